"""Whole agent loops over the Responses and the Messages API: a model that calls a tool, its result, the answer."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai

from tests.support.answers import events
from tests.support.fake_nodes import FakeCluster, FakeConfig
from tests.support.replies import write_speaking_folder
from tests.support.router import router_beside
from tests.support.tool_templates import TOOL_TEMPLATES

OPENED = "<|im_start|>assistant\n"
CALL = ["I look.", "\n\n", "<tool_call>", "\n{", '"name": ', '"weather", ', '"arguments": ', '{"city": "Par', 'is"}',
        "}\n", "</tool_call>"]  # fmt: skip
ANSWER = ["12 degrees\n</tool_response><|im_end|>\n<|im_start|>assistant\n", "Yes", ", warm."]
PARIS = '{"city": "Paris"}'
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
ASKED = "Is it warm in Paris?"


@asynccontextmanager
async def speaking(folder: Path) -> AsyncIterator[str]:
    following = write_speaking_folder(folder, TOOL_TEMPLATES["hermes"], [[OPENED, *CALL], ANSWER], ())
    config = FakeConfig(vocab_size=1 + max(*following, *following.values()), following=following)
    async with (
        FakeCluster(config, prefill=1, decode=1) as cluster,
        router_beside(cluster, model_folder=folder) as router,
    ):
        yield router.http or ""


async def test_responses(tmp_path: Path) -> None:
    tools: Any = [{"type": "function", "name": "weather", "parameters": SCHEMA, "strict": False}]
    async with (
        speaking(tmp_path / "m") as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        first = await client.responses.create(model="m", input=ASKED, tools=tools)
        assert [item.type for item in first.output] == ["message", "function_call"]
        call = first.output[1]
        assert call.type == "function_call"
        assert (first.output_text, call.name, call.arguments) == ("I look.", "weather", PARIS)
        result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "12 degrees"}

        known = await client.responses.create(model="m", input=[result], previous_response_id=first.id, tools=tools)
        assert known.output_text == "Yes, warm."
        history: list[Any] = [{"role": "user", "content": ASKED}, *[item.model_dump() for item in first.output], result]
        spelled = await client.responses.create(model="m", input=history, tools=tools, store=False)
        assert spelled.output_text == "Yes, warm."
        assert known.usage is not None
        assert spelled.usage is not None
        assert known.usage.input_tokens == spelled.usage.input_tokens

        async with client.responses.stream(model="m", input=ASKED, tools=tools) as stream:
            async for _ in stream:
                pass
            final = await stream.get_final_response()
        assert [item.type for item in final.output] == ["message", "function_call"]
        streamed = final.output[1]
        assert streamed.type == "function_call"
        assert (final.output_text, streamed.name, streamed.arguments) == ("I look.", "weather", PARIS)


async def test_messages(tmp_path: Path) -> None:
    asked: dict[str, Any] = {
        "model": "m", "max_tokens": 60, "messages": [{"role": "user", "content": ASKED}],
        "tools": [{"name": "weather", "input_schema": SCHEMA}],
    }  # fmt: skip
    async with speaking(tmp_path / "m") as url, httpx.AsyncClient(base_url=url, timeout=20) as client:
        first = (await client.post("/v1/messages", json=asked)).json()
        text, call = first["content"]
        assert (text["text"], first["stop_reason"]) == ("I look.", "tool_use")
        assert (call["type"], call["name"], call["input"]) == ("tool_use", "weather", {"city": "Paris"})

        stream = events((await client.post("/v1/messages", json=asked | {"stream": True})).text)
        pieces = [data["delta"].get("partial_json", "") for name, data in stream if name == "content_block_delta"]
        assert "".join(pieces) == PARIS
        assert dict(stream)["message_delta"]["delta"]["stop_reason"] == "tool_use"

        result = {"type": "tool_result", "tool_use_id": call["id"], "content": "12 degrees"}
        asked["messages"] += [
            {"role": "assistant", "content": first["content"]}, {"role": "user", "content": [result]}
        ]  # fmt: skip
        second = (await client.post("/v1/messages", json=asked)).json()
        assert second["content"] == [{"type": "text", "text": "Yes, warm."}]
        assert second["stop_reason"] == "end_turn"
