"""Memory that the processor does not address: the one interface to it, CUDA behind it, and a fake for tests."""
