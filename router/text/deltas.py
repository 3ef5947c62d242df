"""What a model's output says, piece by piece: reasoning, text for the reader, and tool calls.

A parser of the model's format makes these out of text (`Part.deltas`); the faces write them in the form of their API.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ReasoningText:
    """What the model thinks before it answers."""

    text: str


@dataclass(frozen=True, slots=True)
class ContentText:
    """Text of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    """A tool call begins; calls are numbered from 0 within a choice."""

    index: int
    call_id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of the arguments of call ``index``: all of a call's together are the JSON text of an object.

    That is as the model writes it: it may be cut by the end of the answer, and wrong where no grammar holds the model.
    """

    index: int
    text: str


Delta = ReasoningText | ContentText | CallBegin | CallArguments
