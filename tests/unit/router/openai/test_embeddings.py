"""Embeddings as clients of both faces see them, against fake nodes."""

from __future__ import annotations

import math
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

import baton
from baton.errors import InvalidRequest
from baton.types import SamplingParams, SequenceSpec
from engine.fake import expected_embedding
from router.serve import Router
from router.text.tokenizer import Tokenizer
from tests.support.fake_nodes import FakeCluster, FakeConfig
from tests.support.router import VOCAB_SIZE, baseline, router_beside, write_model_folder

CONFIG = FakeConfig(vocab_size=VOCAB_SIZE, max_model_tokens=2048)
TEXTS = ["the quick brown fox", "jumps"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    loaded = Tokenizer.load(folder)
    assert loaded is not None
    return loaded


@asynccontextmanager
async def served(folder: Path, **pools: int) -> AsyncIterator[Router]:
    async with FakeCluster(CONFIG, **(pools or {"prefill": 1, "decode": 1})) as cluster:
        async with router_beside(cluster, model_folder=folder) as router:
            yield router
        await baseline(cluster)


@asynccontextmanager
async def sdk(router: Router) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{router.http}/v1", api_key="none", max_retries=0) as client:
        yield client


def embedded(prompt: tuple[int, ...], pooling: str = "last", dimensions: int = 8) -> list[float]:
    sampling = SamplingParams(max_tokens=1, seed=0, temperature=0, pooling=pooling)
    data = expected_embedding(SequenceSpec("a", prompt, sampling), CONFIG.layout)
    values = struct.unpack("<8f", data)[:dimensions]
    length = math.sqrt(sum(value * value for value in values))
    return [value / length for value in values]


async def test_openai_gets_embeddings_of_texts_and_ids(folder: Path, tokenizer: Tokenizer) -> None:
    prompts = [tokenizer.encode(text, add_special_tokens=True) for text in TEXTS]
    async with served(folder) as router, sdk(router) as client:
        # The package asks for base64 by itself.
        found = await client.embeddings.create(model="tiny", input=TEXTS)
        assert [item.index for item in found.data] == [0, 1]
        for item, prompt in zip(found.data, prompts, strict=True):
            assert item.embedding == pytest.approx(embedded(prompt), abs=1e-6)
        assert found.usage.prompt_tokens == found.usage.total_tokens == sum(map(len, prompts))
        short = await client.embeddings.create(
            model="tiny", input=list(prompts[0]), dimensions=3, encoding_format="float",
            extra_body={"pooling": "mean"},
        )  # fmt: skip
        assert short.data[0].embedding == pytest.approx(embedded(prompts[0], "mean", 3), abs=1e-6)
        with pytest.raises(openai.BadRequestError) as refused:
            await client.embeddings.create(model="tiny", input="x", dimensions=9)
        assert refused.value.param == "dimensions"


async def test_a_mean_is_of_all_tokens_and_as_long_as_the_model_makes_it(folder: Path) -> None:
    prompt = [5 + i % 40 for i in range(100)]
    body: dict[str, Any] = {"input": [prompt, prompt], "pooling": "mean", "normalize": False}
    async with served(folder) as router, httpx.AsyncClient(base_url=f"{router.http}/v1", timeout=10) as client:
        answers = [(await client.post("/embeddings", json=body)).json() for _ in range(2)]
        last = (await client.post("/embeddings", json={"input": prompt})).json()
    sampling = SamplingParams(max_tokens=1, seed=0, pooling="mean")
    data = expected_embedding(SequenceSpec("a", tuple(prompt), sampling), CONFIG.layout)
    for item in (item for answer in answers for item in answer["data"]):
        assert item["embedding"] == pytest.approx(struct.unpack("<8f", data), abs=1e-6)
    assert last["data"][0]["embedding"] == pytest.approx(embedded(tuple(prompt)), abs=1e-6)


async def test_no_decode_node_has_a_part_in_it(folder: Path) -> None:
    async with served(folder) as router, httpx.AsyncClient(base_url=f"{router.http}/v1", timeout=10) as client:
        answer = await client.post("/embeddings", json={"input": "hello"})
        assert answer.headers["x-baton-relay"].count("prefill-0")
        assert "decode-0" not in answer.headers["x-baton-relay"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": "x", "pooling": "max"}, "pooling"),
        ({"input": "x", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "x", "dimensions": 0}, "dimensions"),
        ({"input": "x", "stream": True}, "stream"),
        ({"input": [7] * 2049}, "input"),
        ({"input": [VOCAB_SIZE]}, "input"),
    ],
)
async def test_what_cannot_be_embedded_is_refused_by_name(folder: Path, body: dict[str, Any], param: str) -> None:
    async with served(folder) as router, httpx.AsyncClient(base_url=f"{router.http}/v1", timeout=10) as client:
        answer = await client.post("/embeddings", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


async def test_grpc_ends_with_the_embedding(folder: Path, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode(TEXTS[0], add_special_tokens=True)
    async with served(folder) as router, baton.AsyncClient(router.grpc) as client:
        for pooling in ("last", "mean"):
            found = await client.complete(TEXTS[0], prompt_only=True, pooling=pooling)
            assert found.embedding == pytest.approx(embedded(prompt, pooling), abs=1e-6)
            assert found.token_ids == ()
        plain = await client.complete(TEXTS[0], max_tokens=2)
        assert plain.embedding == ()
        with pytest.raises(InvalidRequest, match="pooling"):
            await client.complete(TEXTS[0], pooling="max")
