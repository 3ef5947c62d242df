"""The `baton` command: local clusters, workers, the router, and requests to them."""
