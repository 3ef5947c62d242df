"""The formats in which models write reasoning and tool calls, and which of them a chat template shows.

A template renders earlier turns as the model was trained to write them, so its marks tell the format.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

AUTO, NONE = "auto", "none"
THINK_BEGIN, THINK_END = "<think>", "</think>"
# DeepSeek's marks around all calls, around each, and before its name or its arguments.
CALLS_BEGIN, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL_BEGIN, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
CALL_SEPARATOR = "<｜tool▁sep｜>"


class CallFormat(Enum):
    """How tool calls are written; the values are vLLM's names."""

    # <tool_call>{"name": ..., "arguments": {...}}</tool_call>
    HERMES = "hermes"
    # {"name": ..., "parameters": {...}}, and nothing before it
    LLAMA3_JSON = "llama3_json"
    # [TOOL_CALLS][{"name": ..., "arguments": {...}}], newer models [TOOL_CALLS]name[ARGS]{...}
    MISTRAL = "mistral"
    # <tool_call><function=name><parameter=key>value</parameter></function></tool_call>
    QWEN3_CODER = "qwen3_coder"
    # Between DeepSeek's marks for each call: function, separator, name, and JSON in a fence of Markdown. R1 and V3.
    DEEPSEEK_V3 = "deepseek_v3"
    # The same marks: name, separator, JSON. V3.1.
    DEEPSEEK_V31 = "deepseek_v31"


class ReasoningFormat(Enum):
    """How reasoning is written; the values are vLLM's names."""

    # An answer may begin with <think>, or the prompt has opened it.
    QWEN3 = "qwen3"
    # An answer begins inside of it, unless the prompt has closed it.
    DEEPSEEK_R1 = "deepseek_r1"


# What begins a call; Llama's is written before some calls only.
CALL_MARKS: dict[CallFormat, tuple[str, ...]] = {
    CallFormat.HERMES: ("<tool_call>",),
    CallFormat.LLAMA3_JSON: ("<|python_tag|>",),
    CallFormat.MISTRAL: ("[TOOL_CALLS]",),
    CallFormat.QWEN3_CODER: ("<tool_call>", "<function="),
    CallFormat.DEEPSEEK_V3: (CALLS_BEGIN, CALL_BEGIN),
    CallFormat.DEEPSEEK_V31: (CALLS_BEGIN, CALL_BEGIN),
}
# What else the parser needs to see, and clients do not, if it is a special token.
_OTHER_MARKS = (
    "</tool_call>", "[ARGS]", "[CALL_ID]", CALL_SEPARATOR, CALL_END, CALLS_END, THINK_BEGIN, THINK_END,
)  # fmt: skip
# What a template writes between the mark of a call and the separator: in V3's format the call's type.
_BEFORE_SEPARATOR = re.compile(f"{CALL_BEGIN}(.*?){CALL_SEPARATOR}", re.DOTALL)
_TYPE = re.compile(r"type|^function$")
_TOOLS = re.compile(r"\btools\b")
MARKS = frozenset((*_OTHER_MARKS, *(mark for marks in CALL_MARKS.values() for mark in marks)))


@dataclass(frozen=True, slots=True)
class ReplyFormat:
    """How a model writes; None: it does not, or not in a known format."""

    calls: CallFormat | None = None
    reasoning: ReasoningFormat | None = None

    @classmethod
    def of(cls, templates: str, calls: str = AUTO, reasoning: str = AUTO) -> ReplyFormat:
        """From the text of the model's chat templates, unless a format's name is given."""
        named_calls = None if calls in (AUTO, NONE) else CallFormat(calls)
        named_reasoning = None if reasoning in (AUTO, NONE) else ReasoningFormat(reasoning)
        return cls(
            _call_format(templates) if calls == AUTO else named_calls,
            _reasoning_format(templates) if reasoning == AUTO else named_reasoning,
        )


def _call_format(templates: str) -> CallFormat | None:
    if "<function=" in templates:
        return CallFormat.QWEN3_CODER
    if "<tool_call>" in templates:
        return CallFormat.HERMES
    if "[TOOL_CALLS]" in templates:
        return CallFormat.MISTRAL
    # The first templates of these models write calls, but show the model no tools.
    if (before := _BEFORE_SEPARATOR.search(templates)) is not None and _TOOLS.search(templates):
        return CallFormat.DEEPSEEK_V3 if _TYPE.search(before[1]) else CallFormat.DEEPSEEK_V31
    if "<|start_header_id|>" in templates and '"parameters": ' in templates:
        return CallFormat.LLAMA3_JSON
    return None


def _reasoning_format(templates: str) -> ReasoningFormat | None:
    if THINK_END not in templates and THINK_BEGIN not in templates:
        return None
    return ReasoningFormat.DEEPSEEK_R1 if "<｜Assistant｜>" in templates else ReasoningFormat.QWEN3
