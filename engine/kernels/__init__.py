"""The model's operations behind one interface; `reference` is the truth, the others are measured against it."""
