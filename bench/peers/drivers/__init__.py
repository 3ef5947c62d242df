"""Drivers of the engines, one a file, controlled over pipes. All but Baton's run in an environment without the
project."""
