"""Whose turn it is: the client that has had the least work for its weight. Pure.

Start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996): a client's tag grows by work / weight whenever it gets
some. While two clients have work waiting, what they get by weight differs by no more than one piece of work of each. A
client that comes, or comes back, starts where the others are: no client saves up turns, or pays for having used nodes
that were free.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

# Clients that are remembered while they have nothing waiting: what they had too much counts when they come back.
_MAX_REMEMBERED = 4096


class Shares:
    def __init__(self, weights: Mapping[str, float]) -> None:
        """``weights`` of clients; 1 for all others."""
        self._weights = weights
        # The client that has had something last is the last.
        self._tags: dict[str, float] = {}
        # The tag, when its turn came, of the client whose turn was last.
        self._present = 0.0

    def weight(self, client: str) -> float:
        return self._weights.get(client, 1.0)

    def tag(self, client: str) -> float:
        """The client with the least is next."""
        return self._tags.get(client, self._present)

    @property
    def num_remembered(self) -> int:
        return len(self._tags)

    def comes(self, client: str, others: Collection[str]) -> None:
        """It has something waiting from now on. ``others`` have already."""
        self._tags[client] = max(self.tag(client), self._present)
        if len(self._tags) > _MAX_REMEMBERED:
            forgotten = next((x for x in self._tags if x != client and x not in others), None)
            if forgotten is not None:
                del self._tags[forgotten]

    def takes_turn(self, client: str, before: Iterable[str] = ()) -> None:
        """``before``: clients whose turn comes before it, if their tags are smaller."""
        self._present = max(self._present, min(map(self.tag, (client, *before))))

    def gets(self, client: str, work: float) -> None:
        """Less than 0: it was charged for more than it got."""
        self._tags[client] = self._tags.pop(client, self._present) + work / self.weight(client)


class Work:
    """What an item counts for in its client's share."""

    __slots__ = ("_charged", "_num_known_tokens", "_num_prompt_tokens")

    def __init__(self, num_prompt_tokens: int, num_known_tokens: int) -> None:
        """When it starts for the first time: to be computed, and known."""
        self._num_prompt_tokens = num_prompt_tokens
        self._num_known_tokens = num_known_tokens
        self._charged = 0.0

    def charge(self, num_known_tokens: float, output_token_work: float) -> float:
        """What is to be charged beyond what was, if so many tokens are known in the end."""
        work = self._num_prompt_tokens + (num_known_tokens - self._num_known_tokens) * output_token_work
        charge, self._charged = work - self._charged, work
        return charge
