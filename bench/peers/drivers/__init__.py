"""One engine a file, driven by hand over pipes. All but ours run in an environment that has nothing of the project."""
