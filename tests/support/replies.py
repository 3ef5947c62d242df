"""Reads whole and cut replies with the parser of a format, for the tests."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from router.deltas import CallArguments, CallBegin, ContentText, Delta, ReasoningText, Tool
from router.reply.formats import CallFormat, ReasoningFormat
from router.reply.parser import ReplyParser

TOOLS = (
    Tool("weather", "Of a city.", {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}),
    Tool(
        "add",
        "",
        {
            "type": "object",
            "properties": {
                "a": {"type": "integer"},
                "b": {"anyOf": [{"type": "number"}, {"type": "null"}]},
                "label": {"type": ["string", "null"]},
                "items": {"$ref": "#/$defs/items"},
            },
            "$defs": {"items": {"type": "array", "items": {"$ref": "#/$defs/items"}}},
        },
    ),
)


def parser(
    calls: CallFormat | None, reasoning: ReasoningFormat | None = None, prompt_end: str = "", **settings: Any
) -> ReplyParser:
    """With ids 0, 1, ..."""
    ids = itertools.count()
    return ReplyParser(
        calls=calls, reasoning=reasoning, prompt_end=prompt_end, tools=TOOLS, new_id=lambda: str(next(ids)), **settings
    )


def read(reader: ReplyParser, pieces: Iterable[str]) -> list[Delta]:
    """All deltas, neighbours of a kind joined."""
    found = [delta for piece in pieces for delta in reader.push(piece)]
    return joined([*found, *reader.close()])


def joined(deltas: Sequence[Delta]) -> list[Delta]:
    found: list[Delta] = []
    for delta in deltas:
        last = found[-1] if found else None
        match last, delta:
            case (ContentText(), ContentText()) | (ReasoningText(), ReasoningText()):
                found[-1] = type(delta)(last.text + delta.text)
            case CallArguments(), CallArguments() if last.index == delta.index:
                found[-1] = CallArguments(last.index, last.text + delta.text)
            case _:
                found.append(delta)
    return found


def shown(deltas: Sequence[Delta]) -> list[str]:
    """In short: text, (reasoning), name{arguments}."""
    found: list[str] = []
    for delta in joined(deltas):
        match delta:
            case ContentText(text):
                found.append(text)
            case ReasoningText(text):
                found.append(f"({text})")
            case CallBegin(_, _, name):
                found.append(name)
            case CallArguments(_, text):
                found[-1] += text
    return found
