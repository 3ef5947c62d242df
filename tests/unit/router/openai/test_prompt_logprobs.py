"""Prompts that are scored, as clients of both faces see them, against fake nodes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

import baton
from baton.client import Delta, Finished
from baton.errors import InvalidRequest
from baton.types import PositionLogprobs, SamplingParams, SequenceSpec
from engine.fake import expected_scores
from router.serve import Router
from router.text.tokenizer import Tokenizer
from tests.support.fake_nodes import FakeCluster, FakeConfig
from tests.support.router import VOCAB_SIZE, baseline, quick, router_beside, write_model_folder

CONFIG = FakeConfig(vocab_size=VOCAB_SIZE, max_model_tokens=2048)
TEXT = "the quick brown fox"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    loaded = Tokenizer.load(folder)
    assert loaded is not None
    return loaded


@asynccontextmanager
async def served(
    folder: Path, config: FakeConfig = CONFIG, prefill: int = 1
) -> AsyncIterator[tuple[Router, FakeCluster]]:
    async with FakeCluster(config, prefill=prefill, decode=1) as cluster:
        async with router_beside(cluster, model_folder=folder, timing=quick) as router:
            yield router, cluster
        await baseline(cluster)


@asynccontextmanager
async def sdk(router: Router) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{router.http}/v1", api_key="none", max_retries=0) as client:
        yield client


def scores(prompt: tuple[int, ...], num_top: int) -> list[PositionLogprobs]:
    sampling = SamplingParams(max_tokens=1, seed=0, prompt_logprobs=num_top)
    return expected_scores(SequenceSpec("a", prompt, sampling), CONFIG.layout, VOCAB_SIZE)


async def test_echo_with_logprobs_whole_and_streamed(folder: Path, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode(TEXT, add_special_tokens=True)
    wanted = [p.chosen.logprob for p in scores(prompt, 2)]
    asked: dict[str, Any] = {
        "model": "tiny", "prompt": TEXT, "max_tokens": 3, "seed": 5, "logprobs": 2, "echo": True, "n": 2,
        "extra_body": {"ignore_eos": True},
    }  # fmt: skip
    async with served(folder) as (router, _), sdk(router) as client:
        whole = await client.completions.create(**asked)
        unasked = await client.completions.create(**{**asked, "echo": False})
        chunks = [c async for c in await client.completions.create(**asked, stream=True)]
    for number, choice in enumerate(whole.choices):
        found, alone = choice.logprobs, unasked.choices[number]
        assert found is not None
        assert alone.logprobs is not None
        assert choice.text == TEXT + alone.text
        assert found.token_logprobs == [None, *wanted, *(alone.logprobs.token_logprobs or ())]
        assert found.tokens is not None
        assert found.top_logprobs is not None
        assert found.text_offset is not None
        # The beginning of sequence is a token without text.
        assert found.tokens[0] == ""
        assert "".join(found.tokens[: len(prompt)]) == TEXT
        for offset, name in zip(found.text_offset, found.tokens, strict=True):
            assert choice.text[offset:].startswith(name)
        assert found.top_logprobs[0] is None
        assert all(2 <= len(top) <= 3 for top in found.top_logprobs[1:])
        parts = [c.choices[0] for c in chunks if c.choices[0].index == number]
        assert "".join(part.text for part in parts) == choice.text
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            streamed = [x for part in parts if part.logprobs is not None for x in getattr(part.logprobs, name)]
            assert streamed == getattr(found, name), name


async def test_a_prompt_alone(folder: Path, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode(TEXT, add_special_tokens=True)
    async with served(folder) as (router, _), sdk(router) as client:
        found = await client.completions.create(model="tiny", prompt=[*prompt], max_tokens=0, logprobs=0, echo=True)
        choice = found.choices[0]
        assert (choice.text, choice.finish_reason) == (TEXT, "length")
        assert choice.logprobs is not None
        assert choice.logprobs.token_logprobs == [None, *(p.chosen.logprob for p in scores(prompt, 0))]
        assert found.usage is not None
        assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (len(prompt), 0)
        repeated = await client.completions.create(model="tiny", prompt=TEXT, max_tokens=0, echo=True, stream=True)
        texts = [c.choices[0].text async for c in repeated]
        assert "".join(texts) == TEXT
        single = await client.completions.create(model="tiny", prompt=[5], max_tokens=0, logprobs=1, echo=True)
        assert single.choices[0].logprobs is not None
        assert single.choices[0].logprobs.token_logprobs == [None]


@pytest.mark.parametrize("num_blocks", [256, 4])
async def test_a_prompt_that_fills_the_context(folder: Path, num_blocks: int) -> None:
    """That of the model, or all the memory of a node."""
    config = replace(CONFIG, max_model_tokens=64 if num_blocks == 256 else 2048, num_blocks=num_blocks, block_tokens=16)
    full = tuple(3 + i % 90 for i in range(64))
    async with served(folder, config) as (router, _), sdk(router) as client, baton.AsyncClient(router.grpc) as grpc:
        asked: dict[str, Any] = {"model": "tiny", "prompt": [*full], "echo": True, "logprobs": 0}
        found = await client.completions.create(**asked, max_tokens=0)
        assert found.choices[0].logprobs is not None
        assert found.choices[0].logprobs.token_logprobs == [None, *(p.chosen.logprob for p in scores(full, 0))]
        alone = await grpc.complete([*full], prompt_only=True, prompt_logprobs=0)
        assert alone.prompt_logprobs == tuple(scores(full, 0))
        # Shortened to what fits, it fills the context.
        cut = await client.completions.create(
            **asked | {"prompt": [7, *full]}, max_tokens=0, extra_body={"truncate_prompt_tokens": -1}
        )
        assert cut.choices[0].logprobs == found.choices[0].logprobs
        with pytest.raises(openai.BadRequestError, match="context length is 64 tokens") as refused:
            await client.completions.create(**asked | {"prompt": [*full, 5]}, max_tokens=0)
        assert refused.value.code == "context_length_exceeded"
        # One that generates has no room.
        with pytest.raises(openai.BadRequestError, match="context length is 64 tokens"):
            await client.completions.create(**asked, max_tokens=1)


async def test_prompt_logprobs_in_both_endpoints(folder: Path, tokenizer: Tokenizer) -> None:
    async with served(folder) as (router, _), httpx.AsyncClient(base_url=f"{router.http}/v1", timeout=10) as client:
        body = {"prompt": TEXT, "max_tokens": 2, "prompt_logprobs": 2, "seed": 1}
        completion = (await client.post("/completions", json=body)).json()
        messages = [{"role": "user", "content": "hello"}]
        chat = {"messages": messages, "max_tokens": 2, "prompt_logprobs": 1, "n": 2, "return_token_ids": True}
        answer = (await client.post("/chat/completions", json=chat)).json()
    prompt = tokenizer.encode(TEXT, add_special_tokens=True)
    found = completion["choices"][0]["prompt_logprobs"]
    assert found[0] is None
    for report, position in zip(found[1:], scores(prompt, 2), strict=True):
        chosen = position.chosen
        first = report[str(chosen.token_id)]
        assert next(iter(report)) == str(chosen.token_id)
        assert (first["logprob"], first["rank"]) == (chosen.logprob, position.rank)
        assert first["decoded_token"] == tokenizer.token_name(chosen.token_id)
        tops = [(i, t) for i, t in enumerate(position.top, start=1) if t.token_id != chosen.token_id]
        assert [(report[str(t.token_id)]["logprob"], report[str(t.token_id)]["rank"]) for i, t in tops] == [
            (t.logprob, i) for i, t in tops
        ]
    assert "prompt_logprobs" not in answer["choices"][0]
    assert len(answer["prompt_logprobs"]) == len(answer["prompt_token_ids"])
    ids = tuple(answer["prompt_token_ids"])
    assert [report[str(i)]["logprob"] for i, report in zip(ids[1:], answer["prompt_logprobs"][1:], strict=True)] == [
        p.chosen.logprob for p in scores(ids, 1)
    ]


async def test_grpc_gets_them_before_the_output(folder: Path, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode(TEXT, add_special_tokens=True)
    async with served(folder) as (router, _), baton.AsyncClient(router.grpc) as client:
        whole = await client.complete(TEXT, max_tokens=3, seed=2, prompt_logprobs=2)
        assert whole.prompt_logprobs == tuple(scores(prompt, 2))
        plain = await client.complete(TEXT, max_tokens=3, seed=2)
        assert (plain.token_ids, plain.prompt_logprobs) == (whole.token_ids, ())
        alone = await client.complete(list(prompt), prompt_only=True, prompt_logprobs=0)
        assert alone.prompt_logprobs == tuple(scores(prompt, 0))
        assert (alone.text, alone.token_ids, alone.usage.completion_tokens) == ("", (), 0)
        with pytest.raises(InvalidRequest, match="prompt_only asks for nothing"):
            await client.complete(TEXT, prompt_only=True)


async def test_scores_of_a_prompt_whose_node_dies_come_once(folder: Path) -> None:
    """The first node is lost in the middle of the prompt, and another one begins anew."""
    prompt = tuple(3 + i % 90 for i in range(1500))
    slow = replace(CONFIG, max_batch_tokens=100, prefill_token_s=0.0005)
    async with served(folder, slow, prefill=2) as (router, cluster), baton.AsyncClient(router.grpc) as client:
        found: list[PositionLogprobs] = []
        relay = None
        async for part in client.generate(list(prompt), max_tokens=2, seed=1, prompt_logprobs=1):
            if isinstance(part, Delta):
                if not found:
                    busy = next(n for n in (cluster["prefill-0"], cluster["prefill-1"]) if n.used_blocks)
                    await busy.die()
                found += part.prompt_logprobs
            elif isinstance(part, Finished):
                relay = part.relay
        assert found == scores(prompt, 1)
        assert relay is not None
        assert relay.attempts == 2


def test_the_fakes_scores_depend_on_the_tokens_before() -> None:
    one, other = scores((1, 2, 3, 4), 1), scores((9, 2, 3, 4), 1)
    assert one[0] != other[0]
    assert replace(one[0], top=()) == scores((1, 2, 3, 4), 0)[0]
