"""Requests a minute and sequences at once of one API key: what is refused, with which time, and who is not touched."""

from __future__ import annotations

import asyncio

import httpx
import pytest

import baton
from baton.api_keys import ApiKey
from baton.errors import InvalidRequest, Overloaded, RateLimited, from_code
from router.dispatch.key_limits import KeyLimits
from tests.support.fake_nodes import FakeCluster
from tests.support.router import router_beside, until

BODY = {"model": "fake", "prompt": [1, 2, 3], "max_tokens": 2}


def limits_of(text: str) -> KeyLimits:
    return KeyLimits({"c": ApiKey.parse(text)}, 100.0)


def taken(limits: KeyLimits, now: float, tries: int = 1000) -> int:
    for number in range(tries):
        try:
            limits.take("c", now)
        except RateLimited:
            return number
    return tries


def test_a_minutes_requests_may_come_at_once_and_then_evenly() -> None:
    limits = limits_of("a:1/60=k")
    assert taken(limits, 100.0) == 60
    assert taken(limits, 100.9) == 0
    assert taken(limits, 101.0) == 1
    assert taken(limits, 111.0) == 10
    assert taken(limits, 10_000.0) == 60, "what was not used is not saved up beyond a minute's"
    assert taken(limits, 9_000.0) == 0, "a clock that goes back gives nothing"


@pytest.mark.parametrize("per_minute", [1, 7, 600, 999_999_999])
def test_the_time_that_is_told_is_enough_and_not_much_more(per_minute: int) -> None:
    limits = limits_of(f"a:1/{per_minute}=k")
    now = 100.0
    for _ in range(per_minute if per_minute <= 600 else 0):
        limits.take("c", now)
    if per_minute > 600:
        limits._buckets["c"] = (0.0, now)
    with pytest.raises(RateLimited, match=f"the API key a may send {per_minute} requests a minute") as refused:
        limits.take("c", now)
    wait_s = refused.value.retry_after_s
    assert wait_s is not None
    assert 0 < wait_s <= 60.0 / per_minute * 1.001
    with pytest.raises(RateLimited):
        limits.take("c", now + wait_s * 0.9)
    limits.take("c", now + wait_s * 1.001)


def test_sequences_at_once() -> None:
    limits = limits_of("a:1/0/8=k")
    limits.check_running("c", 0, 8)
    limits.check_running("c", 7, 1)
    for running, more in ((1, 8), (8, 1)):
        with pytest.raises(RateLimited, match="may have 8 sequences at once"):
            limits.check_running("c", running, more)
    with pytest.raises(InvalidRequest, match="may have 8 sequences at once, and 9 were asked for in one request"):
        limits.check_running("c", 0, 9)
    assert taken(limits, 100.0) == 1000, "0: no limit of the rate"
    limits.take("another", 100.0)
    limits.check_running("another", 10**6, 10**6)


def test_it_is_an_overload_to_who_knows_no_better() -> None:
    assert issubclass(RateLimited, Overloaded)
    assert isinstance(from_code("RateLimited", "x"), RateLimited)


async def test_one_key_is_refused_over_both_faces_and_the_other_is_served() -> None:
    keys = ("slow:1/2/3=slow", "free:1=free")
    async with (
        FakeCluster(mixed=1) as cluster,
        router_beside(cluster, api_keys=keys) as router,
        httpx.AsyncClient(base_url=router.http or "") as http,
        baton.AsyncClient(router.grpc or "", api_key="slow") as slow,
    ):
        head = {"authorization": "Bearer slow"}
        assert (await http.post("/v1/completions", json=BODY, headers=head)).status_code == 200
        await slow.complete([1, 2, 3], max_tokens=2)
        answer = await http.post("/v1/completions", json=BODY, headers=head)
        assert answer.status_code == 429
        assert answer.json()["error"]["code"] == "rate_limit_exceeded"
        assert 1 <= int(answer.headers["retry-after"]) <= 31
        with pytest.raises(RateLimited) as refused:
            await slow.complete([1, 2, 3], max_tokens=2)
        assert 20 < (refused.value.retry_after_s or 0) <= 30
        assert router.metrics.refusals.children[("RateLimited",)].value == 2
        free = {"authorization": "Bearer free"}
        for _ in range(5):
            assert (await http.post("/v1/completions", json=BODY, headers=free)).status_code == 200


async def test_choices_count_as_the_sequences_that_they_are_and_ended_ones_make_room() -> None:
    async with (
        FakeCluster(mixed=1) as cluster,
        router_beside(cluster, api_keys=("few:1/0/3=few",)) as router,
        httpx.AsyncClient(base_url=router.http or "", headers={"authorization": "Bearer few"}) as http,
    ):
        never = await http.post("/v1/completions", json={**BODY, "n": 4})
        assert (never.status_code, never.json()["error"]["param"]) == (400, "n"), "no later try fits better"
        cluster["mixed-0"].runner.hold()
        held = [asyncio.create_task(http.post("/v1/completions", json=BODY)) for _ in range(3)]
        await until(lambda: router.dispatcher.scheduler.num_in_flight == 3)
        assert (await http.post("/v1/completions", json=BODY)).status_code == 429
        cluster["mixed-0"].runner.resume()
        assert [(await x).status_code for x in held] == [200] * 3
        assert (await http.post("/v1/completions", json={**BODY, "n": 3})).status_code == 200
