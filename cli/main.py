"""The entry of the `baton` command: turns errors into one clear line and an exit code."""

from __future__ import annotations

import errno
import os
import sys

from baton.errors import BadConfig, BatonError, InvalidRequest, Unavailable, UnsupportedModel, leaves_of
from cli.launch.process import ERROR_PREFIX

_EXIT_FAILED = 1
_EXIT_USAGE = 2
# Of a full or broken disk behind standard output.
_UNWRITABLE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})


def main() -> None:
    _check_packages()
    from cli.app import app
    from cli.usage import UsageError, explain

    try:
        code = app(prog_name="baton", standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()
        sys.exit(code)
    except UsageError as error:
        if len(sys.argv) == 1:
            sys.exit(_EXIT_USAGE)  # its help is printed already
        sys.exit(_tell(BadConfig(explain(error))))
    except BatonError as error:
        sys.exit(_tell(error))
    except OSError as error:
        if error.errno not in _UNWRITABLE or error.filename is not None:
            raise
        _drop_output()
        sys.exit(
            _tell(Unavailable(f"the output cannot be written: {error.strerror}; make room, or write it elsewhere"))
        )
    except ExceptionGroup as group:
        # A TaskGroup wraps what its tasks raise; a person wants the one error inside.
        errors = leaves_of(group)
        if len(errors) != 1 or not isinstance(errors[0], BatonError):
            raise
        sys.exit(_tell(errors[0]))


def _check_packages() -> None:
    try:
        import cli.app  # noqa: F401 - whether it can be is the question
    except ModuleNotFoundError as error:
        if error.name not in ("rich", "typer"):
            raise
        sys.exit(
            f"{ERROR_PREFIX}{error.name} is not installed; the `baton` command needs more than the client does. "
            "Install Baton from where it came, a checkout or a wheel, with the extra router (to ask and to route), "
            "worker (to compute as well) or cuda (on NVIDIA GPUs): pip install 'PATH[router]'"
        )


def _drop_output() -> None:
    """What is left in the buffer cannot be written either, and Python would say so at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _tell(error: BatonError) -> int:
    print(f"{ERROR_PREFIX}{error.code}: {error.message}", file=sys.stderr)
    return _EXIT_USAGE if isinstance(error, BadConfig | InvalidRequest | UnsupportedModel) else _EXIT_FAILED
