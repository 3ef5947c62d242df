"""What one choice says as a list of items (reasoning, text, calls), for APIs whose answers are such lists."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import Enum

from baton.chat import ChatMessage, ToolCall
from router.text.deltas import CallBegin, ContentText, Delta, ReasoningText
from router.text.detokenizer import Part


class ItemKind(Enum):
    REASONING = "reasoning"
    TEXT = "text"
    CALL = "call"


class Item:
    """``utf8`` grows: the text, or a call's arguments."""

    __slots__ = ("call_id", "index", "kind", "name", "utf8")

    def __init__(self, index: int, kind: ItemKind, call_id: str = "", name: str = "") -> None:
        self.index = index
        self.kind = kind
        self.call_id = call_id
        self.name = name
        self.utf8 = bytearray()

    @property
    def text(self) -> str:
        return self.utf8.decode()

    @property
    def call(self) -> ToolCall:
        return ToolCall(self.call_id, self.name, self.text)


class Items:
    """The items so far. Only the last one grows: a model writes one after the other."""

    __slots__ = ("all",)

    def __init__(self) -> None:
        self.all: list[Item] = []

    def take(self, part: Part) -> Iterator[tuple[Item, str, bool]]:
        """For each piece of the part its item, the new text, and whether the item begins with it."""
        for delta in _deltas(part):
            kind = _KINDS.get(type(delta), ItemKind.CALL)
            is_new = isinstance(delta, CallBegin) or not self.all or self.all[-1].kind is not kind
            if is_new:
                self.all.append(_begun(len(self.all), kind, delta))
            item = self.all[-1]
            more = "" if isinstance(delta, CallBegin) else delta.text
            item.utf8 += more.encode()
            yield item, more, is_new


def turn_of(items: Sequence[Item]) -> ChatMessage:
    """The assistant's turn that the items are, for a conversation that goes on."""
    texts = tuple(item.text for item in items if item.kind is ItemKind.TEXT and item.utf8)
    reasoning = "".join(item.text for item in items if item.kind is ItemKind.REASONING)
    calls = tuple(item.call for item in items if item.kind is ItemKind.CALL)
    return ChatMessage("assistant", texts or None, reasoning=reasoning or None, tool_calls=calls)


def joined(turns: Sequence[ChatMessage]) -> ChatMessage:
    """An assistant's turns as one, with the same texts."""
    texts = tuple(text for turn in turns if isinstance(turn.content, tuple) for text in turn.content)
    reasoning = "".join(turn.reasoning or "" for turn in turns)
    calls = tuple(call for turn in turns for call in turn.tool_calls)
    return ChatMessage("assistant", texts or None, reasoning=reasoning or None, tool_calls=calls)


_KINDS = {ReasoningText: ItemKind.REASONING, ContentText: ItemKind.TEXT}


def _begun(index: int, kind: ItemKind, delta: Delta) -> Item:
    if isinstance(delta, CallBegin):
        return Item(index, kind, delta.call_id, delta.name)
    assert kind is not ItemKind.CALL, "arguments come after the call's begin"
    return Item(index, kind)


def _deltas(part: Part) -> Sequence[Delta]:
    return part.deltas or ((ContentText(part.text),) if part.text else ())
