"""`baton profile` and `baton plan validate` against a cluster of the demo's model.

The machine has other work: no time is asserted but that a profile of a cluster ten times as fast is refused.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from planner.measured import read, write
from tests.support.cluster import StartCluster
from tests.support.profiles import too_fast
from tests.support.recall import baton

LOAD = ("--trace", "conv", "--prompt-scale", "0.2", "--output-scale", "0.1", "--max-prompt", "300", "--max-output", "8")
FIGURES = [f"{figure} p{share}" for figure in ("TTFT", "TBT", "E2E") for share in (50, 90, 99)]


def test_a_cluster_is_measured_and_its_prediction_is_a_gate(
    shared_cluster: StartCluster, demo_model: Path, tmp_path: Path
) -> None:
    cluster = shared_cluster(demo_model, prefill=1, decode=1, disaggregation="always")
    profile, out = tmp_path / "profile.json", tmp_path / "out.json"
    told = baton("profile", "--router", cluster.grpc, "--out", str(profile))
    measured = read(profile)
    assert f"{measured.model} on cpu: median error" in told
    assert {point.shape.num_decoding for point in measured.points} >= {0, 1, 4}
    assert measured.transfers is not None
    assert measured.requests.fixed_s > 0
    assert measured.requests.message_s > 0
    # All processes are of this host, and say what they take of its processors.
    overhead = measured.overhead
    assert overhead.num_cores == len(os.sched_getaffinity(0))
    assert 0 < overhead.node_cores <= overhead.num_cores
    assert overhead.router
    assert overhead.client

    described = ("--router", cluster.grpc, "--cluster", "1+1 --disaggregation always --kv-mib 64")
    command = ("plan", "validate", *described, "--times", str(profile), *LOAD, "--requests", "12", "--rate", "6")
    told = baton(*command, "--max-error-p50", "10000%", "--max-error-p99", "10000%", "--out", str(out))
    assert "within limits" in told
    (report,) = json.loads(out.read_text())["reports"]
    rows = {(row["name"], row["unit"]): row for row in report["rows"]}
    assert [name for name, unit in rows if unit == "s" and "transfer" not in name] == FIGURES
    assert {name for name, _ in rows} - set(FIGURES) == {
        "requests answered", "throughput", "transfer p50", "transfer p90", "transfer p99", "transfers", "role changes",
    }  # fmt: skip
    for name in (*FIGURES, "transfer p50"):
        row = rows[name, "s"]
        assert row["predicted"] > 0, row
        assert row["measured"] > 0, row
        assert row["error"] == row["predicted"] / row["measured"] - 1
    # The same requests: every one has been answered and predicted, and all that have a second token were moved.
    assert [each["number"] for each in report["requests"]] == list(range(12))
    assert all(each["predicted"] and each["measured"] for each in report["requests"])
    moved = sum(each["output_tokens"] > 1 for each in report["requests"])
    assert (rows["transfers", ""]["predicted"], rows["transfers", ""]["measured"]) == (moved, moved)

    write(profile, too_fast(measured))
    told = baton(*command, "--refit", code=1)
    assert "beyond: " in told
    assert "E2E p50" in told.split("beyond: ")[1]
    # Its own run shows that it is wrong: the refit is taken, and what failed has failed.
    assert "steps: " in told
    assert "profile.json is updated" in told
    assert read(profile).line.step_s(measured.points[-1].shape) > 2 * too_fast(measured).line.step_s(
        measured.points[-1].shape
    )
    cluster.wait_baseline()


def test_the_planned_cluster_is_started_measured_and_stopped(demo_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    # Rates that differ in nothing but their arrivals; without --times the cluster is measured first.
    baton(
        *("plan", "validate", "--cluster", "1 --kv-mib 64 --tbt-target-ms 50", "--model", str(demo_model)),
        *("--prompt-tokens", "100", "--output-tokens", "5", "--requests", "6", "--rate", "5", "--rate", "10"),
        *("--max-error-p50", "10000", "--max-error-p99", "10000", "--out", str(out)),
    )
    record = json.loads(out.read_text())
    assert [report["load"] for report in record["reports"]] == ["100+5 5/s", "100+5 10/s"]
    for report in record["reports"]:
        assert report["is_met"]
        verdicts = {row["name"]: row["verdict"] for row in report["rows"]}
        # One worker: nothing is moved, which is named.
        assert verdicts["transfer p50"] == "not measured"
