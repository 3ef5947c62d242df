"""The HTTP face, as the `openai` package and as plain HTTP clients see it, against fake nodes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from router.config import LimitsConfig
from router.serve import Router
from router.text.tokenizer import Tokenizer
from tests.support.fake_nodes import FakeCluster, FakeConfig, expected_tokens
from tests.support.router import VOCAB_SIZE, baseline, router_beside, until, write_model_folder

CONFIG = FakeConfig(vocab_size=VOCAB_SIZE, max_model_tokens=2048)


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
    folder: Path | None, config: FakeConfig = CONFIG, **settings: Any
) -> AsyncIterator[tuple[Router, FakeCluster]]:
    async with FakeCluster(config, prefill=1, decode=1) as cluster:
        async with router_beside(cluster, model_folder=folder, **settings) as router:
            yield router, cluster
        await baseline(cluster)


@asynccontextmanager
async def sdk(router: Router) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{router.http}/v1", api_key="none", max_retries=0) as client:
        yield client


@asynccontextmanager
async def plain(router: Router) -> AsyncIterator[httpx.AsyncClient]:
    assert router.http is not None
    async with httpx.AsyncClient(base_url=router.http, timeout=10) as client:
        yield client


def answer(tokenizer: Tokenizer, prompt: tuple[int, ...], seed: int, max_tokens: int) -> tuple[list[int], str]:
    """Ids and text of an undisturbed run; the end-of-sequence token is an id but no text."""
    ids = expected_tokens(prompt, seed, max_tokens, VOCAB_SIZE, (1,))
    return ids, tokenizer.decode([i for i in ids if i != 1], skip_special_tokens=True)


async def test_completion_whole_and_streamed(folder: Path, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode("the quick brown", add_special_tokens=True)
    ids, text = answer(tokenizer, prompt, 11, 40)
    async with served(folder) as (router, _), sdk(router) as client:
        whole = await client.completions.create(model="tiny", prompt="the quick brown", max_tokens=40, seed=11)
        assert whole.choices[0].text == text
        assert whole.usage is not None
        assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(prompt), len(ids))
        stream = await client.completions.create(
            model="tiny", prompt="the quick brown", max_tokens=40, seed=11, stream=True,
            stream_options={"include_usage": True}, extra_body={"return_token_ids": True},
        )  # fmt: skip
        chunks = [c async for c in stream]
        assert "".join(c.choices[0].text for c in chunks if c.choices) == text
        assert [i for c in chunks if c.choices for i in c.choices[0].token_ids] == ids  # type: ignore[attr-defined]
        assert chunks[0].choices[0].prompt_token_ids == list(prompt)  # type: ignore[attr-defined]
        reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
        assert reasons[-1] in ("length", "stop")
        assert not any(reasons[:-1])
        assert chunks[-1].usage == whole.usage
        assert all(c.usage is None for c in chunks[:-1])


async def test_running_usage_counts_up_with_the_tokens_of_each_chunk(folder: Path, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode("the quick brown", add_special_tokens=True)
    async with served(folder) as (router, _), sdk(router) as client:
        stream = await client.completions.create(
            model="tiny", prompt="the quick brown", max_tokens=40, seed=11, stream=True,
            stream_options={"include_usage": True, "continuous_usage_stats": True},  # type: ignore[typeddict-unknown-key]
            extra_body={"return_token_ids": True},
        )  # fmt: skip
        num_tokens = 0
        chunks = [c async for c in stream]
        for chunk in chunks[:-1]:
            num_tokens += len(chunk.choices[0].token_ids)  # type: ignore[attr-defined]
            assert chunk.usage is not None
            assert (chunk.usage.prompt_tokens, chunk.usage.completion_tokens) == (len(prompt), num_tokens)
            assert chunk.usage.total_tokens == len(prompt) + num_tokens
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == num_tokens > 0


async def test_chat_whole_and_streamed(folder: Path, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode("<s><|user|>hel\nlo</s><|assistant|>", add_special_tokens=False)
    _, text = answer(tokenizer, prompt, 3, 30)
    messages: list[Any] = [
        {"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]}
    ]
    async with served(folder) as (router, _), sdk(router) as client:
        whole = await client.chat.completions.create(
            model="tiny", messages=messages, max_completion_tokens=30, seed=3, extra_body={"return_token_ids": True}
        )
        assert whole.choices[0].message.role == "assistant"
        assert whole.choices[0].message.content == text
        assert whole.prompt_token_ids == list(prompt)  # type: ignore[attr-defined]
        stream = await client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=30, seed=3, stream=True, stream_options={"include_usage": True}
        )
        chunks = [c async for c in stream]
        assert chunks[0].choices[0].delta.role == "assistant"
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
        assert chunks[-1].usage == whole.usage


async def test_several_choices_have_seeds_of_their_own(folder: Path, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode("abc", add_special_tokens=True)
    texts = [answer(tokenizer, prompt, 5 + i, 20)[1] for i in range(2)]
    async with served(folder) as (router, _), sdk(router) as client:
        whole = await client.completions.create(model="tiny", prompt="abc", n=2, best_of=2, seed=5, max_tokens=20)
        assert [c.text for c in whole.choices] == texts
        stream = await client.completions.create(model="tiny", prompt="abc", n=2, seed=5, max_tokens=20, stream=True)
        streamed = ["", ""]
        async for chunk in stream:
            streamed[chunk.choices[0].index] += chunk.choices[0].text
        assert streamed == texts
        chat = await client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "x"}], n=2, seed=5, max_tokens=20
        )
        assert len({c.message.content for c in chat.choices}) == 2


async def test_prompts_in_every_form(folder: Path, tokenizer: Tokenizer) -> None:
    ids = list(tokenizer.encode("abc", add_special_tokens=True))
    async with served(folder) as (router, _), sdk(router) as client:
        forms: list[Any] = ["abc", ["abc"], ids, [ids], ["abc", "abc"], [ids, ids]]
        texts = []
        for form in forms:
            done = await client.completions.create(model="tiny", prompt=form, seed=1, max_tokens=8)
            texts += [c.text for c in done.choices]
            assert done.usage is not None
            assert done.usage.prompt_tokens == len(ids) * len(done.choices)
        assert len(texts) == 8
        assert len(set(texts)) == 1, "the same prompt with the same seed"
        echoed = await client.completions.create(model="tiny", prompt="abc", seed=1, max_tokens=8, echo=True)
        assert echoed.choices[0].text == "abc" + texts[0]


async def test_stop_strings_cut_the_text(folder: Path, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode("abc", add_special_tokens=True)
    ids, text = answer(tokenizer, prompt, 9, 60)
    middle = len(text) // 2
    stop = text[middle : middle + 3]
    before = text[: text.index(stop)]
    async with served(folder) as (router, cluster), sdk(router) as client:
        for stops in (stop, [stop], ["never there", stop]):
            done = await client.completions.create(model="tiny", prompt="abc", seed=9, max_tokens=60, stop=stops)
            assert (done.choices[0].text, done.choices[0].finish_reason) == (before, "stop")
            assert done.choices[0].stop_reason == stop  # type: ignore[attr-defined]
            assert done.usage is not None
            assert 0 < done.usage.completion_tokens < len(ids)
        stream = await client.completions.create(
            model="tiny", prompt="abc", seed=9, max_tokens=60, stop=stop, stream=True,
            extra_body={"include_stop_str_in_output": True},
        )  # fmt: skip
        assert "".join([c.choices[0].text async for c in stream]) == before + stop
        await baseline(cluster)


async def test_logprobs_in_both_styles(folder: Path, tokenizer: Tokenizer) -> None:
    async with served(folder) as (router, _), sdk(router) as client:
        done = await client.completions.create(model="tiny", prompt="abc", seed=2, max_tokens=6, logprobs=2)
        found = done.choices[0].logprobs
        assert found is not None
        assert found.tokens is not None
        assert found.top_logprobs is not None
        assert len(found.tokens) == len(found.token_logprobs or []) == len(found.text_offset or []) == 6
        assert all(len(t) >= 2 for t in found.top_logprobs)
        stream = await client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "x"}], logprobs=True, top_logprobs=3, max_tokens=6,
            seed=2, stream=True,
        )  # fmt: skip
        entries = [
            e async for c in stream if c.choices and c.choices[0].logprobs for e in c.choices[0].logprobs.content or []
        ]
        assert len(entries) == 6
        assert all(len(e.top_logprobs) == 3 and e.bytes for e in entries)


async def test_errors_as_the_sdk_sees_them(folder: Path) -> None:
    async with served(folder) as (router, _), sdk(router) as client:
        with pytest.raises(openai.NotFoundError) as unknown:
            await client.completions.create(model="gpt-none", prompt="x")
        assert unknown.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as long:
            await client.completions.create(model="tiny", prompt=[5] * 3000)
        assert long.value.code == "context_length_exceeded"
        with pytest.raises(openai.BadRequestError) as hot:
            await client.completions.create(model="tiny", prompt="x", temperature=-1)
        assert hot.value.param == "temperature"
        with pytest.raises(openai.BadRequestError) as typed:
            await client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}], n="two")  # type: ignore[call-overload]
        assert typed.value.param == "n"


BAD_BODIES: list[tuple[str, dict[str, Any], str | None]] = [
    ("completions", {"prompt": "x", "suffix": "y"}, "suffix"),
    ("completions", {"prompt": "x", "best_of": 3}, "best_of"),
    ("completions", {"prompt": "x", "echo": True, "logprobs": 21}, "logprobs"),
    ("completions", {"prompt": []}, "prompt"),
    ("completions", {"prompt": ["a", 1]}, "prompt"),
    ("completions", {"prompt": [-1]}, "prompt"),
    ("completions", {}, "prompt"),
    ("completions", {"prompt": "x", "max_tokens": 0}, "max_tokens"),
    ("completions", {"prompt": "x", "n": 0}, "n"),
    ("completions", {"prompt": "x", "n": True}, "n"),
    ("completions", {"prompt": "x", "stop": [""]}, "stop"),
    ("completions", {"prompt": "x", "stop": 7}, "stop"),
    ("completions", {"prompt": "x", "stop": ["s"] * 17}, "stop"),
    ("completions", {"prompt": "x", "logprobs": 21}, "logprobs"),
    ("completions", {"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias"),
    ("completions", {"prompt": "x", "top_p": 0}, "top_p"),
    ("completions", {"prompt": "x", "temperature": "hot"}, "temperature"),
    ("completions", {"prompt": "x", "stream_options": {"include_usage": True}}, "stream_options"),
    ("completions", {"prompt": "x", "priority": 1_000_001}, "priority"),
    ("completions", {"prompt": "x", "priority": 1.5}, "priority"),
    ("completions", {"prompt": "x", "frobnicate": 1}, "frobnicate"),
    ("completions", {"prompt": "x", "seed": 2**70}, "seed"),
    ("chat/completions", {"messages": []}, "messages"),
    ("chat/completions", {"messages": [{"content": "x"}]}, "messages.0.role"),
    ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0"),
    ("chat/completions", {"messages": [{"role": "user", "content": "x"}], "tools": [{}]}, "tools.0.type"),
    ("chat/completions", {"messages": [{"role": "user", "content": "x"}], "top_logprobs": 2}, "top_logprobs"),
    ("chat/completions", {"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "xml"}},
     "response_format.type"),
]  # fmt: skip


async def test_bad_bodies_are_refused_by_parameter(folder: Path) -> None:
    async with served(folder) as (router, _), plain(router) as client:
        for path, body, param in BAD_BODIES:
            got = await client.post(f"/v1/{path}", json=body)
            error = got.json()["error"]
            assert (got.status_code, error["param"]) == (400, param), (body, error)
            assert error["type"] == "invalid_request_error"


async def test_http_level_errors(folder: Path) -> None:
    async with served(folder, limits=LimitsConfig(max_body_bytes=2000)) as (router, _), plain(router) as client:
        malformed = await client.post("/v1/completions", content=b'{"prompt": ')
        assert malformed.status_code == 400
        assert "JSON" in malformed.json()["error"]["message"]
        assert (await client.post("/v1/completions", content=b"[1]")).status_code == 400
        assert (await client.post("/v1/completions", content=b"\xff\xfe")).status_code == 400
        assert (await client.get("/v1/completions")).status_code == 405
        assert (await client.get("/v2")).json()["error"]["type"] == "invalid_request_error"
        assert (await client.post("/v1/completions", json={"prompt": "x" * 3000})).status_code == 413


async def test_overload_and_outage_have_their_status(folder: Path) -> None:
    limits = LimitsConfig(refuse_after_s=0.05, max_active=1)
    async with (
        served(folder, replace(CONFIG, step_s=0.02), limits=limits) as (router, cluster),
        plain(router) as client,
    ):
        body = {"prompt": "x", "max_tokens": 20, "seed": 1, "ignore_eos": True}
        first = asyncio.create_task(client.post("/v1/completions", json=body))
        await until(lambda: router.dispatcher.scheduler.num_in_flight == 1)
        refused = await client.post("/v1/completions", json=body)
        assert (refused.status_code, refused.json()["error"]["type"]) == (429, "rate_limit_error")
        assert int(refused.headers["retry-after"]) >= 1
        assert (await first).status_code == 200
        for node in cluster.nodes.values():
            await node.die()
        await until(lambda: not router.dispatcher.is_ready)
        await asyncio.sleep(0.1)
        assert (await client.post("/v1/completions", json=body)).status_code == 503
        assert (await client.get("/ready")).status_code == 503
        assert (await client.get("/health")).status_code == 200, "health is about oneself"


async def test_deadline_before_the_first_token_is_408(folder: Path) -> None:
    async with served(folder) as (router, cluster), plain(router) as client:
        for node in cluster.nodes.values():
            node.stall()
        for stream in (False, True):
            got = await client.post("/v1/completions", json={"prompt": "x", "timeout": 0.2, "stream": stream})
            assert (got.status_code, got.json()["error"]["code"]) == (408, "deadline_exceeded")
        for node in cluster.nodes.values():
            # A step that is under way keeps its blocks.
            node.resume()


async def test_error_in_mid_stream_is_an_event_without_done(folder: Path) -> None:
    async with served(folder, replace(CONFIG, step_s=0.02)) as (router, _), plain(router) as client:
        body = {"prompt": "x", "max_tokens": 1000, "timeout": 0.3, "stream": True, "seed": 1, "ignore_eos": True}
        got = await client.post("/v1/completions", json=body)
        events = [e for e in got.text.split("\n\n") if e]
        assert got.status_code == 200
        assert "choices" in json.loads(events[0].removeprefix("data: "))
        assert json.loads(events[-1].removeprefix("data: "))["error"]["type"] == "timeout_error"
        assert "[DONE]" not in got.text


@pytest.mark.parametrize("stream", [True, False])
async def test_client_that_leaves_cancels_its_request(folder: Path, stream: bool) -> None:
    async with served(folder, replace(CONFIG, step_s=0.01)) as (router, cluster):
        body = {"prompt": "x", "max_tokens": 1000, "stream": stream, "ignore_eos": True, "n": 2}
        async with plain(router) as client:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await client.post("/v1/completions", json=body)
        await until(lambda: router.dispatcher.scheduler.num_in_flight == 0, 1.0)
        await baseline(cluster)


async def test_killed_node_leaves_the_stream_unbroken(folder: Path, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode("abc", add_special_tokens=True)
    ids = expected_tokens(prompt, 4, 60, VOCAB_SIZE)
    cluster = FakeCluster(replace(CONFIG, step_s=0.005), prefill=1, decode=2)
    async with cluster, router_beside(cluster, model_folder=folder) as router, sdk(router) as client:
        stream = await client.completions.create(
            model="tiny", prompt="abc", seed=4, max_tokens=60, stream=True,
            extra_body={"return_token_ids": True, "ignore_eos": True, "return_relay": True},
        )  # fmt: skip
        got: list[int] = []
        attempts = 0
        async for chunk in stream:
            if chunk.choices:
                got += chunk.choices[0].token_ids  # type: ignore[attr-defined]
            else:
                attempts = chunk.baton["relay"]["attempts"]  # type: ignore[attr-defined]
            if len(got) >= 10 and all(not n.is_down for n in cluster.nodes.values()):
                await next(n for n in cluster.nodes.values() if n.used_blocks).die()
        assert got == ids
        assert attempts == 2


async def test_models_metrics_and_relay(folder: Path) -> None:
    async with served(folder) as (router, _), plain(router) as client, sdk(router) as openai_client:
        assert [m.id async for m in openai_client.models.list()] == ["tiny"]
        assert (await openai_client.models.retrieve("tiny")).id == "tiny"
        assert (await client.get("/v1/models/none")).status_code == 404
        body = {"prompt": "x", "max_tokens": 3, "return_relay": True, "request_id": "my-id", "ignore_eos": True}
        done = await client.post("/v1/completions", json=body)
        assert done.headers["x-request-id"] == "my-id"
        assert done.json()["id"] == "cmpl-my-id"
        assert "prefill-0 -> decode-0" in done.headers["x-baton-relay"]
        assert done.json()["baton"]["relay"]["transfer"]["transport"] == "fake"
        text = (await client.get("/metrics")).text
        for name, labels in (
            ("baton_requests_total", {"code": "", "outcome": "finished"}),
            ("baton_time_to_first_token_seconds_count", {}),
            ("baton_nodes", {"pool": "decode", "state": "ready"}),
            ("baton_placements_total", {"reason": "pools"}),
            ("vllm:request_success_total", {"engine": "0", "finished_reason": "length"}),
        ):
            everywhere = {"cluster": "default", "model_name": "tiny"}
            shown = ",".join(f'{key}="{value}"' for key, value in sorted((labels | everywhere).items()))
            assert f"\n{name}{{{shown}}} 1.0\n" in text


async def test_without_a_tokenizer_ids_work_and_text_is_refused() -> None:
    async with served(None) as (router, _), plain(router) as client:
        done = await client.post(
            "/v1/completions", json={"prompt": [1, 2], "seed": 1, "return_token_ids": True, "max_tokens": 5}
        )
        assert done.json()["choices"][0]["token_ids"] == expected_tokens([1, 2], 1, 5, VOCAB_SIZE)
        refused = await client.post("/v1/completions", json={"prompt": "text"})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "prompt")
        chat = await client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}]})
        assert (chat.status_code, chat.json()["error"]["param"]) == (400, "messages")
