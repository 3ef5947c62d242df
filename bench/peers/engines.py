"""Measures engines in rounds: for each cell all engines are made ready, then every round runs each once while the
others are stopped."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bench.peers.book import Book
from bench.peers.cells import CONTEXT_TOKENS, Cell, Probes, between, prompts, regime
from bench.peers.child import Child, Failed, Others, Usage
from bench.peers.drivers.protocol import Start
from bench.peers.environments import RECIPES, Environment, Unavailable, converted, driver_env, environment

OURS = "baton"
PEERS = ("vllm", "openvino", "llamacpp", "transformers")


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds after which an engine is given up: ten times or more of what a quiet machine needs."""

    start_s: float = 240.0
    fill_s: float = 180.0
    sample_s: float = 60.0
    # A sample during which other processes used more cores than this is repeated, at most so often.
    disturbed_cores: float = 0.2
    attempts: int = 3


class Contestant:
    """A live engine, stopped unless it is its turn."""

    def __init__(self, name: str, child: Child) -> None:
        self.name = name
        self.child = child
        self.context = float(CONTEXT_TOKENS)

    def ask(self, question: dict[str, Any], limit_s: float) -> dict[str, Any]:
        self.child.resume()
        try:
            return self.child.ask(question, limit_s)
        finally:
            self.child.pause()


def start(
    name: str, model: Path, envs: Path, log_dir: Path, cores: Sequence[int], limits: Limits, book: Book
) -> Contestant | None:
    """The engine with the model loaded, or a row with the reason why not."""
    stage = "install"
    child: Child | None = None
    try:
        python, target, env = _places(name, model, envs, log_dir, cores)
        given = Start(str(model), str(target), len(cores), tuple(cores), kv_tokens=64 * 1024)
        stage = "start"
        command = [str(python), "-m", f"bench.peers.drivers.{name}", given.line()]
        began_s = time.monotonic()
        child = Child(command, log_dir / f"{name}.log", env)
        ready = child.answer(limits.start_s)
    except (Unavailable, Failed) as error:
        book.failed(name, stage, str(error))
        if child is not None:
            child.end()
        return None
    child.pause()
    book.write("engine", who=name, start_s=time.monotonic() - began_s, **ready)
    return Contestant(name, child)


def _places(
    name: str, model: Path, envs: Path, log_dir: Path, cores: Sequence[int]
) -> tuple[Path, Path, dict[str, str]]:
    """Python, model and environment variables of an engine."""
    if name == OURS:
        return Path(sys.executable), model, driver_env()
    recipe = RECIPES[name]
    made = environment(recipe, envs, log_dir)
    target = converted(recipe, made, model, envs, log_dir)
    return made.python, target, driver_env() | (vllm_env(made, cores) if name == "vllm" else {})


def vllm_env(made: Environment, cores: Sequence[int]) -> dict[str, str]:
    """Settings that its documentation recommends for CPUs and its own worker launcher applies: allocator, OpenMP,
    core binding."""
    preload = [made.library("libtcmalloc_minimal.so.4"), made.library("libiomp5.so")]
    return {
        "LD_PRELOAD": ":".join(str(path) for path in preload if path is not None),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_HOST_IP": "127.0.0.1",
        "OMP_NUM_THREADS": str(len(cores)),
        "KMP_AFFINITY": f"granularity=fine,explicit,proclist=[{','.join(map(str, cores))}]",
        "KMP_BLOCKTIME": "5",
        "KMP_TPAUSE": "0",
    }


def measure(
    cells: Sequence[Cell], contestants: list[Contestant], rounds: int, probes: Probes, limits: Limits, book: Book
) -> None:
    """All cells. An engine that fails is reported, ended and left out from then on."""
    for cell in cells:
        print(f"{cell.name} ...", flush=True)
        _each(contestants, book, f"{cell.name}, made ready", partial(_make_ready, cell=cell, limits=limits))
        for number in range(rounds):
            shift = number % max(1, len(contestants))
            # The order rotates with each round.
            turn = contestants[shift:] + contestants[:shift]
            sample = partial(_sample, cell=cell, number=number, probes=probes, limits=limits, book=book)
            _each(turn, book, cell.name, sample)
            contestants[:] = [one for one in contestants if one in turn]
        _each(contestants, book, f"{cell.name}, cleared", partial(_clear, cell=cell, limits=limits))


def _each(contestants: list[Contestant], book: Book, stage: str, do: Callable[[Contestant], None]) -> None:
    for one in list(contestants):
        try:
            do(one)
        except Failed as error:
            book.failed(one.name, stage, str(error))
            contestants.remove(one)
            one.child.end()


def _make_ready(one: Contestant, cell: Cell, limits: Limits) -> None:
    """Fill the cache of a decode, then run one sample that does not count."""
    if cell.kind == "prefill":
        [prompt] = prompts(f"{cell.name}/warm-up", 1, cell.tokens)
        one.ask({"do": "prefill", "prompt": prompt}, limits.fill_s)
        return
    one.ask({"do": "fill", "prompts": prompts(cell.name, cell.batch, CONTEXT_TOKENS)}, limits.fill_s)
    one.context = CONTEXT_TOKENS + 1
    _decode(one, cell, 4, limits)


def _clear(one: Contestant, cell: Cell, limits: Limits) -> None:
    if cell.kind == "decode":
        one.ask({"do": "clear"}, limits.sample_s)


def _sample(one: Contestant, cell: Cell, number: int, probes: Probes, limits: Limits, book: Book) -> None:
    """A sample that other processes disturbed is repeated; the rejected one stays on record."""
    for attempt in range(limits.attempts):
        row = _measured(one, cell, f"{cell.name}/{number}", probes, limits)
        is_kept = row["others_cores"] <= limits.disturbed_cores or attempt == limits.attempts - 1
        book.write("sample" if is_kept else "disturbed", cell=cell.name, round=number, who=one.name, **row)
        machine = f"{row['read_gb_s']:5.1f} GB/s  {row['gflop_s']:6.0f} GFLOP/s  others {row['others_cores']:.2f} cores"
        again = "" if is_kept else f", {row['busiest_other']}: again"
        print(f"  {number} {one.name:12} {row['tokens_s']:8.1f} tokens/s  {machine}{again}", flush=True)
        if is_kept:
            return


def _measured(one: Contestant, cell: Cell, seed: str, probes: Probes, limits: Limits) -> dict[str, Any]:
    before, usage = probes.read(), Usage()
    began_s = time.monotonic()
    context = one.context + cell.steps / 2
    first_tokens: list[int] = []
    if cell.kind == "prefill":
        answers = [
            one.ask({"do": "prefill", "prompt": prompt}, limits.sample_s)
            for prompt in prompts(seed, cell.repeats, cell.tokens)
        ]
        first_tokens = [answer["token"] for answer in answers]
        seconds = statistics.median(answer["seconds"] for answer in answers)
        tokens_s = cell.tokens / seconds
    else:
        seconds, tokens_s = _decode(one, cell, cell.steps, limits)
    # Read before the probe, which uses the processor itself.
    elapsed_s = time.monotonic() - began_s
    others = Others.between(usage, Usage(), one.child.group, elapsed_s)
    beside = between(before, probes.read())
    flops, num_bytes = cell.floor(context)
    return {
        "tokens_s": tokens_s,
        "seconds": seconds,
        "first_tokens": first_tokens,
        "read_gb_s": beside.read_gb_s,
        "gflop_s": beside.gflop_s,
        "regime": regime(beside.read_gb_s),
        "others_cores": others.cores,
        "busiest_other": others.busiest,
        "flop_share": flops / seconds / beside.gflop_s / 1e9,
        "bandwidth_share": num_bytes / seconds / beside.read_gb_s / 1e9,
    }


def _decode(one: Contestant, cell: Cell, num_steps: int, limits: Limits) -> tuple[float, float]:
    """Seconds a step and tokens/s. Raises Failed if a token is missing."""
    answer = one.ask({"do": "decode", "steps": num_steps}, limits.sample_s)
    if answer["tokens"] != num_steps * cell.batch:
        raise Failed(f"{answer['tokens']} tokens in {num_steps} steps of {cell.batch}, expected one each")
    one.context += num_steps
    return answer["seconds"] / num_steps, answer["tokens"] / answer["seconds"]


def end(contestants: Sequence[Contestant]) -> None:
    for one in contestants:
        with suppress(Failed):
            one.child.end()
