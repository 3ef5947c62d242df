"""Faults on purpose, on real clusters: `baton up --faults` and `baton chaos`, and the same faults again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from baton.faults.kinds import FaultKind, Layer
from baton.faults.plan import Plan, Rule
from tests.support.cluster import StartCluster
from tests.support.load import Job, run_all
from tests.support.recall import baton, recall

SCHEDULE = """
seed = 5

[[fault]]
layer = "data"
node = "prefill-*"
nth = 1
request = "r[02468]"
fault = "corrupt"

[[fault]]
layer = "control"
kind = "ack"
nth = 1
request = "r3"
fault = "disconnect"

[[fault]]
layer = "process"
node = "decode-0"
life = 1
at_s = 3
fault = "die"
"""
NUM_REQUESTS = 10


async def test_a_cluster_under_a_schedule_answers_right_and_says_what_struck(
    start_cluster: StartCluster, demo_model: Path, tmp_path: Path
) -> None:
    file = tmp_path / "faults.toml"
    file.write_text(SCHEDULE)
    cluster = start_cluster(demo_model, prefill=1, decode=2, arguments=("--faults", str(file)))
    first = cluster.nodes["decode-0"]
    tasks = recall(91, NUM_REQUESTS)
    jobs = [Job(t.prompt, t.num_output_tokens + 4, {"request_id": f"r{i}"}) for i, t in enumerate(tasks)]
    answers = await run_all(cluster.http, jobs, 4)
    assert [a.error for a in answers] == [None] * NUM_REQUESTS
    assert [a.text.strip() for a in answers] == [t.expected for t in tasks]
    cluster.wait_back(first)
    cluster.wait_baseline()
    drawn = {(rule.layer, rule.fault, rule.request) for rule in Plan.load(tmp_path / "faults-drawn").rules}
    assert (Layer.PROCESS, FaultKind.DIE, "*") in drawn
    assert {r for layer, _, r in drawn if layer is Layer.DATA} >= {f"r{i}/0/0" for i in (0, 2)}
    assert (tmp_path / "faults-drawn" / "began.json").exists()
    # The node that died and came back does not die again.
    assert cluster.nodes["decode-0"].pid != first.pid
    assert (tmp_path / "faults-drawn" / "decode-0.2.toml").exists()


@pytest.mark.parametrize("command", ["up", "worker", "router"])
def test_a_wrong_schedule_is_refused_before_anything_starts(command: str, demo_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "faults.toml"
    file.write_text('[[fault]]\nlayer = "data"\nfault = "dorp"\nnth = 1\n')
    more = {"worker": ("--role", "mixed"), "router": ("--node", "127.0.0.1:1")}.get(command, ())
    said = baton(command, "--model", str(demo_model), "--faults", str(file), *more, code=2)
    assert "faults.toml, line 1, fault 1: fault is 'dorp', expected one of drop, delay" in " ".join(said.split())


def chaos(out: Path, *arguments: str) -> dict[str, Any]:
    """The report of a run that passed."""
    done = subprocess.run(
        [sys.executable, "-m", "cli", "chaos", "--out", str(out), *arguments],
        capture_output=True, text=True, timeout=280, check=False, env={**os.environ, "TMPDIR": str(out.parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    assert report["verdict"] == "passed"
    assert (out / "report.svg").read_text().startswith("<svg")
    return report


def check(report: dict[str, Any]) -> None:
    outcomes = report["outcomes"]
    bad = {"wrong token", "repeated token", "lost token", "short", "no outcome"}
    assert {name: outcomes[name] for name in bad} == dict.fromkeys(bad, 0)
    assert outcomes["whole"] > 0
    assert report["ledger"]["held"] == report["ledger"]["off"] == report["ledger"]["unreachable"] == 0
    assert report["undisturbed"]["known_right"] >= 0.9 * report["undisturbed"]["known"] > 0


@pytest.mark.timeout(300)
def test_streams_are_whole_under_drawn_faults(tmp_path: Path) -> None:
    """A short run of what `make test-long` does for longer; a router and two workers die in it."""
    report = chaos(tmp_path / "out", "--minutes", "0.33", "--seed", "16", "--streams", "6", "--questions", "12")
    check(report)
    assert report["faults_struck"] >= 5


@pytest.mark.long
def test_a_minute_of_faults_and_the_same_again(tmp_path: Path) -> None:
    first = chaos(tmp_path / "first", "--minutes", "1", "--seed", "7")
    check(first)
    assert first["faults_struck"] >= 25
    drawn = tmp_path / "first" / "drawn"
    again = chaos(tmp_path / "again", "--minutes", "1", "--seed", "7", "--faults", str(drawn))
    check(again)

    def of_time(folder: Path) -> list[tuple[str, str, int]]:
        """Deaths and stops, in the order of their time."""
        rules = [rule for rule in Plan.load(folder).rules if rule.layer is Layer.PROCESS]
        return [(r.node, r.fault, r.life) for r in sorted(rules, key=lambda rule: rule.at_s or 0.0)]

    def of_requests(folder: Path) -> Counter[Rule]:
        return Counter(rule for rule in Plan.load(folder).rules if rule.request != "*")

    assert of_time(tmp_path / "again" / "drawn") == of_time(drawn)
    # A fault of a request that ran otherwise, or was not asked in the time, finds nothing to strike.
    struck = of_requests(tmp_path / "again" / "drawn")
    assert struck <= of_requests(drawn)
    assert struck.total() >= 0.5 * of_requests(drawn).total()
