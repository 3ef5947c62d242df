"""Predictions of the time to the first token, and whom they refuse."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import Shed, TooLate
from baton.types import KvLayout, ModelDescription, NodeDescription, NodeStatus, Role
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


TIMES = st.floats(0, 1e5)


@given(st.lists(st.tuples(TIMES, TIMES), max_size=50), TIMES)
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


def test_a_request_waits_for_the_line_before_it() -> None:
    """The decode node has room for one sequence, and each takes a second there."""
    scheduler: Scheduler[Item] = Scheduler(LimitsConfig(), PolicyConfig(prompt_token_s=1e-3), 0.0)
    for role, num_blocks in ((Role.PREFILL, 100), (Role.DECODE, 2)):
        layout = KvLayout(1, num_blocks, 1, 8, 16, "float32")
        model = ModelDescription("m", "f", "float32", 100, 10)
        node = NodeDescription(role.value, 1, role, "h:1", model, layout, 1, 1, "h", (), "cpu", "none", "0")
        scheduler.node_up(node, NodeStatus(role, free_blocks=num_blocks), True, 0.0)
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
    assert scheduler.predict([Demand(20)], "a", 0.5, 19.0).ttft_s == pytest.approx(10.52)
    assert scheduler.predict([Demand(20, priority=-1)], "a", 0.0, 19.0).ttft_s == pytest.approx(0.02)
    assert scheduler.predict([Demand(20)], "b", 0.0, 19.0).ttft_s == pytest.approx(1.02), "clients take turns"
    assert not scheduler.has_idle_node
