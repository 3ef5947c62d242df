"""`baton plan advise` on a cluster of processes under load: what it reads of their metrics and records is enough."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from xml.etree import ElementTree

from baton.client import Client
from tests.support.cluster import StartCluster
from tests.support.recall import baton


@contextmanager
def load(address: str, num_threads: int = 4) -> Iterator[None]:
    """Requests one after the other from several clients, for the duration of the block."""
    stop, failed = threading.Event(), []

    def ask(number: int) -> None:
        rng = Random(number)
        try:
            with Client(address) as client:
                while not stop.is_set():
                    prompt = [rng.randrange(5, 200) for _ in range(rng.randint(8, 120))]
                    client.complete(prompt, max_tokens=rng.randint(2, 8), ignore_eos=True)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(num_threads)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    assert failed == []


def test_a_cluster_under_load_is_advised(shared_cluster: StartCluster, demo_model: Path, tmp_path: Path) -> None:
    cluster = shared_cluster(demo_model, prefill=1, decode=1, disaggregation="auto")
    with load(cluster.grpc):
        said = baton(
            *("plan", "advise", "--router", cluster.grpc, "--seconds", "8", "--requests", "120"),
            *("--machine", "h100-80gb", "--out", str(tmp_path), "--slo", "E2E_s:p99:600"),
        )
    told = json.loads((tmp_path / "advice.json").read_text())
    assert told["load"]["requests"] >= 100
    assert 8 <= told["load"]["prompt_tokens_mean"] <= 120
    assert 2 <= told["load"]["output_tokens_mean"] <= 8
    setup = told["setup"]
    assert (setup["prefill"], setup["decode"], setup["mixed"], setup["disaggregation"]) == (1, 1, 0, "auto")
    assert {pool["pool"]: pool["nodes"] for pool in told["pools"]} == {"prefill": 1, "decode": 1}
    assert all(pool["busy_share"] > 0 for pool in told["pools"])
    assert {fit["figure"] for fit in told["fit"]} >= {"TTFT_s p50", "TBT_s p50", "E2E_s p99", "tokens/s"}
    changes = {option["change"]: option for option in told["options"]}
    assert {"all nodes mixed", "another node in prefill", "another node in decode", "splitting never"} <= set(changes)
    assert all(option["TTFT_s_p50"] > 0 and option["tokens_per_s"] > 0 for option in told["options"])
    assert all(option["commands"] for option in told["options"] if option["pays"])
    assert told["warnings"] == []
    ElementTree.parse(tmp_path / "advice.svg")
    assert "the model" in said
    cluster.wait_baseline()


def test_an_idle_cluster_is_no_basis(shared_cluster: StartCluster, demo_model: Path) -> None:
    cluster = shared_cluster(demo_model, prefill=1, decode=1, disaggregation="auto")
    said = baton("plan", "advise", "--router", cluster.grpc, "--seconds", "1", code=1)
    assert "0 requests came and 0 ended in 1" in said
    assert "ask again under load" in said
