"""Responses that clients may fetch and continue: in this process's memory, within a number, a size and an age.

A response has its own turns alone and names the one before it, so that a conversation costs its length. When there are
too many, the one that has gone unused for longest of the client that holds most goes first; what continues it is then
without its beginning, and is refused by its name.
"""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from baton import errors
from baton.chat import ChatMessage
from baton.clock import Clock
from baton.errors import quoted
from router.config import StoreConfig

# Of the objects around a response's texts and around a turn's.
_RESPONSE_BYTES = 1024
_TURN_BYTES = 512
_MAX_INDEX_DIGITS = 9


@dataclass(slots=True)
class _Stored:
    previous_id: str | None
    turns: tuple[ChatMessage, ...]
    # Each item of the output, as an assistant's turn of its own.
    items: tuple[ChatMessage, ...]
    content: str
    num_bytes: int
    used_s: float


class _Client:
    """One client's responses, the least recently used first."""

    __slots__ = ("num_bytes", "stored")

    def __init__(self) -> None:
        self.stored: OrderedDict[str, _Stored] = OrderedDict()
        self.num_bytes = 0


class StoredResponses:
    """Thread-safe: large bodies are read in threads."""

    def __init__(self, config: StoreConfig, clock: Clock, *, has_clients: bool) -> None:
        """``has_clients``: only the client that asked for a response has it; else all share them."""
        self._config = config
        self._clock = clock
        self._has_clients = has_clients
        self._clients: dict[str, _Client] = {}
        self._num_stored = 0
        self.num_bytes = 0
        self._lock = threading.Lock()

    @property
    def keeps(self) -> bool:
        return self._config.max_responses > 0

    def put(
        self,
        client: str,
        response_id: str,
        previous_id: str | None,
        turns: Sequence[ChatMessage],
        content: str,
        items: Sequence[ChatMessage] = (),
    ) -> None:
        """``content``: the response's JSON; ``items``: of its output, with the texts that the last turn has."""
        num_bytes = _RESPONSE_BYTES + sys.getsizeof(content) + sum(map(_turn_bytes, turns)) + _TURN_BYTES * len(items)
        with self._lock:
            mine = self._clients.setdefault(self._key(client), _Client())
            now_s = self._clock.now()
            mine.stored[response_id] = _Stored(previous_id, tuple(turns), tuple(items), content, num_bytes, now_s)
            mine.num_bytes += num_bytes
            self.num_bytes += num_bytes
            self._num_stored += 1
            self._shrink(now_s)

    def history(self, client: str, response_id: str | None) -> list[ChatMessage]:
        """The turns of the conversation up to and with this response. Raises UnknownResponse."""
        found: list[_Stored] = []
        with self._lock:
            while response_id is not None:
                found.append(self._find(client, response_id, "previous_response_id"))
                response_id = found[-1].previous_id
        return [turn for stored in reversed(found) for turn in stored.turns]

    def content(self, client: str, response_id: str) -> str:
        with self._lock:
            return self._find(client, response_id, "response_id").content

    def item(self, client: str, item_id: str, param: str) -> ChatMessage:
        """Of the output of a response that is kept. Raises UnknownResponse for ``param``."""
        response_id, index = place_of(item_id)
        with self._lock:
            items = self._find(client, response_id, param, f"item {quoted(item_id)}").items
        if index >= len(items):
            raise _unknown(f"item {quoted(item_id)}", param)
        return items[index]

    def delete(self, client: str, response_id: str) -> None:
        with self._lock:
            self._find(client, response_id, "response_id")
            self._drop(self._key(client), response_id)

    def _key(self, client: str) -> str:
        return client if self._has_clients else ""

    def _find(self, client: str, response_id: str, param: str, what: str = "") -> _Stored:
        mine = self._clients.get(self._key(client))
        stored = None if mine is None else mine.stored.get(response_id)
        now_s = self._clock.now()
        if mine is None or stored is None or now_s - stored.used_s > self._config.max_age_s:
            raise _unknown(what or f"response {quoted(response_id)}", param)
        stored.used_s = now_s
        mine.stored.move_to_end(response_id)
        return stored

    def _shrink(self, now_s: float) -> None:
        for key in list(self._clients):
            for response_id in _outdated(self._clients[key], now_s - self._config.max_age_s):
                self._drop(key, response_id)
        while self._num_stored > self._config.max_responses or self.num_bytes > self._config.max_bytes:
            key = max(self._clients, key=lambda key: self._clients[key].num_bytes)
            self._drop(key, next(iter(self._clients[key].stored)))

    def _drop(self, key: str, response_id: str) -> None:
        mine = self._clients[key]
        num_bytes = mine.stored.pop(response_id).num_bytes
        mine.num_bytes -= num_bytes
        self.num_bytes -= num_bytes
        self._num_stored -= 1
        if not mine.stored:
            del self._clients[key]


def item_id(prefix: str, new_id: str, index: int) -> str:
    """Of an item; ``new_id`` is its response's id without the prefix."""
    return f"{prefix}_{new_id}_{index}"


def place_of(item_id: str) -> tuple[str, int]:
    """The response that an item is of, and the item's index there; an id that is none of ours is of no response."""
    head, _, index = item_id.rpartition("_")
    is_index = index.isascii() and index.isdigit() and len(index) <= _MAX_INDEX_DIGITS
    return (f"resp_{head.partition('_')[2]}", int(index)) if is_index else ("", 0)


def _unknown(what: str, param: str) -> errors.UnknownResponse:
    return errors.UnknownResponse(
        f"the {what} is not kept here: it was not stored, it was deleted, or it made room for others; send the "
        "conversation as input",
        param=param,
    )


def _outdated(client: _Client, since_s: float) -> list[str]:
    """Those used last before that: they are the first."""
    return [name for name, _ in takewhile(lambda item: item[1].used_s < since_s, client.stored.items())]


def _turn_bytes(turn: ChatMessage) -> int:
    texts = [*turn.content] if isinstance(turn.content, tuple) else [turn.content or ""]
    texts += [turn.reasoning or "", *(call.arguments for call in turn.tool_calls)]
    return _TURN_BYTES + sum(map(sys.getsizeof, texts))
