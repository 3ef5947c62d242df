"""The `baton` command's entry: turns what went wrong into one clear line and an exit code. Knows no command itself."""

from __future__ import annotations

import sys

from baton.errors import BadConfig, BatonError, InvalidRequest, UnsupportedModel
from cli.process import ERROR_PREFIX

_EXIT_FAILED = 1
_EXIT_USAGE = 2


def main() -> None:
    try:
        from cli.app import app
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        sys.exit(
            f"{ERROR_PREFIX}{package} is not installed; the `baton` command needs more than the client does: "
            "pip install 'baton-serve[router]' (to ask) or 'baton-serve[worker]' (to serve)"
        )
    try:
        app()
    except (BadConfig, InvalidRequest, UnsupportedModel) as error:
        print(f"{ERROR_PREFIX}{error.code}: {error.message}", file=sys.stderr)
        sys.exit(_EXIT_USAGE)
    except BatonError as error:
        print(f"{ERROR_PREFIX}{error.code}: {error.message}", file=sys.stderr)
        sys.exit(_EXIT_FAILED)
