"""Anthropic's Messages API: bodies to requests, and answers and errors in its form."""
