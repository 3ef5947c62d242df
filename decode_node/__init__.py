"""Receive KV, generate, stream."""
