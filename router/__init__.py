"""Choose the pair of nodes and own the fate of every request. Loads no torch."""
