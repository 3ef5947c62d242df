"""Sizes clusters: runs the router's and the engine's own policy in simulated time, and searches designs with it."""
