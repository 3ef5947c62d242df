"""Drives the flows of all sequences, and passes their tokens on to the tasks that wait for them."""
