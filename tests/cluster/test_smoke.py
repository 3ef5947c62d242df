"""A cluster as a user starts it: it answers right, heals, refuses what it cannot serve, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import psutil
import pytest

from demo import tasks
from tests.support.cluster import CALL_TIMEOUT_S, STOP_TIMEOUT_S, StartCluster
from tests.support.recall import REQUEST_TIMEOUT_S, ask_all, baton, recall


@pytest.mark.parametrize(("asked", "transport"), [("auto", "shm"), ("tcp", "tcp")])
def test_two_pools_answer_right_and_return_every_block(
    shared_cluster: StartCluster, demo_model: Path, asked: str, transport: str
) -> None:
    cluster = shared_cluster(demo_model, prefill=2, decode=2, **({} if asked == "auto" else {"transport": asked}))
    assert [n.role for n in cluster.nodes.values()] == ["prefill", "prefill", "decode", "decode"]
    assert all(psutil.pid_exists(n.pid) for n in cluster.nodes.values())
    relays = [finished.relay for finished in ask_all(cluster, recall(21, 12))]
    for relay in relays:
        assert relay.prefill_node_id.startswith("prefill-")
        assert relay.decode_node_id.startswith("decode-")
        assert relay.attempts == 1
        assert 0 < relay.ttft_s <= relay.e2e_s
    # A short answer can be complete before the prefill node's report of the handoff is in.
    transfers = [relay.transfer for relay in relays if relay.HasField("transfer")]
    assert {report.transport for report in transfers} == {transport}
    assert all(report.num_bytes > 0 for report in transfers)
    cluster.wait_baseline()


def test_http_answers_too(shared_cluster: StartCluster, demo_model: Path) -> None:
    cluster = shared_cluster(demo_model, prefill=1, decode=1)
    task = recall(22, 1)[0]
    body = json.dumps({"prompt": task.prompt, "max_tokens": task.num_output_tokens + 4, "temperature": 0}).encode()
    request = urllib.request.Request(f"{cluster.http}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT_S) as response:
        assert task.accepts(json.load(response)["choices"][0]["text"])


def test_commands_talk_to_a_running_cluster(shared_cluster: StartCluster, demo_model: Path) -> None:
    cluster = shared_cluster(demo_model, prefill=1, decode=1)
    task = recall(25, 1)[0]
    shown = baton("generate", "--router", cluster.grpc, "--relay", task.prompt)
    assert task.accepts(shown.splitlines()[0])
    assert "prefill-0 -> decode-0 | " in shown
    assert task.accepts(baton("generate", "--router", cluster.grpc, "-", stdin=task.prompt))
    said = tasks.recall_prompts(26, 1, num_pairs=10, num_questions=1, kind="chat")[0]
    assert said.expected in baton("chat", "--router", cluster.grpc, "--temperature", "0", stdin=f"{said.prompt}\n")
    cluster.wait_baseline()
    table = baton("status", "--router", cluster.grpc, "--ledger")
    assert "prefill-0" in table
    assert "defect" not in table
    found = json.loads(baton("status", "--router", cluster.grpc, "--ledger", "--json"))
    assert [(n["node"]["node_id"], n["state"]) for n in found["nodes"]] == [
        ("prefill-0", "ready"),
        ("decode-0", "ready"),
    ]
    for n in found["ledger"]["nodes"]:
        cached = sum(owner["num_blocks"] for owner in n["owners"] if owner["state"] == "cached")
        assert n["free_blocks"] + cached == n["total_blocks"]


def test_mixed_workers_answer_right(shared_cluster: StartCluster, demo_model: Path) -> None:
    cluster = shared_cluster(demo_model, prefill=0, decode=0, mixed=2)
    for finished in ask_all(cluster, recall(23, 8)):
        if finished.relay.decode_node_id == finished.relay.prefill_node_id:
            assert finished.relay.transfer.num_bytes == 0
    cluster.wait_baseline()


# In every run workers are killed by test_death, where the others answer meanwhile; here no worker is left.
@pytest.mark.long
@pytest.mark.parametrize("victim", ["prefill-0", "decode-0"])
def test_a_killed_worker_comes_back_and_works(start_cluster: StartCluster, demo_model: Path, victim: str) -> None:
    cluster = start_cluster(demo_model, prefill=1, decode=1)
    dead = cluster.kill(victim)
    back = cluster.wait_back(dead)
    assert back.role == dead.role
    ask_all(cluster, recall(24, 2))
    cluster.wait_baseline()


def test_a_model_that_cannot_be_served_stops_the_start_and_says_why(demo_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    config = json.loads((demo_model / "config.json").read_text())
    config |= {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).symlink_to(demo_model / name)
    done = subprocess.run(
        [sys.executable, "-m", "cli", "up", "--model", str(folder), "--http-port", "0", "--grpc-port", "0"],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode != 0
    assert "UnsupportedModel" in done.stderr
    assert "gpt2" in done.stderr.lower()
    assert "Traceback" not in done.stderr


def test_children_die_with_a_killed_launcher(start_cluster: StartCluster, demo_model: Path) -> None:
    cluster = start_cluster(demo_model, prefill=1, decode=1)
    family = psutil.Process(cluster.launcher.pid).children(recursive=True)
    assert len(family) == 3
    cluster.abandon()
    os.kill(cluster.launcher.pid, signal.SIGKILL)
    cluster.launcher.wait(CALL_TIMEOUT_S)
    _, alive = psutil.wait_procs(family, timeout=STOP_TIMEOUT_S)
    assert not alive
