"""Entry of the `baton` command and of `python -m baton`: runs `cli/__main__.py`.

The serving packages are beside this package in a checkout, and in `_serving` below it in an installed wheel, so that a
user's `import router` finds the user's own module. The file is run, not imported: clients import `baton` and must not
find `cli` on their path.
"""

from __future__ import annotations

import os
import runpy


def main() -> None:
    here = os.path.dirname(os.path.abspath(__file__))
    installed = os.path.join(here, "_serving")
    root = installed if os.path.isdir(installed) else os.path.dirname(here)
    runpy.run_path(os.path.join(root, "cli", "__main__.py"), run_name="__main__")


if __name__ == "__main__":
    main()
