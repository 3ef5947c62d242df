"""Moves KV blocks from worker to worker, completely or not at all. Independent of the model."""
