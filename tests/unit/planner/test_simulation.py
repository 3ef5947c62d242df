"""The honest profile: what one request takes to the last message, and that failures, moves, roles, cancels, prefixes
and shared links are simulated. Conservation is checked at the end of every run, by the run itself."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from baton.errors import BadConfig
from engine.scheduler_config import SchedulerConfig
from planner.results import Ending, Profile
from planner.sim.config import Outage, SimulationConfig
from planner.uncontended import measured
from planner.workload import Request
from router.cluster.config import PolicyConfig
from tests.support.simulated import ALWAYS, CONFIG, LINE, MACHINE, MODEL, design, run, traffic


def test_one_request_takes_its_messages_its_steps_and_its_transfer() -> None:
    found = run([Request(0, 1.0, 1000, 5)], design())
    assert found.profile is Profile.HONEST
    (one,) = found.served
    message_s, prompt_s = CONFIG.message_s, LINE.step_s(1000, 0, 0)
    # Reserved, granted, run, and the token on its way back.
    assert one.first_token_s == pytest.approx(1.0 + prompt_s + 4 * message_s)
    # Layer by layer: 16 blocks of 64 tokens of 20,480 bytes take 21 ms, and the prompt 110: only the last of ten layers
    # is left.
    ready_s = 1.0 + 3 * message_s + prompt_s
    joined_s = ready_s + 1024 * MODEL.kv_bytes_per_token / 10 / 1e9 + MACHINE.link_latency_s + CONFIG.commit_s
    assert (one.prompt_end_s, one.decode_start_s) == (pytest.approx(ready_s), pytest.approx(joined_s))
    assert one.second_token_s == pytest.approx(joined_s + LINE.step_s(0, 1, 1001))
    steps_s = sum(LINE.step_s(0, 1, 1000 + count) for count in range(1, 5))
    assert one.ended_s == pytest.approx(joined_s + steps_s + message_s)
    assert one.max_gap_s == pytest.approx(joined_s + LINE.step_s(0, 1, 1001) - ready_s)
    assert (one.prompt_machine, one.token_machine, one.num_tokens) == ("prefill-0", "decode-0", 5)
    assert one.energy_j == pytest.approx((prompt_s + steps_s) * MACHINE.power_w)
    assert found.counters["transferred_bytes"] == pytest.approx(1024 * MODEL.kv_bytes_per_token, abs=10)


def test_decoding_begins_behind_the_prompt_where_both_are_computed() -> None:
    """By one clock: the first token is on its way to the client meanwhile."""
    (whole,) = run([Request(0, 1.0, 1000, 5)], design(0, 0, 1)).served
    ready_s = 1.0 + CONFIG.message_s + LINE.step_s(1000, 0, 0)
    assert whole.decode_start_s == whole.prompt_end_s == pytest.approx(ready_s)
    assert whole.second_token_s == pytest.approx(ready_s + LINE.step_s(0, 1, 1001))
    assert whole.first_token_s == pytest.approx(ready_s + CONFIG.message_s)
    # One token needs no decoding.
    (single,) = run([Request(0, 1.0, 1000, 1)], design(0, 0, 1)).served
    assert (single.decode_start_s, measured(single, Profile.HONEST).second_token_gap_s) == (None, None)


@pytest.mark.parametrize("pools", [(2, 2, 0), (0, 0, 3), (1, 1, 1)])
@pytest.mark.parametrize("outages", [(), (Outage("mixed-0", 3.0, 4.0), Outage("decode-0", 2.0, 6.0))])
def test_no_sequence_decodes_before_its_prompt_ends(pools: tuple[int, int, int], outages: tuple[Outage, ...]) -> None:
    where = design(*pools)
    there = {f"{group.role.value}-0" for group in where}
    config = replace(CONFIG, policy=PolicyConfig(), outages=tuple(x for x in outages if x.machine in there))
    found = run(traffic(rate=20, seconds=8), where, config)
    gaps_s = [measured(each, found.profile).second_token_gap_s for each in found.served if each.num_tokens > 1]
    assert len(gaps_s) > 100
    assert all(gap_s is not None and gap_s >= 0 for gap_s in gaps_s)
    for each in found.served:
        if each.num_tokens > 1 and each.num_attempts == 1:
            assert each.decode_start_s is not None
            assert each.second_token_s is not None
            assert each.decode_start_s < each.second_token_s


def test_a_short_prompt_is_sent_when_it_is_computed() -> None:
    (one,) = run([Request(0, 0.0, 500, 3)], design()).served
    ready_s = 3 * CONFIG.message_s + LINE.step_s(500, 0, 0)
    joined_s = ready_s + 512 * MODEL.kv_bytes_per_token / 1e9 + MACHINE.link_latency_s + CONFIG.commit_s
    assert one.second_token_s == pytest.approx(joined_s + LINE.step_s(0, 1, 501))


def test_two_transfers_to_one_machine_share_its_link() -> None:
    slow = replace(MACHINE, link_bytes_s=1e7)
    alone = run([Request(0, 0.0, 400, 3)], design(2, machine=slow)).served[0]
    together = run([Request(0, 0.0, 400, 3), Request(1, 0.0, 400, 3)], design(2, machine=slow)).served
    assert {one.prompt_machine for one in together} == {"prefill-0", "prefill-1"}
    transfer_s = 448 * MODEL.kv_bytes_per_token / 1e7
    for one in together:
        assert one.second_token_s is not None
        assert alone.second_token_s is not None
        assert one.second_token_s - alone.second_token_s == pytest.approx(transfer_s, abs=0.015)


def test_many_steps_at_once_change_nothing() -> None:
    requests = traffic(rate=12, seconds=10)
    # What nodes measure differs a little, and so would what the router makes of it.
    found, each = (
        run(requests, design(2, 2), replace(CONFIG, steps_at_once=count, told_times=LINE)).served for count in (64, 1)
    )
    for one, other in zip(found, each, strict=True):
        assert one.first_token_s == pytest.approx(other.first_token_s, abs=1e-6)
        assert one.second_token_s == pytest.approx(other.second_token_s, abs=1e-6)
        assert one.ended_s == pytest.approx(other.ended_s, abs=1e-6)
        assert one.max_gap_s == pytest.approx(other.max_gap_s, abs=1e-6)
        assert one.energy_j == pytest.approx(other.energy_j, rel=1e-6)


def test_equal_arguments_give_equal_runs() -> None:
    config = replace(CONFIG, outages=(Outage("decode-0", 3.0, 6.0),), policy=PolicyConfig())
    runs = [run(traffic(rate=20, seconds=10), design(2, 2, 1), config) for _ in range(2)]
    assert repr(runs[0]) == repr(runs[1])


@pytest.mark.parametrize("machine", ["prefill-0", "decode-0", "mixed-0"])
@pytest.mark.parametrize("back_s", [None, 3.2, 8.0])
def test_what_runs_on_a_machine_that_dies_runs_again(machine: str, back_s: float | None) -> None:
    config = replace(CONFIG, outages=(Outage(machine, 3.0, back_s),), policy=PolicyConfig(migrates=False))
    found = run(traffic(rate=20, seconds=10), design(2, 2, 1), config)
    assert all(one.is_whole for one in found.served)
    assert found.counters["failures"] == 1
    assert found.counters["attempts_failed"] > 0
    again = [one for one in found.served if one.num_attempts > 1]
    assert again
    lost_s = config.membership.lost_s if back_s is None else min(config.membership.lost_s, back_s - 3.0)
    assert max(one.ended_s or 0.0 for one in again) > 3.0 + lost_s


def test_a_client_that_leaves_takes_no_more_steps() -> None:
    stays = Request(0, 0.0, 600, 400)
    (whole,) = run([stays], design()).served
    (one,) = run([replace(stays, cancelled_after_s=1.0)], design()).served
    assert one.ending is Ending.CANCELLED
    assert 10 < one.num_tokens < 100 < whole.num_tokens
    assert one.energy_j < 0.4 * whole.energy_j
    early = [replace(each, cancelled_after_s=0.001 * each.number) for each in traffic(rate=50, seconds=5)]
    endings = [each.ending for each in run(early, design()).served]
    assert endings.count(Ending.CANCELLED) > 100


def test_prompts_that_begin_alike_are_computed_once() -> None:
    requests = [Request(i, 2.0 * i, 1000, 5, prefix="p", num_prefix_tokens=900) for i in range(4)]
    found = run(requests, design(2, 1), replace(CONFIG, policy=PolicyConfig(repurpose_after_s=None)))
    assert [one.num_cached_tokens for one in found.served] == [0, 896, 896, 896]
    assert sum(use.num_prompt_tokens for use in found.machines) == 1000 + 3 * 104
    others = [replace(each, prefix=f"p{each.number}") for each in requests]
    assert [one.num_cached_tokens for one in run(others, design(2, 1)).served] == [0, 0, 0, 0]


def test_nodes_are_borrowed_in_a_burst_and_change_pools_when_the_load_has_shifted() -> None:
    burst = [*(Request(i, 5.0, 2000, 5) for i in range(60)), Request(60, 60.0, 1000, 5)]
    found = run(burst, design(1, 3), SimulationConfig())
    assert found.counters["role_changes_borrowed"] >= 1
    assert found.counters["role_changes_borrowed"] == found.counters["role_changes_returned"]
    splits = SimulationConfig(policy=PolicyConfig(disaggregation="always"))
    shifted = run(traffic(rate=6.5, seconds=200, prompt=2000, output=10), design(1, 3), splits)
    assert shifted.counters["role_changes_scheduler"] >= 1
    assert all(one.is_whole for one in shifted.served)


def test_sequences_move_off_a_node_without_room() -> None:
    small = replace(MACHINE, memory_bytes=4e8)
    requests = [Request(i, 0.02 * i, 1000, 3000) for i in range(6)]
    config = SimulationConfig(policy=ALWAYS, scheduler=SchedulerConfig(block_tokens=16))
    found = run(requests, design(1, 2, machine=small), config)
    assert all(one.is_whole for one in found.served)
    assert found.counters["moves_moved"] + found.counters["preemptions"] > 0


@pytest.mark.parametrize("seed", [41, 44, 45, 47])
def test_a_sequence_that_waits_for_blocks_while_others_decode_ends_where_it_is_to(seed: int) -> None:
    """Others take as many steps at once as it has to go."""
    rng = Random(seed)
    small = replace(MACHINE, memory_bytes=rng.choice([6e6, 9e6, 1.3e7]))
    requests = [Request(i, 0.05 * i, rng.randint(20, 120), rng.randint(60, 200)) for i in range(5)]
    policy = PolicyConfig(disaggregation="never", migrates=False)
    config = SimulationConfig(policy=policy, scheduler=SchedulerConfig(block_tokens=16), max_output_tokens=300)
    found = run(requests, design(0, 0, 1, machine=small), config)
    assert found.counters["preemptions"] > 0
    assert [each.num_tokens for each in found.served] == [each.num_output_tokens for each in requests]


def test_a_model_that_does_not_fit_is_refused() -> None:
    with pytest.raises(BadConfig, match="has 0 GB for small"):
        run([], design(machine=replace(MACHINE, memory_bytes=1e7)))
    with pytest.raises(BadConfig, match="'decode-7', expected one of prefill-0, decode-0"):
        run([], design(), replace(CONFIG, outages=(Outage("decode-7", 1.0),)))


def test_requests_that_no_node_has_room_for_end() -> None:
    """More than a queue of prompts takes, and for too long: refused at their arrival, or failed at their deadline."""
    config = replace(CONFIG, timeout_s=3.0, limits=replace(CONFIG.limits, max_queued=20, max_active=40))
    found = run(traffic(rate=200, seconds=2, prompt=2000), design(), config)
    endings = {one.ending for one in found.served}
    assert {Ending.REFUSED, Ending.WHOLE} <= endings
    assert all((one.ended_s or 0.0) - one.request.arrival_s < 4.0 for one in found.served)
