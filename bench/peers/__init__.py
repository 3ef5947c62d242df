"""Other engines and servers on the same machine, beside ours in one run: ``python -m bench peers``."""
