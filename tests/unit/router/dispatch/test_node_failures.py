"""The router against fake nodes over real gRPC: every failure its users have met (docs/failures.md), one test each."""

from __future__ import annotations

import asyncio
import itertools
import json
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import baton
from baton import errors
from baton.client import Accepted, Completion, Delta, Finished, Options
from baton.types import FinishReason, Role, SamplingParams
from router.cluster.config import PolicyConfig
from router.cluster.membership import State
from router.config import LimitsConfig
from router.face.client_codec import member_to_pb
from router.openai.response import relay_json
from router.serve import Router
from tests.support.fake_nodes import FakeCluster, FakeConfig, expected_tokens
from tests.support.figures import figure
from tests.support.router import VOCAB_SIZE, baseline, quick, router_beside, until, write_model_folder

VOCAB = FakeConfig().vocab_size
SLOW = FakeConfig(step_s=0.01)


def expected(prompt: list[int], seed: int, max_tokens: int, stop_ids: tuple[int, ...] = ()) -> tuple[int, ...]:
    return tuple(expected_tokens(prompt, seed, max_tokens, VOCAB, stop_ids))


async def complete(router: Router, prompt: list[int], **settings: Any) -> Completion:
    assert router.grpc is not None
    async with baton.AsyncClient(router.grpc) as client:
        return await client.complete(prompt, **settings)


async def many(router: Router, count: int, max_tokens: int = 20) -> list[Completion | BaseException]:
    """Concurrent requests; those that finish have the very tokens of an undisturbed run."""
    assert router.grpc is not None
    async with baton.AsyncClient(router.grpc) as client:
        calls = [client.complete([1, 2, i], max_tokens=max_tokens, seed=i) for i in range(count)]
        done = await asyncio.gather(*calls, return_exceptions=True)
    for i, completion in enumerate(done):
        if isinstance(completion, Completion):
            assert completion.token_ids == expected([1, 2, i], i, max_tokens)
    return done


async def test_split_request_runs_over_both_pools() -> None:
    async with FakeCluster(prefill=1, decode=1) as cluster, router_beside(cluster, timing=quick) as router:
        done = await complete(router, [1, 2, 3], max_tokens=10, seed=7)
        assert done.token_ids == expected([1, 2, 3], 7, 10)
        assert done.finish_reason is FinishReason.LENGTH
        assert (done.relay.prefill_node_id, done.relay.decode_node_id) == ("prefill-0", "decode-0")
        assert done.relay.transfer is not None
        assert done.relay.attempts == 1
        await baseline(cluster)


async def test_all_mixed_cluster_moves_no_bytes() -> None:
    async with FakeCluster(mixed=2) as cluster, router_beside(cluster, timing=quick) as router:
        done = [x for x in await many(router, 8) if isinstance(x, Completion)]
        assert len(done) == 8
        assert all(x.relay.prefill_node_id == x.relay.decode_node_id and x.relay.transfer is None for x in done)
        assert {x.relay.prefill_node_id for x in done} == {"mixed-0", "mixed-1"}, "a burst spreads"
        await baseline(cluster)


async def test_burst_spreads_over_both_pools() -> None:
    async with FakeCluster(prefill=2, decode=2) as cluster, router_beside(cluster, timing=quick) as router:
        done = [x for x in await many(router, 8) if isinstance(x, Completion)]
        for side in ("prefill_node_id", "decode_node_id"):
            nodes = [getattr(x.relay, side) for x in done]
            assert sorted(nodes.count(n) for n in set(nodes))[0] >= 3


@pytest.mark.parametrize("victim", ["prefill-0", "decode-0"])
async def test_killed_node_is_not_seen_by_clients(victim: str) -> None:
    config = replace(SLOW, prefill_token_s=0.005)
    async with FakeCluster(config, prefill=2, decode=2) as cluster, router_beside(cluster, timing=quick) as router:
        running = asyncio.create_task(many(router, 16))
        await asyncio.sleep(0.1)
        await cluster[victim].die()
        done = await running
        assert all(isinstance(x, Completion) for x in done), done
        await baseline(cluster)
        assert {m.state for m in router.dispatcher.nodes.members} == {State.READY, State.LOST}


async def test_a_failed_attempt_says_why_and_its_pause_is_what_the_client_saw(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """In the log, in the relay of both faces, and in the histogram."""
    # It stays on the node that falls silent.
    policy = PolicyConfig(migrates=False)
    async with (
        FakeCluster(SLOW, prefill=1, decode=2) as cluster,
        router_beside(cluster, timing=quick, policy=policy) as router,
    ):
        assert router.grpc is not None
        clock = asyncio.get_running_loop().time
        came_s: list[float] = []
        async with baton.AsyncClient(router.grpc) as client:
            async for part in client.generate([5], max_tokens=30, seed=3):
                if isinstance(part, Delta):
                    came_s += [clock()] * len(part.token_ids)
                    if len(came_s) == 5:
                        # Not noticed for lost_s, which is most of what the client waits.
                        victim = next(n for n in cluster.nodes.values() if n.role is Role.DECODE and n.used_blocks)
                        victim.mute()
                if isinstance(part, Finished):
                    relay = part.relay
        pause_s = max(b - a for a, b in itertools.pairwise(came_s))
        assert pause_s > 0.4
        assert relay.recovery_s == pytest.approx(pause_s, abs=0.3)
        (failure,) = relay.failures
        assert (failure.blamed_node_id, failure.code) == (victim.node_id, "NodeLost")
        assert "nothing heard for" in failure.message
        assert failure.decode_node_id == victim.node_id
        assert failure.silent_s > 0.4
        assert "NodeLost" in relay.line()
        lines = [x.message for x in caplog.records if "held against" in x.message]
        assert len(lines) == 1
        assert victim.node_id in lines[0]
        assert "nothing heard for" in lines[0]
        shown = relay_json(relay)["failures"][0]
        assert (shown["code"], shown["blamed_node_id"]) == ("NodeLost", victim.node_id)
        recovery = router.dispatcher._metrics.recovery
        assert recovery.total == pytest.approx(relay.recovery_s)


async def test_the_reasons_of_a_node_that_fails_everything_are_a_few_lines(caplog: pytest.LogCaptureFixture) -> None:
    async with FakeCluster(prefill=1, decode=1) as cluster, router_beside(cluster, timing=quick) as router:
        cluster["prefill-0"].fail("transfer", times=30, code="TransferFailed")
        done = await many(router, 30)
        assert all(isinstance(x, Completion) for x in done)
        assert 1 <= len([x for x in caplog.records if "held against" in x.message]) <= 10


async def test_after_a_planned_drain_the_status_says_so_while_its_address_is_dialled_in_vain() -> None:
    async with FakeCluster(prefill=1, decode=2) as cluster, router_beside(cluster, timing=quick) as router:
        node = cluster["decode-1"]
        member = router.dispatcher.nodes.membership.members[node.address]
        node.drain(0.0)
        await until(lambda: member.state is State.DRAINING)
        node.end_sessions()
        await until(lambda: member.state is State.LEFT)
        await node.die()
        await until(lambda: member.failures > 3)
        assert member_to_pb(member).state == "left: it drained and left in good order"
        losses = router.dispatcher._metrics.node_losses.children
        assert sum(x.value for x in losses.values()) == 0


async def test_rerun_starts_from_the_tokens_so_far() -> None:
    async with FakeCluster(SLOW, prefill=1, decode=2) as cluster, router_beside(cluster, timing=quick) as router:
        assert router.grpc is not None
        async with baton.AsyncClient(router.grpc) as client:
            token_ids: list[int] = []
            async for part in client.generate([5], max_tokens=30, seed=3):
                if isinstance(part, Delta):
                    token_ids += part.token_ids
                    if len(token_ids) == 5:
                        await next(n for n in cluster.nodes.values() if n.role is Role.DECODE and n.used_blocks).die()
        assert tuple(token_ids) == expected([5], 3, 30)
        await baseline(cluster)


async def test_node_restarted_on_its_port_is_used_again() -> None:
    """Known failure 15: a new incarnation at the old address."""
    async with FakeCluster(prefill=1, decode=1) as cluster, router_beside(cluster, timing=quick) as router:
        for node_id in ("decode-0", "prefill-0"):
            before = cluster[node_id].incarnation
            await cluster[node_id].die()
            await cluster[node_id].start()
            await until(lambda i=node_id, b=before: any(
                m.node and m.node.node_id == i and m.node.incarnation != b and m.state is State.READY
                for m in router.dispatcher.nodes.members
            ))  # fmt: skip
            done = await complete(router, [1, 2], max_tokens=5, seed=1)
            assert done.token_ids == expected([1, 2], 1, 5)


async def test_bounced_pool_recovers_by_itself() -> None:
    """Known failure 16: the whole token pool goes and comes back under load."""
    async with FakeCluster(SLOW, prefill=1, decode=2) as cluster, router_beside(cluster, timing=quick) as router:
        running = asyncio.create_task(many(router, 8, max_tokens=40))
        await asyncio.sleep(0.1)
        for node_id in ("decode-0", "decode-1"):
            await cluster[node_id].die()
        for node_id in ("decode-0", "decode-1"):
            await cluster[node_id].start()
        back_s = asyncio.get_running_loop().time()
        assert all(isinstance(x, Completion) for x in await running)
        await until(lambda: all(m.state is State.READY for m in router.dispatcher.nodes.members))
        figure(16, "pool back to all requests served and all nodes ready", asyncio.get_running_loop().time() - back_s)
        done = await complete(router, [1], max_tokens=3, seed=1)
        assert done.relay.decode_node_id.startswith("decode")
        await baseline(cluster)


async def test_prefill_serves_alone_while_the_token_pool_is_gone() -> None:
    """Role is policy: the opposite pool is borrowed. Known failure 13: a neighbour's death harms no request."""
    async with FakeCluster(prefill=1, decode=1) as cluster, router_beside(cluster, timing=quick) as router:
        await cluster["decode-0"].die()
        await until(lambda: sum(m.state is State.READY for m in router.dispatcher.nodes.members) == 1)
        assert router.dispatcher.is_ready
        done = await complete(router, [1], max_tokens=4, seed=1)
        assert done.relay.decode_node_id == "prefill-0"
        await cluster["decode-0"].start()
        await until(lambda: all(m.state is State.READY for m in router.dispatcher.nodes.members))
        assert (await complete(router, [1], max_tokens=4, seed=1)).relay.decode_node_id == "decode-0"


async def test_all_nodes_gone_is_said_quickly_and_heals() -> None:
    async with FakeCluster(prefill=1, decode=1) as cluster:
        limits = LimitsConfig(refuse_after_s=0.1)
        async with router_beside(cluster, timing=quick, limits=limits) as router:
            for node in cluster.nodes.values():
                await node.die()
            await until(lambda: not router.dispatcher.is_ready)
            await asyncio.sleep(0.15)
            async with asyncio.timeout(1.0):
                with pytest.raises(errors.Unavailable) as refused:
                    await complete(router, [1], max_tokens=4, seed=1)
            assert refused.value.retry_after_s is not None
            for node in cluster.nodes.values():
                await node.start()
            await until(lambda: router.dispatcher.is_ready)
            assert (await complete(router, [1], max_tokens=4, seed=1)).token_ids == expected([1], 1, 4)


async def test_silent_node_counts_as_lost() -> None:
    async with FakeCluster(SLOW, prefill=1, decode=2) as cluster, router_beside(cluster, timing=quick) as router:
        running = asyncio.create_task(many(router, 6, max_tokens=30))
        await asyncio.sleep(0.1)
        cluster["decode-0"].mute()
        assert all(isinstance(x, Completion) for x in await running)
        cluster["decode-0"].resume()
        await until(lambda: all(m.state is State.READY for m in router.dispatcher.nodes.members))
        await baseline(cluster)


@pytest.mark.parametrize("code", ["TransferFailed", "InternalError", "Unavailable"])
async def test_failed_transfer_is_run_again(code: str) -> None:
    """Known failure 20: no request waits for a time-out."""
    async with FakeCluster(prefill=1, decode=1) as cluster, router_beside(cluster, timing=quick) as router:
        cluster["prefill-0"].fail("transfer", 1, code=code)
        async with asyncio.timeout(1.0):
            done = await complete(router, [1, 2], max_tokens=8, seed=2)
        assert done.token_ids == expected([1, 2], 2, 8)
        assert done.relay.attempts == 2
        figure(20, "a request whose transfer failed, all of it", done.relay.e2e_s)
        await baseline(cluster)


async def test_pair_heals_after_transient_failures() -> None:
    """Known failure 14: failures shut no pair out for good, not even the only one."""
    async with FakeCluster(prefill=1, decode=1) as cluster, router_beside(cluster, timing=quick) as router:
        cluster["prefill-0"].fail("transfer", 4, code="TransferFailed")
        # While decode is avoided, prefill keeps the sequence; the next requests try the pair again.
        for _ in range(4):
            done = await complete(router, [1], max_tokens=4, seed=1)
            assert (done.relay.attempts, done.token_ids) == (2, expected([1], 1, 4))
        done = await complete(router, [1], max_tokens=4, seed=1)
        assert (done.relay.attempts, done.relay.decode_node_id) == (1, "decode-0")
        assert done.token_ids == expected([1], 1, 4)
        figure(14, "a request over the only pair after four failures in a row", done.relay.e2e_s)
        await baseline(cluster)


async def test_broken_pair_is_avoided_where_others_work() -> None:
    async with FakeCluster(prefill=1, decode=2) as cluster, router_beside(cluster, timing=quick) as router:
        cluster["decode-0"].fail("join", 2, code="TransferFailed")
        done = await many(router, 6)
        assert all(isinstance(x, Completion) for x in done)
        await baseline(cluster)


async def test_poisonous_request_does_not_run_for_ever() -> None:
    async with FakeCluster(prefill=2, decode=2) as cluster, router_beside(cluster, timing=quick) as router:
        for node in cluster.nodes.values():
            node.fail("run", 99, code="InternalError")
        with pytest.raises(errors.InternalError):
            await complete(router, [1], max_tokens=4, seed=1)
        await baseline(cluster)


async def test_refused_reservation_goes_to_the_next_node() -> None:
    async with FakeCluster(prefill=1, decode=2) as cluster, router_beside(cluster, timing=quick) as router:
        cluster["decode-0"].fail("reserve", 1, code="NoBlocks")
        cluster["decode-1"].fail("reserve", 1, code="NoBlocks")
        done = await complete(router, [1, 2, 3], max_tokens=6, seed=1)
        assert done.token_ids == expected([1, 2, 3], 1, 6)
        assert done.relay.attempts == 1, "no room is no failure"


@pytest.mark.parametrize("what", ["reserved", "tokens", "joined", "handed_off", "prefill_done", "commit"])
@pytest.mark.parametrize("how", ["drop", "duplicate"])
async def test_lost_and_repeated_messages(what: str, how: str) -> None:
    config = FakeConfig(status_s=0.05)
    async with FakeCluster(config, prefill=1, decode=2) as cluster, router_beside(cluster, timing=quick) as router:
        for node in cluster.nodes.values():
            if what == "commit" and how == "drop":
                continue  # found by the lease's expiry, below
            getattr(node, how)(what)
        done = await complete(router, [1, 2, 3], max_tokens=12, seed=4)
        assert done.token_ids == expected([1, 2, 3], 4, 12)
        await baseline(cluster)


async def test_silent_prefill_costs_decode_its_lease_only() -> None:
    """Known failure 1, the router's share: a commit that never comes ends with the lease and the request runs again."""
    async with FakeCluster(prefill=1, decode=1) as cluster, router_beside(cluster, timing=quick) as router:
        # The request's own time bounds the lease.
        cluster["prefill-0"].drop("commit")
        with pytest.raises(errors.DeadlineExceeded):
            await complete(router, [1], options=Options(timeout_s=0.5), max_tokens=4, seed=1)
        await baseline(cluster)


@pytest.mark.parametrize("phase", ["queued", "reserving", "prefilling", "decoding"])
async def test_cancel_in_every_phase(phase: str) -> None:
    """Known failure 4, 5, 6: whichever client leaves, and whenever, nothing stays behind."""
    config = replace(SLOW, prefill_token_s=0.05 if phase == "prefilling" else 0.0)
    async with FakeCluster(config, prefill=1, decode=1) as cluster, router_beside(cluster, timing=quick) as router:
        if phase == "queued":
            for node in cluster.nodes.values():
                node.drain(0.0)
            await until(lambda: not router.dispatcher.is_ready)
        if phase == "reserving":
            cluster["decode-0"].drop("reserved")
        assert router.grpc is not None
        async with baton.AsyncClient(router.grpc) as client:
            async with aclosing(client.generate([1] * 10, max_tokens=1000, seed=1)) as parts:
                assert isinstance(await anext(parts), Accepted)
                if phase == "decoding":
                    for _ in range(3):
                        assert isinstance(await anext(parts), Delta)
            await until(lambda: router.dispatcher.scheduler.num_in_flight == 0)
        await baseline(cluster)


async def test_many_cancels_leave_nothing() -> None:
    async with FakeCluster(SLOW, prefill=2, decode=2) as cluster, router_beside(cluster, timing=quick) as router:
        assert router.grpc is not None
        async with baton.AsyncClient(router.grpc) as client:

            async def leave_after(delay_s: float) -> None:
                async with aclosing(client.generate([1, 2], max_tokens=500, seed=1)) as parts:
                    try:
                        async with asyncio.timeout(delay_s):
                            async for _ in parts:
                                pass
                    except TimeoutError:
                        pass

            await asyncio.gather(*(leave_after(0.0005 * i) for i in range(200)))
        await until(lambda: router.dispatcher.scheduler.num_in_flight == 0)
        await baseline(cluster)


async def test_24_end_at_the_first_token() -> None:
    """Known failure 24: max_tokens=1 and a stop id as the first token, split and colocated; no lease stays."""
    first = expected([9], 1, 1)[0]
    for pools in ({"prefill": 1, "decode": 1}, {"mixed": 1}):
        async with FakeCluster(**pools) as cluster, router_beside(cluster, timing=quick) as router:
            one = await complete(router, [9], max_tokens=1, seed=1)
            assert (one.token_ids, one.finish_reason) == ((first,), FinishReason.LENGTH)
            stopped = await complete(router, [9], max_tokens=50, seed=1, stop_token_ids=(first,))
            assert (stopped.token_ids, stopped.finish_reason) == ((first,), FinishReason.STOP)
            assert stopped.stop_reason == str(first)
            await baseline(cluster)


@pytest.mark.parametrize("pools", [{"prefill": 1, "decode": 1}, {"mixed": 1}], ids=["split", "whole"])
async def test_24_the_models_own_end_at_the_first_token(tmp_path: Path, pools: dict[str, int]) -> None:
    first = expected_tokens([9], 1, 1, VOCAB_SIZE)[0]
    folder = write_model_folder(tmp_path / "tiny")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [first]}))
    config = FakeConfig(vocab_size=VOCAB_SIZE)
    async with FakeCluster(config, **pools) as cluster:
        async with router_beside(cluster, timing=quick, model_folder=folder) as router:
            ended = await complete(router, [9], max_tokens=50, seed=1)
            assert (ended.token_ids, ended.finish_reason) == ((first,), FinishReason.STOP)
            goes_on = await complete(router, [9], max_tokens=5, seed=1, ignore_eos=True)
            assert list(goes_on.token_ids) == expected_tokens([9], 1, 5, VOCAB_SIZE)
        await baseline(cluster)


async def test_full_cluster_queues_then_refuses() -> None:
    """Two sequences fit; others wait for room, and beyond the queue's limit they are refused with a time to return."""
    config = replace(SLOW, num_blocks=8)
    limits = LimitsConfig(max_queued=4)
    async with (
        FakeCluster(config, prefill=1, decode=1) as cluster,
        router_beside(cluster, timing=quick, limits=limits) as router,
    ):
        assert router.grpc is not None
        async with baton.AsyncClient(router.grpc) as client:
            prompt = list(range(40))
            calls = [client.complete(prompt, max_tokens=15, seed=i) for i in range(12)]
            done = await asyncio.gather(*calls, return_exceptions=True)
        finished = [x for x in done if isinstance(x, Completion)]
        refused = [x for x in done if isinstance(x, errors.Overloaded)]
        assert len(finished) + len(refused) == 12
        assert len(finished) >= 6
        assert refused
        assert all(x.retry_after_s for x in refused)
        await baseline(cluster)


async def test_deadline_ends_a_waiting_request() -> None:
    async with FakeCluster(prefill=1, decode=1) as cluster, router_beside(cluster, timing=quick) as router:
        for node in cluster.nodes.values():
            node.stall()
        with pytest.raises(errors.DeadlineExceeded):
            await complete(router, [1], options=Options(timeout_s=0.2), max_tokens=4)
        for node in cluster.nodes.values():
            node.resume()
        await baseline(cluster)


async def test_wedged_engine_makes_the_router_unready() -> None:
    """Known failure 8: sessions and status go on, but no step is finished."""
    async with FakeCluster(prefill=1, decode=1) as cluster, router_beside(cluster, timing=quick) as router:
        for node in cluster.nodes.values():
            node.stall()
            node.script.stalled_since_s = 0.0
        stalled_s = asyncio.get_running_loop().time()
        await until(lambda: not router.dispatcher.is_ready)
        red_s = asyncio.get_running_loop().time() - stalled_s
        figure(8, "engines that stand for too long to a router that is not ready", red_s)
        # And it heals by itself.
        for node in cluster.nodes.values():
            node.resume()
        await until(lambda: router.dispatcher.is_ready)
        done = await complete(router, [1], max_tokens=4, seed=1)
        assert done.token_ids == expected([1], 1, 4)
        await baseline(cluster)


async def test_different_model_is_refused_with_both_values(caplog: pytest.LogCaptureFixture) -> None:
    cluster = FakeCluster(prefill=1, decode=1)
    cluster.add("odd", Role.DECODE, FakeConfig(fingerprint="another"))
    async with cluster:
        await cluster["odd"].die()
        await _odd_one_out(cluster, caplog)


async def _odd_one_out(cluster: FakeCluster, caplog: pytest.LogCaptureFixture) -> None:
    async with router_beside(cluster, timing=quick, all_up=False) as router:
        await until(lambda: sum(m.state is State.READY for m in router.dispatcher.nodes.members) == 2)
        await cluster["odd"].start()
        await until(lambda: any(m.state is State.REFUSED for m in router.dispatcher.nodes.members))
        assert router.grpc is not None
        async with baton.AsyncClient(router.grpc) as client:
            states = [n.state for n in (await client.status()).nodes if n.state.startswith("refused")]
        assert len(states) == 1
        assert "another" in states[0]
        assert "fake-fingerprint" in states[0]
        assert "another" in caplog.text


async def test_draining_node_gets_no_new_work() -> None:
    async with FakeCluster(prefill=1, decode=2) as cluster, router_beside(cluster, timing=quick) as router:
        cluster["decode-0"].drain(0.0)
        await until(lambda: any(m.state is State.DRAINING for m in router.dispatcher.nodes.members))
        done = [x for x in await many(router, 4) if isinstance(x, Completion)]
        assert {x.relay.decode_node_id for x in done} == {"decode-1"}


async def test_ledger_and_status() -> None:
    async with FakeCluster(SLOW, prefill=1, decode=1) as cluster, router_beside(cluster, timing=quick) as router:
        assert router.grpc is not None
        async with baton.AsyncClient(router.grpc) as client:
            async with aclosing(client.generate([1, 2], max_tokens=500, seed=1)) as parts:
                async for part in parts:
                    if isinstance(part, Delta) and cluster["decode-0"].used_blocks:
                        break
                ledger = await client.ledger()
                owners = {n.node_id: [(o.state, o.num_blocks) for o in n.owners] for n in ledger.nodes}
                assert owners["decode-0"] == [("running", 1)]
                assert (await client.status()).num_running == 1
            await cluster["decode-0"].die()
            await until(lambda: not all(m.state is State.READY for m in router.dispatcher.nodes.members))
            assert list((await client.ledger()).unreachable) == [cluster["decode-0"].address]


async def test_bad_requests_say_what_is_wrong() -> None:
    async with FakeCluster(prefill=1, decode=1) as cluster, router_beside(cluster, timing=quick) as router:
        cases: list[tuple[Any, dict[str, Any], type[errors.BatonError], str]] = [
            ([], {}, errors.InvalidRequest, "prompt"),
            ([VOCAB], {}, errors.InvalidRequest, "prompt"),
            ("text", {}, errors.InvalidRequest, "prompt"),
            ([("user", "hello")], {}, errors.InvalidRequest, "messages"),
            ([1], {"stop": ["x"]}, errors.InvalidRequest, "stop"),
            ([1], {"model": "other"}, errors.UnknownModel, "model"),
            ([1], {"request_id": "no spaces"}, errors.InvalidRequest, "request_id"),
            ([1], {"stop_token_ids": (VOCAB,)}, errors.InvalidRequest, "stop_token_ids"),
            ([1], {"logit_bias": {VOCAB: 1.0}}, errors.InvalidRequest, "logit_bias"),
            ([1] * 5000, {}, errors.PromptTooLong, "prompt"),
            ([1], {"max_tokens": 5000}, errors.PromptTooLong, "max_tokens"),
            ([1], {"timeout_s": 1e9}, errors.InvalidRequest, "timeout_s"),
        ]
        for prompt, settings, kind, param in cases:
            with pytest.raises(kind) as refused:
                await complete(router, prompt, **settings)
            assert type(refused.value) is kind, settings
            assert refused.value.param == param
        assert router.dispatcher.scheduler.num_in_flight == 0


async def test_seeds_are_drawn_and_requests_with_one_agree() -> None:
    async with FakeCluster(prefill=1, decode=1) as cluster, router_beside(cluster, timing=quick) as router:
        seeded = [await complete(router, [3], sampling=SamplingParams(seed=5, max_tokens=8)) for _ in range(2)]
        assert seeded[0].token_ids == seeded[1].token_ids
        drawn = [await complete(router, [3], max_tokens=8) for _ in range(2)]
        assert drawn[0].token_ids != drawn[1].token_ids


async def test_a_draining_node_gets_nothing_new_and_loses_nothing() -> None:
    async with FakeCluster(SLOW, prefill=1, decode=2) as cluster, router_beside(cluster, timing=quick) as router:
        assert router.grpc is not None
        async with baton.AsyncClient(router.grpc) as client:
            running = [asyncio.create_task(client.complete([1, 2, i], max_tokens=60, seed=i)) for i in range(6)]
            await until(lambda: cluster["decode-0"].used_blocks > 0)
            answer = await client.drain("decode-0", grace_s=7.0)
            assert (answer.address, answer.drain.grace_s) == (cluster["decode-0"].address, 7.0)
            assert answer.drain.num_sequences > 0
            await until(lambda: State.DRAINING in [m.state for m in router.dispatcher.nodes.members])
            later = [await client.complete([9, i], max_tokens=3, seed=1) for i in range(4)]
            assert "decode-0" not in {c.relay.decode_node_id for c in later}
            assert [(await r).relay.attempts for r in running] == [1] * 6
            by_address = await client.drain(cluster["decode-1"].address)
            assert by_address.drain.node_id == "decode-1"
            with pytest.raises(errors.UnknownNode, match="expected one of"):
                await client.drain("decode-7")


async def test_a_node_that_refuses_because_it_drains_costs_no_attempt() -> None:
    async with FakeCluster(prefill=2, decode=2) as cluster, router_beside(cluster, timing=quick) as router:
        cluster["prefill-0"].fail("run", 20, code="Draining")
        cluster["decode-0"].fail("reserve", 20, code="Draining")
        done = await many(router, 8)
        assert [d.relay.attempts for d in done if isinstance(d, Completion)] == [1] * 8
        await baseline(cluster)


async def test_the_last_tokens_of_a_node_that_leaves_are_not_lost() -> None:
    async with FakeCluster(SLOW, prefill=1, decode=2) as cluster, router_beside(cluster, timing=quick) as router:
        asked = asyncio.create_task(complete(router, [1, 2, 3], max_tokens=30, seed=7))
        await until(lambda: any(n.script.seen["joined"] for n in cluster.nodes.values()))
        leaving = next(n for n in cluster.nodes.values() if n.script.seen["joined"])
        # All tokens that it has left are under way when it says goodbye.
        leaving.mute()
        leaving.runner.step_s = 0.0
        await until(lambda: not leaving.status().num_running)
        leaving.end_sessions()
        leaving.resume()
        done = await asked
        assert (done.relay.attempts, done.relay.decode_node_id) == (1, leaving.node_id)
        assert done.token_ids == expected([1, 2, 3], 7, 30)
