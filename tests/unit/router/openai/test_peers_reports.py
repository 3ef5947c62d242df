"""Reports of users of other servers about tools, structured output, streams and log-probabilities, each tried here.

The number of each report is at its test; docs/failures.md has those about clusters.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from tests.support.fake_nodes import FakeCluster, FakeConfig
from tests.support.root import ROOT
from tests.support.router import baseline, router_beside

TEXT = "Grüße aus 東京 😊"
PROMPT = "Months from May to July:"


def closed(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


FUNCTION = {"name": "greet", "description": "Greets.", "parameters": closed(text={"enum": [TEXT]}, to={"enum": ["Bo"]})}
CALL = {
    "messages": [{"role": "user", "content": "What does Ada like?"}], "temperature": 0, "max_tokens": 400,
    "tools": [{"type": "function", "function": FUNCTION}], "tool_choice": "required",
}  # fmt: skip


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    """Of a router of the demo's model, whose nodes draw any token that a form allows."""
    folder = ROOT / "demo" / "model"
    config = FakeConfig(vocab_size=2867, max_model_tokens=2048, tokenizer_file=folder / "tokenizer.json")
    async with FakeCluster(config, prefill=1, decode=1) as cluster:
        async with router_beside(cluster, model_folder=folder) as router:
            assert router.http is not None
            async with httpx.AsyncClient(base_url=router.http, timeout=60) as client:
                yield client
        await baseline(cluster)


async def whole(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> Any:
    got = await client.post(path, json=body)
    assert got.status_code == 200, got.text
    return got.json()


async def streamed(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> list[Any]:
    got = await client.post(path, json={**body, "stream": True})
    assert got.status_code == 200, got.text
    lines = [line.removeprefix("data: ") for line in got.text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def calls_of(chunks: list[Any]) -> list[tuple[str, str]]:
    """By index, which counts from 0: names and arguments."""
    found: list[list[str]] = []
    for chunk in chunks:
        for call in (chunk["choices"][0]["delta"].get("tool_calls") or []) if chunk["choices"] else []:
            if call["index"] == len(found):
                found.append(["", ""])
            assert call["index"] == len(found) - 1, "a later piece belongs to the last call"
            found[-1][0] += call["function"].get("name") or ""
            found[-1][1] += call["function"].get("arguments") or ""
    return [(name, arguments) for name, arguments in found]


async def test_offsets_of_a_stream_with_echo_go_on_behind_the_prompt(client: httpx.AsyncClient) -> None:
    """vllm #47815: later offsets of the stream lacked the prompt's length."""
    body = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, "echo": True, "logprobs": 1, "ignore_eos": True}
    answer = (await whole(client, "/v1/completions", body))["choices"][0]
    reports = [c["choices"][0]["logprobs"] for c in await streamed(client, "/v1/completions", body) if c["choices"]]
    offsets = [offset for report in reports if report for offset in report["text_offset"]]
    assert offsets == answer["logprobs"]["text_offset"]
    for offset, token in zip(offsets, answer["logprobs"]["tokens"], strict=True):
        assert answer["text"][offset : offset + len(token)] == token


async def test_a_complete_form_ends_before_min_tokens(client: httpx.AsyncClient) -> None:
    """vllm #53665: no token was left to draw, which was a 500."""
    for form in ({"json": closed(a={"enum": [1]})}, {"regex": "[0-9]{2}"}, {"choice": ["yes", "no"]}):
        body = {"prompt": PROMPT, "max_tokens": 64, "min_tokens": 40, "temperature": 1, "seed": 3}
        answer = await whole(client, "/v1/completions", {**body, "structured_outputs": form})
        assert answer["choices"][0]["finish_reason"] == "stop", form
        assert answer["usage"]["completion_tokens"] < 40, form


async def test_the_likeliest_tokens_of_a_form_may_be_special_ones(client: httpx.AsyncClient) -> None:
    """vllm #17637: a KeyError."""
    body = {"messages": [{"role": "user", "content": " "}], "logprobs": True, "top_logprobs": 5, "max_tokens": 60,
            "guided_json": closed()}  # fmt: skip
    choice = (await whole(client, "/v1/chat/completions", body))["choices"][0]
    assert json.loads(choice["message"]["content"]) == {}
    assert all(len(token["top_logprobs"]) == 5 for token in choice["logprobs"]["content"])


async def test_log_probabilities_without_a_number_of_others(client: httpx.AsyncClient) -> None:
    """vllm #4795: an error where `top_logprobs` was missing."""
    body = {"messages": [{"role": "user", "content": "Hi!"}], "logprobs": True, "max_tokens": 4, "ignore_eos": True}
    choice = (await whole(client, "/v1/chat/completions", body))["choices"][0]
    assert [token["top_logprobs"] for token in choice["logprobs"]["content"]] == [[]] * 4


async def test_a_required_call_is_there_and_said_to_be(client: httpx.AsyncClient) -> None:
    """vllm #53363 and #25054: prose with `finish_reason` "tool_calls", or a call without it; sglang #6310: indices of
    a stream that differ; sglang #12626: arguments that were escaped twice."""
    choice = (await whole(client, "/v1/chat/completions", CALL))["choices"][0]
    calls = [(c["function"]["name"], c["function"]["arguments"]) for c in choice["message"]["tool_calls"]]
    chunks = await streamed(client, "/v1/chat/completions", CALL)
    assert calls_of(chunks) == calls
    reasons = [c["choices"][0]["finish_reason"] for c in chunks if c["choices"]]
    assert [reason for reason in reasons if reason] == [choice["finish_reason"]]
    assert calls
    first, *_ = calls
    assert first[0] == "greet"
    assert json.loads(first[1]) == {"text": TEXT, "to": "Bo"}
    if choice["finish_reason"] != "length":
        assert choice["finish_reason"] == "tool_calls"
        assert all(json.loads(arguments) == {"text": TEXT, "to": "Bo"} for _, arguments in calls)


async def test_usage_comes_last_also_behind_a_call(client: httpx.AsyncClient) -> None:
    """vllm #6371: `include_usage` without effect."""
    body = {**CALL, "parallel_tool_calls": False, "stream_options": {"include_usage": True}}
    *others, last = await streamed(client, "/v1/chat/completions", body)
    assert last["choices"] == []
    plain = await whole(client, "/v1/chat/completions", {**CALL, "parallel_tool_calls": False})
    assert {k: last["usage"][k] for k in ("prompt_tokens", "completion_tokens", "total_tokens")} == {
        k: plain["usage"][k] for k in ("prompt_tokens", "completion_tokens", "total_tokens")
    }
    assert all(chunk.get("usage") is None for chunk in others)


async def test_items_of_a_streamed_response_are_counted_from_0_and_completed(client: httpx.AsyncClient) -> None:
    """sglang #12644: indices from 1; #12653: no `output_item.done`, and a message instead of the call at the end."""
    body = {"input": "What does Ada like?", "temperature": 0, "max_output_tokens": 400, "tool_choice": "required",
            "parallel_tool_calls": False, "tools": [{"type": "function", **FUNCTION}]}  # fmt: skip
    events = await streamed(client, "/v1/responses", body)
    kinds = [event["type"] for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    output = events[-1]["response"]["output"]
    assert kinds[-1] == "response.completed"
    assert [item["type"] for item in output][-1] == "function_call"
    for kind in ("response.output_item.added", "response.output_item.done"):
        assert [e["output_index"] for e in events if e["type"] == kind] == list(range(len(output)))
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == output
    assert json.loads(output[-1]["arguments"]) == {"text": TEXT, "to": "Bo"}


async def test_bytes_of_parts_of_a_character_are_those_of_the_tokens(client: httpx.AsyncClient) -> None:
    """ollama #13497: three bytes of U+FFFD for each part."""
    body = {"messages": [{"role": "user", "content": "Hi!"}], "logprobs": True, "top_logprobs": 1, "max_tokens": 64,
            "guided_choice": [TEXT]}  # fmt: skip
    choice = (await whole(client, "/v1/chat/completions", body))["choices"][0]
    assert choice["message"]["content"] == TEXT
    told = [token["bytes"] for token in choice["logprobs"]["content"]]
    assert bytes(byte for part in told for byte in part or []).decode() == TEXT
    assert len(told) > len(TEXT.split())
