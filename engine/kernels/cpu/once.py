"""What a process makes once for given arguments, also where several threads want it at the same time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar, TypeVarTuple

_Made = TypeVar("_Made")
_Arguments = TypeVarTuple("_Arguments")


class once(Generic[_Made, *_Arguments]):  # noqa: N801 - a decorator
    """As functools.cache, which calls ``make`` in every thread that comes before the first is done and then keeps only
    the last result: code that others have the address of would be freed."""

    __slots__ = ("_kept", "_lock", "_make")

    def __init__(self, make: Callable[[*_Arguments], _Made]) -> None:
        self._make = make
        self._kept: dict[tuple[*_Arguments], _Made] = {}
        self._lock = threading.Lock()

    def __call__(self, *arguments: *_Arguments) -> _Made:
        # The lock is for those who make it: a process that is forked meanwhile finds what is there.
        if arguments not in self._kept:
            with self._lock:
                if arguments not in self._kept:
                    self._kept[arguments] = self._make(*arguments)
        return self._kept[arguments]

    def forget_all(self) -> None:
        """To be called while nobody uses what was made."""
        self._kept.clear()
