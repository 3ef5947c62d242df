"""Clients that read slowly or not at all: what is kept for them is bounded, on both faces."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton import errors
from baton.types import PositionLogprobs, TokenLogprob
from baton.v1 import common_pb2, router_pb2, router_pb2_grpc
from router.dispatch.stream import Backlog, Pacer, TokenStream
from router.turns import Turns
from tests.support.fake_nodes import FakeConfig
from tests.support.http_wire import Wire, asked, post, served
from tests.support.router import VOCAB_SIZE, until, write_model_folder

CONFIG = FakeConfig(vocab_size=VOCAB_SIZE, max_model_tokens=2048)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_folder(tmp_path_factory.mktemp("models") / "tiny")


def backlog(**limits: Any) -> Backlog:
    return Backlog(**{"max_stream_bytes": 10_000, "max_answer_bytes": 10_000, "max_bytes": 100_000, **limits})


float32 = st.floats(width=32, allow_nan=False)
token = st.builds(TokenLogprob, st.integers(0, 2**32 - 1), float32)
position = st.builds(PositionLogprobs, token, st.integers(1, 2**32 - 1), st.lists(token, max_size=20).map(tuple))


@given(st.lists(st.lists(position, min_size=1, max_size=3), min_size=1, max_size=5))
def test_what_is_packed_comes_out_as_it_was(pushes: list[list[PositionLogprobs]]) -> None:
    async def run() -> None:
        kept = backlog(max_stream_bytes=10**9)
        stream = TokenStream(Pacer(0.05, Turns(0.01)), kept)
        for positions in pushes:
            stream.push(tuple(p.chosen.token_id for p in positions), tuple(positions))
        assert kept.num_bytes > 0
        batch = await stream.next()
        assert batch.logprobs == [p for positions in pushes for p in positions]
        assert kept.num_bytes == 0

    asyncio.run(run())


async def test_only_those_that_are_behind_are_touched_when_all_keep_too_much() -> None:
    kept = backlog(max_bytes=20_000)
    streams = [TokenStream(Pacer(0.05, Turns(0.01)), kept) for _ in range(4)]
    for stream in streams[:3]:
        stream.push((7,) * 200, ())
    streams[3].push((7,), ())
    assert all(stream.complaint for stream in streams[:3])
    assert streams[3].complaint is None
    streams[0].drop()
    assert [stream.complaint is None for stream in streams] == [True] * 4
    streams[3].push((7,) * 300, ())
    assert "limit is 10000" in str(streams[3].complaint)


async def test_a_stream_that_nobody_reads_fails_and_frees_what_it_kept(folder: Path) -> None:
    async with served(folder, CONFIG, max_stream_bytes=20_000) as (router, _):
        ended = []
        router.dispatcher.records.watch(ended.append)
        wire = await Wire.open(router, buffer_bytes=4096)
        wire.writer.transport.pause_reading()  # type: ignore[attr-defined]
        body = {"prompt": [5], "max_tokens": 2000, "min_tokens": 2000, "stream": True, "logprobs": 5, "n": 2}
        wire.send(post(body, "Connection: close"))
        await until(lambda: len(ended) == 2, timeout_s=30)
        assert {type(e.outcome.error) for e in ended} == {errors.ClientTooSlow}
        assert router.dispatcher.backlog.num_bytes == 0
        wire.writer.transport.resume_reading()  # type: ignore[attr-defined]
        said = (await wire.rest()).decode()
        assert '"code": "client_too_slow"' in said
        assert "the client reads too slowly" in said
        assert said.endswith("0\r\n\r\n")


async def test_a_whole_answer_is_bounded(folder: Path) -> None:
    async with served(folder, CONFIG, max_answer_bytes=50_000) as (router, _):
        body = {"prompt": [5], "max_tokens": 500, "min_tokens": 500, "logprobs": 5, "n": 2}
        refused = await asked(router, post(body, "Connection: close"))
        assert refused.startswith(b"HTTP/1.1 400 ")
        assert b"the answer has grown beyond 50000 bytes; use stream" in refused
        await until(lambda: router.dispatcher.scheduler.num_in_flight == 0)
        assert router.dispatcher.backlog.num_bytes == 0
        fits = await asked(router, post({**body, "n": 1, "logprobs": None}, "Connection: close"))
        assert fits.startswith(b"HTTP/1.1 200 ")
        assert router.dispatcher.backlog.num_bytes == 0


@pytest.mark.parametrize("limit", ["bytes", "time"])
async def test_a_grpc_client_that_takes_nothing_is_given_up(
    folder: Path, caplog: pytest.LogCaptureFixture, limit: str
) -> None:
    caplog.set_level(logging.INFO)
    limits: dict[str, Any] = {"max_stream_bytes": 20_000} if limit == "bytes" else {"write_timeout_s": 1.0}
    async with (
        served(folder, CONFIG, **limits) as (router, _),
        grpc.aio.insecure_channel(router.grpc or "", options=[("grpc.http2.bdp_probe", 0)]) as channel,
    ):
        ended = []
        router.dispatcher.records.watch(ended.append)
        request = router_pb2.GenerateRequest(
            prompt_token_ids=router_pb2.TokenIds(token_ids=[5]),
            sampling=common_pb2.SamplingParams(max_tokens=2000, min_tokens=2000, logprobs=20),
        )
        # gRPC itself takes some hundred KiB of a connection for a client that does not read.
        calls = [router_pb2_grpc.RouterStub(channel).Generate(request) for _ in range(12)]
        for call in calls:
            await call.read()
        if limit == "bytes":
            await until(lambda: len(ended) == 12, timeout_s=60)
            assert any(isinstance(e.outcome.error, errors.ClientTooSlow) for e in ended)
        else:
            # All of it fits into the stream's limit; the task that would write it is released.
            await until(lambda: "took nothing for 1 s and is given up" in caplog.text, timeout_s=60)
            await until(lambda: router.dispatcher.backlog.num_bytes == 0, timeout_s=30)
        for call in calls:
            call.cancel()
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR] == []
