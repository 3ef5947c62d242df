"""Conversations to and from their messages on the wire. Raises InvalidRequest for what a client may not send."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from baton.chat import CallMode, ChatMessage, Tool, ToolCall, ToolChoice
from baton.errors import InvalidRequest, quoted
from baton.v1 import router_pb2

_MODES = {
    CallMode.NONE: router_pb2.ToolChoice.MODE_NONE,
    CallMode.AUTO: router_pb2.ToolChoice.MODE_AUTO,
    CallMode.REQUIRED: router_pb2.ToolChoice.MODE_REQUIRED,
}


def message_to_pb(message: ChatMessage) -> router_pb2.ChatMessage:
    content = "\n".join(message.content) if isinstance(message.content, tuple) else message.content
    return router_pb2.ChatMessage(
        role=message.role,
        content=content or "",
        name=message.name or "",
        reasoning=message.reasoning or "",
        tool_calls=[
            router_pb2.ToolCall(call_id=call.call_id, name=call.name, arguments=call.arguments)
            for call in message.tool_calls
        ],
        tool_call_id=message.tool_call_id or "",
    )


def message_from_pb(message: router_pb2.ChatMessage) -> ChatMessage:
    calls = tuple(ToolCall(call.call_id, call.name, call.arguments) for call in message.tool_calls)
    # An assistant that only calls has said nothing.
    content = None if calls and not message.content else message.content
    return ChatMessage(
        message.role, content, message.name or None, message.reasoning or None, calls, message.tool_call_id or None
    )


def tool_to_pb(tool: Tool) -> router_pb2.Tool:
    parameters = "" if tool.parameters is None else json.dumps(dict(tool.parameters))
    return router_pb2.Tool(
        name=tool.name, description=tool.description, parameters=parameters, strict=tool.is_strict
    )  # fmt: skip


def tools_from_pb(tools: Sequence[router_pb2.Tool]) -> tuple[Tool, ...]:
    return tuple(
        Tool(tool.name, tool.description, object_of(tool.parameters, f"tools.{i}.parameters"), tool.strict)
        for i, tool in enumerate(tools)
    )


def choice_to_pb(choice: ToolChoice) -> router_pb2.ToolChoice:
    return router_pb2.ToolChoice(mode=_MODES[choice.mode], names=choice.names, single=not choice.is_parallel)


def choice_from_pb(choice: router_pb2.ToolChoice) -> ToolChoice:
    found = {number: mode for mode, number in _MODES.items()} | {0: CallMode.AUTO}
    if choice.mode not in found:
        raise InvalidRequest(
            f"tool_choice.mode is {quoted(choice.mode)}, expected a number that router.proto defines",
            param="tool_choice",
        )
    return ToolChoice(found[choice.mode], tuple(choice.names), not choice.single)


def object_of(text: str, where: str) -> Mapping[str, Any] | None:
    """A JSON object; None for no text."""
    if not text:
        return None
    try:
        found = json.loads(text)
        if "\\u" in text:
            # Raises ValueError for half of a surrogate pair, which no prompt can have.
            json.dumps(found, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{where} is no valid JSON: {error}", param=where) from None
    if not isinstance(found, dict):
        raise InvalidRequest(f"{where} is {quoted(found)}, expected a JSON object", param=where)
    return found
