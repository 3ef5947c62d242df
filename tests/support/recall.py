"""Questions that the demo model answers right, and commands, put to a running cluster."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from baton.v1 import common_pb2, router_pb2
from demo import tasks
from tests.support.cluster import Cluster

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


def baton(*arguments: str, stdin: str = "", code: int = 0) -> str:
    """The output of a command that must end with this code."""
    done = subprocess.run(
        [sys.executable, "-m", "cli", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=REQUEST_TIMEOUT_S,
        check=False,
        env={**os.environ, "NO_COLOR": "1", "COLUMNS": "200"},
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr
