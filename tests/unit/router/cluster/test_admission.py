"""Predictions of the time to the first token, and whom they refuse."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import Shed, TooLate
from baton.types import KvLayout, ModelDescription, NodeDescription, NodeStatus, Role, Slo, StepTimes
from router.cluster.admission import Correction, Pace, Prediction
from router.cluster.config import PolicyConfig
from router.cluster.policy import Decision, Demand
from router.cluster.scheduler import Scheduler
from router.config import LimitsConfig

CONFIG = PolicyConfig(admitted_share=0.9, sheddable_share=0.5)


@pytest.mark.parametrize(
    ("ttft_s", "objective_s", "is_sheddable", "refused_with"),
    [
        (0.9, 1.0, False, None),
        (0.91, 1.0, False, TooLate),
        (0.5, 1.0, True, None),
        (0.51, 1.0, True, Shed),
        (math.inf, 60.0, False, TooLate),
        (0.0, 1e-9, True, None),
    ],
)
def test_what_would_be_late_is_refused_and_sheddable_requests_first(
    ttft_s: float, objective_s: float, is_sheddable: bool, refused_with: type[TooLate] | None
) -> None:
    prediction = Prediction(0.0, ttft_s)
    if refused_with is None:
        prediction.check(objective_s, is_sheddable=is_sheddable, config=CONFIG)
        return
    with pytest.raises(refused_with) as refused:
        prediction.check(objective_s, is_sheddable=is_sheddable, config=CONFIG)
    assert type(refused.value) is refused_with
    assert refused.value.retryable


@pytest.mark.parametrize(("ttft_s", "retry_after_s"), [(1.0, 1.0), (11.8, 10.0), (500.0, 30.0), (math.inf, 30.0)])
def test_a_refused_client_hears_when_its_objective_will_be_met(ttft_s: float, retry_after_s: float) -> None:
    with pytest.raises(
        TooLate, match=r"the first token is predicted in .* s, too late for the objective of 2 s"
    ) as late:
        Prediction(0.0, max(ttft_s, 1.81)).check(2.0, is_sheddable=False, config=CONFIG)
    assert late.value.retry_after_s == pytest.approx(retry_after_s)


def test_the_pace_is_that_of_a_line_that_has_someone_in_it() -> None:
    pace = Pace()
    assert pace.wait_s(5, 0.0) == 0.0, "nothing is known"
    for i in range(20):  # a busy line, then an empty one, again and again
        pace.started(1, 100.0 * i)
        pace.started(1, 100.0 * i + 0.2)
        pace.started(0, 100.0 * i + 0.4)
    assert pace.wait_s(5, 5000.0) == pytest.approx(1.0)
    assert pace.wait_s(0, 5000.0) == 0.0
    pace.started(1, 5000.0)
    assert pace.wait_s(5, 5000.1) == pytest.approx(1.0)
    assert pace.wait_s(5, 5060.0) > 10.0, "the line stands still"
    pace.left(0)
    assert pace.wait_s(5, 5060.0) == pytest.approx(1.0), "they were cancelled"


def test_predictions_learn_from_what_became_of_earlier_ones() -> None:
    correction = Correction()
    assert correction.prediction(3.0) == Prediction(3.0, 3.0), "nothing is known"
    for i in range(200):
        computed_s = 0.1 * (i % 10)
        correction.turned_out(correction.prediction(computed_s), 0.05 + 1.5 * computed_s)
    assert correction.prediction(1.0).ttft_s == pytest.approx(1.55, rel=0.01)
    assert correction.prediction(0.0).ttft_s == pytest.approx(0.05, abs=0.01)
    for _ in range(500):
        correction.turned_out(Prediction(0.3, 0.0), 0.3)
    assert correction.prediction(0.3).ttft_s == pytest.approx(0.3, rel=0.01), "the newest count"


SECONDS = st.floats(0, 1e5)


@given(st.lists(st.tuples(SECONDS, SECONDS), max_size=50), SECONDS)
def test_no_history_makes_a_prediction_that_is_no_time(history: list[tuple[float, float]], computed_s: float) -> None:
    correction = Correction()
    for seen_s, real_s in history:
        correction.turned_out(Prediction(seen_s, 0.0), real_s)
    found = correction.prediction(computed_s)
    assert found.computed_s == computed_s
    assert 0 <= found.ttft_s < math.inf
    assert correction.prediction(computed_s + 1).ttft_s >= found.ttft_s, "more work never takes less"


@dataclass(eq=False)
class Item:
    number: int
    client: str = "a"
    has_tokens: bool = False

    @property
    def sequence_id(self) -> str:
        return str(self.number)

    def demand(self, now: float) -> Demand:
        return Demand(20)


def add_node(scheduler: Scheduler[Item], node_id: str, status: NodeStatus) -> None:
    layout = KvLayout(1, status.free_blocks, 1, 8, 16, "float32")
    model = ModelDescription("m", "f", "float32", 100, 10)
    node = NodeDescription(node_id, 1, status.role, "h:1", model, layout, 1, 1, "h", (), "cpu", "none", "0")
    scheduler.node_up(node, status, True, 0.0)


# A step takes 10 ms, and 5 ms more for each sequence.
TIMES = StepTimes(0.01, 1e-3, 0.005, 0.0)


@pytest.mark.parametrize(
    ("nums_running", "tbt_ms", "priority", "refused_with"),
    [
        ([4], 36.0, 0, None),
        ([4], 34.0, 0, TooLate),
        # Alone it would take 15 ms: half of what is beyond is left to others.
        ([4], 57.0, 1, None),
        ([4], 53.0, 1, Shed),
        # One node is enough.
        ([4, 3], 31.0, 0, None),
        # One where nothing runs is.
        ([4, 0], 16.0, 5, None),
        ([4, 1], 16.0, 0, TooLate),
        # What no node could ever meet need not wait.
        ([4, 4], 14.0, 5, None),
    ],
)
def test_tokens_that_would_come_too_slowly_are_refused(
    nums_running: list[int], tbt_ms: float, priority: int, refused_with: type[TooLate] | None
) -> None:
    scheduler: Scheduler[Item] = Scheduler(LimitsConfig(), PolicyConfig(), 0.0)
    add_node(scheduler, "p", NodeStatus(Role.PREFILL, free_blocks=100, step_times=TIMES))
    for i, num in enumerate(nums_running):
        status = NodeStatus(Role.DECODE, free_blocks=100, num_running=num, running_tokens=num * 20, step_times=TIMES)
        add_node(scheduler, f"d{i}", status)
    demand, slo = Demand(20, priority=priority), Slo(tbt_s=tbt_ms / 1e3)
    if refused_with is None:
        assert scheduler.predict([demand], slo, "a", 0.0, 0.0) is None
    else:
        with pytest.raises(refused_with, match="the time between tokens is predicted to be") as refused:
            scheduler.predict([demand], slo, "a", 0.0, 0.0)
        assert type(refused.value) is refused_with
    only_first = Demand(20, is_single_token=True, priority=priority)
    assert scheduler.predict([only_first], slo, "a", 0.0, 0.0) is None, "there is no time between its tokens"
    add_node(scheduler, "new", NodeStatus(Role.DECODE, free_blocks=100, num_running=9))
    assert scheduler.predict([demand], slo, "a", 0.0, 0.0) is None, "nothing is known of a node that was not measured"


def test_a_request_waits_for_the_line_before_it() -> None:
    """The decode node has room for one sequence, and each takes a second there."""
    scheduler: Scheduler[Item] = Scheduler(LimitsConfig(), PolicyConfig(prompt_token_s=1e-3), 0.0)
    for role, num_blocks in ((Role.PREFILL, 100), (Role.DECODE, 2)):
        add_node(scheduler, role.value, NodeStatus(role, free_blocks=num_blocks))
    for i in range(30):
        scheduler.arrive(Item(i), 0.0)
    for second in range(20):
        item = scheduler.next(float(second))
        assert item is not None
        decision = scheduler.decide(item, float(second))
        assert isinstance(decision, Decision)
        scheduler.assign(item, decision, 20, float(second))
        scheduler.prefilled(item.sequence_id)
        scheduler.release(item, float(second))
        scheduler.depart(item, float(second))
    assert scheduler.num_waiting == 10
    # 20 tokens take 20 ms.

    def ttft_s(demand: Demand, client: str, arrived_s: float = 19.0) -> float:
        found = scheduler.predict([demand], Slo(ttft_s=100.0), client, arrived_s, 19.0)
        assert found is not None
        return found.ttft_s

    assert ttft_s(Demand(20), "a", 18.5) == pytest.approx(10.52)
    assert ttft_s(Demand(20, priority=-1), "a") == pytest.approx(0.02)
    assert ttft_s(Demand(20), "b") == pytest.approx(1.02), "clients take turns"
    with pytest.raises(TooLate):
        scheduler.predict([Demand(20)], Slo(ttft_s=10.0), "a", 19.0, 19.0)
    assert scheduler.predict([Demand(20)], Slo(), "a", 19.0, 19.0) is None, "it has no objective"
