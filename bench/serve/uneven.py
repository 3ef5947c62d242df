"""Two mixed workers, one of them three times slower: its share of the work and the cluster's latency, by a router that
knows the nodes' measured speeds and by one to which all are equally fast (bench.speedless).

The slow one is stopped for two thirds of the time, in slices that are short beside an engine step.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from prometheus_client.parser import text_string_to_metric_families

from bench.serve.turns import Result, Setting, standing
from loadgen.client import Server, get
from loadgen.clusters import Cluster, Node, Shape, running
from loadgen.compare import Comparison, Measured, Target, measured
from loadgen.load import Load, closed, poisson, same_size
from loadgen.objectives import Limits
from loadgen.report import Shown, table
from loadgen.run import run as send

SLOWNESS = 3
_SLICE_S = 0.005
_SHAPE = Shape("2 mixed", ("--mixed", "2", "--tbt-target-ms", "100"))
_PROMPT, _OUTPUT, _STREAMS, _LIMIT_S = 512, 32, 8, 180.0
# Of what the closed loop served with the speeds known: busy, and not more than the nodes can do.
_OPEN_SHARE = 0.7
_CALL_S = 10.0
ROUTERS = {"speeds measured": "cli", "speeds unknown": "bench.speedless"}


@contextlib.asynccontextmanager
async def _routers(setting: Setting) -> AsyncIterator[tuple[tuple[Target, ...], Cluster]]:
    """The workers, of which the first is slow, and a router of each kind before them that has learned what they do."""
    with TemporaryDirectory(prefix="baton-bench-uneven-") as folder:
        async with standing(setting, _SHAPE) as (first, cluster), contextlib.AsyncExitStack() as stack:
            stack.enter_context(slowed(cluster.nodes[0].pid))
            targets = []
            for name, module in ROUTERS.items():
                stem = Path(folder) / module
                config, ready = stem.with_suffix(".toml"), stem.with_suffix(".json")
                assert cluster.cluster_key_file is not None, "the shape has no TLS"
                key = cluster.cluster_key_file.read_text().strip()
                config.write_text(
                    f"ready_file = {json.dumps(str(ready))}\nready_needs_nodes = true\n"
                    f"[access]\ncluster_key = {json.dumps(key)}\n"
                )
                command = [sys.executable, "-m", module, "router", "--model", setting.model, "--config", str(config)]
                command += ["--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"]
                command += [word for node in cluster.nodes for word in ("--node", node.address)]
                router = await stack.enter_async_context(
                    running(f"the router, {name},", command, ready, stem.with_suffix(".log"))
                )
                targets.append(replace(first, name=name, server=Server.parse(router["http"])))
            yield tuple(targets), cluster


async def run(setting: Setting) -> Result:
    runs: list[Measured] = []
    shares: dict[tuple[str, str], list[float]] = {}
    with Shown(setting.console) as shown:
        async with _routers(setting) as (targets, cluster):
            learned = [await send(_closed("learn", setting), t.server, t.asking, f"learn {t.name}") for t in targets]
            rate = _OPEN_SHARE * len(learned[0].whole) / learned[0].wall_s
            for number in range(setting.rounds):
                for target in targets[:: 1 if number % 2 == 0 else -1]:
                    for load in _loads(setting, number, rate):
                        before = await computed(cluster.nodes)
                        runs.append(await measured(target, load, number, "0", shown.watching(target, load)))
                        work = [now - then for now, then in zip(await computed(cluster.nodes), before, strict=True)]
                        shares.setdefault((target.name, load.name), []).append(work[0] / sum(work))
    comparison = Comparison(targets, None, Limits(), tuple(runs))
    setting.console.print(table(comparison))
    rows = [{"router": t, "load": load, "share of the slow node": found} for (t, load), found in shares.items()]
    for row in rows:
        setting.console.print(row, highlight=False)
    fair = 1 / (1 + SLOWNESS)
    return Result(comparison.as_json(has_requests=False) | {"shares": rows, "share by its speed": fair}, {})


def _closed(name: str, setting: Setting) -> Load:
    return closed(name, same_size(setting.count(32), _PROMPT, _OUTPUT), _STREAMS, _LIMIT_S)


def _loads(setting: Setting, number: int, rate: float) -> tuple[Load, ...]:
    requests = same_size(max(2, round(rate * setting.seconds)), _PROMPT, _OUTPUT)
    return _closed(f"{_STREAMS} streams", setting), poisson("open loop", requests, rate, _LIMIT_S, str(number))


@contextlib.contextmanager
def slowed(pid: int) -> Iterator[None]:
    """The process runs for one slice of SLOWNESS."""
    is_over = threading.Event()

    def turn() -> None:
        while not is_over.is_set():
            os.kill(pid, signal.SIGSTOP)
            is_over.wait((SLOWNESS - 1) * _SLICE_S)
            os.kill(pid, signal.SIGCONT)
            is_over.wait(_SLICE_S)

    thread = threading.Thread(target=turn, name="slow down")
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


async def computed(nodes: Sequence[Node]) -> list[float]:
    """Tokens whose KV each node has computed."""
    found = []
    for node in nodes:
        async with asyncio.timeout(_CALL_S):
            text = (await get(Server.parse(f"http://{node.metrics}"), "/metrics")).decode()
        families = text_string_to_metric_families(text)
        samples = (sample for family in families for sample in family.samples)
        found.append(sum(s.value for s in samples if s.name == "baton_computed_tokens_total"))
    return found
