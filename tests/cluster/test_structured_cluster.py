"""Structured output on real clusters: every answer is valid, and its ids are the same wherever and after whatever."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
import tokenizers

from tests.support import schema_suite
from tests.support.cluster import Cluster, StartCluster
from tests.support.schemas import FOLLOWED, REFUSED

CONCURRENCY = 16
MAX_TOKENS = 700
# The demo's model knows no JSON: what ends a part of it is made likelier, and what makes a text longer less likely.
ENDING = {'"': 20.0, "}": 15.0, "]": 15.0, "@": 17.0, "\n": -20.0, " ": -10.0}


def biases(model: Path) -> dict[str, float]:
    tokenizer = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    # The end of sequence, which is drawn only where the answer may end.
    found = {"0": 25.0}
    for text, bias in ENDING.items():
        token_ids = tokenizer.encode(text, add_special_tokens=False).ids
        if len(token_ids) == 1:
            found[str(token_ids[0])] = bias
    return found


def body(schema: Any, model: Path, number: int) -> dict[str, Any]:
    """Greedy and sampled in turn."""
    return {
        "prompt": f"Months to July: {number}", "max_tokens": MAX_TOKENS, "temperature": number % 2, "seed": number,
        "return_token_ids": True, "return_relay": True, "logit_bias": biases(model),
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
    }  # fmt: skip


async def ask_all(cluster: Cluster, bodies: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    turn = asyncio.Semaphore(CONCURRENCY)
    async with httpx.AsyncClient(base_url=cluster.http, timeout=300) as client:

        async def ask(one: dict[str, Any]) -> dict[str, Any]:
            async with turn:
                got = await client.post("/v1/completions", json=one)
            assert got.status_code == 200, (one, got.text)
            answer: dict[str, Any] = got.json()
            return answer

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(ask(one)) for one in bodies]
        return [task.result() for task in tasks]


def check(bodies: Sequence[dict[str, Any]], answers: Sequence[dict[str, Any]]) -> None:
    for asked, answer in zip(bodies, answers, strict=True):
        schema = asked["response_format"]["json_schema"]["schema"]
        choice = answer["choices"][0]
        assert choice["finish_reason"] == "stop", (schema, choice["text"])
        jsonschema.Draft202012Validator(schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER).validate(
            json.loads(choice["text"])
        )


def ids(answers: Sequence[dict[str, Any]]) -> list[list[int]]:
    return [answer["choices"][0]["token_ids"] for answer in answers]


async def through_deaths(
    cluster: Cluster, bodies: Sequence[dict[str, Any]], undisturbed: list[list[int]], num_deaths: int
) -> None:
    num_reruns = 0
    for kill in range(num_deaths):
        running = asyncio.create_task(ask_all(cluster, bodies))
        # Into the middle of it: answers take longer than this.
        await asyncio.sleep(0.3 + 0.1 * (kill % 5))
        dead = cluster.kill(f"decode-{kill % 2}")
        answers = await running
        assert ids(answers) == undisturbed, f"kill {kill}"
        num_reruns += sum(answer["baton"]["relay"]["attempts"] - 1 for answer in answers)
        await asyncio.to_thread(cluster.wait_back, dead)
    assert num_reruns > 0


async def test_answers_are_valid_and_the_same_split_whole_and_after_a_death(
    shared_cluster: StartCluster, start_cluster: StartCluster, demo_model: Path
) -> None:
    bodies = [body(schema, demo_model, n) for n, schema in enumerate(FOLLOWED[::10])]
    split = shared_cluster(demo_model, prefill=2, decode=2)
    answers = await ask_all(split, bodies)
    check(bodies, answers)
    whole = await ask_all(start_cluster(demo_model, prefill=0, decode=0, mixed=1, disaggregation="auto"), bodies)
    assert ids(whole) == ids(answers)
    await through_deaths(split, bodies * 3, ids(answers) * 3, num_deaths=1)


@pytest.mark.long
async def test_two_hundred_schemas_greedy_and_sampled(start_cluster: StartCluster, demo_model: Path) -> None:
    assert len(FOLLOWED) >= 200
    cluster = start_cluster(demo_model, prefill=1, decode=2)
    bodies = [body(schema, demo_model, n) for schema in FOLLOWED for n in (0, 1)]
    answers = await ask_all(cluster, bodies)
    check(bodies, answers)
    for schema, why in REFUSED:
        async with httpx.AsyncClient(base_url=cluster.http, timeout=60) as client:
            got = await client.post("/v1/completions", json=body(schema, demo_model, 0))
        assert got.status_code == 400, (schema, got.text)
        assert got.json()["error"]["param"] == "response_format.json_schema.schema"
        assert why in got.json()["error"]["message"], got.text


@pytest.mark.long
async def test_schemas_of_the_json_schema_test_suite_greedy_and_sampled(
    start_cluster: StartCluster, demo_model: Path
) -> None:
    schemas = schema_suite.checkable()
    assert len(schemas) >= 190
    cluster = start_cluster(demo_model, prefill=1, decode=2)
    bodies = [body(schema, demo_model, n) for schema in schemas for n in (0, 1)]
    answers = await ask_all(cluster, bodies)
    # Many of these bound nothing: an answer may go on until it is cut.
    ended = [pair for pair in zip(bodies, answers, strict=True) if pair[1]["choices"][0]["finish_reason"] == "stop"]
    assert len(ended) >= 0.9 * len(bodies)
    check([asked for asked, _ in ended], [answer for _, answer in ended])


@pytest.mark.long
async def test_twenty_schemas_through_twenty_deaths(start_cluster: StartCluster, demo_model: Path) -> None:
    cluster = start_cluster(demo_model, prefill=1, decode=2)
    bodies = [body(schema, demo_model, n) for n, schema in enumerate(FOLLOWED[3::10][:20])]
    undisturbed = ids(await ask_all(cluster, bodies))
    await through_deaths(cluster, bodies * 3, undisturbed * 3, num_deaths=20)
