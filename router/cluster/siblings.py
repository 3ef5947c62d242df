"""Choices of one prompt: the first goes ahead, the others wait until nodes have the prompt's blocks from it. Pure.

Sent all at once they would go to several nodes, and each of these would compute the whole prompt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

from router.cluster.policy import Keyed


class _Of(Protocol):
    @property
    def client(self) -> str: ...


ItemT = TypeVar("ItemT", bound=_Of)


class Siblings(Generic[ItemT]):
    """Invariant: what waits here has a leader, for which `let_go` has not been called."""

    def __init__(self) -> None:
        self._leaders: dict[Keyed, ItemT] = {}
        self._prompts: dict[ItemT, Keyed] = {}
        # By leader, in the order they came; and the leader of each.
        self._waiting: dict[ItemT, dict[ItemT, None]] = {}
        self._leader_of: dict[ItemT, ItemT] = {}
        self._num_of: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._leader_of)

    def __iter__(self) -> Iterator[ItemT]:
        return iter(self._leader_of)

    def __contains__(self, item: ItemT) -> bool:
        return item in self._leader_of

    def num_waiting_of(self, client: str) -> int:
        return self._num_of[client]

    def arrive(self, item: ItemT, prompt: Keyed) -> bool:
        """Whether it waits: another one of the prompt goes ahead. Else it goes ahead itself."""
        leader = self._leaders.get(prompt)
        if leader is None:
            self._leaders[prompt], self._prompts[item], self._waiting[item] = item, prompt, {}
            return False
        self._waiting[leader][item] = None
        self._leader_of[item] = leader
        self._num_of[item.client] += 1
        return True

    def let_go(self, leader: ItemT) -> list[ItemT]:
        """The nodes have the blocks, or it is over: those that waited for it. None for all others."""
        waiting = list(self._waiting.pop(leader, ()))
        if leader in self._prompts:
            del self._leaders[self._prompts.pop(leader)]
        for item in waiting:
            self._forget(item)
        return waiting

    def remove(self, item: ItemT) -> None:
        """It is over before its turn came."""
        del self._waiting[self._leader_of[item]][item]
        self._forget(item)

    def check(self) -> None:
        assert self._leaders == {prompt: leader for leader, prompt in self._prompts.items()}
        assert self._waiting.keys() == self._prompts.keys()
        assert self._leader_of == {item: leader for leader, items in self._waiting.items() for item in items}
        assert self._num_of == Counter(item.client for item in self._leader_of), "a client's share is held by nothing"

    def _forget(self, item: ItemT) -> None:
        del self._leader_of[item]
        self._num_of[item.client] -= 1
        if not self._num_of[item.client]:
            del self._num_of[item.client]
