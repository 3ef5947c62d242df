"""`python -m cli` is `baton`. The launcher starts its children with this file's path and `python -P`.

Its first action is to put Baton's own folder first on the path. Python puts the current folder (`-m`) or the command's
there, and modules in those must not shadow Baton's.
"""

# Only what Python has loaded already: a `pathlib.py` in the current folder would still be taken for Python's.
import os
import sys

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if sys.flags.safe_path:
    sys.path.insert(0, _ROOT)
else:
    sys.path[0] = _ROOT

from cli.main import main  # noqa: E402

# Processes that a command spawns load this file as well, under another name.
if __name__ == "__main__":
    main()
