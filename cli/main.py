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
        from cli.usage import UsageError, explain
    except ModuleNotFoundError as error:
        if error.name not in ("rich", "typer"):
            raise
        sys.exit(
            f"{ERROR_PREFIX}{error.name} is not installed; the `baton` command needs more than the client does. "
            "Install Baton from where it came, a checkout or a wheel, with the extra router (to ask and to route), "
            "worker (to compute as well) or cuda (on NVIDIA GPUs): pip install 'PATH[router]'"
        )
    try:
        sys.exit(app(prog_name="baton", standalone_mode=False))
    except UsageError as error:
        if len(sys.argv) == 1:
            sys.exit(_EXIT_USAGE)  # its help is printed already
        sys.exit(_tell(BadConfig(explain(error))))
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
