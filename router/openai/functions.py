"""The older form of tools in the OpenAI API: `functions` and `function_call` of chat.

Functions are tools of which a reply calls one at most, and the reply's message names the call `function_call`. Turns of
role `function` are a tool's turns; they name the function, not the call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from baton.chat import CallMode, ChatMessage, Tool, ToolCall, ToolChoice
from baton.errors import InvalidRequest, quoted
from router.openai.tools import call_of, function_of, object_at

ROLE = "function"
_MODES = {"none": CallMode.NONE, "auto": CallMode.AUTO}


def tools_of_functions(functions: Sequence[Any]) -> tuple[Tool, ...]:
    return tuple(function_of(function, f"functions.{i}") for i, function in enumerate(functions))


def choice_of_function(choice: Any, tools: Sequence[Tool]) -> ToolChoice:
    """Of the field function_call: a mode, or which of the functions to call."""
    if choice is None or (isinstance(choice, str) and choice in _MODES):
        return ToolChoice(_MODES[choice or "auto"], is_parallel=False)
    if not isinstance(choice, dict):
        raise InvalidRequest(
            f"function_call is {quoted(choice)}, expected 'none', 'auto' or {{\"name\": ...}}", param="function_call"
        )
    name = choice.get("name")
    if name not in [tool.name for tool in tools]:
        param = "function_call.name"
        raise InvalidRequest(f"{param} is {quoted(name)}, expected one of the functions", param=param)
    return ToolChoice(CallMode.REQUIRED, (name,), is_parallel=False)


def call_of_turn(call: object, number: int) -> ToolCall:
    """Of an assistant's turn, the ``number``-th message: the id is one that every template takes."""
    where = f"messages.{number}.function_call"
    return call_of(object_at(call, where), f"{number:09d}", where)


def with_tool_turns(messages: Sequence[ChatMessage]) -> tuple[ChatMessage, ...]:
    """Turns of role ``function`` become a tool's turns, which name the newest call of their function."""
    newest: dict[str, str] = {}
    found = []
    for number, message in enumerate(messages):
        newest |= {call.name: call.call_id for call in message.tool_calls}
        if message.role == ROLE:
            name = message.name or ""
            if name not in newest:
                param = f"messages.{number}.name"
                expected = "expected the name of a function that an assistant's turn before it has called"
                raise InvalidRequest(f"{param} is {quoted(message.name)}, {expected}", param=param)
            message = replace(message, role="tool", tool_call_id=newest[name])
        found.append(message)
    return tuple(found)
