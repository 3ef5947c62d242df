"""kill -9 of the router under load: its clients' streams go on with the very next token, at the router that is back."""

from __future__ import annotations

import os
import signal
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import baton
from baton.client import Completion, Delta
from tests.support.cluster import StartCluster

PROMPTS = [f"Months from May to July: {i}" for i in range(8)]
SETTINGS = {"max_tokens": 200, "ignore_eos": True, "temperature": 1.0}


def test_streams_outlive_their_router(start_cluster: StartCluster, demo_model: Path) -> None:
    cluster = start_cluster(demo_model)
    address, dead_pid = cluster.grpc, cluster.router_pid
    workers = {node.id: node.pid for node in cluster.nodes.values()}
    with baton.Client(address, patience_s=60) as client:
        alone = [client.complete(prompt, seed=i, **SETTINGS) for i, prompt in enumerate(PROMPTS)]
        begun = threading.Barrier(len(PROMPTS) + 1, timeout=60)

        def stream(number: int) -> tuple[tuple[int, ...], str, int]:
            ids: list[int] = []
            text, num_deltas = "", 0
            for part in client.generate(PROMPTS[number], seed=number, **SETTINGS):
                text += part.text
                if isinstance(part, Delta):
                    ids += part.token_ids
                    num_deltas += 1
                    if num_deltas == 3:
                        begun.wait()
            return tuple(ids), text, num_deltas

        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            running = [pool.submit(stream, i) for i in range(len(PROMPTS))]
            begun.wait()
            os.kill(dead_pid, signal.SIGKILL)
            found = [each.result(timeout=120) for each in running]
    cluster.wait_until(lambda: cluster.router_pid != dead_pid, "new router", 60.0)
    cluster.remember()
    assert [each[:2] for each in found] == [_seen(done) for done in alone]
    assert {node.id: node.pid for node in cluster.nodes.values()} == workers, "the workers have stayed"
    cluster.wait_baseline()


@pytest.mark.long
def test_a_stream_goes_on_elsewhere_when_its_router_is_frozen(start_cluster: StartCluster, demo_model: Path) -> None:
    """A stopped process keeps its connections: only its silence tells."""
    cluster = start_cluster(demo_model, arguments=("--routers", "2"))
    first, second = _routers(cluster.ready)
    settings = SETTINGS | {"max_tokens": 1000}
    with baton.Client(second["grpc"]) as client:
        alone = client.complete(PROMPTS[0], seed=0, **settings)
    ids: list[int] = []
    text = ""
    with baton.Client([first["grpc"], second["grpc"]], patience_s=60) as client:
        try:
            for part in client.generate(PROMPTS[0], seed=0, **settings):
                text += part.text
                if isinstance(part, Delta):
                    if not ids:
                        os.kill(first["pid"], signal.SIGSTOP)
                    ids += part.token_ids
        finally:
            os.kill(first["pid"], signal.SIGCONT)
    assert (tuple(ids), text) == _seen(alone)
    cluster.wait_baseline()


@pytest.mark.long
def test_a_rolling_restart_of_everything_fails_nothing(start_cluster: StartCluster, demo_model: Path) -> None:
    cluster = start_cluster(demo_model, arguments=("--routers", "2"))
    routers = _routers(cluster.ready)
    stop, done = threading.Event(), list[list[Completion]]()
    with baton.Client([router["grpc"] for router in routers], patience_s=60) as client:

        def ask(number: int) -> Completion:
            return client.complete(PROMPTS[number], seed=number, **SETTINGS)

        alone = [ask(i) for i in range(len(PROMPTS))]

        def load() -> None:
            with ThreadPoolExecutor(len(PROMPTS)) as pool:
                while not stop.is_set():
                    done.append(list(pool.map(ask, range(len(PROMPTS)))))

        with ThreadPoolExecutor(1) as loader:
            loading: Future[None] = loader.submit(load)
            try:
                for router in routers:
                    os.kill(router["pid"], signal.SIGTERM)
                    cluster.wait_until(lambda old=router: _is_back(cluster.ready, old), "router", 60.0)  # type: ignore[misc]
                for node in cluster.nodes.values():
                    client.drain(node.id, grace_s=60.0)
                    cluster.wait_back(node)
            finally:
                stop.set()
            loading.result(timeout=120)
    cluster.remember()
    assert len(done) >= 2
    for answers in done:
        assert [_seen(each) for each in answers] == [_seen(each) for each in alone]
    cluster.wait_baseline()


def _routers(ready: dict[str, object]) -> list[dict[str, Any]]:
    listed = ready["routers"]
    assert isinstance(listed, list)
    return listed


def _is_back(ready: dict[str, object], old: dict[str, Any]) -> bool:
    return any(router["grpc"] == old["grpc"] and router["pid"] != old["pid"] for router in _routers(ready))


def _seen(done: Completion) -> tuple[tuple[int, ...], str]:
    return done.token_ids, done.text
