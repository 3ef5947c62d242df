"""Large inputs: refused before they cost anything, worked on beside the event loop, bounded together."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, get_args, get_origin

import httpx
import pytest
from pydantic import BaseModel

from baton import errors
from baton.chat import ChatMessage
from router.config import LimitsConfig
from router.face.body import BodyReader, TooLarge, check_structure
from router.frontend.offload import Offload
from router.messages.request import MessagesBody
from router.openai.embeddings import EmbeddingBody
from router.openai.request import ChatBody, CompletionBody
from router.openai.request import read as read_fields
from router.responses.request import ResponsesBody
from router.serve import Router
from router.text.chat import ChatTemplate, Conversation
from router.text.tokenizer import Tokenizer
from tests.support.fake_nodes import FakeCluster, FakeConfig
from tests.support.router import VOCAB_SIZE, router_beside, write_model_folder

CONFIG = FakeConfig(vocab_size=VOCAB_SIZE, max_model_tokens=2048)
LIMITS = LimitsConfig()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_folder(tmp_path_factory.mktemp("models") / "tiny")


@asynccontextmanager
async def client_of(folder: Path, **settings: Any) -> AsyncIterator[tuple[httpx.AsyncClient, Router]]:
    async with (
        FakeCluster(CONFIG, prefill=1, decode=1) as cluster,
        router_beside(cluster, model_folder=folder, **settings) as router,
    ):
        assert router.http is not None
        async with httpx.AsyncClient(base_url=router.http, timeout=30) as client:
            yield client, router


# ── Structure ─────────────────────────────────────────────────────────────────────────────────────────────────────────

STRUCTURES: list[tuple[str, Any]] = [
    ("lists and objects", {"prompt": [[1]] * 10_000}),
    ("texts", {"messages": [{"role": "user", "content": "a"}] * 10_000}),
    ("values", {"prompt": [1] * 400_000}),
    ("texts", {"prompt": [""] * 40_000}),
    ("texts", {"metadata": {str(i): 1 for i in range(40_000)}}),
    ("escapes", {"prompt": "é" * 500_000}),
    ("escapes", {"prompt": '"' * 500_000}),
]


@pytest.mark.parametrize("kind", [ChatBody, CompletionBody, ResponsesBody, MessagesBody, EmbeddingBody])
def test_no_field_reports_an_error_for_each_of_many_entries(kind: type[BaseModel]) -> None:
    """Which would hold every stream up: a field's entries are checked by one call of a library."""
    num_tried = 0
    many = dict.fromkeys(map(str, range(20_000)))
    for name, field in kind.model_fields.items():
        parts = [field.annotation, *get_args(field.annotation)]
        lists = [part for part in parts if get_origin(part) in (list, dict) and get_args(part)[-1] is not Any]
        objects = [part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)]
        wrong = [list(many) if get_origin(part) is list else many for part in (*lists, *objects)]
        for value in wrong:
            num_tried += 1
            with pytest.raises(errors.InvalidRequest, match=f"{name} has 20000 entries, expected at most"):
                read_fields(kind, {name: value}, None)
    assert num_tried > 0 or kind is EmbeddingBody


@pytest.mark.parametrize(("what", "body"), STRUCTURES)
def test_a_body_of_too_many_parts_is_refused_with_their_number(what: str, body: Any) -> None:
    with pytest.raises(errors.InvalidRequest, match=rf"JSON has \d+ {what}, expected at most"):
        check_structure(json.dumps(body).encode(), LIMITS, 2048)


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "[[{,:" * 200_000},
        {"prompt": '\\"[\\\\",[' * 20_000},
        {"prompt": json.dumps({"a": [{"b": "c"}] * 3000})},
        {"prompt": [[7] * 2000] * 128},
        {"messages": [{"role": "user", "content": "text, [1, 2]"}] * 2000},
    ],
)
def test_what_texts_contain_does_not_count(body: Any) -> None:
    check_structure(json.dumps(body).encode(), LIMITS, 2048)


def test_a_long_context_may_have_more_values() -> None:
    ids = json.dumps({"prompt": [1] * 400_000}).encode()
    check_structure(ids, LIMITS, 500_000)


# ── Bytes ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def read(reader: BodyReader, chunks: list[bytes], declared: bytes | None = None) -> int:
    messages = [{"type": "http.request", "body": c, "more_body": True} for c in chunks]
    messages.append({"type": "http.request", "body": b"", "more_body": False})

    async def receive() -> Any:
        return messages.pop(0)

    headers = [] if declared is None else [(b"content-length", declared)]
    async with reader.read({"headers": headers}, receive) as content:
        return len(content)


@pytest.mark.parametrize("declared", [b"1001", b"9" * 5000, b"0001001"])
async def test_a_length_that_is_declared_is_refused_before_anything_is_read(declared: bytes) -> None:
    reader = BodyReader(LIMITS, lambda: 1000)
    with pytest.raises(TooLarge):
        async with reader.read({"headers": [(b"content-length", declared)]}, None):  # type: ignore[arg-type]
            pass
    assert await read(reader, [b"x" * 1000], b"1000") == 1000
    with pytest.raises(TooLarge):
        await read(reader, [b"x" * 600, b"x" * 600])


async def test_bodies_are_bounded_together_and_small_ones_always_get_in() -> None:
    reader = BodyReader(LimitsConfig(max_bodies_bytes=150_000), lambda: 10**6)
    large, held = [b"x" * 100_000], asyncio.Event()

    async def receive() -> Any:
        await held.wait()
        return {"type": "http.request", "body": b"", "more_body": False}

    async with reader.read({"headers": []}, lambda: _first(large, receive)):  # type: ignore[arg-type,return-value]
        with pytest.raises(errors.Overloaded) as refused:
            await read(reader, [b"x" * 100_000])
        assert refused.value.retry_after_s
        assert await read(reader, [b"x" * 10_000]) == 10_000
        held.set()
    assert await read(reader, [b"x" * 100_000]) == 100_000


async def _first(chunks: list[bytes], receive: Any) -> Any:
    if chunks:
        return {"type": "http.request", "body": chunks.pop(), "more_body": False}
    return await receive()


async def test_a_body_may_have_what_the_context_can_need(folder: Path) -> None:
    limits = LimitsConfig(least_body_bytes=10_000, body_bytes_per_token=10)
    async with client_of(folder, limits=limits) as (client, router):
        assert router.frontend.prompts.max_request_bytes == 20_480
        assert (await client.post("/v1/completions", json={"prompt": "x" * 30_000})).status_code == 413
        assert (await client.post("/v1/completions", json={"prompt": "the " * 2500})).status_code == 400


# ── Prompts ───────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_prompt_that_cannot_fit_is_refused_before_it_is_tokenized(folder: Path) -> None:
    async with client_of(folder) as (client, router):
        tokenizer = router.frontend.tokenizer
        assert tokenizer is not None
        assert tokenizer.max_chars_per_token is not None
        longest = 2048 * tokenizer.max_chars_per_token
        for body in (
            {"prompt": "x" * (longest + 1)},
            {"prompt": ["a", "x" * 3_000_000]},
            {"prompt": [7] * 3000},
            {"prompt": "ab " * 3000},
        ):
            got = await client.post("/v1/completions", json=body)
            assert (got.status_code, got.json()["error"]["code"]) == (400, "context_length_exceeded"), got.text
            assert got.json()["error"]["param"] == "prompt"
        chat = {"messages": [{"role": "user", "content": "x" * 3_000_000}]}
        got = await client.post("/v1/chat/completions", json=chat)
        assert (got.status_code, got.json()["error"]["param"]) == (400, "messages")


async def test_a_bound_on_new_tokens_is_named_as_the_client_named_it(folder: Path) -> None:
    async with client_of(folder) as (client, _):
        chat = {"messages": [{"role": "user", "content": "x"}]}
        for param in ("max_tokens", "max_completion_tokens", "min_tokens"):
            got = await client.post("/v1/chat/completions", json=chat | {param: 5000})
            error = got.json()["error"]
            assert (error["code"], error["param"]) == ("context_length_exceeded", param), error


async def test_a_large_prompt_is_answered_as_a_small_one_would_be(folder: Path) -> None:
    """What is parsed and tokenized on a thread is the same."""
    text = "the quick brown fox, " * 220
    async with client_of(folder) as (client, router):
        assert router.frontend.tokenizer is not None
        ids = list(router.frontend.tokenizer.encode(text, add_special_tokens=True))
        assert 1000 < len(ids) < 2040
        ask = {
            "seed": 3,
            "max_tokens": 4,
            "ignore_eos": True,
            "return_token_ids": True,
            "metadata": {"x": "y" * 20_000},
        }
        whole = await client.post("/v1/completions", json=ask | {"prompt": text, "echo": True})
        by_ids = await client.post("/v1/completions", json=ask | {"prompt": ids, "echo": True})
        assert whole.json()["choices"][0]["prompt_token_ids"] == ids
        assert whole.json()["choices"][0]["text"].startswith(text)
        assert by_ids.json()["choices"][0]["token_ids"] == whole.json()["choices"][0]["token_ids"]
        chat = {"messages": [{"role": "user", "content": text}], "seed": 3, "max_tokens": 4, "return_token_ids": True}
        got = await client.post("/v1/chat/completions", json=chat)
        prompt = router.frontend.tokenizer.encode(f"<s><|user|>{text}</s><|assistant|>", add_special_tokens=False)
        assert got.json()["prompt_token_ids"] == list(prompt)


async def test_a_prompt_is_not_repeated_without_bound(folder: Path) -> None:
    async with client_of(folder, limits=LimitsConfig(max_repeated=1000)) as (client, _):
        for param in ("echo", "return_token_ids"):
            body = {"prompt": [7] * 400, "max_tokens": 1, param: True}
            assert (await client.post("/v1/completions", json=body)).status_code == 200
            got = await client.post("/v1/completions", json=body | {"n": 3})
            assert (got.status_code, got.json()["error"]["param"]) == (400, param), got.text


def test_encoding_a_long_text_gives_the_interpreter_back(folder: Path) -> None:
    """Another thread goes on meanwhile; with `Tokenizer.encode` of the package it did not make a single turn."""
    tokenizer = Tokenizer.load(folder)
    assert tokenizer is not None
    turns, is_over = 0, threading.Event()

    def turn() -> None:
        nonlocal turns
        while not is_over.wait(0.001):
            turns += 1

    other = threading.Thread(target=turn)
    other.start()
    ids = tokenizer.encode("the quick brown fox jumps over the lazy dog, " * 40_000, add_special_tokens=False)
    during = turns
    is_over.set()
    other.join()
    assert len(ids) > 100_000
    assert during >= 10


def test_a_long_text_is_counted_in_pieces(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    assert tokenizer is not None
    text = "the quick brown fox " * 20_000
    num = len(tokenizer.encode(text, add_special_tokens=False))
    assert tokenizer.has_more_than(num - 1000, text)
    assert not tokenizer.has_more_than(num + 1000, text)


def test_a_template_that_writes_without_end_is_stopped() -> None:
    template = ChatTemplate("{% for i in range(100000) %}{{ messages[0].content }}{% endfor %}", {})
    with pytest.raises(errors.PromptTooLong) as refused:
        template.render(Conversation((ChatMessage("user", "x" * 1000),)), max_chars=50_000)
    assert refused.value.param == "messages"


def test_what_a_template_says_is_shortened() -> None:
    template = ChatTemplate("{{ raise_exception('no ' + messages[0].content) }}", {})
    with pytest.raises(errors.InvalidRequest, match=r"no xxx") as refused:
        template.render(Conversation((ChatMessage("user", "x" * 10**6),)))
    assert len(refused.value.message) < 400


# ── The pool ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_the_pool_refuses_when_too_many_wait_and_lets_the_loop_turn() -> None:
    pool, gate = Offload(num_threads=1, max_jobs=2), threading.Event()
    try:
        waiting = [asyncio.create_task(pool.run(lambda: gate.wait(10))) for _ in range(2)]
        await asyncio.sleep(0.01)
        with pytest.raises(errors.Overloaded) as refused:
            await pool.run(lambda: None)
        assert refused.value.retry_after_s
        gate.set()
        assert await asyncio.gather(*waiting) == [True, True]
        assert await pool.run(lambda: 7) == 7
    finally:
        gate.set()
        pool.close()


async def test_what_left_the_pool_early_still_counts_until_its_thread_is_free() -> None:
    pool, gate = Offload(num_threads=1, max_jobs=1), threading.Event()
    try:
        job = asyncio.create_task(pool.run(lambda: gate.wait(10)))
        await asyncio.sleep(0.01)
        job.cancel()
        await asyncio.wait([job])
        with pytest.raises(errors.Overloaded):
            await pool.run(lambda: None)
    finally:
        gate.set()
        pool.close()


# ── Messages ──────────────────────────────────────────────────────────────────────────────────────────────────────────

LONG = "k" * 1_000_000
REPEATERS: list[tuple[str, dict[str, Any]]] = [
    ("completions", {"prompt": "a", "model": LONG}),
    ("completions", {"prompt": "a", LONG: 1}),
    ("completions", {"prompt": "a", "stream_options": {LONG: 1}}),
    ("completions", {"prompt": "a", "request_id": LONG}),
    ("completions", {"prompt": "a", "n": LONG}),
    ("completions", {"prompt": "a", "temperature": [LONG]}),
    ("completions", {"prompt": "a", "logit_bias": {LONG: 1}}),
    ("completions", {"prompt": "a", "logit_bias": {LONG: "x"}}),
    ("completions", {"prompt": "a", "stop": [LONG]}),
    ("completions", {"prompt": {LONG: LONG}}),
    ("completions", {"prompt": "a", "suffix": LONG}),
    ("completions", {"prompt": "a", "guided_regex": LONG}),
    ("completions", {"prompt": "a", "response_format": {"type": LONG}}),
    ("chat/completions", {"messages": [{"role": LONG, "content": 7}]}),
    ("chat/completions", {"messages": [{"role": "user", "content": "a", LONG: 1}]}),
    ("chat/completions", {"messages": [{"role": "user", "content": [{"type": LONG}]}]}),
    ("chat/completions", {"messages": [LONG]}),
    ("chat/completions", {"messages": [{"role": "user", "content": "a"}], "modalities": [LONG]}),
    ("chat/completions", {"messages": [{"role": "user", "content": "a"}], "tool_choice": LONG}),
    ("chat/completions", {"messages": [{"role": "user", "content": "a"}], "verbosity": LONG}),
]


async def test_no_answer_repeats_what_the_client_sent(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with client_of(folder) as (client, _):
        for path, body in REPEATERS:
            got = await client.post(f"/v1/{path}", json=body)
            assert got.status_code in (400, 404), got.text[:300]
            assert len(got.content) < 1000, (path, got.text[:300])
        for path in ("/v1/models/" + "m" * 50_000, "/" + "m" * 50_000):
            got = await client.get(path)
            assert (got.status_code, len(got.content) < 500) == (404, True)
    assert max((len(r.getMessage()) for r in caplog.records), default=0) < 1000
