"""An agent's loop with the demo's model, which calls since the grammar makes it: split, whole and streamed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai
import pytest

from baton.chat import CallMode, ChatMessage, Tool, ToolChoice
from baton.client import Client
from tests.support.cluster import StartCluster

QUESTION = "What does Ada like?"
SCHEMA = {
    "type": "object",
    "properties": {"person": {"enum": ["Ada", "Bo"]}},
    "required": ["person"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("streams", [False, True])
def test_a_loop_over_http(shared_cluster: StartCluster, demo_model: Path, streams: bool) -> None:
    cluster = shared_cluster(demo_model, prefill=1, decode=1)
    tools: Any = [{"type": "function", "function": {"name": "facts", "parameters": SCHEMA}}]
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    asked: dict[str, Any] = {
        "model": "model", "temperature": 0, "max_tokens": 200, "tools": tools, "parallel_tool_calls": False
    }  # fmt: skip
    with openai.OpenAI(base_url=f"{cluster.http}/v1", api_key="none", max_retries=0) as client:

        def reply(choice: str) -> Any:
            if not streams:
                return client.chat.completions.create(messages=messages, tool_choice=choice, **asked).choices[0]
            with client.chat.completions.stream(messages=messages, tool_choice=choice, **asked) as stream:
                return stream.get_final_completion().choices[0]

        for _ in range(2):
            found = reply("required")
            (call,) = found.message.tool_calls
            assert (found.finish_reason, call.function.name) == ("tool_calls", "facts")
            assert json.loads(call.function.arguments)["person"] in ("Ada", "Bo")
            messages.append({"role": "assistant", "tool_calls": [call.model_dump()]})
            messages.append({"role": "tool", "tool_call_id": call.id, "content": "Ada likes plums."})
        last = client.chat.completions.create(messages=messages, tool_choice="none", **asked).choices[0]
        assert last.message.content
        assert not last.message.tool_calls
    cluster.wait_baseline()


def test_a_loop_over_responses(shared_cluster: StartCluster, demo_model: Path) -> None:
    """A call that is named by its id is the call itself."""
    cluster = shared_cluster(demo_model, prefill=1, decode=1)
    tools: Any = [{"type": "function", "name": "facts", "parameters": SCHEMA, "strict": True}]
    asked: dict[str, Any] = {"model": "model", "temperature": 0, "max_output_tokens": 200, "tools": tools}
    with openai.OpenAI(base_url=f"{cluster.http}/v1", api_key="none", max_retries=0) as client:
        first = client.responses.create(input=QUESTION, tool_choice="required", parallel_tool_calls=False, **asked)
        (call,) = [item for item in first.output if item.type == "function_call"]
        assert call.name == "facts"
        assert json.loads(call.arguments)["person"] in ("Ada", "Bo")
        result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "Ada likes plums."}
        named: Any = [{"role": "user", "content": QUESTION}, {"type": "item_reference", "id": call.id}, result]
        last = client.responses.create(input=named, tool_choice="none", **asked)
        kept = client.responses.create(input=[result], previous_response_id=first.id, tool_choice="none", **asked)
        assert last.output_text
        assert last.output_text == kept.output_text
    cluster.wait_baseline()


def test_a_loop_over_grpc(shared_cluster: StartCluster, demo_model: Path) -> None:
    cluster = shared_cluster(demo_model, prefill=1, decode=1)
    asked: dict[str, Any] = {"temperature": 0, "max_tokens": 200, "tools": [Tool("facts", "", SCHEMA)]}
    talk: list[ChatMessage | tuple[str, str]] = [("user", QUESTION)]
    with Client(cluster.grpc) as client:
        first = client.complete(talk, tool_choice=ToolChoice(CallMode.REQUIRED, is_parallel=False), **asked)
        (call,) = first.tool_calls
        talk += [first.message, ChatMessage("tool", "Ada likes plums.", tool_call_id=call.call_id)]
        last = client.complete(talk, tool_choice=ToolChoice(CallMode.NONE), **asked)
        assert (last.tool_calls, bool(last.text)) == ((), True)
    cluster.wait_baseline()
