"""Stamps and what follows from them: stages that add up, whatever order, failure or clock they came from."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.observe import Lifeline
from baton.types import Slo, TransferReport

REPORT = TransferReport("shm", True, 4096, 1, 0.02, 0.005)


def stages(life: Lifeline) -> dict[str, float]:
    return {name: round(duration_s, 9) for name, duration_s in life.relay().ttft_stages}


def test_stages_of_a_handed_over_request() -> None:
    life = Lifeline(100.0)
    life.queued(100.01)
    life.placed("p0", "d0", 100.03)
    life.leased(100.06)
    life.sent(100.06)
    life.prefilled(0.1, 0.2, 0)
    life.tokens(1, 100.4)
    life.joined(0.33, 100.42)
    life.transferred(REPORT, 100.43)
    life.tokens(1, 100.45)
    life.tokens(2, 100.5)
    life.ended(100.5)
    assert stages(life) == {
        "tokenize": 0.01, "rerun": 0.0, "placement": 0.02, "reserve": 0.03, "prefill_queue": 0.1, "prefill": 0.2,
        "network": 0.04,
    }  # fmt: skip
    relay = life.relay()
    assert (relay.second_token_s, relay.lease_wait_s) == (pytest.approx(0.05), 0.33)
    assert [name for name, _ in relay.stamps] == [
        "arrived", "queued", "placed", "leased", "dispatched", "first_token", "joined", "handed_off", "second_token",
        "last_token", "ended",
    ]  # fmt: skip


def test_what_failed_before_the_first_token_is_a_stage_of_its_own() -> None:
    life = Lifeline(0.0)
    life.queued(0.5)
    life.placed("p0", "d0", 1.0)
    life.sent(1.0)
    life.prefilled(0.3, 0.3, 0)
    life.failed("p0", "NodeLost", "gone", 2.0)
    life.placed("p1", "d1", 2.5)
    life.sent(3.0)
    life.prefilled(0.25, 0.5, 0)
    life.tokens(1, 4.0)
    assert stages(life) == {
        "tokenize": 0.5, "rerun": 1.5, "placement": 0.5, "reserve": 0.5, "prefill_queue": 0.25, "prefill": 0.5,
        "network": 0.25,
    }  # fmt: skip
    assert (life.relay().attempts, life.relay().prefill_node_id) == (2, "p1")


def test_a_failure_after_the_first_token_leaves_its_stages_alone_and_is_counted_as_recovery() -> None:
    life = Lifeline(0.0)
    life.placed("p0", "d0", 0.0)
    life.sent(0.0)
    life.prefilled(0.0, 0.5, 0)
    life.tokens(1, 1.0)
    before = stages(life)
    life.failed("d0", "NodeLost", "gone", 2.0)
    life.failed("d1", "NodeLost", "gone too", 2.5)
    life.placed("p1", "d1", 3.0)
    life.sent(3.0)
    life.prefilled(9.0, 9.0, 0)
    life.tokens(1, 4.0)
    assert stages(life) == before
    # From the last token, not from when the failure was noticed: that is how long the client waited.
    assert life.relay().recovery_s == 3.0
    assert [(x.blamed_node_id, x.at_s, x.silent_s) for x in life.relay().failures] == [
        ("d0", 2.0, 1.0),
        ("d1", 2.5, 0.0),
    ]
    assert life.relay().failures[0].line() == (
        "an attempt on p0 -> d0 failed after 2000.0 ms (1000.0 ms without a sign of life), held against d0: "
        "NodeLost: gone"
    )


def test_a_failure_before_the_first_token_is_a_pause_from_its_dispatch() -> None:
    life = Lifeline(0.0)
    life.placed("p0", "d0", 1.0)
    life.sent(2.0)
    life.failed("p0", "NodeLost", "x" * 1000, 4.0)
    life.placed("p1", "d1", 4.5)
    life.sent(4.5)
    life.tokens(1, 5.0)
    relay = life.relay()
    assert (relay.recovery_s, relay.failures[0].silent_s) == (3.0, 2.0)
    assert len(relay.failures[0].message) < 400
    for _ in range(100):
        life.failed("p0", "NodeLost", "again", 6.0)
    assert len(life.relay().failures) == 8
    assert life.relay().attempts == 102


def test_a_second_choice_of_nodes_leaves_nothing_of_the_first() -> None:
    life = Lifeline(0.0)
    life.placed("p0", "d0", 1.0)
    life.leased(2.0)
    life.sent(2.0)
    life.placed("p1", "d1", 3.0)
    life.tokens(1, 4.0)
    assert stages(life)["reserve"] == 0.0
    assert "leased" not in dict(life.relay().stamps)


def test_a_node_whose_clock_runs_fast_makes_no_stage_negative() -> None:
    life = Lifeline(0.0)
    life.placed("p0", "d0", 0.0)
    life.sent(1.0)
    life.prefilled(5.0, 7.0, 0)
    life.tokens(1, 2.0)
    assert stages(life)["prefill"] == 1.0
    assert min(stages(life).values()) == 0.0


def test_intervals_are_shared_by_tokens_that_come_together() -> None:
    heard: list[tuple[float, int]] = []
    life = Lifeline(0.0, lambda seconds, count: heard.append((seconds, count)))
    life.tokens(1, 1.0)
    life.tokens(1, 1.5)
    life.tokens(4, 2.5)
    assert heard == [(0.5, 1), (0.25, 4)]
    assert life.relay().tbt_max_s == 1.0


def test_a_request_that_got_no_token_has_no_stages_but_stamps() -> None:
    life = Lifeline(0.0)
    life.queued(0.1)
    life.ended(3.0)
    assert set(stages(life).values()) == {0.0}
    assert life.relay().ttft_s == 0.0
    assert life.relay().stamps == (("arrived", 0.0), ("queued", 0.1), ("ended", 3.0))


STEPS = st.sampled_from(["placed", "leased", "sent", "prefilled", "tokens", "joined", "transferred", "failed"])


@given(st.lists(st.tuples(STEPS, st.floats(0, 10), st.floats(0, 100)), max_size=30))
def test_the_time_to_the_first_token_is_the_sum_of_its_stages_whatever_happens(
    steps: list[tuple[str, float, float]],
) -> None:
    now = 1000.0
    life = Lifeline(now)
    now += 0.125
    life.queued(now)
    for what, pause_s, duration_s in steps:
        now += pause_s
        match what:
            case "placed":
                life.placed("p", "d", now)
            case "prefilled":
                life.prefilled(duration_s, duration_s / 2, 0)
            case "tokens":
                life.tokens(1, now)
            case "joined":
                life.joined(duration_s, now)
            case "transferred":
                life.transferred(REPORT, now)
            case "failed":
                life.failed("p", "NodeLost", "gone", now)
            case _:
                getattr(life, what)(now)
    relay = life.relay()
    assert min(stages(life).values()) >= -1e-9
    assert math.isclose(sum(s.duration_s for s in relay.ttft_stages), relay.ttft_s, abs_tol=1e-9)
    times = [stamp.at_s for stamp in relay.stamps]
    assert times == sorted(times)


@pytest.mark.parametrize(
    ("slo", "token_times_s", "ended_s", "objectives", "last_words"),
    [
        (Slo(), (1.0, 2.0), 2.0, {}, "2 tokens"),
        (Slo(1.0, 1.0), (1.0, 2.0), 2.0, {"ttft": True, "tbt": True}, "SLO met"),
        (Slo(0.9, 1.0), (1.0, 2.0), 2.0, {"ttft": False, "tbt": True}, "SLO missed by TTFT"),
        (Slo(0.9, 0.9), (1.0, 2.0), 2.0, {"ttft": False, "tbt": False}, "SLO missed by TTFT and TBT"),
        # The mean counts: one long gap among short ones is no miss.
        (Slo(tbt_s=1.0), (1.0, 1.1, 3.0), 3.0, {"tbt": True}, "SLO met"),
        (Slo(1.0, 1.0), (1.0,), 9.0, {"ttft": True}, "SLO met"),
        # It ended before its time was up, and after.
        (Slo(1.0, 1.0), (), 0.5, {}, "0 tokens"),
        (Slo(1.0, 1.0), (), 1.5, {"ttft": False}, "SLO missed by TTFT"),
    ],
)
def test_objectives_are_judged_by_what_the_sequence_came_to(
    slo: Slo, token_times_s: tuple[float, ...], ended_s: float, objectives: dict[str, bool], last_words: str
) -> None:
    life = Lifeline(10.0, slo=slo)
    for at_s in token_times_s:
        life.tokens(1, 10.0 + at_s)
    life.ended(10.0 + ended_s)
    assert life.relay().objectives == objectives
    assert life.relay().line().rpartition(" | ")[2] == last_words
