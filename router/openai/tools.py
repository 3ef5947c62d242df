"""Tools and tool calls in the OpenAI API's form: read from a body of chat, written into an answer's messages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from baton.chat import MAX_TOOLS, CallMode, Tool, ToolCall, ToolChoice
from baton.errors import InvalidRequest, quoted
from router.text.deltas import CallArguments, CallBegin, ContentText, Delta, ReasoningText

_MODES = {mode.value: mode for mode in CallMode}


def tools_of(tools: Sequence[Any] | None) -> tuple[Tool, ...]:
    return tuple(_tool(tool, f"tools.{i}") for i, tool in enumerate(tools or ()))


def _tool(tool: object, where: str) -> Tool:
    kind = tool.get("type") if isinstance(tool, dict) else type(tool).__name__
    if kind != "function" or not isinstance(tool, dict):
        raise InvalidRequest(f"{where}.type is {quoted(kind)}, expected 'function'", param=f"{where}.type")
    return function_of(tool.get("function"), f"{where}.function")


def function_of(value: object, where: str) -> Tool:
    function = object_at(value, where)
    return Tool(
        function.get("name", ""),
        optional_at(function.get("description"), str, "a text", f"{where}.description") or "",
        optional_at(function.get("parameters"), dict, "a JSON schema", f"{where}.parameters"),
        bool(optional_at(function.get("strict"), bool, "true or false", f"{where}.strict")),
    )


def choice_of(choice: Any, is_parallel: bool | None) -> ToolChoice:
    """Of the field tool_choice: a mode, a function's name, or the functions that are allowed."""
    parallel = is_parallel is not False
    if choice is None:
        return ToolChoice(is_parallel=parallel)
    if isinstance(choice, str) and choice in _MODES:
        return ToolChoice(_MODES[choice], is_parallel=parallel)
    kind = choice.get("type") if isinstance(choice, dict) else None
    if kind == "function":
        return ToolChoice(CallMode.REQUIRED, (_named(choice, "tool_choice"),), is_parallel=False)
    if kind == "allowed_tools":
        allowed = object_at(choice.get("allowed_tools"), "tool_choice.allowed_tools")
        mode, tools = allowed.get("mode"), allowed.get("tools")
        if mode in ("auto", "required") and isinstance(tools, list) and 0 < len(tools) <= MAX_TOOLS:
            names = tuple(_named(tool, "tool_choice.allowed_tools.tools") for tool in tools)
            return ToolChoice(_MODES[mode], names, is_parallel=parallel)
    raise InvalidRequest(
        f"tool_choice is {quoted(choice)}, expected 'none', 'auto', 'required' or "
        '{"type": "function", "function": {"name": ...}}',
        param="tool_choice",
    )


def _named(tool: object, where: str) -> str:
    function = object_at(object_at(tool, where).get("function"), f"{where}.function")
    return str(optional_at(function.get("name"), str, "a tool's name", f"{where}.function.name") or "")


def calls_of(calls: Sequence[Any] | None, where: str) -> tuple[ToolCall, ...]:
    """Of an assistant's turn."""
    return tuple(_call(call, f"{where}.tool_calls.{i}") for i, call in enumerate(calls or ()))


def _call(call: object, where: str) -> ToolCall:
    found = object_at(call, where)
    if found.get("type", "function") != "function":
        raise InvalidRequest(f"{where}.type is {quoted(found['type'])}, expected 'function'", param=f"{where}.type")
    call_id = optional_at(found.get("id"), str, "a text", f"{where}.id") or ""
    return call_of(object_at(found.get("function"), f"{where}.function"), call_id, f"{where}.function")


def call_of(function: dict[str, Any], call_id: str, where: str) -> ToolCall:
    name = str(optional_at(function.get("name"), str, "a tool's name", f"{where}.name") or "")
    arguments = optional_at(function.get("arguments"), str, "JSON text", f"{where}.arguments")
    return ToolCall(call_id, name, arguments or "")


def object_at(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidRequest(f"{where} is {quoted(value)}, expected an object", param=where)
    return value


def optional_at(value: Any, kind: type, expected: str, where: str) -> Any:
    if value is not None and not isinstance(value, kind):
        raise InvalidRequest(f"{where} is {quoted(value)}, expected {expected}", param=where)
    return value


def delta_json(deltas: Sequence[Delta], *, has_reasoning: bool, has_functions: bool = False) -> str:
    """The ``delta`` of a chunk. ``has_functions``: the call is in the API's older form."""
    fields: dict[str, Any] = {}
    calls: list[dict[str, Any]] = []
    for delta in deltas:
        match delta:
            case ContentText(text):
                fields["content"] = fields.get("content", "") + text
            case ReasoningText(text) if has_reasoning:
                # vLLM's newer name, and that of all others.
                fields["reasoning"] = fields["reasoning_content"] = fields.get("reasoning", "") + text
            case CallBegin(_, _, name) if has_functions:
                fields["function_call"] = {"name": name, "arguments": ""}
            case CallArguments(_, text) if has_functions:
                fields.setdefault("function_call", {"arguments": ""})["arguments"] += text
            case CallBegin(index, call_id, name):
                function = {"name": name, "arguments": ""}
                calls.append({"index": index, "id": call_id, "type": "function", "function": function})
            case CallArguments(index, text):
                if not calls or calls[-1]["index"] != index:
                    calls.append({"index": index, "function": {"arguments": ""}})
                calls[-1]["function"]["arguments"] += text
    if calls:
        fields["tool_calls"] = calls
    return json.dumps(fields)


class WholeReply:
    """Reasoning and calls of a whole message, as JSON that grows with the deltas."""

    __slots__ = ("_calls", "_has_functions", "_has_reasoning", "_reasoning")

    def __init__(self, *, has_reasoning: bool, has_functions: bool) -> None:
        self._has_reasoning = has_reasoning
        self._has_functions = has_functions
        self._reasoning = bytearray()
        # Each without the quote and braces at its end.
        self._calls: list[bytearray] = []

    @property
    def has_calls(self) -> bool:
        return bool(self._calls)

    def add(self, deltas: Sequence[Delta]) -> int:
        """Returns the number of bytes added."""
        num_bytes = 0
        for delta in deltas:
            match delta:
                case ReasoningText(text) if self._has_reasoning:
                    num_bytes += _extend(self._reasoning, text)
                case CallBegin(_, call_id, name):
                    head = "" if self._has_functions else f'"id":{json.dumps(call_id)},"type":"function","function":{{'
                    opening = f'{{{head}"name":{json.dumps(name)},"arguments":"'
                    self._calls.append(bytearray(opening.encode()))
                    num_bytes += len(self._calls[-1])
                case CallArguments(_, text):
                    num_bytes += _extend(self._calls[-1], text)
        return num_bytes

    def pieces(self) -> list[str | bytearray]:
        """Further members of the message, each with a leading comma."""
        found: list[str | bytearray] = []
        if self._reasoning:
            for name in ("reasoning", "reasoning_content"):
                found += [f',"{name}":"', self._reasoning, '"']
        if self._has_functions:
            # There is one at most.
            return [*found, ',"function_call":', self._calls[0], '"}'] if self._calls else found
        for number, call in enumerate(self._calls):
            found += ["," if number else ',"tool_calls":[', call, '"}}']
        return [*found, "]"] if self._calls else found


def _extend(text: bytearray, more: str) -> int:
    added = json.dumps(more)[1:-1].encode()
    text += added
    return len(added)
