"""From a client's request to generations: checks, encodes, resolves and admits it, whatever its API."""
