"""The `baton` command: local clusters, workers, the router, and asking them things."""
