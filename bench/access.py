"""What TLS costs a cluster: tokens/s, time to the first token and between tokens, with and without, in one run.

    python -m bench access [--quick]

Two clusters of one prefill and one decode node, whose KV goes over tcp, run side by side and are asked in turn, so that
both are measured under the same conditions. Both have a cluster key; one encrypts everything as well: client to router,
router to nodes, control and data streams of transfers. GB/s of a transfer alone are in ``python -m bench transfer``.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any

from baton.access import AccessConfig
from bench import cluster
from bench import model as bench_model
from cli import certs
from loadgen.samples import Samples

_SPLIT = ("--prefill", "1", "--decode", "1", "--disaggregation", "always", "--transport", "tcp")
_NUM_CLIENTS = 4


async def _loaded(where: cluster.Cluster, rng: Random, num_output: int) -> tuple[float, list[cluster.Timing]]:
    """Tokens/s of a few clients that ask one request after another, and the requests."""

    async def client(seed: int) -> list[cluster.Timing]:
        own = Random(seed)
        return [await cluster.ask(where, cluster.random_prompt(own), num_output) for _ in range(2)]

    began_s = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        clients = [group.create_task(client(rng.randrange(2**32))) for _ in range(_NUM_CLIENTS)]
    taken = [timing for task in clients for timing in task.result()]
    return sum(len(t.token_ids) for t in taken) / (time.perf_counter() - began_s), taken


async def _measure(quick: bool) -> dict[str, Any]:
    folder, rng = bench_model.bench_model(), Random(0)
    num_output, rounds = (16, 2) if quick else (32, 8)
    async with contextlib.AsyncExitStack() as stack:
        run_dir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="baton-bench-")))
        (cert,) = certs.make(run_dir / "pki", ["127.0.0.1"], 1)
        files = (cert, cert.with_suffix(".key"), run_dir / "pki" / certs.CA_CERT)
        tls = [w for x in zip(("--tls-cert", "--tls-key", "--tls-ca"), map(str, files), strict=True) for w in x]
        trust = AccessConfig(tls_ca=files[2])
        plain = await stack.enter_async_context(cluster.cluster("plain", _SPLIT, folder, run_dir))
        encrypted = await stack.enter_async_context(cluster.cluster("TLS", (*_SPLIT, *tls), folder, run_dir, trust))
        idle: dict[str, list[cluster.Timing]] = {plain.name: [], encrypted.name: []}
        loaded: dict[str, list[cluster.Timing]] = {plain.name: [], encrypted.name: []}
        rates: dict[str, list[float]] = {plain.name: [], encrypted.name: []}
        # The first round is a warm-up.
        for i in range(rounds + 1):
            for where in (plain, encrypted) if i % 2 else (encrypted, plain):
                alone = [await cluster.ask(where, cluster.random_prompt(rng), num_output) for _ in range(2)]
                rate, taken = await _loaded(where, rng, num_output)
                if i:
                    idle[where.name] += alone
                    loaded[where.name] += taken
                    rates[where.name].append(rate)
    ratio = Samples.of(b / a for a, b in zip(rates[plain.name], rates[encrypted.name], strict=True)).median
    return {
        "model": bench_model.NAME,
        "prompt_tokens": cluster.PROMPT_TOKENS,
        "output_tokens": num_output,
        "clients": _NUM_CLIENTS,
        "tokens_per_s_tls_over_plain": ratio,
        "tokens_per_s": [{"cluster": name, "median": Samples.of(x).median} for name, x in rates.items()],
        "idle": [{"cluster": name, **cluster.summary(taken)} for name, taken in idle.items()],
        "loaded": [{"cluster": name, **cluster.summary(taken)} for name, taken in loaded.items()],
    }


def run(quick: bool) -> dict[str, Any]:
    """Rows of both clusters, idle and loaded, and the ratio of their tokens/s round by round."""
    return asyncio.run(_measure(quick))
