"""Compares other engines and servers with Baton on the same machine in one run: ``python -m bench peers``."""
