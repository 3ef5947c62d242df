"""Conversations with a cluster that caches prefixes are the same as with one that does not, log-probabilities included.

Also while workers die and drain in the middle of them: the cache of a node goes with it, and nothing else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from random import Random

import pytest

import baton
from baton.types import DTYPE_BYTES
from tests.support.cluster import Cluster, Node, StartCluster, layerwise_from_kib
from tests.support.conversations import Book, Conversation, Shape
from tests.support.models import ORACLE_CASES, VOCAB_SIZE, ModelCase
from tests.support.talks import Talked, assert_same, talk

OFF = ("--prefix-cache", "off")
SMALL_BLOCKS = ("--block-tokens", "16")
_GREEDY = {"temperature": 0.0}
# The demo model ends in one of these now and then, mostly in the middle of a token's text or across two.
_STOPS = {"temperature": 0.7, "stop": ["es", ". ", "ke"], "logprobs": 2}
_SAMPLINGS = (_GREEDY, _STOPS, *(dict(sampling) for sampling in Shape(2).samplings))


def talks(vocab_size: int, count: int, seed: str, **shape: object) -> list[Conversation]:
    return Book(Shape(vocab_size, samplings=_SAMPLINGS, **shape), Random(seed)).conversations(count)  # type: ignore[arg-type]


def demo_talks(count: int, seed: str) -> list[Conversation]:
    return talks(2867, count, seed, system_lengths=(0, 100, 300, 600), longest=1100)


async def without_cache(start: StartCluster, model: Path, asked: Sequence[Conversation]) -> Talked:
    """Of one worker that does it all."""
    cluster = start(model, prefill=0, decode=0, mixed=1, arguments=OFF)
    answers = await talk(cluster.http, asked)
    assert answers.num_cached_tokens == 0
    return answers


@pytest.mark.parametrize(
    ("prefill", "decode", "mixed", "transport"), [(1, 1, 0, "tcp"), (2, 2, 0, "auto"), (0, 0, 2, "auto")]
)
async def test_conversations_are_the_same_with_the_cache(
    shared_cluster: StartCluster, demo_model: Path, prefill: int, decode: int, mixed: int, transport: str
) -> None:
    asked = demo_talks(8, f"{prefill}+{decode}")
    expected = await without_cache(shared_cluster, demo_model, asked)
    assert {choice.finish_reason for choice in expected.choices.values()} == {"stop", "length"}
    settings = {} if transport == "auto" else {"transport": transport}
    if mixed:
        settings["mixed"] = mixed
    cluster = shared_cluster(demo_model, prefill=prefill, decode=decode, **settings)
    answers = await talk(cluster.http, asked)
    assert_same(answers, expected)
    assert answers.num_cached_tokens > 0.3 * answers.num_prompt_tokens
    # A second time all of it is known, but for what has to be computed.
    assert_same(await talk(cluster.http, asked), expected)
    await asyncio.to_thread(cluster.wait_baseline)


async def kill_in_the_middle(cluster: Cluster, asked: Sequence[Conversation], victim: str, when: int) -> Talked:
    """When so many turns are answered."""
    dead: list[Node] = []

    def on_answer(num_answered: int) -> None:
        if num_answered == when:
            dead.append(cluster.kill(victim))

    answers = await talk(cluster.http, asked, on_answer=on_answer)
    await asyncio.to_thread(cluster.wait_back, dead[0])
    return answers


async def survives(start: StartCluster, model: Path, cluster: Cluster, victims: Sequence[str]) -> None:
    rng = Random("/".join(victims))
    asked = demo_talks(12, "deaths")
    expected = await without_cache(start, model, asked)
    num_reruns = 0
    for victim in victims:
        when = rng.randint(1, sum(len(conversation.turns) for conversation in asked) // 2)
        answers = await kill_in_the_middle(cluster, asked, victim, when)
        assert_same(answers, expected)
        num_reruns += answers.num_reruns
        await asyncio.to_thread(cluster.wait_baseline)
    assert num_reruns > 0, "the kills hit no request: nothing was tested"


async def test_conversations_survive_the_death_of_a_worker(shared_cluster: StartCluster, demo_model: Path) -> None:
    cluster = shared_cluster(demo_model, prefill=2, decode=2)
    await survives(shared_cluster, demo_model, cluster, ["decode-0", "prefill-1"])


@pytest.mark.long
@pytest.mark.timeout(1800)
async def test_conversations_survive_ten_deaths_of_each_role(start_cluster: StartCluster, demo_model: Path) -> None:
    cluster = start_cluster(demo_model, prefill=2, decode=2)
    victims = [f"{role}-{number % 2}" for number in range(10) for role in ("prefill", "decode")]
    await survives(start_cluster, demo_model, cluster, victims)


@pytest.mark.long
@pytest.mark.timeout(1800)
async def test_conversations_with_workers_that_drain(start_cluster: StartCluster, demo_model: Path) -> None:
    asked = demo_talks(16, "drains")
    expected = await without_cache(start_cluster, demo_model, asked)
    cluster = start_cluster(demo_model, prefill=2, decode=2)
    rounds: list[Talked] = []
    is_over = asyncio.Event()

    async def go_on() -> None:
        while not is_over.is_set():
            rounds.append(await talk(cluster.http, asked))

    async with asyncio.TaskGroup() as group:
        group.create_task(go_on())
        try:
            async with baton.AsyncClient(cluster.grpc) as client:
                for node in cluster.nodes.values():
                    await client.drain(node.id, grace_s=60.0)
                    await asyncio.to_thread(cluster.wait_back, node)
        finally:
            is_over.set()
    assert rounds
    for answers in rounds:
        assert_same(answers, expected)
    await asyncio.to_thread(cluster.wait_baseline)


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("index", range(len(ORACLE_CASES)), ids=[case.name for case in ORACLE_CASES])
async def test_conversations_of_every_model_split_over_two_nodes(
    start_cluster: StartCluster, index: int, tmp_path: Path
) -> None:
    case, dtype, transport = ORACLE_CASES[index], ("float32", "bfloat16")[index % 2], ("shm", "tcp")[index // 2 % 2]
    folder = case.save(tmp_path / "model")
    asked = model_talks(case)
    without = start_cluster(folder, prefill=0, decode=0, mixed=1, dtype=dtype, arguments=(*OFF, *SMALL_BLOCKS))
    expected = await talk(without.http, asked)
    # Pools that are too small for all of them: sequences are preempted and refused, cached blocks evicted.
    few = ("--kv-mib", str(mib_of(case, dtype, 120)))
    arguments = (*SMALL_BLOCKS, *few, "--layerwise-from-kib", str(layerwise_from_kib(case, 2)))
    cluster = start_cluster(folder, prefill=1, decode=1, transport=transport, dtype=dtype, arguments=arguments)
    answers = await talk(cluster.http, asked)
    assert_same(answers, expected)
    assert answers.num_cached_tokens > 0
    await asyncio.to_thread(cluster.wait_baseline)


def mib_of(case: ModelCase, dtype: str, num_blocks: int) -> int:
    """The KV of so many blocks of 16 tokens, rounded up."""
    block_bytes = case.layers * case.kv_heads * case.head_dim * 2 * 16 * DTYPE_BYTES[dtype]
    return -(-num_blocks * block_bytes >> 20)


def model_talks(case: ModelCase) -> list[Conversation]:
    """Without text: these models have no tokenizer."""
    plain = tuple(dict(s) for s in Shape(2).samplings if "logprobs" not in s)
    return Book(Shape(VOCAB_SIZE, samplings=plain), Random(case.name)).conversations(8)
