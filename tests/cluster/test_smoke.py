"""A cluster as a user starts it: it answers right, heals, refuses what it cannot serve, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from baton.v1 import common_pb2, router_pb2
from demo import tasks
from tests.cluster.harness import CALL_TIMEOUT_S, STOP_TIMEOUT_S, Cluster, StartCluster

REQUEST_TIMEOUT_S = 60.0
CONCURRENT = 8


def recall(seed: int, count: int) -> list[tasks.Task]:
    """Of lengths at which the demo model itself makes no mistake."""
    return tasks.recall_prompts(seed, count, num_pairs=(20, 150), num_questions=(1, 6))


def ask(cluster: Cluster, task: tasks.Task) -> tuple[str, router_pb2.GenerateResponse.Finished]:
    sampling = common_pb2.SamplingParams(temperature=0, max_tokens=task.num_output_tokens + 4)
    request = router_pb2.GenerateRequest(prompt=task.prompt, sampling=sampling, timeout_s=REQUEST_TIMEOUT_S)
    text, finished = "", router_pb2.GenerateResponse.Finished()
    for response in cluster.stub().Generate(request):
        text += response.delta.text
        if response.HasField("finished"):
            finished = response.finished
    return text, finished


def ask_all(cluster: Cluster, prompts: list[tasks.Task]) -> list[router_pb2.GenerateResponse.Finished]:
    """All right, or the test fails."""
    with ThreadPoolExecutor(CONCURRENT) as pool:
        answers = list(pool.map(lambda task: ask(cluster, task), prompts))
    wrong = [(t.kind, text, t.expected) for (text, _), t in zip(answers, prompts, strict=True) if not t.accepts(text)]
    assert not wrong
    return [finished for _, finished in answers]


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


def baton(*arguments: str, stdin: str = "") -> str:
    """The standard output of a command that must succeed."""
    done = subprocess.run(
        [sys.executable, "-m", "cli", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=REQUEST_TIMEOUT_S,
        check=False,
        env={**os.environ, "NO_COLOR": "1", "COLUMNS": "200"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


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
    assert all(n["free_blocks"] == n["total_blocks"] for n in found["ledger"]["nodes"])


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
