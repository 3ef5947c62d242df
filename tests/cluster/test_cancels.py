"""Clients that leave, over HTTP and gRPC, in every phase of their request: it is cancelled at once, and every block is
free long before the request would have ended by itself.

A schedule of faults makes every phase take half a minute at least: steps are slow, and a hand-over is held back.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

import baton
from baton.client import Delta
from demo.tasks import recall_prompts
from tests.support.cluster import Cluster, starter

# 1,200 tokens in chunks of 8 take 150 steps; the transfer waits for the receiver's word.
SCHEDULE = """
[[fault]]
layer = "engine"
after_s = 0.1
probability = 1
fault = "slow"
seconds = 0.15

[[fault]]
layer = "control"
kind = "begun"
probability = 1
request = "transfer-*"
fault = "delay"
seconds = 60
"""
WAIT_S = 30.0
NUM_TOKENS = 250
SHORT = "Months from May to July:"
LONG = recall_prompts(seed=3, count=1, num_pairs=(300, 300), num_questions=1)[0].prompt
# A sequence of this prompt fills most of a node.
KV_MIB = 3


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> Iterator[Cluster]:
    """Each test leaves it as it was."""
    folder = tmp_path_factory.mktemp("cancels")
    schedule = folder / "faults.toml"
    schedule.write_text(SCHEDULE)
    options = ("--faults", str(schedule), "--max-batch-tokens", "8", "--kv-mib", str(KV_MIB), "--prefix-cache", "off")
    with ExitStack() as clusters:
        yield starter(folder, clusters)(demo_model, prefill=1, decode=1, arguments=options)


@contextmanager
def http(cluster: Cluster, request_id: str, prompt: str, num_tokens: int) -> Iterator[None]:
    """Asks, waits for so many tokens, and closes the socket when left, with nothing unread: a FIN and no reset."""
    url = urlsplit(cluster.http)
    body = json.dumps(
        {
            "prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True, "stream": True,
            "request_id": request_id,
        }
    ).encode()  # fmt: skip
    head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((url.hostname, url.port), timeout=WAIT_S) as connection:
        connection.sendall(head.encode() + body)
        got = b""
        while got.count(b"data: ") < num_tokens:
            got += connection.recv(65536)
        yield


@contextmanager
def grpc(cluster: Cluster, request_id: str, prompt: str, num_tokens: int) -> Iterator[None]:
    """The same with a call that is cancelled when left."""
    with baton.Client(cluster.grpc) as client:
        parts = client.generate(prompt, max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True, request_id=request_id)
        # The call is sent when it is read.
        next(parts)
        for _ in range(num_tokens):
            while not isinstance(next(parts), Delta):
                pass
        yield
        parts.close()


def states(cluster: Cluster) -> dict[str, set[str]]:
    """What sequences' blocks are there for, by node."""
    return {node.node_id: {owner.state for owner in node.owners} for node in cluster.ledger().nodes}


def waits(cluster: Cluster) -> bool:
    return cluster.status().num_queued == 1


def computes(cluster: Cluster) -> bool:
    return states(cluster)["prefill-0"] == {"prompt"}


def moves(cluster: Cluster) -> bool:
    return states(cluster) == {"prefill-0": {"sending"}, "decode-0": {"leased"}}


def generates(cluster: Cluster) -> bool:
    return states(cluster) == {"prefill-0": set(), "decode-0": {"running"}}


Ask = Callable[[Cluster, str, str, int], "contextmanager[None]"]


@pytest.mark.parametrize("ask", [http, grpc])
@pytest.mark.parametrize(
    ("request_id", "prompt", "num_tokens", "is_there"),
    [
        ("prefill", LONG, 0, computes),
        ("transfer-{}", SHORT, 1, moves),
        ("stream", SHORT, 3, generates),
    ],
)
def test_a_client_that_leaves_takes_its_request_along(
    cluster: Cluster, ask: Ask, request_id: str, prompt: str, num_tokens: int, is_there: Callable[[Cluster], bool]
) -> None:
    with ask(cluster, request_id.format(ask.__name__), prompt, num_tokens):
        cluster.wait_until(lambda: is_there(cluster), is_there.__name__, WAIT_S)
    cluster.wait_baseline()
    assert cluster.status().num_running == 0


@pytest.mark.parametrize("ask", [http, grpc])
def test_a_client_that_leaves_the_queue_is_not_served(cluster: Cluster, ask: Ask) -> None:
    with ask(cluster, "first", LONG, 0):
        cluster.wait_until(lambda: computes(cluster), "first request", WAIT_S)
        with ask(cluster, "second", LONG, 0):
            cluster.wait_until(lambda: waits(cluster), "second request", WAIT_S)
        cluster.wait_until(lambda: not waits(cluster), "empty queue", 10.0)
        # It did not leave the queue for a node.
        assert cluster.status().num_running == 1
    cluster.wait_baseline()
    assert cluster.status().num_running == 0
