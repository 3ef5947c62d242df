"""A cache that computes a value once per process and arguments, also if several threads ask for it at the same time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar, TypeVarTuple

_Made = TypeVar("_Made")
_Arguments = TypeVarTuple("_Arguments")


class once(Generic[_Made, *_Arguments]):  # noqa: N801 - a decorator
    """Like functools.cache; but functools.cache calls ``make`` in every thread that comes before the first is done
    and keeps the last result only, so code whose address is in use would be freed."""

    __slots__ = ("_kept", "_lock", "_make")

    def __init__(self, make: Callable[[*_Arguments], _Made]) -> None:
        self._make = make
        self._kept: dict[tuple[*_Arguments], _Made] = {}
        self._lock = threading.Lock()

    def __call__(self, *arguments: *_Arguments) -> _Made:
        # The lock is held only to compute a value: a process that is forked meanwhile can still read the cache.
        if arguments not in self._kept:
            with self._lock:
                if arguments not in self._kept:
                    self._kept[arguments] = self._make(*arguments)
        return self._kept[arguments]

    def forget_all(self) -> None:
        """To be called only while no cached value is in use."""
        self._kept.clear()
