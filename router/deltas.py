"""What a model's output says, piece by piece: reasoning, text for the reader, and tool calls.

A parser of the model's format makes these out of text (`Part.deltas`); the faces write them in the form of their API.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any


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


class CallMode(Enum):
    """Whether an answer has tool calls."""

    # The model does not even see the tools.
    NONE = "none"
    # The model decides.
    AUTO = "auto"
    # It has one at least.
    REQUIRED = "required"


@dataclass(frozen=True, slots=True)
class ToolChoice:
    mode: CallMode = CallMode.AUTO
    # The tools that may be called; empty: any. The model sees the others too.
    names: tuple[str, ...] = ()
    # An answer may have several calls.
    is_parallel: bool = True


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call; ``parameters`` is the JSON schema of its arguments."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | None = None
    # The arguments of every call are valid by the schema, whether or not a call is required.
    is_strict: bool = False


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that an assistant's turn of a conversation made; ``arguments`` is JSON text."""

    call_id: str
    name: str
    arguments: str
