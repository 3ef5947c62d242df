"""Memory that the processor cannot address: an interface, CUDA behind it, and a fake for tests."""
