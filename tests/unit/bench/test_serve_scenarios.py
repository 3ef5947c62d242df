"""What the scenarios of ``bench serve`` send, in which order, and how they judge what they find."""

import subprocess
import sys
import time
from dataclasses import replace

import psutil
import pytest
from rich.console import Console

from bench.serve import burst, overload, replay, table, uneven
from bench.serve.command import main
from bench.serve.turns import Setting, turns
from loadgen import traces
from loadgen.client import Answer
from loadgen.clusters import Shape
from loadgen.compare import Comparison, Measured
from loadgen.load import Load, Request
from loadgen.objectives import Limits, Point, Uncontended
from loadgen.run import Outcome

SETTING = Setting(
    model="m", options=(), minutes=1.0, rounds=2, seconds=60.0, share=1.0, only=(), console=Console(quiet=True)
)


def answer(ttft_s=0.1, gap_s=0.01, num_tokens=3, due_s=0.0, number=0, **more) -> Answer:
    stamps = tuple(due_s + ttft_s + i * gap_s for i in range(num_tokens))
    made = Answer(number, Request(8, num_tokens, due_s), due_s, due_s, stamps[-1], stamps, 200)
    return replace(made, **more)


def run(target, load, *answers, wall_s=1.0) -> Measured:
    requests = tuple(each.request for each in answers)
    return Measured(target, load, 0, Outcome(Load(load, requests, rate=1.0), answers, wall_s), {})


def comparison(*runs) -> Comparison:
    return Comparison((), Uncontended((Point(8, 0.1, 0.01),)), Limits(), runs)


def test_each_round_begins_with_another_configuration():
    shapes = [Shape(name, ()) for name in "abc"]
    assert [shape.name for _, shape in turns(shapes, 3)] == list("abcbcacab")
    assert [number for number, _ in turns(shapes, 2)] == [0, 0, 0, 1, 1, 1]
    assert [s.name for s in replace(SETTING, only=("b", "c")).chosen(shapes)] == ["b", "c"]


@pytest.mark.parametrize(("only", "chosen"), [("2", ["2"]), ("2 a", ["2 a"]), ("a", ["2 a", "1 a"]), ("3", [])])
def test_a_name_that_is_given_whole_chooses_one_configuration(only, chosen):
    shapes = [Shape(name, ()) for name in ("2", "2 a", "1 a")]
    assert [s.name for s in replace(SETTING, only=(only,)).chosen(shapes)] == chosen


# -- table


def test_the_table_has_the_loads_of_the_record():
    open_loop, eight, many = table.loads(SETTING, 0)
    assert (open_loop.rate, len(open_loop.requests)) == (0.45, 27)
    assert (eight.streams, len(eight.requests), many.streams, len(many.requests)) == (8, 16, 32, 48)
    assert {(r.prompt_tokens, r.output_tokens) for r in many.requests} == {(512, 64)}
    assert open_loop.requests != table.loads(SETTING, 1)[0].requests


@pytest.mark.parametrize(
    ("ttft_s", "gap_s", "wall_s", "is_met"),
    [(1.1, 0.1, 1.0, True), (1.3, 0.1, 1.0, False), (1.1, 0.12, 1.0, False), (1.1, 0.1, 1.2, False)],
)
def test_the_aim_is_beside_the_best_mixed_configuration(ttft_s, gap_s, wall_s, is_met):
    (aim,) = table.aims(
        comparison(
            run("1 mixed", "x", answer(ttft_s=1.0, gap_s=1.0), wall_s=2.0),
            run("2 mixed", "x", answer(ttft_s=2.0, gap_s=2.0), wall_s=1.0),
            run(table.AIMED, "x", answer(ttft_s=ttft_s, gap_s=gap_s), wall_s=wall_s),
            run("2 mixed", "not of all", answer()),
        )
    )
    assert aim["ttft_p99_over_best"] == pytest.approx(ttft_s)
    assert aim["tokens_s_over_best"] == pytest.approx(1.0 / wall_s)
    assert (aim["load"], aim["is_met"]) == ("x", is_met)


# -- replay


def test_rounds_replay_parts_of_the_traces_that_follow_each_other():
    first, second = replay.loads(SETTING, 0), replay.loads(SETTING, 1)
    assert [load.name for load in first] == [f"{t} {r:g}/s" for t in ("code", "conv") for r in replay.RATES[t]]
    assert [len(load.requests) for load in first] == [18, 36, 54, 30, 60, 90]
    rows = traces.read("code")
    assert [r.prompt_tokens for r in first[0].requests] == [round(min(1500, x.prompt_tokens / 4)) for x in rows[:18]]
    assert [r.prompt_tokens for r in second[0].requests] == [round(min(1500, x.prompt_tokens / 4)) for x in rows[18:36]]
    assert first[2].last_due_s == pytest.approx(53 / 0.9)


def test_conditional_is_compared_with_the_better_of_the_others_in_each_figure():
    rows = replay.against_best(
        comparison(
            run("split", "x", answer(ttft_s=0.2, gap_s=0.01)),
            run("aggregated", "x", answer(ttft_s=0.1, gap_s=0.04), wall_s=2.0),
            run("conditional", "x", answer(ttft_s=0.11, gap_s=0.02)),
            run("conditional", "alone", answer()),
        )
    )
    (row,) = rows
    assert row["ttft_p99"] == pytest.approx(1.1)
    assert row["gap_p99"] == pytest.approx(2.0)
    assert row["goodput_requests_s"] == pytest.approx(1.0)


# -- burst


def test_answers_without_the_oracles_ids_are_wrong():
    expected = run("oracle", "x", answer(token_ids=(1, 2)), answer(number=1, token_ids=(3,))).outcome
    found = run(
        "2+2", "x", answer(token_ids=(1, 2)), answer(number=1, token_ids=(4,)), answer(number=2, token_ids=(5,))
    ).outcome
    assert burst.mismatches(found, expected) == 2
    assert burst.mismatches(expected, expected) == 0


# -- overload


def test_an_overload_is_three_times_the_capacity_and_then_half_of_it():
    load = overload.Phases(over_s=100.0, after_s=50.0, capacity=2.0).load()
    over = [request for request in load.requests if request.due_s < 100.0]
    assert len(over) == pytest.approx(600, rel=0.15)
    assert len(load.requests) - len(over) == pytest.approx(50, rel=0.4)
    assert [r.due_s for r in load.requests] == sorted(r.due_s for r in load.requests)


def test_a_cluster_has_recovered_when_the_last_bad_request_is_past():
    limits = Limits(ttft_s=1.0)

    def after(*kinds):
        bad = {"late": {"ttft_s": 2.0}, "refused": {"error": "busy", "status": 429}, "good": {}}
        return [answer(due_s=60.0 + i, **bad[kind]) for i, kind in enumerate(kinds)]

    assert overload.recovery_s(after("good", "good"), 60.0, limits) == 0.0
    assert overload.recovery_s(after("late", "good", "refused", "good"), 60.0, limits) == 3.0
    assert overload.recovery_s(after("good", "late"), 60.0, limits) is None
    assert overload.recovery_s([], 60.0, limits) is None


@pytest.mark.parametrize(
    ("goodput", "has_peaked"),
    [([1.0], False), ([1.0, 0.9], False), ([1.0, 0.9, 0.8], True), ([1.0, 0.9, 1.1], False), ([0.0, 0.0, 0.0], True)],
)
def test_rates_rise_until_the_goodput_falls(goodput, has_peaked):
    assert overload.has_peaked([{"goodput_requests_s": found} for found in goodput]) is has_peaked


def test_goodput_and_refusals_are_those_of_the_overload():
    phases = overload.Phases(over_s=10.0, after_s=5.0, capacity=1.0)
    busy = {"error": "HTTP 429: busy", "status": 429, "stamps_s": ()}
    answers = (
        answer(due_s=1.0), answer(due_s=2.0), answer(due_s=3.0, ttft_s=9.0),
        answer(due_s=4.0, ended_s=4.05, **busy), answer(due_s=11.0), answer(due_s=12.0),
    )  # fmt: skip
    found = overload.judged("x", run("x", "overload", *answers).outcome, phases, 0.21, Limits(ttft_s=5.0))
    assert (found["requests"], found["refused"], found["goodput_requests_s"]) == (4, 1, 0.2)
    assert found["refusal_p99_s"] == pytest.approx(0.05)
    assert found["recovery_s"] == 0.0
    assert found["aims"] == {"goodput": True, "refusals": True, "recovery": True}
    worse = overload.judged("x", run("x", "overload", *answers).outcome, phases, 0.25, Limits(ttft_s=5.0))
    assert worse["aims"]["goodput"] is False


@pytest.mark.parametrize("wrong", [["nothing"], ["table", "--rounds", "-1"], ["table", "--minutes", "-2"]])
def test_wrong_arguments_are_refused(tmp_path, wrong, capsys):
    with pytest.raises(SystemExit):
        main(wrong, tmp_path)
    assert "expected" in capsys.readouterr().err or wrong == ["nothing"]


def test_a_slowed_process_is_stopped_again_and_again_and_runs_in_the_end():
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        process, seen = psutil.Process(busy.pid), set()
        until_s = time.monotonic() + 30
        with uneven.slowed(busy.pid):
            while not {psutil.STATUS_STOPPED, psutil.STATUS_RUNNING} <= seen and time.monotonic() < until_s:
                seen.add(process.status())
        assert {psutil.STATUS_STOPPED, psutil.STATUS_RUNNING} <= seen
        assert process.status() != psutil.STATUS_STOPPED
    finally:
        busy.kill()
        busy.wait()
