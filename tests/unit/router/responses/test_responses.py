"""The Responses API over HTTP, as the `openai` package and as plain HTTP clients see it, against fake nodes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from router.config import StoreConfig
from router.text.tokenizer import Tokenizer
from tests.support.fake_nodes import FakeCluster, FakeConfig, expected_tokens
from tests.support.router import VOCAB_SIZE, baseline, router_beside, write_model_folder

CONFIG = FakeConfig(vocab_size=VOCAB_SIZE, max_model_tokens=2048)
ASKED: dict[str, Any] = {"model": "tiny", "max_output_tokens": 30, "extra_body": {"seed": 3}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_folder(tmp_path_factory.mktemp("models") / "tiny")


@asynccontextmanager
async def served(folder: Path, **settings: Any) -> AsyncIterator[str]:
    async with FakeCluster(CONFIG, prefill=1, decode=1) as cluster:
        async with router_beside(cluster, model_folder=folder, **settings) as router:
            yield router.http or ""
        await baseline(cluster)


@asynccontextmanager
async def sdk(url: str, key: str = "none") -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as client:
        yield client


def answer(folder: Path, prompt: str) -> tuple[int, list[int], str]:
    """The prompt's number of tokens, and ids and text of an undisturbed run."""
    tokenizer = Tokenizer.load(folder)
    assert tokenizer is not None
    token_ids = tokenizer.encode(prompt, add_special_tokens=False)
    ids = expected_tokens(token_ids, 3, 30, VOCAB_SIZE, (1,))
    return len(token_ids), ids, tokenizer.decode([i for i in ids if i != 1], skip_special_tokens=True)


async def test_whole_and_streamed(folder: Path) -> None:
    num_prompt, ids, text = answer(folder, "<s><|user|>hello</s><|assistant|>")
    async with served(folder) as url, sdk(url) as client:
        whole = await client.responses.create(input="hello", **ASKED)
        assert whole.output_text == text
        assert whole.status == ("incomplete" if len(ids) == 30 else "completed")
        assert whole.usage is not None
        assert (whole.usage.input_tokens, whole.usage.output_tokens) == (num_prompt, len(ids))
        stream = await client.responses.create(input="hello", stream=True, **ASKED)
        events = [event async for event in stream]
        assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == text
        assert [e.type for e in events if e.type != "response.output_text.delta"] == [
            "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
            "response.output_text.done", "response.content_part.done", "response.output_item.done",
            f"response.{whole.status}",
        ]  # fmt: skip
        assert [e.sequence_number for e in events] == list(range(len(events)))
        last = events[-1]
        assert last.type in ("response.completed", "response.incomplete")
        assert last.response.output_text == text
        async with client.responses.stream(input="hello", **ASKED) as managed:
            assert "".join([e.delta async for e in managed if e.type == "response.output_text.delta"]) == text


async def test_a_conversation_goes_on_behind_what_is_kept(folder: Path) -> None:
    async with served(folder) as url, sdk(url) as client:
        first = await client.responses.create(input="hello", instructions="be brief", **ASKED)
        second = await client.responses.create(input="and", previous_response_id=first.id, **ASKED)
        past = f"<s><|user|>hello</s><|assistant|>{first.output_text}</s><|user|>and</s><|assistant|>"
        assert second.output_text == answer(folder, past)[2]
        spelled = [
            {"role": "user", "content": "hello"}, *[item.model_dump() for item in first.output],
            {"role": "user", "content": "and"},
        ]  # fmt: skip
        same = await client.responses.create(input=spelled, **ASKED)  # type: ignore[arg-type]
        assert same.output_text == second.output_text
        named = [{"type": "item_reference", "id": item.id} for item in first.output]
        short = [{"role": "user", "content": "hello"}, *named, {"role": "user", "content": "and"}]
        assert (await client.responses.create(input=short, **ASKED)).output_text == second.output_text  # type: ignore[arg-type]

        assert (await client.responses.retrieve(second.id)).model_dump() == second.model_dump()
        stream = await client.responses.create(input="or", previous_response_id=second.id, stream=True, **ASKED)
        last = [event async for event in stream][-1]
        assert last.type in ("response.completed", "response.incomplete")
        assert (await client.responses.retrieve(last.response.id)).output_text == last.response.output_text

        await client.responses.delete(first.id)
        for gone in (first.id, second.id):
            with pytest.raises(openai.NotFoundError) as refused:
                await client.responses.create(input="more", previous_response_id=gone, **ASKED)
            assert refused.value.param == "previous_response_id"
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(first.id)
        with pytest.raises(openai.NotFoundError) as refused:
            await client.responses.create(input=short, **ASKED)  # type: ignore[arg-type]
        assert refused.value.param == "input.1.id"
        kept_not = await client.responses.create(input="hello", store=False, **ASKED)
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(kept_not.id)


async def test_a_response_is_kept_for_its_key_alone(folder: Path) -> None:
    async with served(folder, api_keys=("one", "two")) as url, sdk(url, "one") as one, sdk(url, "two") as two:
        response = await one.responses.create(input="hello", **ASKED)
        assert (await one.responses.retrieve(response.id)).id == response.id
        for attempt in (
            two.responses.retrieve(response.id),
            two.responses.delete(response.id),
            two.responses.create(input="more", previous_response_id=response.id, **ASKED),
        ):
            with pytest.raises(openai.NotFoundError):
                await attempt


async def test_a_router_that_keeps_none_says_so(folder: Path) -> None:
    async with served(folder, store=StoreConfig(max_responses=0)) as url, sdk(url) as client:
        response = await client.responses.create(input="hello", **ASKED)
        assert response.store is False
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(response.id)


async def test_errors_and_methods(folder: Path) -> None:
    async with served(folder) as url, httpx.AsyncClient(base_url=url, timeout=10) as client:
        refused = await client.post("/v1/responses", json={"input": [], "model": "tiny"})
        assert (refused.status_code, refused.json()["error"]["type"]) == (400, "invalid_request_error")
        long = await client.post("/v1/responses", json={"input": "hello " * 4000, "model": "tiny"})
        assert (long.status_code, long.json()["error"]["code"]) == (400, "context_length_exceeded")
        assert long.json()["error"]["param"] == "input"
        for method, path, allowed in (
            ("GET", "/v1/responses", "OPTIONS, POST"),
            ("POST", "/v1/responses/resp_1", "DELETE, GET, HEAD, OPTIONS"),
        ):
            answer = await client.request(method, path)
            assert (answer.status_code, answer.headers["allow"]) == (405, allowed)
        assert (await client.get("/v1/responses/resp_1", params={"stream": "true"})).status_code == 400
