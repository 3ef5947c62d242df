"""The grammars of structured output: made of what a request asks for, and checked in a process of their own."""
