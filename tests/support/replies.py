"""Reads whole and cut replies with the parser of a format, and makes models that give known ones."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from baton.chat import Tool
from router.reply.formats import CallFormat, ReasoningFormat
from router.reply.parser import ReplyParser
from router.text.deltas import CallArguments, CallBegin, ContentText, Delta, ReasoningText
from tests.support.router import write_model_folder

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
    settings = {"tools": TOOLS} | settings
    return ReplyParser(
        calls=calls, reasoning=reasoning, prompt_end=prompt_end, new_id=lambda: str(next(ids)), **settings
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


def write_speaking_folder(
    folder: Path, template: str, ways: Sequence[Sequence[str]], specials: Sequence[str] = ()
) -> dict[int, int]:
    """A model folder whose tokenizer has every piece of the ways as a token, and what follows on each.

    A way begins with the end of a prompt, and then has an answer's pieces.
    """
    write_model_folder(folder, chat_template=template)
    path = str(folder / "tokenizer.json")
    tokenizer = tokenizers.Tokenizer.from_file(path)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    pieces = [piece for way in ways for piece in way if piece not in specials]
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in pieces])
    tokenizer.save(path)
    eos = 1
    ids = [[*map(tokenizer.token_to_id, way), eos] for way in ways]
    return {before: after for way in ids for before, after in itertools.pairwise(way)}
