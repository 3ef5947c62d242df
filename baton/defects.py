"""Handles unexpected exceptions: logs the traceback, increments a counter, and lets the process continue.

Owns the format and the rate limit of these log lines. The code that catches the exception cleans up after it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from baton.clock import Clock
from baton.errors import BatonError, InternalError, described
from baton.types import Failure

# Kinds are error codes, places and node ids: few. Past the limit the table is cleared, which costs a few extra lines.
_MAX_KINDS = 256


class LogLimit:
    """Rate limit: of the lines of one kind, the first ``burst`` in every ``window_s`` are written, the rest counted."""

    def __init__(self, clock: Clock, *, burst: int = 5, window_s: float = 60.0) -> None:
        self._clock = clock
        self._burst = burst
        self._window_s = window_s
        # By kind: start of its window, lines written in it, lines left out since the last written one.
        self._kinds: dict[str, tuple[float, int, int]] = {}

    def admits(self, kind: str) -> str | None:
        """None if the line must be left out; else a suffix for it: empty, or the number of lines left out."""
        now = self._clock.now()
        began_s, written, left_out = self._kinds.get(kind, (now, 0, 0))
        if now - began_s >= self._window_s:
            began_s, written = now, 0
        if kind not in self._kinds and len(self._kinds) >= _MAX_KINDS:
            self._kinds.clear()
        if written >= self._burst:
            self._kinds[kind] = (began_s, written, left_out + 1)
            return None
        self._kinds[kind] = (began_s, written + 1, 0)
        return f" ({left_out} more like it were not logged)" if left_out else ""


class Defects:
    """One per thread. ``count`` is called with the place of each defect; places are few, fixed words."""

    def __init__(self, log: logging.Logger, clock: Clock, count: Callable[[str], None] | None = None) -> None:
        self._log = log
        self._count = count
        self._limit = LogLimit(clock)

    def caught(self, where: str, error: BaseException, about: str = "") -> InternalError:
        """Count and log; returns the error to fail the affected sequence with."""
        if self._count is not None:
            self._count(where)
        more = self._limit.admits(f"{where}/{type(error).__name__}")
        if more is not None:
            self._log.error("defect in %s%s%s", where, f", {about}" if about else "", more, exc_info=error)
        return InternalError(f"defect in {where}: {described(error)}")

    def failure(self, where: str, error: BaseException, about: str = "") -> Failure:
        """What a sequence fails with: a BatonError as it is; anything else is a defect, counted and logged."""
        return Failure.of(error if isinstance(error, BatonError) else self.caught(where, error, about))

    @contextmanager
    def contained(self, where: str, about: str = "") -> Iterator[None]:
        """For work without a caller to raise to: an exception inside ends here."""
        try:
            yield
        except Exception as error:
            self.caught(where, error, about)
