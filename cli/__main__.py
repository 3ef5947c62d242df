"""`python -m cli` is `baton`. The launcher's children are started with this file's path and `python -P`.

First of all it puts Baton's own folder first on the path. Python has the current folder there (`-m`) or the command's;
what lies in those is not ours, whatever it is called.
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

main()
