"""Choices of one prompt: the first goes ahead, and the others follow when nodes have its blocks, or when it is over."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from baton import errors
from baton.node_messages import CacheChanged
from baton.prefix import PrefixScheme, key_of
from baton.types import SamplingParams
from router.cluster.prefix_index import PrefixIndex
from router.dispatch.active import Active
from router.flow.messages import OutcomeKind, Phase, Prompt
from router.serve import Router
from tests.support.fake_nodes import FakeCluster, FakeConfig, FakeNode, expected_tokens
from tests.support.router import router_beside, until

VOCAB_SIZE = 512
TOKENS = tuple(range(40))
# A step is slow: nothing ends by itself while a test looks.
CONFIG = FakeConfig(vocab_size=VOCAB_SIZE, has_prefix_cache=True, step_s=0.05, prefill_token_s=0.0)


@asynccontextmanager
async def split(config: FakeConfig = CONFIG) -> AsyncIterator[tuple[FakeCluster, Router]]:
    async with FakeCluster(config, prefill=2, decode=2) as cluster, router_beside(cluster) as router:
        yield cluster, router


def submit(
    router: Router, num_choices: int = 3, prompt: tuple[int, ...] = TOKENS, **options: int | float
) -> list[Active]:
    max_tokens, timeout_s = int(options.get("max_tokens", 4)), options.get("timeout_s", 30.0)
    shared, now = Prompt(prompt, num_choices=num_choices), router.dispatcher.clock.now()
    actives = [
        router.dispatcher.submit(
            "r", choice, shared, SamplingParams(seed=choice, max_tokens=max_tokens), arrived_s=now,
            deadline_s=now + timeout_s,
        )
        for choice in range(num_choices)
    ]  # fmt: skip
    router.dispatcher.place()
    return actives


def phases(actives: list[Active]) -> list[Phase]:
    return [active.flow.phase for active in actives]


async def all_right(actives: list[Active], skipped: int = 0) -> None:
    await until(lambda: all(active.flow.has_ended for active in actives))
    for active in actives[skipped:]:
        expected = expected_tokens(TOKENS, active.flow.choice, active.flow.max_tokens, VOCAB_SIZE)
        assert active.flow.tokens == expected, active.flow.choice


async def test_the_others_wait_until_the_first_has_joined() -> None:
    async with split() as (cluster, router):
        for node in cluster.nodes.values():
            node.drop("commit", 1)  # the decode node does not get it
        first, *others = submit(router)
        await until(lambda: first.flow.phase is Phase.DECODING)
        assert phases(others) == [Phase.QUEUED] * 2
        assert router.dispatcher.scheduler.num_waiting == 2
        router.dispatcher.scheduler.check()
        for node in cluster.nodes.values():
            node.script.forget()
        router.dispatcher.cancel([first], "enough")
        await all_right([first, *others], skipped=1)


async def test_all_follow_once_the_first_has_joined_and_before_it_ends() -> None:
    async with split() as (_, router):
        first, *others = submit(router, max_tokens=40)
        await until(lambda: all(phase is Phase.DECODING for phase in phases(others)))
        assert not first.flow.has_ended
        router.dispatcher.cancel([first, *others], "enough")


async def test_the_others_wait_for_what_the_prefill_node_says_too() -> None:
    """The decode node's word may be here before the prefill node's first token, and what that node holds."""
    async with split() as (cluster, router):
        for node_id in ("prefill-0", "prefill-1"):
            cluster[node_id].drop("tokens", 1)
        first, *others = submit(router)
        await until(lambda: first.flow._has_joined)
        assert phases(others) == [Phase.QUEUED] * 2
        await all_right([first, *others])


async def test_a_decode_node_gets_the_prompt_from_one_choice_at_a_time() -> None:
    """No node has said that it holds anything here: each choice would bring the blocks again."""
    async with split(FakeConfig(vocab_size=VOCAB_SIZE, has_prefix_cache=True, transfer_s=0.1)) as (cluster, router):
        actives = submit(router, num_choices=6, max_tokens=8)
        decodes = [node for node_id, node in cluster.nodes.items() if node_id.startswith("decode")]
        most = 0
        while not all(active.flow.has_ended for active in actives):
            most = max(most, *(node.num_leased for node in decodes))
            router.dispatcher.scheduler.check()
            await asyncio.sleep(0.01)
        assert most == 1
        await all_right(actives)
        assert {active.flow.lifeline.relay().decode_node_id for active in actives} == {"decode-0", "decode-1"}


async def test_choices_go_together_to_a_node_that_holds_the_prompt() -> None:
    async with split(FakeConfig(vocab_size=VOCAB_SIZE, has_prefix_cache=True, transfer_s=1.0)) as (cluster, router):
        scheme = PrefixScheme.of(cluster["decode-0"].description)
        assert scheme is not None
        keys = [key_of(value) for value in scheme.block_hashes(TOKENS, len(TOKENS))]
        for node in cluster.nodes.values():
            node.tell_cache(keys, is_snapshot=True)
        await until(lambda: router.dispatcher.scheduler.prefix_index.num_blocks == 8)
        first, *others = submit(router, num_choices=5, max_tokens=8)
        await until(lambda: first.flow.lifeline.is_transfer_known)
        await until(lambda: Phase.QUEUED not in phases(others))
        assert not any(other.flow.lifeline.is_transfer_known for other in others)
        await all_right([first, *others])


async def test_a_first_choice_that_stays_on_its_node_lets_the_others_follow_with_its_first_token() -> None:
    async with FakeCluster(CONFIG, mixed=2) as cluster, router_beside(cluster) as router:
        first, *others = submit(router, max_tokens=40)
        await until(lambda: all(phase is Phase.DECODING for phase in phases(others)))
        assert first.flow.phase is Phase.DECODING
        router.dispatcher.cancel([first, *others], "enough")


def cancel_it(router: Router, cluster: FakeCluster, first: Active) -> None:
    router.dispatcher.cancel([first], "the client has enough of it")


def stop_it(router: Router, cluster: FakeCluster, first: Active) -> None:
    router.dispatcher.stop_text(first)


def lose_its_node(router: Router, cluster: FakeCluster, first: Active) -> None:
    assert first.flow.placement is not None
    router.dispatcher.on_node_down(first.flow.placement.prefill_id, "a test")


def raise_in_it(router: Router, cluster: FakeCluster, first: Active) -> None:
    router.dispatcher._fail(first, errors.InternalError("a defect"))


@pytest.mark.parametrize("ends", [cancel_it, stop_it, raise_in_it, lose_its_node])
async def test_the_others_follow_however_the_first_ends(ends: Callable[[Router, FakeCluster, Active], None]) -> None:
    async with split() as (cluster, router):
        for node in cluster.nodes.values():
            node.stall()
        first, *others = submit(router)
        await until(lambda: first.flow.phase is Phase.PREFILLING)
        assert phases(others) == [Phase.QUEUED] * 2
        ends(router, cluster, first)
        for node in cluster.nodes.values():
            node.resume()
        await all_right([first, *others], skipped=0 if ends is lose_its_node else 1)


async def test_the_others_follow_a_first_choice_that_fails_or_is_refused() -> None:
    async with split() as (cluster, router):
        for node in cluster.nodes.values():
            node.fail("run", 1, code="BadLogits")
        first, *others = submit(router, num_choices=2)
        await until(lambda: first.flow.has_ended)
        assert first.flow.outcome is not None
        assert first.flow.outcome.kind is OutcomeKind.FAILED
        for node in cluster.nodes.values():
            node.script.forget()
        await all_right(others)


async def test_deadlines_run_on_while_a_choice_waits() -> None:
    async with split() as (cluster, router):
        for node in cluster.nodes.values():
            node.stall()
        actives = submit(router, timeout_s=0.3)
        await until(lambda: all(active.flow.has_ended for active in actives))
        for active in actives:
            assert active.flow.outcome is not None
            assert isinstance(active.flow.outcome.error, errors.DeadlineExceeded)
        for node in cluster.nodes.values():
            node.resume()


async def test_a_request_that_is_given_up_takes_its_waiting_choices_along() -> None:
    async with split() as (cluster, router):
        for node in cluster.nodes.values():
            node.stall()
        actives = submit(router)
        await until(lambda: actives[0].flow.phase is Phase.PREFILLING)
        router.dispatcher.cancel(actives, "the client left")
        assert all(active.flow.has_ended for active in actives)
        assert router.dispatcher.scheduler.num_waiting == 0
        for node in cluster.nodes.values():
            node.resume()


async def test_a_first_choice_of_one_token_is_over_before_the_others_begin() -> None:
    async with split() as (_, router):
        await all_right(submit(router, max_tokens=1))


async def test_without_a_cache_or_a_full_block_all_begin_at_once() -> None:
    async with split(FakeConfig(vocab_size=VOCAB_SIZE, step_s=0.05)) as (_, router):
        actives = submit(router)
        assert Phase.QUEUED not in phases(actives)
        await all_right(actives)
    async with split() as (_, router):
        assert Phase.QUEUED not in phases(submit(router, prompt=TOKENS[:15]))


async def test_a_node_that_holds_the_prompt_gets_it() -> None:
    async with split() as (cluster, router):
        node: FakeNode = cluster["prefill-1"]
        scheme = PrefixScheme.of(node.description)
        assert scheme is not None
        keys = [key_of(value) for value in scheme.block_hashes(TOKENS, len(TOKENS))]
        index = router.dispatcher.scheduler.prefix_index
        node.tell_cache(keys, is_snapshot=True)
        await until(lambda: index.num_blocks_of("prefill-1") == 2)
        [active] = submit(router, 1)
        assert active.flow.placement is not None
        assert active.flow.placement.prefill_id == "prefill-1", "prefill-0 comes first by its name"
        load = router.dispatcher.scheduler.node("prefill-1")
        assert load is not None
        assert load.prompt_tokens == 8
        await all_right([active])
        node.tell_cache((), keys[1:])
        await until(lambda: index.num_blocks_of("prefill-1") == 1)
        await node.die()
        await until(lambda: not index)


def test_a_prompt_is_hashed_no_further_than_a_node_holds_it() -> None:
    scheme = PrefixScheme.of(FakeCluster(CONFIG, prefill=1)["prefill-0"].description)
    assert scheme is not None
    tokens = tuple(range(1000))
    expected = [key_of(value) for value in scheme.block_hashes(tokens, len(tokens), salt=b"tenant")]
    prompt, index = Prompt(tokens, cache_salt=b"tenant"), PrefixIndex(max_blocks=100)
    assert not index.hits(prompt.keys(scheme))
    assert len(prompt._keys) == 8
    index.change("p", CacheChanged(1, tuple(expected[:20]), is_snapshot=True))
    assert [hit.num_blocks for hit in index.hits(prompt.keys(scheme))] == [20]
    assert len(prompt._keys) == 32
    assert list(prompt.keys(scheme)) == expected
    assert list(Prompt(tokens).keys(scheme)) != expected, "another salt"


async def test_a_garbled_change_makes_a_nodes_blocks_unknown() -> None:
    async with split() as (cluster, router):
        index, node = router.dispatcher.scheduler.prefix_index, cluster["prefill-0"]
        node.tell_cache([1, 2, 3], is_snapshot=True)
        await until(lambda: index.num_blocks_of("prefill-0") == 3)
        node.script.garbles_cache = True
        node.tell_cache([4])
        await until(lambda: not index)
        router.dispatcher.scheduler.cache_changed("nobody", CacheChanged(1, (1,), is_snapshot=True))
        assert not index
