"""Measures servers end to end: ``vllm serve`` and Baton's clusters run side by side and get the same load in turn."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from bench.cluster import NO_PREFIX_CACHE
from bench.peers.book import Book
from bench.peers.cells import Probes, between, regime
from bench.peers.child import Child, Failed, Others, Usage
from bench.peers.drivers.protocol import MAX_BATCH_TOKENS, MAX_MODEL_TOKENS
from bench.peers.engines import vllm_env
from bench.peers.environments import RECIPES, Unavailable, driver_env, environment
from loadgen.client import Asking
from loadgen.client import Server as Address
from loadgen.load import Load, closed, same_size
from loadgen.run import Outcome, run

_KV_MIB = 1024
_LOOK_EVERY_S = 0.5
VLLM = "vLLM server"


@dataclass(frozen=True, slots=True)
class Plan:
    """How to start a server; ``url`` returns its address once known, None before."""

    name: str
    command: tuple[str, ...]
    env: dict[str, str]
    url: Callable[[], str | None]
    model: str
    # Whether it can be stopped during the turns of others, without time-outs of its own.
    can_pause: bool
    settings: dict[str, object] = field(default_factory=dict)


class Server:
    def __init__(self, plan: Plan, child: Child, url: str) -> None:
        self.plan = plan
        self.child = child
        self.url = url

    @property
    def name(self) -> str:
        return self.plan.name


def baton_plans(model: Path, run_dir: Path, num_threads: int) -> list[Plan]:
    """One mixed worker with all threads; two workers with half of them each, split and colocated."""
    half = max(1, num_threads // 2)
    shapes = (
        ("Baton, 1 mixed", ("--mixed", "1"), num_threads),
        ("Baton, 1 prefill + 1 decode", ("--prefill", "1", "--decode", "1"), half),
        ("Baton, 2 mixed", ("--mixed", "2"), half),
    )
    plans = []
    for i, (name, roles, threads) in enumerate(shapes):
        ready = run_dir / f"baton-{i}.json"
        options = (*roles, "--threads", str(threads), "--kv-mib", str(_KV_MIB), "--dtype", "bfloat16", *NO_PREFIX_CACHE)
        command = (
            *(sys.executable, "-m", "cli", "up", "--model", str(model), *options),
            *("--http-port", "0", "--grpc-port", "0", "--ready-file", str(ready)),
        )
        settings: dict[str, object] = {"options": " ".join(options)}
        plans.append(Plan(name, command, driver_env(), partial(_of_ready_file, ready), model.name, False, settings))
    return plans


def _of_ready_file(path: Path) -> str | None:
    if not path.exists():
        return None
    http = str(json.loads(path.read_text())["http"])
    return http if http.startswith("http") else f"http://{http}"


def vllm_plan(model: Path, envs: Path, log_dir: Path, cores: Sequence[int]) -> Plan:
    """Its OpenAI server with all cores. Raises Unavailable."""
    made = environment(RECIPES["vllm"], envs, log_dir)
    # It cannot choose a free port itself, so one that was free a moment ago is passed.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = (
        *("--dtype", "bfloat16", "--max-model-len", str(MAX_MODEL_TOKENS)),
        *("--max-num-batched-tokens", str(MAX_BATCH_TOKENS), "--no-enable-prefix-caching"),
    )
    command = (
        # The module that ``vllm serve`` runs; the command itself looks for a package named vllm and fails in this
        # build.
        *(str(made.python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)),
        *("--host", "127.0.0.1", "--port", str(port), "--served-model-name", model.name, *options),
    )
    env = driver_env() | vllm_env(made, cores)
    # Its worker process sets the OpenMP options itself.
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "OMP_NUM_THREADS", "KMP_AFFINITY", "KMP_BLOCKTIME", "KMP_TPAUSE"):
        del env[name]
    env["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, _KV_MIB // 1024))
    settings: dict[str, object] = {"options": " ".join(options), "kv_gib": env["VLLM_CPU_KVCACHE_SPACE"]}
    return Plan(VLLM, command, env, lambda: f"http://127.0.0.1:{port}", model.name, True, settings)


def start(plan: Plan, log_dir: Path, limit_s: float, book: Book) -> Server | None:
    """The server, once it has answered one request, or a row with the reason why not."""
    began_s = time.monotonic()
    child: Child | None = None
    try:
        log = log_dir / f"server-{plan.name.replace(' ', '-').replace(',', '')}.log"
        child = Child(plan.command, log, plan.env, has_pipes=False)
        url = _await(plan, child, began_s + limit_s)
        warm = _run(closed("warm-up", same_size(2, 64, 8), 2, limit_s), url, plan.model, "w")
        if failed := [answer.error for answer in warm.answers if answer.error] or (
            [] if warm.answers else ["no answer"]
        ):
            raise Failed(f"the first request: {failed[0]}")
    except (Failed, Unavailable) as error:
        book.failed(plan.name, "start", str(error))
        if child is not None:
            child.end()
        return None
    book.write("server", who=plan.name, start_s=time.monotonic() - began_s, settings=plan.settings)
    server = Server(plan, child, url)
    if plan.can_pause:
        child.pause()
    return server


def _await(plan: Plan, child: Child, deadline_s: float) -> str:
    with httpx.Client(trust_env=False) as client:
        while time.monotonic() < deadline_s:
            child.check()
            url = plan.url()
            try:
                if url is not None and client.get(f"{url}/health", timeout=_LOOK_EVERY_S).status_code == 200:
                    return url
            except httpx.HTTPError:
                # Not ready yet: tried again until the deadline.
                pass
            time.sleep(_LOOK_EVERY_S)
    raise Failed("not ready within its time limit")


def measure(loads: Sequence[Load], servers: list[Server], rounds: int, probes: Probes, book: Book) -> None:
    """Every round gives every server each load once. A server that fails is reported, ended and left out from then
    on."""
    for number in range(rounds):
        for load in loads:
            print(f"round {number}, {load.name} ...", flush=True)
            shift = number % max(1, len(servers))
            for server in servers[shift:] + servers[:shift]:
                try:
                    _sample(server, load, number, probes, book)
                except Failed as error:
                    book.failed(server.name, load.name, str(error))
                    servers.remove(server)
                    server.child.end()


def _sample(server: Server, load: Load, number: int, probes: Probes, book: Book) -> None:
    server.child.check()
    before, usage = probes.read(), Usage()
    began_s, mine_s = time.monotonic(), time.process_time()
    if server.plan.can_pause:
        server.child.resume()
    try:
        outcome = _run(load, server.url, server.plan.model, f"{load.name}/{number}")
    finally:
        if server.plan.can_pause:
            server.child.pause()
    elapsed_s, mine_s = time.monotonic() - began_s, time.process_time() - mine_s
    others = Others.between(usage, Usage(), server.child.group, elapsed_s)
    beside = between(before, probes.read())
    figures = _figures(outcome)
    book.write(
        "load", load=load.name, round=number, who=server.name, read_gb_s=beside.read_gb_s, gflop_s=beside.gflop_s,
        regime=regime(beside.read_gb_s), others_cores=max(0.0, others.cores - mine_s / elapsed_s),
        busiest_other=others.busiest, generator_cores=mine_s / elapsed_s, **figures,
    )  # fmt: skip
    told = f", {figures['errors']} errors ({figures['first_error']})" if figures["errors"] else ""
    cut = f", {figures['cut']} cut off" if figures["cut"] else ""
    print(
        f"  {number} {server.name:28} {figures['tokens_s']:7.1f} tokens/s  {beside.read_gb_s:5.1f} GB/s{told}{cut}",
        flush=True,
    )
    if not figures["requests"]:
        raise Failed(f"no request was answered whole{told}{cut}")


def _run(load: Load, url: str, model: str, seed: str) -> Outcome:
    return asyncio.run(run(load, Address.parse(url), Asking(model, {}, {}), seed))


def _figures(outcome: Outcome) -> dict[str, Any]:
    """Of a row; its samples are pooled over rounds."""
    errors = [answer.error for answer in outcome.answers if answer.error is not None]
    return {
        "requests": len(outcome.whole),
        "errors": len(errors),
        "cut": outcome.num_cut,
        "first_error": errors[0] if errors else None,
        "wall_s": outcome.wall_s,
        "tokens_s": sum(len(answer.stamps_s) for answer in outcome.whole) / outcome.wall_s,
        "ttft_s": [round(answer.ttft_s, 4) for answer in outcome.whole],
        "gaps_ms": [round(gap * 1e3, 2) for answer in outcome.whole for gap in answer.gaps_s],
    }
