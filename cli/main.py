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
        if error.name not in ("rich", "typer"):
            raise
        sys.exit(
            f"{ERROR_PREFIX}{error.name} is not installed; the `baton` command needs more than the client does: "
            "pip install 'baton-serve[router]' (to ask) or 'baton-serve[worker]' (to serve)"
        )
    try:
        app()
    except BatonError as error:
        sys.exit(_tell(error))
    except ExceptionGroup as group:
        # A TaskGroup wraps what its tasks raise; a person wants the one error inside.
        errors = _leaves(group)
        if len(errors) != 1 or not isinstance(errors[0], BatonError):
            raise
        sys.exit(_tell(errors[0]))


def _tell(error: BatonError) -> int:
    print(f"{ERROR_PREFIX}{error.code}: {error.message}", file=sys.stderr)
    return _EXIT_USAGE if isinstance(error, BadConfig | InvalidRequest | UnsupportedModel) else _EXIT_FAILED


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    return [
        leaf
        for error in group.exceptions
        for leaf in (_leaves(error) if isinstance(error, BaseExceptionGroup) else [error])
    ]
