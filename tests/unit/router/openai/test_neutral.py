"""Fields of OpenAI and vLLM that the server does not have: values that ask for nothing pass, others are named."""

from __future__ import annotations

import json
from typing import Any

import pytest

from baton.errors import InvalidRequest
from router.frontend.request import Caller
from router.openai.neutral import UnknownFields
from router.openai.request import ChatBody, CompletionBody, parse

CHAT = {"messages": [{"role": "user", "content": "x"}]}

NEUTRAL: list[dict[str, Any]] = [
    {"prompt_logprobs": None},
    {"length_penalty": 1.0},
    {"length_penalty": 1},
    {"use_beam_search": False},
    {"early_stopping": False},
    {"spaces_between_special_tokens": True},
    {"detokenize": True},
    {"truncate_prompt_tokens": None},
    {"allowed_token_ids": None},
    {"bad_words": []},
    {"logits_processors": None},
    {"logits_processors": []},
    {"structured_outputs": None},
    {"structural_tag": None},
    {"prompt_embeds": None},
    {"cache_salt": None},
    {"cache_salt": "x"},
    {"kv_transfer_params": None},
    {"vllm_xargs": {}},
    {"mm_processor_kwargs": {}},
    {"response_format": None},
    {"response_format": {"type": "text"}},
    {"best_of": 1},
    {"priority": None},
    {"priority": 0},
    {"suffix": ""},
    *[{f"guided_{x}": None} for x in ("json", "regex", "choice", "grammar", "decoding_backend", "whitespace_pattern")],
]
NEUTRAL_IN_CHAT: list[dict[str, Any]] = [
    *[x for x in NEUTRAL if not {"best_of", "suffix"} & set(x)],
    {"continue_final_message": False},
    {"echo": False},
    {"documents": None},
    {"documents": []},
    {"chat_template": None},
    {"reasoning_effort": None},
    {"reasoning_effort": "none"},
    {"reasoning_effort": "high"},
    {"include_reasoning": False},
    {"include_reasoning": True},
    {"thinking_token_budget": None},
    {"verbosity": None},
    {"verbosity": "medium"},
    {"web_search_options": None},
    {"tools": []},
    {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "none"},
    {"tool_choice": "auto"},
    {"functions": [{"name": "f"}], "function_call": "none"},
    {"functions": [], "function_call": "auto"},
    {"parallel_tool_calls": True},
    {"top_logprobs": 0},
    {"top_logprobs": 0, "logprobs": False},
    {"modalities": ["text"]},
    {"audio": None},
]
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"prompt_logprobs": 0, "stream": True}, "prompt_logprobs"),
    ({"prompt_logprobs": -1}, "prompt_logprobs"),
    ({"prompt_logprobs": 21}, "prompt_logprobs"),
    ({"length_penalty": 0.5}, "length_penalty"),
    ({"length_penalty": True}, "length_penalty"),
    ({"use_beam_search": True}, "use_beam_search"),
    ({"use_beam_search": 0}, "use_beam_search"),
    ({"early_stopping": "never"}, "early_stopping"),
    ({"spaces_between_special_tokens": False}, "spaces_between_special_tokens"),
    ({"detokenize": False}, "detokenize"),
    ({"truncate_prompt_tokens": "5"}, "truncate_prompt_tokens"),
    ({"truncation_side": "middle"}, "truncation_side"),
    ({"allowed_token_ids": []}, "allowed_token_ids"),
    ({"bad_words": "x"}, "bad_words"),
    ({"logits_processors": ["x"]}, "logits_processors"),
    ({"guided_json": "{"}, "guided_json"),
    ({"guided_regex": 5}, "guided_regex"),
    ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs"),
    ({"structured_outputs": {"xml": "x"}}, "structured_outputs"),
    ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs.regex"),
    ({"response_format": {"type": "structural_tag"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format.json_schema.schema"),
    ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex"),
    ({"response_format": {}}, "response_format.type"),
    ({"response_format": "text/plain"}, "response_format.type"),
    ({"cache_salt": ""}, "cache_salt"),
    ({"cache_salt": 1}, "cache_salt"),
]
REFUSED_IN_CHAT: list[tuple[dict[str, Any], str]] = [
    *REFUSED,
    ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    ({"echo": True}, "echo"),
    ({"documents": [{"text": "x"}]}, "documents"),
    ({"chat_template": "{{ messages }}"}, "chat_template"),
    ({"reasoning_effort": 1}, "reasoning_effort"),
    ({"include_reasoning": "no"}, "include_reasoning"),
    ({"verbosity": "high"}, "verbosity"),
    ({"web_search_options": {}}, "web_search_options"),
    ({"tools": [{"type": "function"}]}, "tools.0.function"),
    ({"tools": [{"type": "code_interpreter"}]}, "tools.0.type"),
    ({"tool_choice": "any"}, "tool_choice"),
    ({"tool_choice": {"type": "function"}}, "tool_choice.function"),
    ({"functions": [{"name": "f"}], "tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ({"functions": [{"name": "f"}], "tool_choice": "auto"}, "tool_choice"),
    ({"functions": ["f"]}, "functions.0"),
    ({"functions": [{"name": "f", "parameters": []}]}, "functions.0.parameters"),
    ({"functions": [{"name": "f"}], "function_call": "required"}, "function_call"),
    ({"functions": [{"name": "f"}], "function_call": {"name": "g"}}, "function_call.name"),
    ({"functions": [{"name": "f"}], "function_call": {}}, "function_call.name"),
    ({"function_call": {"name": "f"}}, "function_call"),
    ({"messages": [{"role": "function", "name": "f", "content": "1"}]}, "messages.0.name"),
    ({"messages": [{"role": "assistant", "function_call": "f"}]}, "messages.0.function_call"),
    ({"messages": [{"role": "assistant", "function_call": {"name": 1}}]}, "messages.0.function_call.name"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"audio": {"voice": "x"}}, "audio"),
    ({"top_logprobs": 1, "logprobs": False}, "top_logprobs"),
]


def asked(fields: dict[str, Any], *, is_chat: bool) -> None:
    if is_chat:
        parse(ChatBody, json.dumps(CHAT | fields).encode()).request(Caller())
    else:
        parse(CompletionBody, json.dumps({"prompt": "x"} | fields).encode()).request(Caller())


@pytest.mark.parametrize(
    ("fields", "is_chat"), [*[(x, False) for x in NEUTRAL], *[(x, True) for x in NEUTRAL_IN_CHAT]], ids=str
)
def test_what_asks_for_nothing_passes(fields: dict[str, Any], is_chat: bool) -> None:
    asked(fields, is_chat=is_chat)


@pytest.mark.parametrize(
    ("fields", "param", "is_chat"), [*[(*x, False) for x in REFUSED], *[(*x, True) for x in REFUSED_IN_CHAT]], ids=str
)
def test_what_asks_for_something_is_refused_by_its_name(fields: dict[str, Any], param: str, is_chat: bool) -> None:
    with pytest.raises(InvalidRequest) as refused:
        asked(fields, is_chat=is_chat)
    assert refused.value.param == param
    assert param.split(".")[0] in refused.value.message


def test_unknown_fields_can_be_left_out_and_are_logged_once_each(caplog: pytest.LogCaptureFixture) -> None:
    unknown = UnknownFields(ignores=True)
    for _ in range(3):
        body = parse(CompletionBody, b'{"prompt": "x", "max_tokens": 3, "frobnicate": {"a": 1}, "b": 2}', unknown)
        assert (body.prompt, body.max_tokens) == ("x", 3)
    assert [record.getMessage() for record in caplog.records] == [
        "requests have a field 'frobnicate', which is unknown and ignored",
        "requests have a field 'b', which is unknown and ignored",
    ]
    with pytest.raises(InvalidRequest, match="use_beam_search"):
        parse(CompletionBody, b'{"prompt": "x", "use_beam_search": true}', unknown)


def test_what_nobody_knows_stays_unknown() -> None:
    with pytest.raises(InvalidRequest, match="Unrecognized request argument supplied: frobnicate") as refused:
        asked({"frobnicate": None}, is_chat=True)
    assert refused.value.param == "frobnicate"
    with pytest.raises(InvalidRequest, match="verbosity"):
        asked({"verbosity": None}, is_chat=False)
