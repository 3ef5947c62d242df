"""Decides when a sender opens its connection to a receiver again. Pure."""

from __future__ import annotations

# Doublings of a back-off, which has long been at its limit then.
_MAX_DOUBLINGS = 16


class Redial:
    """Call ``failed`` and ``lost`` for what became of a connection, ``pushed`` for every push."""

    __slots__ = ("_failures", "_keep_warm_s", "_max_s", "_min_s", "_not_before_s", "_warm_at_s", "_warm_until_s")

    def __init__(self, min_backoff_s: float, max_backoff_s: float, keep_warm_s: float) -> None:
        self._min_s, self._max_s, self._keep_warm_s = min_backoff_s, max_backoff_s, keep_warm_s
        # Attempts that failed in a row, and when the next one may start.
        self._failures = 0
        self._not_before_s: float | None = None
        # When the connection is opened again unasked, and until when that makes sense.
        self._warm_at_s: float | None = None
        self._warm_until_s = 0.0

    def pushed(self, now: float) -> None:
        self._warm_until_s = now + self._keep_warm_s

    def connected(self) -> None:
        self._failures, self._not_before_s, self._warm_at_s = 0, None, None

    def failed(self, now: float, *, can_repeat: bool) -> None:
        """``can_repeat``: another attempt may succeed without anything being done about it."""
        backoff_s = min(self._min_s * 2.0 ** min(self._failures, _MAX_DOUBLINGS), self._max_s)
        self._failures += 1
        self._not_before_s = now + backoff_s
        self._warm_at_s = self._warm_from(self._not_before_s) if can_repeat else None

    def lost(self, now: float) -> None:
        self._warm_at_s = self._warm_from(now + self._max_s)

    def _warm_from(self, at_s: float) -> float | None:
        """If the last push is not too long ago by then."""
        return at_s if at_s < self._warm_until_s else None

    def due_s(self, *, is_waited_for: bool) -> float | None:
        """When Tick is due; None if no time has to pass."""
        asked_s = self._not_before_s if is_waited_for else None
        return min((at_s for at_s in (asked_s, self._warm_at_s) if at_s is not None), default=None)

    def is_due(self, now: float, *, is_waited_for: bool) -> bool:
        if self._not_before_s is not None and now < self._not_before_s:
            return False
        return is_waited_for or (self._warm_at_s is not None and now >= self._warm_at_s)
