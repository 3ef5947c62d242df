"""File descriptor limits of a process, and the log line for when accept() finds none left."""

from __future__ import annotations

import asyncio
import logging
import resource
from dataclasses import dataclass
from typing import Any

from baton.errors import BadConfig

_log = logging.getLogger("baton.descriptors")

# Enough for every limit in Baton. Containers often allow a billion, and some libraries iterate over all of them.
_WANTED = 65_536
# With fewer, none are left for clients.
_LEAST = 128
_SAY_EVERY_S = 60.0
# asyncio's message for a failed accept() in its exception handler.
_ACCEPT_FAILED = "socket.accept() out of system resource"


def raise_limit() -> int:
    """Raise the soft limit of open files towards the hard one; returns the new limit. Raises BadConfig if it is too
    low to serve."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _WANTED if hard == resource.RLIM_INFINITY else min(_WANTED, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    limit = num_allowed()
    if limit < _LEAST:
        raise BadConfig(f"the process may open {limit} files, expected at least {_LEAST}; raise `ulimit -n`")
    return limit


def num_allowed() -> int:
    """Descriptors that this process may have open at once, at most _WANTED."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return _WANTED if soft == resource.RLIM_INFINITY else min(soft, _WANTED)


@dataclass(frozen=True, slots=True)
class Shares:
    """Connections that clients may have; the rest is for sessions with nodes, Redis, logs and scrapes."""

    http: int
    grpc: int


def shares(num_files: int) -> Shares:
    return Shares(http=num_files // 2, grpc=num_files // 4)


def say_less_of_accept(loop: asyncio.AbstractEventLoop) -> None:
    """Log accept errors once a minute and without a traceback: asyncio reports every try, 100 a second."""
    last_s: float | None = None
    num_unsaid = 0

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        nonlocal last_s, num_unsaid
        if context.get("message") != _ACCEPT_FAILED:
            loop.default_exception_handler(context)
            return
        num_unsaid += 1
        now = loop.time()
        if last_s is None or now - last_s >= _SAY_EVERY_S:
            _log.error(
                "no connection can be accepted: %s (%d times; %d files allowed, see `ulimit -n`)",
                context.get("exception"), num_unsaid, num_allowed(),
            )  # fmt: skip
            last_s, num_unsaid = now, 0

    loop.set_exception_handler(handle)
