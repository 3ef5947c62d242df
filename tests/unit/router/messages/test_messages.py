"""The Messages API over HTTP, against fake nodes."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from router.text.tokenizer import Tokenizer
from tests.support.answers import events
from tests.support.fake_nodes import FakeCluster, FakeConfig, expected_tokens
from tests.support.router import VOCAB_SIZE, baseline, router_beside, write_model_folder

CONFIG = FakeConfig(vocab_size=VOCAB_SIZE, max_model_tokens=2048)
ASKED = {"model": "tiny", "max_tokens": 30, "seed": 3, "messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_folder(tmp_path_factory.mktemp("models") / "tiny")


@asynccontextmanager
async def served(folder: Path, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    async with FakeCluster(CONFIG, prefill=1, decode=1) as cluster:
        async with (
            router_beside(cluster, model_folder=folder, **settings) as router,
            httpx.AsyncClient(base_url=router.http or "", timeout=10) as client,
        ):
            yield client
        await baseline(cluster)


async def test_whole_and_streamed(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    assert tokenizer is not None
    prompt = tokenizer.encode("<s><|user|>hello</s><|assistant|>", add_special_tokens=False)
    ids = expected_tokens(prompt, 3, 30, VOCAB_SIZE, (1,))
    text = tokenizer.decode([i for i in ids if i != 1], skip_special_tokens=True)
    async with served(folder) as client:
        answer = await client.post("/v1/messages", json=ASKED)
        assert answer.status_code == 200, answer.text
        message = answer.json()
        assert answer.headers["x-request-id"]
        assert message["id"].startswith("msg_")
        assert message["content"] == [{"type": "text", "text": text}]
        assert message["usage"]["input_tokens"] + message["usage"]["cache_read_input_tokens"] == len(prompt)
        assert message["usage"]["output_tokens"] == len(ids)
        assert message["stop_reason"] == ("max_tokens" if len(ids) == 30 else "end_turn")

        answer = await client.post("/v1/messages", json=ASKED | {"stream": True})
        assert answer.headers["content-type"].startswith("text/event-stream")
        found = events(answer.text)
        deltas = [data["delta"]["text"] for name, data in found if name == "content_block_delta"]
        assert "".join(deltas) == text
        assert [name for name, _ in found if name != "content_block_delta"] == [
            "message_start", "ping", "content_block_start", "content_block_stop", "message_delta", "message_stop",
        ]  # fmt: skip
        assert dict(found)["message_delta"]["usage"] == message["usage"]


async def test_errors_have_the_form_of_the_api(folder: Path) -> None:
    async with served(folder) as client:
        cases = [
            (ASKED | {"max_tokens": 0}, 400, "invalid_request_error", "max_tokens"),
            (ASKED | {"model": "gpt-9"}, 404, "not_found_error", "gpt-9"),
            (ASKED | {"messages": []}, 400, "invalid_request_error", "messages"),
        ]
        for body, status, kind, word in cases:
            answer = await client.post("/v1/messages", json=body)
            assert answer.status_code == status
            error = answer.json()
            assert (error["type"], error["error"]["type"]) == ("error", kind)
            assert word in error["error"]["message"]
            assert "details" not in error["error"]
        # The package's tool runner goes on without a thread where an error says this.
        answer = await client.post("/v1/messages", json=ASKED | {"thread": {"type": "create"}})
        assert answer.status_code == 400
        assert answer.json()["error"]["details"] == {"error_code": "thread_unsupported_request"}
        answer = await client.get("/v1/messages")
        assert (answer.status_code, answer.json()["type"]) == (405, "error")
        assert answer.headers["allow"] == "OPTIONS, POST"


async def test_the_key_may_come_as_anthropics_clients_send_it(folder: Path) -> None:
    async with served(folder, api_keys=("secret",)) as client:
        for headers, status in (
            ({"x-api-key": "secret"}, 200),
            ({"Authorization": "Bearer secret", "x-api-key": "wrong"}, 200),
            ({"x-api-key": "wrong"}, 401),
            ({"Authorization": "Bearer wrong", "x-api-key": "secret"}, 401),
            ({}, 401),
        ):
            answer = await client.post("/v1/messages", json=ASKED, headers=headers)
            assert answer.status_code == status, headers
            if status == 401:
                assert answer.json()["error"]["type"] == "authentication_error"


async def test_tokens_are_counted_as_they_are_served(folder: Path) -> None:
    long = {"role": "user", "content": "hello " * 4000}
    async with served(folder) as client:
        for extra in ({}, {"system": "be brief"}, {"max_tokens": None}):
            asked = ASKED | extra
            count = await client.post("/v1/messages/count_tokens", json=asked)
            usage = (await client.post("/v1/messages", json=asked | {"max_tokens": 1})).json()["usage"]
            assert count.json() == {"input_tokens": usage["input_tokens"] + usage["cache_read_input_tokens"]}
        for body, status in (({"messages": [long]}, 400), ({"messages": []}, 400), ({"model": "x"}, 404)):
            refused = await client.post("/v1/messages/count_tokens", json=ASKED | body)
            assert (refused.status_code, refused.json()["type"]) == (status, "error")


async def test_a_stream_whose_client_leaves_is_cancelled(folder: Path) -> None:
    async with served(folder) as client:
        body = ASKED | {"stream": True, "max_tokens": 2000, "ignore_eos": True}
        async with client.stream("POST", "/v1/messages", content=json.dumps(body)) as answer:
            async for _ in answer.aiter_lines():
                break
