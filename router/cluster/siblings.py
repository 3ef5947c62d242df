"""Choices of one prompt: the first goes ahead, the others wait until nodes have the prompt's blocks from it. Pure.

Sent all at once they would go to several nodes, and each of these would compute the whole prompt. The same holds for
each decode node that gets the prompt: the first choice that goes there brings the blocks, once.
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
    """Invariant: what waits here has a leader, for which neither `let_go` nor `turned_back` has been called."""

    def __init__(self) -> None:
        # Of all items here that have not been let go and not ended.
        self._prompts: dict[ItemT, Keyed] = {}
        # Who brings the blocks of a prompt to a node, or to any (an empty id), both ways.
        self._leaders: dict[tuple[Keyed, str], ItemT] = {}
        self._leads: dict[ItemT, tuple[Keyed, str]] = {}
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
        self._prompts[item] = prompt
        return self._waits_or_leads(item, "")

    def sets_out(self, item: ItemT, node_id: str) -> bool:
        """Whether it waits: another one is on its way to this node with the blocks that it would bring. Else it brings
        them, if it has siblings."""
        # While the first is on its way all others wait, wherever it goes.
        return item in self._prompts and item not in self._leads and self._waits_or_leads(item, node_id)

    def turned_back(self, item: ItemT) -> list[ItemT]:
        """It has not come to the node that it set out for: those that waited there. The first still goes ahead."""
        _, node_id = self._leads.get(item, (None, ""))
        return self._resign(item) if node_id else []

    def let_go(self, item: ItemT) -> list[ItemT]:
        """The nodes have the blocks, or it is over: those that waited for it."""
        self._prompts.pop(item, None)
        return self._resign(item)

    def remove(self, item: ItemT) -> None:
        """It is over before its turn came."""
        del self._waiting[self._leader_of[item]][item]
        del self._prompts[item]
        self._forget(item)

    def check(self) -> None:
        assert self._leads.keys() == self._waiting.keys() <= self._prompts.keys()
        assert self._leads == {item: key for key, item in self._leaders.items()}
        assert self._leader_of.keys() <= self._prompts.keys()
        assert self._leader_of == {item: leader for leader, items in self._waiting.items() for item in items}
        assert self._num_of == Counter(item.client for item in self._leader_of), "a client's share is held by nothing"

    def _waits_or_leads(self, item: ItemT, node_id: str) -> bool:
        key = self._prompts[item], node_id
        leader = self._leaders.get(key)
        if leader is None:
            self._leaders[key], self._leads[item], self._waiting[item] = item, key, {}
            return False
        self._waiting[leader][item] = None
        self._leader_of[item] = leader
        self._num_of[item.client] += 1
        return True

    def _resign(self, item: ItemT) -> list[ItemT]:
        if item not in self._leads:
            return []
        del self._leaders[self._leads.pop(item)]
        waiting = list(self._waiting.pop(item))
        for other in waiting:
            self._forget(other)
        return waiting

    def _forget(self, item: ItemT) -> None:
        del self._leader_of[item]
        self._num_of[item.client] -= 1
        if not self._num_of[item.client]:
            del self._num_of[item.client]
