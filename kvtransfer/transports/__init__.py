"""The transports: ways to move bytes between two KV caches."""
