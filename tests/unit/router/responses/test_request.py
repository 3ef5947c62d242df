"""Bodies of the Responses API: items become turns, and what cannot be honoured is refused by its name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from baton.chat import CallMode, ChatMessage, Tool, ToolCall, ToolChoice
from baton.errors import InvalidRequest, UnknownResponse
from router.frontend.request import Caller, GenerationRequest
from router.openai.request import parse
from router.responses.request import ResponsesBody, echoed
from router.text.chat import Conversation


def body_of(**body: Any) -> ResponsesBody:
    return parse(ResponsesBody, json.dumps({"input": "a", **body}).encode())


def request(history: tuple[ChatMessage, ...] = (), **body: Any) -> GenerationRequest:
    parsed = body_of(**body)
    return parsed.request(Caller("c"), history, parsed.turns(kept))


KEPT = {
    "rs_1_0": ChatMessage("assistant", None, reasoning="hm"),
    "msg_1_1": ChatMessage("assistant", ("t",)),
    "fc_1_2": ChatMessage("assistant", None, tool_calls=(ToolCall("c1", "f", "{}"),)),
}


def kept(item_id: str, param: str) -> ChatMessage:
    if item_id not in KEPT:
        raise UnknownResponse(item_id, param=param)
    return KEPT[item_id]


def conversation(history: tuple[ChatMessage, ...] = (), **body: Any) -> Conversation:
    (found,) = request(history, **body).prompts
    assert isinstance(found, Conversation)
    return found


def test_text_is_a_users_turn_behind_instructions_and_history() -> None:
    past = (ChatMessage("user", "x"), ChatMessage("assistant", "y"))
    assert conversation(input="a").messages == (ChatMessage("user", "a"),)
    assert conversation(past, input="a", instructions="be brief").messages == (
        ChatMessage("system", "be brief"), *past, ChatMessage("user", "a"),
    )  # fmt: skip


def test_items_that_are_kept_may_be_referred_to() -> None:
    references = [{"type": "item_reference", "id": name} for name in KEPT]
    output = {"type": "function_call_output", "call_id": "c1", "output": "1"}
    whole = ChatMessage("assistant", ("t",), reasoning="hm", tool_calls=(ToolCall("c1", "f", "{}"),))
    assert conversation(input=[{"role": "user", "content": "u"}, *references, output]).messages == (
        ChatMessage("user", ("u",)), whole, ChatMessage("tool", ("1",), tool_call_id="c1"),
    )  # fmt: skip
    with pytest.raises(UnknownResponse) as unknown:
        request(input=[references[0], {"type": "item_reference", "id": "msg_2_0"}])
    assert unknown.value.param == "input.1.id"
    with pytest.raises(InvalidRequest) as bad:
        request(input=[{"type": "item_reference"}])
    assert bad.value.param == "input.0.id"


def test_items_of_an_assistant_in_a_row_are_one_turn() -> None:
    call = {
        "type": "function_call",
        "call_id": "c1",
        "name": "f",
        "arguments": '{"a":1}',
        "id": "fc_1",
        "status": "completed",
    }
    items = [
        {"role": "developer", "content": [{"type": "input_text", "text": "d"}]},
        {"type": "message", "role": "user", "content": "u"},
        {"type": "reasoning", "id": "rs", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {
            "type": "message", "role": "assistant", "id": "msg", "status": "completed", "phase": "final_answer",
            "content": [{"type": "output_text", "text": "t", "annotations": [], "logprobs": []}],
        },
        call,
        call | {"call_id": "c2", "id": None},
        {"type": "function_call_output", "call_id": "c1", "output": "1"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "2"}]},
        {"role": "assistant", "content": "so"},
        {"role": "assistant", "content": "and"},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "short"}]},
        call,
    ]  # fmt: skip
    calls = (ToolCall("c1", "f", '{"a":1}'), ToolCall("c2", "f", '{"a":1}'))
    assert conversation(input=items).messages == (
        ChatMessage("developer", ("d",)),
        ChatMessage("user", ("u",)),
        ChatMessage("assistant", ("t",), reasoning="hm", tool_calls=calls),
        ChatMessage("tool", ("1",), tool_call_id="c1"),
        ChatMessage("tool", ("2",), tool_call_id="c2"),
        ChatMessage("assistant", ("so",)),
        ChatMessage("assistant", ("and",)),
        ChatMessage("assistant", None, reasoning="short", tool_calls=calls[:1]),
    )


def test_sampling() -> None:
    found = request(
        temperature=0.5, top_p=0.9, max_output_tokens=7, seed=3, metadata={"a": "b"}, include=[], store=False
    )
    assert (found.sampling.temperature, found.sampling.top_p, found.sampling.max_tokens) == (0.5, 0.9, 7)
    assert (found.sampling.seed, found.n, found.is_chat, found.max_tokens_param) == (3, 1, True, "max_output_tokens")
    assert "temperature" not in found.unset_sampling


def test_tools() -> None:
    function = {"type": "function", "name": "f", "description": "d", "parameters": {"type": "object"}, "strict": True}
    found = conversation(tools=[function, {"type": "function", "name": "g"}], reasoning={"effort": "low"})
    assert found.tools == (Tool("f", "d", {"type": "object"}, True), Tool("g"))
    assert found.reasoning_effort == "low"
    cases: list[tuple[Any, ToolChoice]] = [
        (None, ToolChoice()),
        ("none", ToolChoice(CallMode.NONE)),
        ("required", ToolChoice(CallMode.REQUIRED)),
        ({"type": "function", "name": "f"}, ToolChoice(CallMode.REQUIRED, ("f",), False)),
        (
            {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "g"}]},
            ToolChoice(CallMode.AUTO, ("g",)),
        ),
    ]
    for choice, expected in cases:
        assert conversation(tools=[function], tool_choice=choice).tool_choice == expected
    assert conversation(tools=[function], parallel_tool_calls=False).tool_choice == ToolChoice(is_parallel=False)


def test_structured_output() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form = {"type": "json_schema", "name": "x", "schema": schema, "strict": True}
    found = request(text={"format": form})
    assert '"a"' in found.sampling.grammar
    assert found.grammar_param == "text.format.schema"
    assert request(text={"format": {"type": "json_object"}}).sampling.grammar
    assert not request(text={"format": {"type": "text"}}).sampling.grammar
    for text, param in (
        ({"format": {"type": "xml"}}, "text.format.type"),
        ({"format": {"type": "json_schema", "name": "x"}}, "text.format.schema"),
    ):
        with pytest.raises(InvalidRequest) as refused:
            request(text=text)
        assert refused.value.param == param
    with pytest.raises(InvalidRequest, match="both"):
        request(text={"format": form}, guided_regex="a+")


def test_neutral_values_have_no_effect() -> None:
    plain = request()
    neutral = {
        "background": False, "truncation": "disabled", "top_logprobs": 0, "conversation": None, "prompt": None,
        "max_tool_calls": 3, "service_tier": "auto", "prompt_cache_key": "k", "safety_identifier": "s", "user": "u",
        "text": {"format": {"type": "text"}, "verbosity": "medium"}, "reasoning": {"effort": None, "summary": "auto"},
        "include": ["reasoning.encrypted_content", "file_search_call.results"], "context_management": None,
    }  # fmt: skip
    assert request(**neutral) == plain


def test_the_request_is_repeated() -> None:
    body = body_of(
        instructions="i", tools=[{"type": "function", "name": "f"}], metadata={"a": "b"}, max_output_tokens=5
    )
    found = json.loads("{" + echoed(body, is_stored=True)[1:] + "}")
    assert (found["instructions"], found["metadata"], found["max_output_tokens"]) == ("i", {"a": "b"}, 5)
    assert (found["store"], found["tool_choice"], found["text"]) == (True, "auto", {"format": {"type": "text"}})
    assert found["tools"] == [{"type": "function", "name": "f"}]


@pytest.mark.parametrize(("body", "param"), [
    ({"metadata": {str(i): "" for i in range(17)}}, "metadata"),
    ({"metadata": {"k" * 65: "v"}}, "metadata"),
    ({"metadata": {"k": "v" * 513}}, "metadata"),
    ({"metadata": {"k": 1}}, "metadata"),
    ({"tools": [{"type": "function", "name": "f", "description": "d" * 600_000}]}, "tools"),
])  # fmt: skip
def test_what_a_response_repeats_is_bounded(body: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        echoed(body_of(**body), is_stored=True)
    assert refused.value.param == param


IMAGE = {"type": "input_image", "image_url": "data:"}


@pytest.mark.parametrize(("body", "param"), [
    ({"n": 2}, "n"),
    ({"max_tokens": 5}, "max_tokens"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"background": True}, "background"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"prompt": {"id": "p"}}, "prompt"),
    ({"truncation": "auto"}, "truncation"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"include": ["message.output_text.logprobs"]}, "include"),
    ({"reasoning": {"effort": 3}}, "reasoning.effort"),
    ({"text": {"verbosity": "high"}}, "text.verbosity"),
    ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
    ({"tools": [{"type": "function"}]}, "tools.0.name"),
    ({"tool_choice": {"type": "file_search"}}, "tool_choice.type"),
    ({"tool_choice": "any"}, "tool_choice"),
    ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}}, "tool_choice.tools"),
    ({"input": []}, "input"),
    ({"input": ["a"]}, "input.0"),
    ({"input": [{"role": "robot", "content": "a"}]}, "input.0.role"),
    ({"input": [{"role": "user"}]}, "input.0.content"),
    ({"input": [{"role": "user", "content": [IMAGE]}]}, "input.0.content.0.type"),
    ({"input": [{"type": "web_search_call", "id": "x"}]}, "input.0.type"),
    ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input.0.call_id"),
    ({"input": [{"type": "function_call_output", "call_id": "c"}]}, "input.0.output"),
    ({"input": [{"role": "user", "content": "a", "mood": "good"}]}, "input.0.mood"),
    ({"inputs": "a"}, "inputs"),
])  # fmt: skip
def test_what_cannot_be_honoured_is_refused_by_name(body: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        request(**body)
    assert refused.value.param == param
    assert param.rpartition(".")[2] in refused.value.message
