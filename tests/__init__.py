"""Tests by kind; `support` has what they share. A package, so that no other folder of this name is searched."""
