"""The first-run kit under planted faults: what fails costs itself alone, and a second run goes on where one ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from bench import gpu_stages
from bench.gpu import Compiler, Options, Parent
from bench.gpu_goals import GOALS, verdicts
from bench.gpu_rows import Rows, results, under_way
from bench.gpu_stages import STAGES, Clock, Stage
from bench.kernel_table import record, report, source_digest
from tests.support.root import ROOT

PLANTED = "tests.support.bench.gpu_planted"
OPTIONS = Options(device=f"{PLANTED}:device")


def stage(cases: str, seconds: float = 100, name: str = "planted", part_limit_s: float = 10) -> Stage:
    return Stage(name, "", f"{PLANTED}:{cases}", (seconds,) * 3, part_limit_s, least_s=0.1)


def run(folder: Path, *stages: Stage, minutes: float = 3, options: Options = OPTIONS) -> Rows:
    rows = Rows(folder)
    rows.add("run")
    Parent(rows, options, lambda text: None).run(stages, minutes)
    return rows


@pytest.mark.alone
def test_a_fault_costs_itself_alone(tmp_path: Path) -> None:
    rows = run(tmp_path, stage("cases"))
    found: dict[str, dict[str, str]] = {}
    for (_, case), parts in results(rows.read()).items():
        shape = case.split(" | ")[1]
        found[shape] = {
            part: line.get("fault") or str(line.get("is_right", "us" in line)) for part, line in parts.items()
        }
    whole = {"check": "True", "time": "True"}
    good = {**whole, "peer good": "True"}
    assert found == {
        "good first": {**whole, "peer same": "True"},
        "peer raises on its second call": {**good, "peer bad": "exception"},
        "ours is wrong": {"check": "False"},
        "ours raises": {"check": "exception"},
        "make raises": {"check": "exception"},
        "peer kills": {**good, "peer bad": "died"},
        "ours kills": {"check": "died"},
        "peer hangs": {**good, "peer bad": "hung"},
        "peer is out of memory": {**good, "peer bad": "out of memory"},
        "peer needs too much": {**good, "peer bad": "too little memory"},
        "inputs need too much": {"check": "too little memory"},
        "peer cannot be recorded": {**good, "peer bad": "capture failed"},
        "good last": {**whole, "peer same": "True"},
    }
    said = {line["case"].split(" | ")[1]: line["said"] for line in rows.read() if line["kind"] == "fault"}
    assert "SIGKILL" in said["ours kills"]
    assert "10 s" in said["peer hangs"]
    assert said["peer raises on its second call"] == "RuntimeError: call 2"
    ends = [line["state"] for line in rows.read() if line["kind"] == "stage"]
    assert ends == ["begun", "ended"]
    # A second run finds nothing to do, and measures again what failed where it is told to.
    num_lines = len(rows.read())
    again = run(tmp_path, stage("cases"))
    assert {line["kind"] for line in again.read()[num_lines:]} == {"run", "stage"}
    num_lines = len(rows.read())
    run(tmp_path, stage("cases"), options=Options(device=OPTIONS.device, retries=True, only="raises"))
    taken = [(line["case"], line["part"]) for line in rows.read()[num_lines:] if line["kind"] == "begin"]
    assert taken == [
        ("planted | peer raises on its second call | ", "peer bad"),
        ("planted | ours raises | ", "check"),
        ("planted | make raises | ", "check"),
    ]


@pytest.mark.alone
def test_a_stage_that_is_cut_goes_on_in_the_next_run(tmp_path: Path) -> None:
    started = time.monotonic()
    minutes = (gpu_stages.RESERVED_S + 6) / 60
    rows = run(tmp_path, stage("slow", 6), stage("cases", 100, "later"), minutes=minutes)
    assert time.monotonic() - started < 40
    lines = rows.read()
    # What the first one had was not enough, and the second was promised more than there was.
    assert [(x["stage"], x["state"]) for x in lines if x["kind"] == "stage"][:2] == [
        ("planted", "begun"), ("planted", "cut"),
    ]  # fmt: skip
    num_done = sum(line["kind"] == "row" for line in lines)
    assert num_done < 10
    lines = run(tmp_path, stage("slow")).read()
    done = [line["shape"] for line in lines if line["kind"] == "row" and line["stage"] == "planted"]
    assert done == [str(i) for i in range(10)]


@pytest.mark.parametrize(
    ("cases", "device", "case", "fault", "said"),
    [
        ("broken", "device", "", "exception", "ValueError: no more cases"),
        ("broken", "unusable", "", "died", "no such device"),
        ("missing", "device", "", "died", "has no attribute 'missing'"),
    ],
)
def test_a_stage_that_cannot_be_run_is_a_fault_of_its_own(
    tmp_path: Path, cases: str, device: str, case: str, fault: str, said: str
) -> None:
    rows = run(tmp_path, stage(cases), options=Options(device=f"{PLANTED}:{device}"))
    faults = [line for line in rows.read() if line["kind"] == "fault"]
    assert [(line["case"], line["fault"]) for line in faults] == [(case, fault)]
    assert said in faults[0]["said"]


class Told(Compiler):
    """Compiles nothing and remembers what it was asked."""

    def __init__(self, folder: Path, heard: list[str]) -> None:
        super().__init__(folder)
        self.heard = heard

    def start(self, *arguments: str) -> None:
        self.heard.append(" ".join(("start", *arguments)))

    def end(self, wait_s: float) -> None:
        self.heard.append("end")


def test_kernels_are_compiled_ahead_of_stages_and_never_beside_timings(tmp_path: Path) -> None:
    heard: list[str] = []
    first, second, third = (stage("none", name=name) for name in "abc")
    stages = [first, replace(second, is_timed=True), replace(third, ahead=("--tune",))]
    Parent(Rows(tmp_path), OPTIONS, heard.append, Told(tmp_path, heard)).run(stages, minutes=3)
    order = [line.partition(":")[0] for line in heard if "after" not in line]
    assert order == ["start", "a", "end", "b", "end", "start --tune", "c"]


def test_a_line_that_was_cut_off_costs_itself_alone(tmp_path: Path) -> None:
    rows = Rows(tmp_path)
    rows.add("begin", stage="s", case="a", part="check")
    with rows.path.open("ab") as file:
        file.write(b'{"kind": "row", "stage": "s", "ca')
    rows.fault("s", "a", "check", "died", "")
    assert [line["kind"] for line in rows.read()] == ["begin", "fault"]


def test_what_was_under_way_is_what_was_begun_last_and_gave_nothing(tmp_path: Path) -> None:
    rows = Rows(tmp_path)
    assert under_way(rows.read(), "s") is None
    rows.add("begin", stage="s", case="a", part="check")
    rows.add("begin", stage="other", case="a", part="time")
    assert under_way(rows.read(), "s") == ("a", "check")
    rows.add("row", stage="s", case="a", part="check")
    assert under_way(rows.read(), "s") is None


@pytest.mark.parametrize("minutes", gpu_stages.PLANS)
def test_a_plan_fits_its_minutes(minutes: int) -> None:
    planned = gpu_stages.shares(STAGES, minutes)
    assert sum(planned.values()) <= minutes * 60 - gpu_stages.RESERVED_S
    assert all(planned[s.name] >= s.least_s for s in STAGES if s.name in planned)
    # Never less than a smaller plan has.
    smaller = [plan for plan in gpu_stages.PLANS if plan < minutes]
    assert all(set(gpu_stages.shares(STAGES, plan)) <= set(planned) for plan in smaller)


def test_the_documented_shares_are_those_that_are_given() -> None:
    text = (ROOT / "docs" / "gpu.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    names = {stage.name for stage in STAGES}
    told = {row[0]: tuple(float(cell or 0) for cell in row[2:]) for row in rows if row[0] in names}
    assert told == {stage.name: stage.shares_s for stage in STAGES}
    commands = {row[0]: row[2] for row in rows if len(row) == 3}
    for before, minutes in ((0, 2), (2, 5), (5, 9)):
        more = set(gpu_stages.shares(STAGES, minutes)) - (set(gpu_stages.shares(STAGES, before)) if before else set())
        assert set(commands[f"{minutes} minutes"].removeprefix("and ").split(", ")) == more


def test_stages_use_what_others_leave_and_no_more() -> None:
    first, second, third = (stage("cases", seconds, name) for name, seconds in (("a", 20), ("b", 30), ("c", 40)))
    clock = Clock(100 / 60, {"a": 20, "b": 30, "c": 40}, now=0)
    assert clock.limit(first, now=0) == 20
    # The first took 5 of its 20 seconds.
    assert clock.limit(second, now=5) == 45
    assert clock.limit(third, now=80) == 10
    assert clock.limit(third, now=80) == 0


def test_goals_stand_beside_the_rows_that_they_are_of() -> None:
    def row(kernel: str, shape: str, part: str, **values: float) -> dict[str, object]:
        return {"kernel": kernel, "shape": shape, "part": part, **values}

    decode = "decode attention, blocks of 64"
    assert verdicts(row(decode, "64 x 4096", "time", us=300.0, percent_of_copy=91.0)) == [
        ">= 80/90/95 % of copy: goal"
    ]  # fmt: skip
    assert verdicts(row(decode, "1 x 4096", "time", us=25.0, percent_of_copy=20.0)) == [
        "<= 20/16/12 us: below the floor"
    ]  # fmt: skip
    assert verdicts(row(decode, "1 x 4096", "peer sdpa_flash", us=20.0, ratio=1.2)) == [">= 1.1x: met"]
    assert verdicts(row("product, head 128256 x 4096", "64 rows", "peer cublas", us=1.0, ratio=1.06)) == [
        ">= 0.9/0.97/1.05x: stretch"
    ]  # fmt: skip
    assert verdicts(row("blocks in", "1024 tokens in blocks of 64", "check", error=0.0)) == []
    assert all(list(goal.levels) == sorted(goal.levels, reverse=goal.is_most) for goal in GOALS)


def test_a_report_says_what_was_found(tmp_path: Path) -> None:
    rows = Rows(tmp_path)
    rows.add("run", commit="", source=source_digest(), versions={}, minutes=2, argv=[])
    facts = {"device": "A GPU", "is_gpu": True, "copy_bytes_per_s": 4e12}
    rows.add("row", stage="machine", case="machine | versions | ", part="check", facts=facts)
    case = {"stage": "time", "case": "blocks in | 1024 tokens | bfloat16"}
    named = {"kernel": "blocks in", "shape": "1024 tokens", "dtype": "bfloat16"}
    rows.add("row", **case, part="check", is_right=True, error=0.0, **named)
    rows.add("row", **case, part="time", us=100.0, percent_of_copy=90.0, **named)
    rows.add("row", **case, part="peer torch_copy", us=80.0, ours_us=100.0, ratio=0.8, **named)
    rows.fault("time", "blocks out | 1024 tokens | bfloat16", "peer torch_copy", "hung", "a log\nno word for 45 s")
    head = report(tmp_path)
    assert "2 cases, 1 right, 0 wrong" not in head
    assert "1 right, 0 wrong" in head
    assert "blocks out, 1024 tokens, bfloat16, peer torch_copy: hung: no word for 45 s" in head
    assert "Goals: 1 goal." in head
    text = (tmp_path / "report.md").read_text()
    assert (
        "| blocks in, 1024 tokens, bfloat16 | yes, 0.0e+00 | 100.0 | 90 % of copy | torch_copy 0.80x | "
        ">= 75/85/92 % of copy: goal |" in text
    )
    found = record(rows.read())
    assert found["device"] == "A GPU"
    assert found["commit"], "the sources are those that were measured"
    assert json.loads(json.dumps(found)) == found


def test_the_parent_loads_no_torch() -> None:
    code = "import bench.gpu, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_files_are_few_enough_to_be_brought_back(tmp_path: Path) -> None:
    rows = Rows(tmp_path)
    rows.add("run")
    report(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["report.md", "rows.jsonl"]
