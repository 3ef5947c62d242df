"""Requests to a server that streams, and to those that fail."""

import asyncio
import time

import pytest

from baton.errors import BadConfig
from loadgen.client import Asking, Server, ask, get, model_of, seconds_since
from loadgen.load import Request, closed, poisson, same_size
from loadgen.run import Event, Outcome, run
from tests.support.openai_stream import OpenAiStream, openai_stream

ASKING = Asking("fake", {"x-slo-ttft-ms": "500"}, {"priority": 2, "ignore_eos": None}, keeps_ids=True)


async def one(fake: OpenAiStream, num_tokens: int = 4, due_s: float = 0.0):
    body = ASKING.body([7, 8], num_tokens)
    clock = seconds_since(time.perf_counter())
    return await ask(Server.parse(fake.url), ASKING, body, 3, Request(2, num_tokens), due_s, clock)


async def test_tokens_are_stamped_when_they_come():
    async with openai_stream(prompt_s=0.2, token_s=0.1) as fake:
        answer = await one(fake)
    assert (answer.status, answer.error, answer.number) == (200, None, 3)
    assert answer.token_ids == (7, 8, 9, 10)
    assert len(answer.stamps_s) == 4
    # A loaded machine is late, never early.
    assert answer.ttft_s >= 0.2
    assert answer.e2e_s >= 0.5
    assert len(answer.gaps_s) == 3
    assert answer.e2e_s == pytest.approx(answer.ttft_s + sum(answer.gaps_s))
    assert answer.tbt_s == pytest.approx(sum(answer.gaps_s) / 3)


async def test_headers_and_extra_fields_go_along_and_null_takes_a_field_out():
    async with openai_stream() as fake:
        await one(fake)
    assert fake.headers[0]["x-slo-ttft-ms"] == "500"
    assert fake.bodies[0] == {
        "model": "fake", "prompt": [7, 8], "max_tokens": 4, "temperature": 0, "stream": True,
        "return_token_ids": True, "priority": 2,
    }  # fmt: skip


async def test_time_to_first_token_counts_from_when_it_was_due():
    async with openai_stream() as fake:
        assert (await one(fake, due_s=-5.0)).ttft_s > 5.0


async def test_without_ids_an_event_with_text_is_a_token():
    async with openai_stream(fault="text") as fake:
        answer = await one(fake)
    assert (len(answer.stamps_s), answer.token_ids, answer.error) == (4, (), None)


@pytest.mark.parametrize(
    ("fault", "status", "num_tokens", "said"),
    [
        ("503", 503, 0, 'HTTP 503: {"error": "busy"}'),
        ("cut", 200, 1, "closed the connection before the end"),
        ("few", 200, 3, "3 tokens, expected 4"),
        ("event", 200, 3, "it went wrong"),
        ("garbage", 0, 0, "no HTTP/1.1"),
    ],
)
async def test_a_failure_is_an_answer_with_its_reason(fault, status, num_tokens, said):
    async with openai_stream(fault=fault) as fake:
        answer = await one(fake)
    assert (answer.status, len(answer.stamps_s)) == (status, num_tokens)
    assert said in answer.error


async def test_a_server_that_is_not_there_is_an_answer_too():
    async with openai_stream() as fake:
        pass
    assert "ConnectionRefusedError" in (await one(fake)).error


async def test_a_cancelled_request_closes_its_connection():
    async with openai_stream(fault="hang") as fake:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await one(fake)
        async with asyncio.timeout(30):
            await fake.left.wait()


async def test_the_model_is_the_first_that_is_listed():
    async with openai_stream() as fake:
        server = Server.parse(fake.url)
        assert await model_of(server, {}) == "fake"
        with pytest.raises(ConnectionError, match="GET /nothing: HTTP 404: not here"):
            await get(server, "/nothing")


def test_addresses():
    assert Server.parse("http://a:8000/v1/") == Server("a", 8000)
    assert Server.parse("https://a/models/v1") == Server("a", 443, "/models", is_tls=True)
    for url in ("a:8000", "ftp://a", "http://", "http://a:port"):
        with pytest.raises(BadConfig, match="URL"):
            Server.parse(url)


# -- whole loads


async def sent(load, fake, watch=lambda _: None) -> Outcome:
    return await run(load, Server.parse(fake.url), ASKING, "seed", watch)


async def test_a_closed_loop_keeps_its_streams_busy():
    async with openai_stream(token_s=0.02) as fake:
        outcome = await sent(closed("x", same_size(9, 4, 3), 3, 60.0), fake)
    assert fake.most_open == 3
    assert [answer.number for answer in outcome.whole] == list(range(9))
    assert outcome.wall_s >= 3 * 0.04


async def test_an_open_loop_does_not_wait_for_answers():
    seen = []
    async with openai_stream(prompt_s=1.0) as fake:
        outcome = await sent(poisson("x", same_size(6, 4, 1), 100.0, 60.0, "s"), fake, seen.append)
    assert len(outcome.whole) == 6
    assert fake.most_open == 6
    assert outcome.wall_s >= 1.0
    assert seen == [Event.SENT] * 6 + [Event.ANSWERED] * 6
    assert all(a.sent_s >= a.due_s == r.due_s for a, r in zip(outcome.answers, outcome.load.requests, strict=True))


async def test_an_open_loop_lasts_as_long_as_its_requests_come_at_its_rate():
    async with openai_stream() as fake:
        outcome = await sent(poisson("x", same_size(1, 4, 1), 0.1, 60.0, "s"), fake)
    assert outcome.wall_s == 10.0, "one request is no higher rate than asked for"


async def test_what_is_not_answered_in_time_is_cut_off():
    async with openai_stream(fault="hang") as fake:
        outcome = await sent(closed("x", same_size(5, 4, 3), 2, 0.3), fake)
    assert (outcome.answers, outcome.num_cut) == ((), 5)
    assert len(fake.bodies) == 2


async def test_equal_seeds_send_equal_prompts():
    load = closed("x", same_size(3, 16, 1), 1, 60.0)
    async with openai_stream() as fake:
        await sent(load, fake)
        await sent(load, fake)
    prompts = [body["prompt"] for body in fake.bodies]
    assert prompts[:3] == prompts[3:]
