"""A profile after a run: parts are taken from the run where they fit it better, and left where they do not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from baton.observe import Relay
from baton.types import KvLayout, TransferReport
from engine.step import StepShape
from loadgen.client import Answer
from loadgen.load import Request
from planner.fitted import Line, Point, RequestTimes, Sharing, Transfers
from planner.measured import Measured
from planner.observed import Observed, layerwise_from_bytes, power_of, request_times, transfers_of
from planner.overhead import Overhead
from planner.refit import refitted
from planner.steps import RecordedStep

TRUE = Line(0.01, 1e-4, 0.0, 1e-3, 1e-6)
SHAPES = (
    *(StepShape().with_prompt(0, tokens) for tokens in (1, 63, 512)),
    *(StepShape(num_decoding=n, num_kv_tokens=n * kv) for n in (1, 4, 16) for kv in (100, 1000)),
)


def measured(line: Line, sharing: Sharing = Sharing()) -> Measured:  # noqa: B008 - it is frozen
    return Measured(
        model="m", device="cpu", software_version="1", kv_layout=KvLayout(2, 100, 1, 8, 16, "float32"), line=line,
        points=tuple(Point(shape, line.step_s(shape)) for shape in SHAPES), sharing=sharing,
        transfers=Transfers(0.001, 1e9), requests=RequestTimes(0.01, 0.001),
    )  # fmt: skip


def steps(line: Line) -> tuple[RecordedStep, ...]:
    found, now = [], 0.0
    for shape in SHAPES * 8:
        now += line.step_s(shape)
        found.append(RecordedStep("n", "h", shape, now, line.step_s(shape)))
    return tuple(found)


def relay(**times: float) -> Relay:
    fixed: dict[str, Any] = {"tokenize_s": 0.0, "placement_s": 0.0, "reserve_s": 0.0, "network_s": 0.0}
    return Relay("p", "d", 0.0, times.pop("prefill_queue_s", 0.0), 0.1, times.pop("ttft_s", 0.2), 1.0, 0.0, 0.0, 1,
                 **(fixed | times))  # fmt: skip


def answer(number: int, ttft_s: float) -> Answer:
    return Answer(number, Request(10, 2, float(number)), number, number, number + 1, (number + ttft_s, number + 1), 200)


def test_steps_that_fit_are_left_as_they_are() -> None:
    before = measured(TRUE, Sharing((1.5,), (1.5,)))
    after, changes = refitted(before, [(Observed(steps(TRUE)), ())])
    assert after == before
    assert [(change.part, change.is_taken) for change in changes] == [("steps", False), ("interruptions", False)]
    assert all(change.before < 0.01 for change in changes)


def test_what_interrupts_steps_is_taken_and_the_line_stays() -> None:
    """One decode in six takes 13 times as long."""
    found = tuple(
        each._replace(turn_s=13 * each.turn_s) if number % 9 == 3 else each for number, each in enumerate(steps(TRUE))
    )
    # One after the other, as late as it makes them.
    at_s = 0.0
    recorded = []
    for each in found:
        at_s += each.turn_s
        recorded.append(each._replace(ended_s=at_s))
    before = measured(TRUE)
    after, (change, pace) = refitted(before, [(Observed(tuple(recorded)), ())])
    assert (change.is_taken, pace.is_taken, pace.after) == (False, True, pytest.approx(0, abs=1e-9))
    assert after.line == before.line
    assert after.pace.prompt == pytest.approx(1.0)
    decodes = [(each.turn_s, TRUE.step_s(each.shape)) for each in recorded if each.shape.num_decoding]
    assert after.pace.decode == pytest.approx(sum(took for took, _ in decodes) / sum(alone for _, alone in decodes))
    # The run's own prediction is then left as it is.
    assert refitted(after, [(Observed(tuple(recorded)), ())])[0] == after


def test_steps_of_a_slower_node_are_taken_and_sharing_that_the_run_does_not_show_stays() -> None:
    slower = Line(*(2 * getattr(TRUE, name) for name in Line.__slots__))
    before = measured(TRUE, Sharing((1.5,), (1.5,)))
    after, (change, _) = refitted(before, [(Observed(steps(slower)), ())])
    assert change.is_taken
    assert change.before == pytest.approx(0.5, abs=0.01)
    assert change.after < change.before
    assert after.sharing == before.sharing
    # Shapes of before are as much slower.
    for shape in SHAPES:
        assert after.line.step_s(shape) == pytest.approx(slower.step_s(shape), rel=0.02)
    assert len(after.points) > len(before.points)


def test_transfers_and_requests_are_taken_where_they_fit_better() -> None:
    moves = tuple(TransferReport("shm", False, size, 1, 0.1, 0.005 + size / 1e8) for size in (10**5, 10**6, 10**7))
    relays = tuple(relay(ttft_s=0.2, tokenize_s=0.001) for _ in range(4))
    answers = tuple(answer(number, 0.25) for number in range(4))
    after, changes = refitted(measured(TRUE), [(Observed(steps(TRUE), moves, relays), answers)])
    assert {change.part: change.is_taken for change in changes} == {
        "steps": False, "interruptions": False, "transfers": True, "messages": False, "requests": True,
    }  # fmt: skip
    assert after.transfers is not None
    assert after.transfers.latency_s == pytest.approx(0.005, rel=0.01)
    assert after.requests.fixed_s == pytest.approx(0.051)
    # A router that forgot some says nothing of the others.
    short = Observed(steps(TRUE), (), relays[:-1])
    assert [change.part for change in refitted(measured(TRUE), [(short, answers)])[1]] == ["steps", "interruptions"]


def test_messages_that_wait_for_nodes_that_compute_are_taken() -> None:
    moved = TransferReport("shm", False, 10**6, 1, 0.1, 0.002)
    relays = (replace(relay(reserve_s=0.012, second_token_s=0.08), transfer=moved),) * 8
    before = measured(TRUE)
    after, changes = refitted(before, [(Observed(steps(TRUE), (), relays), ()), (Observed(steps(TRUE)), ())])
    (change,) = (each for each in changes if each.part == "messages")
    assert (change.is_taken, change.after) == (True, pytest.approx(0))
    assert change.before == pytest.approx(0.005 / 0.006)
    # A reservation is two messages; a second token waits for half of a step, too.
    steps_s = 1.5 * sum(TRUE.step_s(shape) for shape in SHAPES if shape.num_decoding) / 6
    assert after.overhead == Overhead(
        busy_message_s=pytest.approx(0.005), busy_join_s=pytest.approx(0.08 - 0.002 - steps_s)
    )
    assert refitted(after, [(Observed(steps(TRUE), (), relays), ())])[0] == after


def test_what_requests_take_is_what_no_node_computed() -> None:
    split = relay(reserve_s=0.004, network_s=0.006, prefill_queue_s=0.002, ttft_s=0.2, tokenize_s=0.003)
    whole = relay(network_s=0.004, prefill_queue_s=0.002, ttft_s=0.2)
    assert request_times([split], [0.21]) == RequestTimes(pytest.approx(0.013), pytest.approx(0.003), 0.0)
    assert request_times([whole], [0.21]) == RequestTimes(pytest.approx(0.01), pytest.approx(0.003), 0.0)
    moved = replace(split, transfer=TransferReport("shm", False, 1, 1, 0.01, 0.004), second_token_s=0.03)
    assert request_times([moved] * 3 + [split], [0.21], decode_s=0.02).join_s == pytest.approx(0.006)
    assert request_times([], []) == RequestTimes()


def test_of_a_transfer_layer_by_layer_the_last_layer_is_left() -> None:
    at_once = TransferReport("shm", False, 1000, 1, 9.0, 0.001 + 1000 / 1e6)
    layered = TransferReport("shm", True, 80_000, 1, 9.0, 0.001 + 80_000 / 8 / 1e6)
    found = transfers_of([at_once, layered], 8)
    assert found is not None
    assert found.latency_s == pytest.approx(0.001, rel=1e-3)
    assert found.bytes_s == pytest.approx(1e6, rel=1e-3)
    assert layerwise_from_bytes([at_once, layered]) == 80_000
    assert layerwise_from_bytes([at_once]) is None
    assert transfers_of([], 8) is None


def test_power_is_of_a_node_that_computes_and_of_one_that_does_not() -> None:
    busy = [RecordedStep("n", "h", SHAPES[0], 10.0, 6.0), RecordedStep("m", "h", SHAPES[0], 10.0, 2.0)]
    # Two nodes for 10 s, 8 s of it busy: 12 s at 50 W and 8 s at 300 W.
    found = power_of(50.0, 12 * 50 + 8 * 300, 10.0, busy, 2)
    assert found is not None
    assert (found.idle_w, found.busy_w) == (50.0, pytest.approx(300.0))
    assert power_of(None, 100.0, 10.0, busy, 2) is None
    assert power_of(50.0, None, 10.0, busy, 2) is None
    assert power_of(50.0, 100.0, 10.0, [], 2) is None
