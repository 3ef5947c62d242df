"""The loads of the prefix bench: talks, unique prompts, prompts with common beginnings, several choices.

Each takes a cluster and the number of the round; equal numbers give equal prompts, different ones share nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from baton.v1 import router_pb2
from bench.cluster import Cluster, Timing, ask

DEMO = Path(__file__).resolve().parents[1] / "demo" / "model"
# Ids that all models here have.
_VOCAB_SIZE = 2000
_TIMEOUT_S = 300.0
_LOOK_EVERY_S = 0.01
_CALL_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Talks:
    """Each user asks one turn after the other, as soon as the one before is answered."""

    num_users: int = 8
    num_turns: int = 6
    system_tokens: int = 600
    said_tokens: int = 40
    answer_tokens: int = 32


@dataclass(frozen=True, slots=True)
class Unique:
    """Each client sends one request after the other; no two prompts begin alike."""

    num_clients: int = 8
    requests_each: int = 2
    prompt_tokens: int = 300
    answer_tokens: int = 32


@dataclass(frozen=True, slots=True)
class Groups:
    """Prompts that begin like those of their group, in random order, a number of clients at a time."""

    num_groups: int
    num_requests: int = 48
    num_clients: int = 6
    common_tokens: int = 600
    own_tokens: int = 40
    answer_tokens: int = 16


@dataclass(frozen=True, slots=True)
class Choices:
    num_choices: int = 8
    prompt_tokens: int = 600
    answer_tokens: int = 48


@dataclass(frozen=True, slots=True)
class Counted:
    """Of all workers, since their start."""

    computed_tokens: int
    moved_bytes: int

    @classmethod
    async def of(cls, where: Cluster) -> Counted:
        async with httpx.AsyncClient(timeout=_CALL_TIMEOUT_S) as client:
            answers = [await client.get(f"http://{address}/metrics") for address in where.metrics]
        computed = moved = 0.0
        for family in (f for a in answers for f in text_string_to_metric_families(a.raise_for_status().text)):
            for sample in family.samples:
                if sample.name == "baton_computed_tokens_total" and sample.labels["phase"] == "prefill":
                    computed += sample.value
                elif sample.name == "baton_transfer_bytes_total":
                    moved += sample.value
        return cls(round(computed), round(moved))

    def __sub__(self, other: Counted) -> Counted:
        return Counted(self.computed_tokens - other.computed_tokens, self.moved_bytes - other.moved_bytes)


@dataclass(frozen=True, slots=True)
class Round:
    """``lanes``: the requests of each client, in order."""

    lanes: tuple[tuple[Timing, ...], ...]
    num_prompt_tokens: int
    wall_s: float
    computed_tokens: int
    moved_bytes: int

    @property
    def num_output_tokens(self) -> int:
        return sum(len(t.token_ids) for lane in self.lanes for t in lane)

    def token_ids(self) -> list[list[tuple[int, ...]]]:
        return [[t.token_ids for t in lane] for lane in self.lanes]

    def samples(self) -> dict[str, Any]:
        return {
            "wall_s": self.wall_s,
            "ttft_s": [[t.ttft_s for t in lane] for lane in self.lanes],
            "cached_tokens": [[t.num_cached_tokens for t in lane] for lane in self.lanes],
            "nodes": [[f"{t.prefill_node_id} {t.decode_node_id}" for t in lane] for lane in self.lanes],
        }


# A client's requests: the timings, and how many prompt tokens were sent.
_Lane = Callable[[], Awaitable[tuple[list[Timing], int]]]


async def _round(where: Cluster, lanes: Sequence[_Lane]) -> Round:
    before, began_s = await Counted.of(where), time.perf_counter()
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_awaited(lane)) for lane in lanes]
    wall_s = time.perf_counter() - began_s
    counted = await Counted.of(where) - before
    done = [task.result() for task in tasks]
    return Round(
        tuple(tuple(timings) for timings, _ in done),
        sum(num_tokens for _, num_tokens in done),
        wall_s,
        counted.computed_tokens,
        counted.moved_bytes,
    )


async def _awaited(lane: _Lane) -> tuple[list[Timing], int]:
    return await lane()


def tokens(rng: Random, count: int) -> list[int]:
    return [rng.randrange(1, _VOCAB_SIZE) for _ in range(count)]


async def talk(where: Cluster, number: int, talks: Talks) -> Round:
    system = tokens(Random(f"system {number}"), talks.system_tokens)

    def lane(user: int) -> _Lane:
        async def turns() -> tuple[list[Timing], int]:
            rng = Random(f"user {number} {user}")
            history, timings, num_asked = list(system), [], 0
            for _ in range(talks.num_turns):
                history += tokens(rng, talks.said_tokens)
                num_asked += len(history)
                timings.append(await ask(where, history, talks.answer_tokens))
                history += timings[-1].token_ids
            return timings, num_asked

        return turns

    return await _round(where, [lane(user) for user in range(talks.num_users)])


async def unique(where: Cluster, number: int, load: Unique) -> Round:
    def lane(client: int) -> _Lane:
        async def requests() -> tuple[list[Timing], int]:
            rng = Random(f"unique {number} {client}")
            prompts = [tokens(rng, load.prompt_tokens) for _ in range(load.requests_each)]
            return [await ask(where, p, load.answer_tokens) for p in prompts], sum(map(len, prompts))

        return requests

    return await _round(where, [lane(client) for client in range(load.num_clients)])


async def grouped(where: Cluster, number: int, load: Groups) -> Round:
    rng = Random(f"groups {number}")
    common = [tokens(rng, load.common_tokens) for _ in range(load.num_groups)]
    prompts = [common[i % load.num_groups] + tokens(rng, load.own_tokens) for i in range(load.num_requests)]
    rng.shuffle(prompts)

    def lane(client: int) -> _Lane:
        async def requests() -> tuple[list[Timing], int]:
            own = prompts[client :: load.num_clients]
            return [await ask(where, p, load.answer_tokens) for p in own], sum(map(len, own))

        return requests

    return await _round(where, [lane(client) for client in range(load.num_clients)])


@dataclass(frozen=True, slots=True)
class Answered:
    """``most_blocks``: KV blocks that sequences held at once, on all nodes, when all choices were generated."""

    token_ids: list[list[int]]
    single_token_ids: list[list[int]]
    computed_tokens: int
    moved_bytes: int
    most_blocks: int
    seconds: float


async def choices(where: Cluster, load: Choices, seed: float) -> Answered:
    """The n choices first, so that the prompt is new to the cluster; then a request for each, which is not counted."""
    prompt = tokens(Random(seed), load.prompt_tokens)
    body = {
        "prompt": prompt, "max_tokens": load.answer_tokens, "temperature": 1.0, "seed": 7, "ignore_eos": True,
        "return_token_ids": True,
    }  # fmt: skip
    async with httpx.AsyncClient(base_url=where.http, timeout=_TIMEOUT_S) as client:
        body["model"] = (await client.get("/v1/models")).json()["data"][0]["id"]
        before, began_s = await Counted.of(where), time.perf_counter()
        asking = asyncio.create_task(_ask(client, {**body, "n": load.num_choices}))
        most_blocks = 0
        while not asking.done():
            most_blocks = max(most_blocks, await _held_blocks(where))
            await asyncio.wait([asking], timeout=_LOOK_EVERY_S)
        seconds = time.perf_counter() - began_s
        counted = await Counted.of(where) - before
        singles = [await _ask(client, {**body, "seed": 7 + i}) for i in range(load.num_choices)]
    return Answered(
        token_ids=asking.result(),
        single_token_ids=[answer for single in singles for answer in single],
        computed_tokens=counted.computed_tokens,
        moved_bytes=counted.moved_bytes,
        most_blocks=most_blocks,
        seconds=seconds,
    )


async def _held_blocks(where: Cluster) -> int:
    ledger = await where.stub.Ledger(router_pb2.ClusterLedgerRequest(), timeout=_CALL_TIMEOUT_S)
    return sum(owner.num_blocks for node in ledger.nodes for owner in node.owners if owner.state != "cached")


async def _ask(client: httpx.AsyncClient, body: dict[str, Any]) -> list[list[int]]:
    response = await client.post("/v1/completions", json=body)
    response.raise_for_status()
    return [choice["token_ids"] for choice in sorted(response.json()["choices"], key=lambda c: c["index"])]
