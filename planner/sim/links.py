"""KV on its way: transfers that share the links of the machines they leave and reach.

Each link gives its transfers equal parts, and a transfer runs at the lesser of its two parts. What is sent while the
prompt is still computed is told chunk by chunk; the last layer's part of a chunk comes with the commit.
"""

from __future__ import annotations

from collections.abc import Callable

from planner.sim.events import Events


class Link:
    """Of one machine, one way."""

    __slots__ = ("bytes_s", "transfers")

    def __init__(self, bytes_s: float) -> None:
        self.bytes_s = bytes_s
        # In the order they began, for the order of events.
        self.transfers: dict[Transfer, None] = {}

    @property
    def part_bytes_s(self) -> float:
        return self.bytes_s / len(self.transfers)


class Transfer:
    """Bytes from one machine to another. ``on_sent`` is called whenever all that was told so far has been sent."""

    __slots__ = ("_at_s", "_events", "_left", "_links", "_on_sent", "_rate", "_version", "num_bytes")

    def __init__(self, events: Events, sender: Link, receiver: Link, on_sent: Callable[[], None]) -> None:
        self._events = events
        self._links = sender, receiver
        self._on_sent = on_sent
        # Bytes to be sent, as of a time, and how fast they are.
        self._left = 0.0
        self._at_s = 0.0
        self._rate = 0.0
        self._version = 0
        # Told so far.
        self.num_bytes = 0.0

    @property
    def is_under_way(self) -> bool:
        return self in self._links[0].transfers

    def send(self, num_bytes: float) -> None:
        """So many more."""
        self.num_bytes += num_bytes
        if self.is_under_way:
            self._settle()
            self._left += num_bytes
            self._schedule()
            return
        self._left, self._at_s, self._rate = num_bytes, self._events.now_s, 0.0
        for link in self._links:
            link.transfers[self] = None
        self._share()

    def stop(self) -> None:
        """Send no more of it."""
        self._version += 1
        if self.is_under_way:
            self._leave()

    def _leave(self) -> None:
        for link in self._links:
            del link.transfers[self]
        self._share()

    def _share(self) -> None:
        """The links have one transfer more or less."""
        for other in dict.fromkeys((*self._links[0].transfers, *self._links[1].transfers)):
            other.take_part()

    def take_part(self) -> None:
        """Of both links, as they are shared now."""
        rate = min([link.part_bytes_s for link in self._links])
        if rate != self._rate:
            self._settle()
            self._rate = rate
            self._schedule()

    def _settle(self) -> None:
        now = self._events.now_s
        self._left = max(0.0, self._left - (now - self._at_s) * self._rate)
        self._at_s = now

    def _schedule(self) -> None:
        self._version += 1
        self._events.at(self._at_s + self._left / self._rate, self._sent, self._version)

    def _sent(self, version: int) -> None:
        if version != self._version:
            return
        self._left = self._rate = 0.0
        self._leave()
        self._on_sent()
