"""The Responses API's events, byte for byte (`*.events`), as its official client reads them, and the whole response."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from openai import Omit
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from baton.errors import InvalidRequest, NodeLost, Overloaded
from baton.types import FinishReason
from router.responses.response import Heading, ResponseForm
from router.text.detokenizer import Part
from tests.support.answers import AGENT, ending, events, part, streamed, whole

ECHO = ',"instructions":null,"store":true,"parallel_tool_calls":true,"tool_choice":"auto","tools":[]'
HEADING = Heading("1", 1700000000, "tiny", 20, 1.0, 0.5, ECHO)
CASES = {
    "text": ([Part("Hel", (5,)), Part("lo é\n", (6, 7))], ending(num_cached_tokens=16)),
    "agent": ([part(delta) for delta in AGENT], ending(has_tool_calls=True, num_reasoning_tokens=3)),
    "cut": ([Part("Hel", (5,))], ending(FinishReason.LENGTH)),
    "empty": ([], ending()),
}


def form() -> ResponseForm:
    return ResponseForm(HEADING, None)


@pytest.mark.parametrize("name", CASES)
def test_events_are_the_published_ones_in_their_order(name: str) -> None:
    assert streamed(form(), *CASES[name]) == Path(__file__).with_name(f"{name}.events").read_text()


@pytest.mark.parametrize("name", CASES)
def test_the_official_client_reads_the_events(name: str) -> None:
    parts, end = CASES[name]
    found = events(streamed(form(), parts, end))
    event_type: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
    state: ResponseStreamState[Any] = ResponseStreamState(input_tools=Omit(), text_format=Omit())
    for number, (kind, data) in enumerate(found):
        assert (data["type"], data["sequence_number"]) == (kind, number)
        event = event_type.validate_python(data)
        assert event.type == kind
        state.handle_event(event)
    last = found[-1][1]["response"]
    assert last == whole(form(), parts, end)
    Response.model_validate(last)


@pytest.mark.parametrize("name", CASES)
def test_the_pieces_are_the_whole(name: str) -> None:
    parts, end = CASES[name]
    found = events(streamed(form(), parts, end))
    response = whole(form(), parts, end)
    done = [data["item"] for kind, data in found if kind == "response.output_item.done"]
    assert done == response["output"]
    added = [data["item"]["id"] for kind, data in found if kind == "response.output_item.added"]
    assert added == [item["id"] for item in done]
    assert len(set(added)) == len(added)
    for item in done:
        mine = [data for _, data in found if data.get("item_id") == item["id"]]
        text = "".join(data["delta"] for data in mine if "delta" in data)
        assert text == (item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"])


def test_usage_and_status() -> None:
    for end, status, details in (
        (ending(num_cached_tokens=16, num_reasoning_tokens=2), "completed", None),
        (ending(FinishReason.LENGTH), "incomplete", {"reason": "max_output_tokens"}),
    ):
        found = whole(form(), [Part("a", (1,))], end)
        assert (found["status"], found["incomplete_details"], found["output"][0]["status"]) == (status, details, status)
        assert found["usage"] == {
            "input_tokens": 20,
            "input_tokens_details": {"cached_tokens": end.num_cached_tokens, "cache_write_tokens": 0},
            "output_tokens": 9,
            "output_tokens_details": {"reasoning_tokens": end.num_reasoning_tokens},
            "total_tokens": 29,
        }


def test_a_stream_that_fails_ends_with_the_failed_response() -> None:
    for error, code in (
        (NodeLost("decode-0 is gone"), "server_error"),
        (Overloaded("full"), "rate_limit_exceeded"),
        (InvalidRequest("too long"), "invalid_prompt"),
    ):
        failing = form()
        (writer,) = failing.writers
        text = writer.begin() + writer.chunk(Part("Hel", (5,))) + failing.failed(error).decode()
        kind, data = events(text)[-1]
        assert (kind, data["sequence_number"]) == ("response.failed", len(events(text)) - 1)
        assert data["response"]["status"] == "failed"
        assert data["response"]["error"] == {"code": code, "message": error.message}
        assert data["response"]["output"][0]["content"][0]["text"] == "Hel"


def test_a_response_that_ended_is_given_to_the_keeper_once() -> None:
    for write in (streamed, whole):
        kept: list[tuple[str, int]] = []

        def keep(response: str, items: Any, kept: list[tuple[str, int]] = kept) -> None:
            kept.append((response, len(items)))

        write(ResponseForm(HEADING, keep), [Part("a", (1,))], ending())
        ((response, num_items),) = kept
        assert json.loads(response)["output"][0]["content"][0]["text"] == "a"
        assert num_items == 1
