"""The report of a chaos run, from what processes wrote and what was seen of them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from xml.etree import ElementTree

from rich.console import Console

from baton.faults.faults import Record
from baton.faults.injector import Point, Strike
from baton.faults.kinds import FaultKind, Layer
from cli.chaos.report import Asked, Report, Struck, picture, show
from cli.chaos.verdict import Ledger, Outcome, verdict
from cli.chaos.watch import Look, Process, absences

MIB = 1 << 20


def look(at_s: float, ready: str | None, pid: int = 7) -> Look:
    processes = {"a": Process(pid, (100 + int(at_s)) * MIB, 20)}
    return Look(at_s, processes, None if ready is None else frozenset(ready.split()))


LOOKS = (look(0.0, "a b"), look(1.0, "a"), look(2.0, None), look(4.5, "a b", 8), look(5.0, "b", 8), look(6.0, "b", 8))


def asked(number: int, outcome: Outcome, detail: str = "") -> Asked:
    return Asked(number, "recall", outcome, 0.0, 1.0, 5, 0, 0, 0.25 * number, detail)


def made(folder: Path, *outcomes: Outcome) -> Report:
    for node in ("a", "b"):
        record = Record(folder, node)
        record.add(Strike(FaultKind.DIE, 0.0, 0, 0, Point(Layer.PROCESS, "tick"), 9), 3.25)
        record.add(Strike(FaultKind.DROP, 0.0, 0, 1, Point(Layer.DATA, "unit", "b", "r/0/1"), 1), 4.5)
    ledger = Ledger(2, 0, 0, 0)
    told = tuple(asked(i, outcome, "why" * (outcome is Outcome.WRONG)) for i, outcome in enumerate(outcomes))
    counts = {outcome: outcomes.count(outcome) for outcome in Outcome}
    return Report(
        seconds=6.0, num_planned=9, struck=Struck.of(folder), asked=told, num_questions=3, num_known=2,
        num_known_right=2, ledger=ledger, looks=LOOKS, nodes=("a", "b"), routers=("r",), tokens={0: 5, 1: 7},
        verdict=verdict(counts, ledger, 4),
    )  # fmt: skip


def test_a_node_is_absent_until_it_is_ready_again() -> None:
    assert absences(LOOKS, ("a", "b")) == [3.5]


def test_faults_are_counted_from_what_processes_wrote(tmp_path: Path) -> None:
    struck = made(tmp_path, Outcome.WHOLE).struck
    assert struck.counts == {"data drop": 2, "process die": 2}
    assert struck.times_s == {"process": (3.25, 3.25), "data": (4.5, 4.5)}
    assert struck.total == 4


def test_the_report_has_what_was_found(tmp_path: Path) -> None:
    report = made(tmp_path, Outcome.WHOLE, Outcome.WHOLE, Outcome.WRONG)
    found = json.loads(json.dumps(report.as_json()))
    assert (found["verdict"], found["reasons"]) == ("failed", ["1 streams: wrong token"])
    assert found["outcomes"]["whole"] == 2
    assert found["outcomes"]["no outcome"] == 0
    assert found["processes"]["a"] == {
        "lives": 2, "rss_mib_first": 104.0, "rss_mib_last": 106.0, "rss_mib_max": 106.0,
        "descriptors_first": 20, "descriptors_last": 20, "descriptors_max": 20,
    }  # fmt: skip
    assert found["node_absent_s"]["max"] == 3.5
    assert found["longest_gap_s"]["max"] == 0.25
    assert [each["number"] for each in found["not_whole"]] == [2]


def test_what_is_shown_ends_with_the_verdict(tmp_path: Path) -> None:
    for outcomes, end in (
        ((Outcome.WHOLE,), "passed: no token was wrong, repeated or lost, and every block came back"),
        ((Outcome.WHOLE, Outcome.LOST), "failed: 1 streams: lost token"),
    ):
        output = io.StringIO()
        show(made(tmp_path / end[:6], *outcomes), Console(file=output, width=120))
        assert output.getvalue().rstrip().endswith(end)


def test_the_picture_is_a_picture(tmp_path: Path) -> None:
    drawn = picture(made(tmp_path, Outcome.WHOLE))
    assert ElementTree.fromstring(drawn).tag.endswith("svg")
    assert "1 requests under 4 faults: passed" in drawn
