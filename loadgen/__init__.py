"""Sends requests to any OpenAI-compatible server, by a trace, at a rate or in a closed loop, and reports its latency
and goodput."""
