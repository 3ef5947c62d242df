"""Conversations as clients send them: messages, tools, and which of these the model is to call."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from baton.errors import InvalidRequest, quoted

# OpenAI allows 128; servers of tools have more.
MAX_TOOLS = 1024
_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,256}")


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
    """A function that the model may call; ``parameters`` is the JSON schema of its arguments.

    Raises InvalidRequest for a name that formats of calls cannot have.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | None = None
    # The arguments of every call are valid by the schema, whether or not a call is required; otherwise a model that
    # decides by itself may get them wrong. Only where a token of its own begins the model's calls.
    is_strict: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise InvalidRequest(
                f"a tool's name is {quoted(self.name)}, expected 1 to 256 letters, digits, '_', '-', '.', ':' and '/'",
                param="tools",
            )


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that an assistant's turn of a conversation made; ``arguments`` is JSON text."""

    call_id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ChatMessage:
    role: str
    # Text, the texts of its parts, or None for an assistant's turn without text.
    content: str | tuple[str, ...] | None
    name: str | None = None
    # Of an assistant's turn.
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    # Of a tool's turn: the call that it answers.
    tool_call_id: str | None = None

    @property
    def last_text(self) -> str:
        """Of its content's parts."""
        content = self.content or ""
        return content[-1] if isinstance(content, tuple) else content

    @property
    def num_chars(self) -> int:
        texts = self.content if isinstance(self.content, tuple) else (self.content or "",)
        calls = sum(len(call.name) + len(call.arguments) for call in self.tool_calls)
        return sum(len(text) + 1 for text in texts) + len(self.reasoning or "") + calls
