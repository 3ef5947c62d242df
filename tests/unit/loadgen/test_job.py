"""`baton bench serve` from its options to its files, against servers of the test."""

import json
import time

import pytest
from rich.console import Console

from baton.errors import BadConfig, Unavailable
from loadgen.client import Asking, Server
from loadgen.clusters import Shape
from loadgen.compare import Comparison, Measured, Schedule, Target, alone_load, compare
from loadgen.counters import counted, during, processor_s
from loadgen.job import Job, extra_of, headers_of, named_servers
from loadgen.load import Request, closed, same_size
from loadgen.objectives import Limits
from loadgen.plan import Plan
from loadgen.report import table
from tests.support.openai_stream import OpenAiStream, openai_stream


def job(*urls: str, **more) -> Job:
    plan = Plan(prompt_tokens=8, output_tokens=3, rates=(50.0,), streams=(2,), num_requests=4, limit_s=60.0)
    return Job(**{"urls": urls, "plan": plan, "headers": {}, "extra": {}, "limits": Limits(ttft_s=60.0), **more})


async def test_several_servers_get_the_same_requests_and_one_record_has_all():
    async with openai_stream(token_s=0.001) as first, openai_stream(fault="429") as second:
        console = Console(record=True, width=400)
        comparison = await job(f"ours={first.url}/v1", second.url, rounds=2).run(console)
        prompts = [[body["prompt"] for body in fake.bodies] for fake in (first, second)]
    # The first server's prompts begin with the single requests.
    assert len(prompts[0]) == 3 + 16
    assert sorted(prompts[0][3:]) == sorted(prompts[1])
    record = json.loads(json.dumps(comparison.as_json()))
    assert [(r["target"], r["round"]) for r in record["runs"]] == [
        ("ours", 0), (second.url, 0), ("ours", 0), (second.url, 0),
        (second.url, 1), ("ours", 1), (second.url, 1), ("ours", 1),
    ]  # fmt: skip
    found = {(f["target"], f["load"]): f for f in record["figures"]}
    assert found["ours", "8+3 50/s"]["whole"] == 8
    assert found["ours", "8+3 50/s"]["goodput_requests_s"] > 0
    assert found[second.url, "8+3 2 streams"]["refused"] == 8
    assert all(len(run["requests_sent"]) == 4 for run in record["runs"])
    assert all(0 < run["generator_cores"] < 2 for run in record["runs"])
    assert [point["prompt_tokens"] for point in record["alone"]] == [8]
    console.print(table(comparison))
    said = console.export_text()
    assert "round 1  8+3 2 streams  ours: 4 of 4 requests" in said
    assert "8/8" in said


async def test_a_server_that_cannot_answer_stops_the_run_before_it():
    async with openai_stream(fault="503") as fake:
        with pytest.raises(Unavailable, match="a single request failed: HTTP 503"):
            await job(fake.url).run(Console(quiet=True))
    with pytest.raises(Unavailable, match="no answer to GET /v1/models"):
        await job(fake.url).run(Console(quiet=True))


def target(fake: OpenAiStream, name: str) -> Target:
    return Target(name, Server.parse(fake.url), Asking("fake", {}, {}))


async def test_no_run_begins_that_would_end_after_the_time_there_is():
    load = closed("x", same_size(1, 4, 1), 1, 60.0)
    told: list[Measured] = []
    async with openai_stream(prompt_s=0.5) as fake:
        targets = [target(fake, "a"), target(fake, "b")]
        schedule = Schedule(lambda _: [load], 50, "s", until_s=time.monotonic() + 2.0)
        began_s = time.monotonic()
        runs = await compare(targets, schedule, told.append, lambda *_: lambda _: None)
    assert 1 <= len(runs) <= 4
    assert tuple(told) == runs
    # The first one may be long: nothing is known of it before.
    assert time.monotonic() - began_s < 30


def test_single_requests_are_as_long_as_those_of_the_load():
    requests = [Request(prompt, 64) for prompt in range(1, 102)]
    load = alone_load(requests)
    assert sorted({r.prompt_tokens for r in load.requests}) == [1, 26, 51, 76, 91, 101]
    assert (load.streams, len(load.requests)) == (1, 18)
    assert {r.prompt_tokens for r in alone_load(same_size(5, 8, 1)).requests} == {8}


async def test_a_server_that_is_not_baton_has_no_counters():
    async with openai_stream() as fake:
        assert await counted(Server.parse(fake.url)) is None
        assert await processor_s(Server.parse(fake.url)) is None
    assert during(None, {"a": 1.0}) == {}
    assert during({"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 5.0, "c": 1.0}) == {"b": 3.0, "c": 1.0}


def test_pooled_figures_are_over_all_rounds():
    comparison = Comparison((), None, Limits(), ())
    assert comparison.pooled() == {}


def test_wrong_options_are_refused_with_their_name():
    assert named_servers(["a b=http://h:1", "http://h:2"]) == {"a b": Server("h", 1), "http://h:2": Server("h", 2)}
    for urls, said in ((["h:1"], "--url is 'h:1'"), (["a=http://h:1"] * 2, "called 'a'")):
        with pytest.raises(BadConfig, match=said):
            named_servers(urls)
    for asked, said in (
        ({}, "nothing to measure"),
        ({"shapes": (Shape("a", ()),)}, "--cluster needs --model"),
        ({"shapes": (Shape("a", ()),), "model": "m", "urls": ("a=http://h:1",)}, "two servers are called 'a'"),
    ):
        with pytest.raises(BadConfig, match=said):
            job(**asked)
    assert headers_of(["x-slo-ttft-ms: 500"], "one two") == {"Authorization": "Bearer one", "x-slo-ttft-ms": "500"}
    for header in ("nothing", ":x", "a:b\r\nc:d"):
        with pytest.raises(BadConfig, match="--header is"):
            headers_of([header], "")
    assert extra_of('{"a": null}') == {"a": None}
    for text in ("{", "[]"):
        with pytest.raises(BadConfig, match="--extra is"):
            extra_of(text)
