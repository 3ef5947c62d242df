"""`baton bench serve` against a cluster: all requests answered, figures of both sides agree, nothing left behind."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.cluster import StartCluster
from tests.support.recall import baton
from tests.support.root import ROOT


def test_a_trace_is_replayed_and_the_cluster_counted_the_same(
    shared_cluster: StartCluster, demo_model: Path, tmp_path: Path
) -> None:
    cluster = shared_cluster(demo_model, prefill=1, decode=1, disaggregation="auto")
    output, rows = tmp_path / "out.json", tmp_path / "out.csv"
    load = ("--trace", "conv", "--rate", "20", "--requests", "10", "--max-prompt", "40", "--max-output", "6")
    baton(
        *("bench", "serve", "--url", f"split={cluster.http}", *load, "--streams", "2", "--rounds", "2"),
        *("--slo-ttft-ms", "60000", "-o", str(output), "--csv", str(rows)),
    )
    record = json.loads(output.read_text())
    assert [(run["load"], run["round"]) for run in record["runs"]] == [
        (load, number) for number in (0, 1) for load in ("conv 20/s", "conv 2 streams")
    ]
    for run in record["runs"]:
        assert (run["whole"], run["errors"], run["cut"]) == (10, 0, 0), run["first_error"]
        assert run["goodput_requests_s"] == pytest.approx(run["requests_s"])
        assert run["rate"] == 0 or run["requests_s"] <= run["rate"] * 1.0001
        sent = run["requests_sent"]
        counted = run["counted"]
        assert counted["baton_requests_total{code=,outcome=finished}"] == 10
        assert counted["baton_generated_tokens_total"] == sum(request["output_tokens"] for request in sent)
        assert counted["baton_prompt_tokens_total"] == sum(request["prompt_tokens"] for request in sent)
        assert sum(v for key, v in counted.items() if key.startswith("baton_transfer_bytes_total")) > 0
        assert all(len(request["gaps_ms"]) == request["output_tokens"] - 1 for request in sent)
    assert len(record["figures"][0]["nine"]) == 9
    assert len(list(csv.DictReader(rows.read_text().splitlines()))) == 40
    cluster.wait_baseline()


def test_clusters_are_started_measured_in_turn_and_stopped(demo_model: Path, tmp_path: Path) -> None:
    output, picture = tmp_path / "out.json", tmp_path / "out.svg"
    small = "--kv-mib 64 --prefix-cache off"
    baton(
        *("bench", "serve", "--model", str(demo_model)),
        *("--cluster", f"split=1+1 {small}", "--cluster", f"mixed=1 {small} --tbt-target-ms 100"),
        *("--rate", "10", "--rate", "20", "--requests", "4", "--prompt-tokens", "40", "--output-tokens", "6"),
        *("--rounds", "2", "--minutes", "5", "-o", str(output), "--picture", str(picture)),
    )
    record = json.loads(output.read_text())
    assert [target["options"].split(" --")[0] for target in record["targets"]] == ["--prefill 1", "--mixed 1"]
    order = [run["target"] for run in record["runs"]]
    assert order == ["split", "mixed"] * 2 + ["mixed", "split"] * 2
    for run in record["runs"]:
        assert (run["whole"], run["errors"]) == (4, 0), run["first_error"]
        moved = sum(v for key, v in run["counted"].items() if key.startswith("baton_transfer_bytes_total"))
        assert run["target"] == "split" or not moved
    # Six panels with two points for each of two clusters; a median gap of 0 is on no logarithmic axis.
    assert 20 <= picture.read_text().count("<circle") <= 24


@pytest.mark.long
@pytest.mark.parametrize(
    ("scenario", "found", "pictures"),
    [
        ("table", "aims", ["serve-frontier"]),
        ("replay", "conditional_over_best", ["serve-replay-code", "serve-replay-conv"]),
        ("burst", "roles", ["serve-burst-roles"]),
        ("overload", "overload", ["serve-overload"]),
        ("uneven", "shares", []),
    ],
)
def test_a_scenario_runs_to_its_end(tmp_path: Path, scenario: str, found: str, pictures: list[str]) -> None:
    command = [sys.executable, "-m", "bench", "serve", scenario, "--quick", "--minutes", "10", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = tmp_path.glob("serve-*.json")
    record = json.loads(file.read_text())
    assert record["results"][found], record
    assert sorted(path.stem for path in tmp_path.glob("*.svg")) == pictures
    if scenario == "burst":
        assert (record["results"]["failed"], record["results"]["wrong_token_ids"]) == (0, 0)
