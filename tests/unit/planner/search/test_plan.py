"""The answers of all kinds: which is best, whether splitting pays, JSON and pictures of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from xml.etree import ElementTree

import pytest

from baton.errors import BadConfig
from baton.types import Role
from planner.machines import catalogue
from planner.models import BUILT_IN
from planner.results import Profile
from planner.search import pictures, report
from planner.search.kind import KindSearch
from planner.search.plan import Plan, num_parts, search
from planner.search.question import Goal, Kind, Limits, Question, Range, kinds
from planner.search.slos import NINE_SLOS, missed, slo
from planner.search.source import Distributed, Redrawn, Stretched, lengths
from planner.summary import Figures, Summary
from planner.workload import Request, Workload
from tests.support.designs import LENGTHS, Known

KNOWN = catalogue()
A, H = KNOWN["a100-80gb"], KNOWN["h100-80gb"]


def question(**fields: object) -> Question:
    limits = Limits(machines=Range(1, 3))
    made = Question(
        Redrawn(LENGTHS, 8.0, 1), Profile.COMPAT, BUILT_IN["bloom-176b"], 8, KNOWN, kinds((H,), ((H, A),)),
        limits=limits, max_rate=12.0,
    )  # fmt: skip
    return replace(made, **fields)  # type: ignore[arg-type]


def plan_of(asked: Question, highest_rate: Callable[[int, int], float]) -> Plan:
    return Plan(asked, tuple(KindSearch(asked, kind, Known(highest_rate)).answer() for kind in asked.kinds))


def test_mixed_machines_are_always_among_the_kinds() -> None:
    assert kinds((), ((H, A),)) == (Kind(H, A), Kind(H, None), Kind(A, None))
    assert kinds((A, H), ()) == (
        Kind(A, A), Kind(A, H), Kind(H, A), Kind(H, H), Kind(A, None), Kind(H, None),
    )  # fmt: skip
    assert kinds((H, H), ((H, H),)) == (Kind(H, H), Kind(H, None))


def test_the_plan_says_whether_splitting_pays() -> None:
    """Failure 30: users could not tell."""
    asked = question(limits=Limits(machines=Range(1, 8)), max_rate=50.0)

    def split(prompt: int, token: int) -> float:
        return min(4 * prompt, 4 * token) if token else 1.25 * prompt

    assert plan_of(asked, split).verdict == "splitting pays: 1.60 times the rate of the best mixed design"
    mixed = plan_of(asked, lambda prompt, token: 1 if token else 3 * prompt)
    assert mixed.verdict.startswith("splitting does not pay")
    assert mixed.best is not None
    assert mixed.best is mixed.best_mixed
    assert plan_of(asked, lambda prompt, token: 5 if token else 0).verdict.endswith("meets the objectives")
    nothing = plan_of(asked, lambda prompt, token: 0)
    assert nothing.best is None
    assert nothing.verdict == "no design within the limits meets the objectives"
    cheap = plan_of(replace(asked, goal=Goal.COST, rate=8.0), split)
    assert cheap.best is not None
    assert cheap.best.best is not None
    # Two H100 and two A100 against seven A100.
    saved = 1 - (2 * H.machine_dollars_per_hour + 2 * A.machine_dollars_per_hour) / (7 * A.machine_dollars_per_hour)
    assert cheap.verdict == f"splitting pays: {100 * saved:.0f} % less cost than the best mixed design"


def test_of_equal_designs_the_mixed_one_is_best() -> None:
    asked = question(kinds=(Kind(H, H), Kind(H, None)), limits=Limits(machines=Range(2, 2)))
    found = plan_of(asked, lambda prompt, token: 5)
    assert found.best is not None
    assert found.best.kind.token is None


def test_limits_that_leave_no_design_are_refused() -> None:
    with pytest.raises(BadConfig, match="no design is within the limits"):
        num_parts(question(limits=Limits(dollars_per_hour=1.0)))
    with pytest.raises(BadConfig, match="from 3 to 2 machines"):
        Range(3, 2)


def test_a_budget_of_so_many_machines_has_room_for_them() -> None:
    """Sums of prices in another order differ by their rounding."""
    for count in range(2, 60):
        limits = Limits(dollars_per_hour=count * H.machine_dollars_per_hour, power_units=count * H.power_units)
        for kind in (Kind(H, None), Kind(H, H)):
            designs = [kind.design(column.prompt, column.high) for column in kind.columns(limits)]
            assert max(design.num_machines for design in designs) == count


def test_json_and_pictures_have_what_was_found(tmp_path: Path) -> None:
    asked = question(has_fronts=True)
    found = search(asked)
    told = json.loads(json.dumps(report.as_json(found)))
    assert told["profile"] == "compat"
    assert told["slos"][0] == "TTFT_slowdown:p50:2"
    assert [answer["kind"] for answer in told["answers"]] == [kind.name for kind in asked.kinds]
    for answer in told["answers"]:
        assert answer["runs"] > 0
        if answer["best"]:
            assert answer["best"]["missed"] == []
            assert answer["by_cost"][-1]["rate"] == answer["best"]["rate"]
            prices = [each["dollars_per_hour"] for each in answer["by_cost"]]
            assert prices == sorted(prices)
    assert any(answer["best"] for answer in told["answers"])
    subjects = [warning.partition(":")[0] for warning in told["warnings"]]
    assert len(set(subjects)) == len(subjects) > 0
    assert [len(row) for row in report.rows(found)] == [len(report.COLUMNS)] * len(asked.kinds)
    paths = pictures.write(tmp_path, found)
    assert [path.name for path in paths] == ["region.svg", "front.svg", "latency.svg"]
    for path in paths:
        assert ElementTree.parse(path).getroot().tag.endswith("svg")
    assert "meets the objectives" in paths[0].read_text()
    assert "h100-80gb mixed" in paths[1].read_text()
    assert "TTFT p99" in paths[2].read_text()


def test_objectives_of_ones_own() -> None:
    figures = Figures(1.0, 1.0, 2.0, 3.0)
    summary = Summary({"TTFT_s": figures}, (), 2, 2)
    assert missed(summary, (slo("TTFT_s:p99:3"),)) == ()
    assert missed(summary, (slo("TTFT_s:p99:2.9"), slo("TTFT_s:mean:1"))) == ("TTFT_s:p99:2.9",)
    assert missed(replace(summary, num_served=1), ()) == ("1 requests not served",)
    assert len(NINE_SLOS) == 9
    for wrong in ("TTFT_s", "TTFT_s:p98:1", "TTFT:p99:1", "TTFT_s:p99:0", "TTFT_s:p99:nan", "TTFT_s:p99:inf"):
        with pytest.raises(BadConfig, match="expected METRIC:PART:LIMIT"):
            slo(wrong)


def test_a_higher_rate_is_the_same_requests_closer_together() -> None:
    trace = Workload("trace", tuple(Request(i, 1.0 + i, 10 + i, 5) for i in range(50)))
    for source in (
        Stretched(trace, None), Redrawn(trace, 20.0, 3),
        Distributed(lengths("10-20", "--p"), lengths("lognormal:30:1", "--o"), 20.0, 3),
    ):  # fmt: skip
        slow, fast = source.at(2.0).requests, source.at(4.0).requests
        assert len(slow) <= len(fast)
        for one, other in zip(slow, fast, strict=False):
            assert one.arrival_s == pytest.approx(2 * other.arrival_s)
            assert (one.num_prompt_tokens, one.num_output_tokens) == (other.num_prompt_tokens, other.num_output_tokens)


def test_lengths_are_read() -> None:
    rng = Random(0)
    assert {lengths("512", "--p")(rng) for _ in range(9)} == {512}
    uniform = [lengths("3-5", "--p")(rng) for _ in range(99)]
    assert (min(uniform), max(uniform)) == (3, 5)
    drawn = sorted(lengths("lognormal:1000:0.5", "--p")(rng) for _ in range(999))
    assert 900 < drawn[499] < 1100
    assert max(lengths("lognormal:1000:1000", "--p")(rng) for _ in range(99)) == 10_000_000
    for wrong in ("", "0", "5-3", "x", "1-2-3", "lognormal:5", "lognormal:0:1", "lognormal:5:-1", "lognormal:5:nan"):
        with pytest.raises(BadConfig, match="--p is"):
            lengths(wrong, "--p")


def test_a_design_has_a_machine_in_each_pool() -> None:
    limits = Limits(machines=Range(0, 3), prompt=Range(0, 3), token=Range(0, 3))
    for kind in (Kind(H, A), Kind(H, None)):
        for column in kind.columns(limits):
            design = kind.design(column.prompt, column.low)
            assert design.count(Role.MIXED) or (design.count(Role.PREFILL) and design.count(Role.DECODE))
