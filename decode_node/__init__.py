"""The token phase: receives KV, generates tokens, streams them."""
