"""Bodies of the Messages API: blocks become turns, and what cannot be honoured is refused by its name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from baton.chat import CallMode, ChatMessage, Tool, ToolCall, ToolChoice
from baton.errors import InvalidRequest
from router.frontend.request import Caller, GenerationRequest
from router.messages.request import MessagesBody
from router.openai.request import parse
from router.text.chat import Conversation


def request(**body: Any) -> GenerationRequest:
    content = json.dumps({"max_tokens": 10, "messages": [{"role": "user", "content": "a"}], **body})
    return parse(MessagesBody, content.encode()).request(Caller("c"))


def turns(messages: list[Any], **body: Any) -> tuple[ChatMessage, ...]:
    content = json.dumps({"messages": messages, **body})
    return tuple(parse(MessagesBody, content.encode()).turns())


def test_texts_and_blocks_of_text() -> None:
    text = {"type": "text", "text": "b", "cache_control": {"type": "ephemeral"}}
    assert turns([{"role": "user", "content": "a"}]) == (ChatMessage("user", "a"),)
    assert turns([{"role": "user", "content": [text, text]}], system="s") == (
        ChatMessage("system", "s"), ChatMessage("user", ("b", "b")),
    )  # fmt: skip
    assert turns([{"role": "assistant", "content": [text]}, {"role": "user", "content": "c"}], system=[text]) == (
        ChatMessage("system", ("b",)), ChatMessage("assistant", ("b",)), ChatMessage("user", "c"),
    )  # fmt: skip


def test_turns_of_a_user_in_a_row_are_one() -> None:
    found = turns([{"role": "user", "content": "a"}, {"role": "user", "content": [{"type": "text", "text": "b"}]}])
    assert found == (ChatMessage("user", ("a", "b")),)


def test_results_of_tools_are_turns_of_their_own() -> None:
    use = {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": ["é", 1.5]}}
    blocks = [{"type": "thinking", "thinking": "hm", "signature": "x"}, {"type": "text", "text": "I call"}, use]
    results = [
        {"type": "tool_result", "tool_use_id": "t1", "content": "21", "is_error": False},
        {"type": "tool_result", "tool_use_id": "t2", "content": [{"type": "text", "text": "22"}]},
        {"type": "tool_result", "tool_use_id": "t3"},
        {"type": "text", "text": "so?"},
    ]
    found = turns([{"role": "assistant", "content": blocks}, {"role": "user", "content": results}])
    call = ToolCall("t1", "f", '{"a": ["é", 1.5]}')
    assert found == (
        ChatMessage("assistant", ("I call",), reasoning="hm", tool_calls=(call,)),
        ChatMessage("tool", "21", tool_call_id="t1"),
        ChatMessage("tool", ("22",), tool_call_id="t2"),
        ChatMessage("tool", "", tool_call_id="t3"),
        ChatMessage("user", ("so?",)),
    )


def test_sampling() -> None:
    found = request(
        temperature=0.5, top_p=0.9, top_k=7, stop_sequences=["#"], seed=3, priority=2, metadata={"user_id": "u"}
    )
    assert (found.sampling.temperature, found.sampling.top_p, found.sampling.top_k) == (0.5, 0.9, 7)
    assert (found.sampling.max_tokens, found.sampling.seed, found.stops, found.priority) == (10, 3, ("#",), 2)
    assert (found.n, found.is_chat, found.caller.client) == (1, True, "c")
    assert "temperature" not in found.unset_sampling
    assert "min_p" in found.unset_sampling


def test_stop_sequences_are_named_as_the_client_named_them() -> None:
    assert request(stop_sequences=["#"]).stops_param == "stop_sequences"
    assert request(stop=["#"]).stops_param == "stop"


def test_tools() -> None:
    tool = {"name": "f", "description": "d", "input_schema": {"type": "object"}, "cache_control": {"type": "ephemeral"}}
    (found,) = request(tools=[tool, tool | {"name": "g", "strict": True, "type": "custom"}]).prompts
    assert isinstance(found, Conversation)
    assert found.tools == (Tool("f", "d", {"type": "object"}), Tool("g", "d", {"type": "object"}, True))
    cases: list[tuple[Any, ToolChoice]] = [
        (None, ToolChoice()),
        ({"type": "auto", "disable_parallel_tool_use": True}, ToolChoice(is_parallel=False)),
        ({"type": "any"}, ToolChoice(CallMode.REQUIRED)),
        ({"type": "tool", "name": "f"}, ToolChoice(CallMode.REQUIRED, ("f",), False)),
        ({"type": "none"}, ToolChoice(CallMode.NONE)),
    ]
    for choice, expected in cases:
        (found,) = request(tools=[tool], tool_choice=choice).prompts
        assert isinstance(found, Conversation)
        assert found.tool_choice == expected


def test_structured_output_and_effort() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    asked = request(output_config={"effort": "low", "format": {"type": "json_schema", "schema": schema}})
    (found,) = asked.prompts
    assert isinstance(found, Conversation)
    assert (found.reasoning_effort, asked.grammar_param) == ("low", "output_config.format.schema")
    assert '"a"' in asked.sampling.grammar


def test_an_answer_continues_a_last_turn_of_the_assistant() -> None:
    for messages, continues in (([USER], False), ([USER, {"role": "assistant", "content": "It is"}], True)):
        (conversation,) = request(messages=messages).prompts
        assert isinstance(conversation, Conversation)
        assert (conversation.continues_final, conversation.add_generation_prompt) == (continues, not continues)


@pytest.mark.parametrize(("thinking", "expected"), [
    ({"type": "enabled", "budget_tokens": 2048}, {"enable_thinking": True, "thinking": True}),
    ({"type": "adaptive"}, {"enable_thinking": True, "thinking": True}),
    ({"type": "disabled"}, {"enable_thinking": False, "thinking": False}),
    (None, {}),
])  # fmt: skip
def test_thinking_is_a_variable_of_the_template(thinking: Any, expected: dict[str, Any]) -> None:
    (conversation,) = request(thinking=thinking).prompts
    assert isinstance(conversation, Conversation)
    assert conversation.variables == expected


USER = {"role": "user", "content": "a"}


def user(*blocks: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": blocks}]}


def assistant(*blocks: Any) -> dict[str, Any]:
    return {"messages": [{"role": "assistant", "content": blocks}]}


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}


@pytest.mark.parametrize(("body", "param"), [
    ({"max_tokens": None}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"n": 2}, "n"),
    ({"container": "x"}, "container"),
    ({"thread": {"type": "create"}}, "thread"),
    ({"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
    ({"speed": "fast"}, "speed"),
    ({"thinking": {"type": "maybe"}}, "thinking.type"),
    ({"tools": [{"type": "web_search_20250305", "name": "w"}]}, "tools.0.type"),
    ({"tools": [{"name": "f"}]}, "tools.0.input_schema"),
    ({"tools": [{"input_schema": {}}]}, "tools.0.name"),
    ({"tool_choice": {"type": "some"}}, "tool_choice.type"),
    ({"tool_choice": {"type": "tool"}}, "tool_choice.name"),
    ({"output_config": {"effort": 3}}, "output_config.effort"),
    ({"output_config": {"format": {"type": "xml"}}}, "output_config.format.type"),
    (assistant({"type": "tool_use", "id": "t", "name": "f", "input": {}}), "messages"),
    ({"messages": ["a"]}, "messages.0"),
    ({"messages": [{"role": "robot", "content": "a"}]}, "messages.0.role"),
    ({"messages": [{"content": "a"}]}, "messages.0.role"),
    ({"messages": [USER, {"role": "user"}]}, "messages.1.content"),
    ({"messages": [USER | {"mood": "good"}]}, "messages.0.mood"),
    (user(IMAGE), "messages.0.content.0.type"),
    (assistant({"type": "redacted_thinking", "data": "x"}), "messages.0.content.0.type"),
    (assistant({"type": "tool_use", "id": "t", "name": "f", "input": "{}"}), "messages.0.content.0.input"),
    (user({"type": "tool_result", "content": "x"}), "messages.0.content.0.tool_use_id"),
    (user({"type": "tool_result", "tool_use_id": "t", "content": [IMAGE]}), "messages.0.content.0.content.0.type"),
    (user({"type": "text", "text": 3}), "messages.0.content.0.text"),
    ({"system": [IMAGE]}, "system.0.type"),
    ({"temprature": 1}, "temprature"),
])  # fmt: skip
def test_what_cannot_be_honoured_is_refused_by_name(body: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        request(**body)
    assert refused.value.param == param
    assert param.rpartition(".")[2] in refused.value.message
