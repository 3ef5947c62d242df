"""Benchmarks of Baton, each beside a peer or a hardware limit. May import any package; no package imports it."""
