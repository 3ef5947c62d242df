"""Ways to move bytes between two KV caches. Each knows addresses and fences, none knows the protocol."""
