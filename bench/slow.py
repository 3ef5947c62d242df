"""Normal requests beside a thousand token streams, and beside clients that hardly read as well.

    python -m bench.slow --minutes 5

A few requests a second are asked in three phases: alone, beside ``--streams`` token streams, and beside these and
``--slow`` clients of which half read half a kilobyte a second and half nothing. What slow clients cost others is the
time to the first token of the third phase over that of the second. Every answer is compared with the same request
asked alone; streams are, too. Memory and open files of each process are taken once a second. The exit status is 1 if a
token was wrong or a block did not come back.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

from rich.console import Console

from baton.client import AsyncClient
from bench.__main__ import RESULTS, show
from bench.cluster import NO_PREFIX_CACHE
from bench.measure import commit, machine
from bench.slow_crowd import CrowdJob, address_of, ids_in, outcome, posted
from bench.soak import Watch
from demo.tasks import mixed_prompts
from loadgen import machine as software
from loadgen.clusters import Cluster, Shape, started
from loadgen.samples import Percentiles

_MODEL = Path(__file__).resolve().parents[1] / "demo" / "model"
_NUM_PROMPTS = 64
_MAX_TOKENS = 24
_STREAM_TOKENS = 500
_NUM_ADDRESSES = 20
_ANSWER_TIMEOUT_S = 120.0
_BEGIN_TIMEOUT_S = 180.0
_CHILD_END_S = 30.0
_LEDGER_TIMEOUT_S = 30.0
# Of the minutes: the phase alone is the shortest, as its times vary least.
_SHARES = {"alone": 0.2, "streams": 0.4, "streams and slow readers": 0.4}


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked; ``seconds`` are those of all phases, without the time that streams need to begin."""

    num_streams: int
    num_slow: int
    slow_logprobs: int
    seconds: float
    rate_per_s: float

    @property
    def options(self) -> str:
        """Of `baton up`: room for all at once, so that nothing but processors is scarce."""
        seats = self.num_streams + self.num_slow + 256
        kv_mib = max(256, 2 * seats)
        return f"--max-num-seqs {seats} --kv-mib {kv_mib} {' '.join(NO_PREFIX_CACHE)}"


@dataclass(slots=True)
class Normal:
    """The normal requests of one phase."""

    ttft_s: list[float] = field(default_factory=list)
    e2e_s: list[float] = field(default_factory=list)
    ended: Counter[str] = field(default_factory=Counter)

    def row(self) -> dict[str, Any]:
        ttft, e2e = Percentiles.of(self.ttft_s), Percentiles.of(self.e2e_s)
        return {
            "requests": self.ended.total(), "whole": self.ended["whole"],
            "wrong": self.ended["wrong tokens"] + self.ended["short"], "ttft_p50_s": ttft.p50, "ttft_p99_s": ttft.p99,
            "ttft_max_s": ttft.max, "e2e_p50_s": e2e.p50, "e2e_p99_s": e2e.p99,
        }  # fmt: skip


class Asker:
    """Sends normal requests at random times, each from one of a few addresses."""

    def __init__(self, cluster: Cluster, prompts: Sequence[str], oracle: Sequence[tuple[int, ...]]) -> None:
        url = urlsplit(cluster.http)
        assert url.hostname is not None
        assert url.port is not None
        self.host, self.port = url.hostname, url.port
        self._prompts = prompts
        self._oracle = oracle

    async def run(self, seconds: float, rate_per_s: float, seed: int) -> Normal:
        """An open loop: a request does not wait for the one before."""
        rng, found = Random(seed), Normal()
        until_s = time.monotonic() + seconds
        async with asyncio.TaskGroup() as group:
            number = 0
            while (now_s := time.monotonic()) < until_s:
                group.create_task(self._one(number, found))
                number += 1
                await asyncio.sleep(min(rng.expovariate(rate_per_s), until_s - now_s))
        return found

    async def _one(self, number: int, found: Normal) -> None:
        turn = number % len(self._prompts)
        body: dict[str, object] = {
            "prompt": self._prompts[turn], "max_tokens": _MAX_TOKENS, "temperature": 0, "ignore_eos": True,
            "stream": True, "return_token_ids": True,
        }  # fmt: skip
        began_s, events = time.monotonic(), bytearray()
        try:
            async with asyncio.timeout(_ANSWER_TIMEOUT_S):
                async with posted(self.host, self.port, address_of(3, number % _NUM_ADDRESSES), body) as reply:
                    async for part in reply.parts():
                        if not events:
                            found.ttft_s.append(time.monotonic() - began_s)
                        events += part
                    status = reply.status
        except (OSError, ValueError) as error:
            found.ended[f"failed: {type(error).__name__}"] += 1
            return
        if status != 200 or b"[DONE]" not in events:
            found.ended[f"failed: HTTP {status}: {bytes(events[:200]).decode(errors='replace')}"] += 1
            return
        found.e2e_s.append(time.monotonic() - began_s)
        found.ended[outcome(ids_in(bytes(events)), self._oracle[turn], is_whole=True)] += 1


@contextlib.asynccontextmanager
async def crowd(job: CrowdJob) -> AsyncIterator[dict[str, Any]]:
    """The child, from when all of its streams have begun; what it says at its end is in the mapping afterwards."""
    found: dict[str, Any] = {}
    if not job.num_streams and not job.num_slow:
        yield found
        return
    pipe = asyncio.subprocess.PIPE
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "bench.slow_crowd", stdin=pipe, stdout=pipe, limit=1 << 24
    )
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        child.stdin.write(job.line().encode())
        async with asyncio.timeout(_BEGIN_TIMEOUT_S):
            await child.stdin.drain()
            line = await child.stdout.readline()
        if line != b"begun\n":
            raise RuntimeError(f"the crowd said {line!r} before all of its streams had begun")
        yield found
        child.stdin.close()
        async with asyncio.timeout(_CHILD_END_S):
            found.update(json.loads(await child.stdout.readline()))
            await child.wait()
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()


async def measure(cluster: Cluster, plan: Plan, console: Console) -> dict[str, Any]:
    prompts = [task.prompt for task in mixed_prompts(1, _NUM_PROMPTS)]
    settings: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}
    rows: list[dict[str, Any]] = []
    processes: list[dict[str, Any]] = []
    crowds: dict[str, dict[str, Any]] = {}
    samples: dict[str, dict[str, Any]] = {}
    async with AsyncClient(cluster.grpc) as client:
        short = [(await client.complete(p, max_tokens=_MAX_TOKENS, **settings)).token_ids for p in prompts]
        long = [(await client.complete(p, max_tokens=_STREAM_TOKENS, **settings)).token_ids for p in prompts]
        asker = Asker(cluster, prompts, short)
        for number, (name, share) in enumerate(_SHARES.items()):
            job = CrowdJob(
                asker.host, asker.port, plan.num_streams if number else 0, plan.num_slow if number == 2 else 0,
                plan.slow_logprobs,
                _STREAM_TOKENS, tuple(prompts), tuple(long),
            )  # fmt: skip
            console.print(f"{name}: {job.num_streams} streams, {job.num_slow} slow readers", highlight=False)
            watch = Watch.of(cluster)
            async with crowd(job) as said:
                watching = asyncio.create_task(watch.run())
                began_s = time.monotonic()
                normal = await asker.run(plan.seconds * share, plan.rate_per_s, seed=number)
                took_s = time.monotonic() - began_s
                watching.cancel()
            rows.append({"phase": name, **normal.row()})
            processes += [{"phase": name, **row} for row in watch.rows()]
            samples[name] = {"at_s": watch.at_s, "rss_mib": watch.rss_mib, "files": watch.files}
            crowds[name] = {**said, "seconds": took_s, "normal": dict(normal.ended)}
            held = await _held(client)
            console.print(f"  {dict(normal.ended)}, crowd {said}, {held} blocks held afterwards", highlight=False)
            rows[-1]["blocks_held_afterwards"] = held
    return {
        "phases": rows, "processes": processes, "outcomes": crowds, "samples": samples,
        "ttft_p50_slow_over_streams": _ratio(rows[2], rows[1], "ttft_p50_s"),
        "ttft_p99_slow_over_streams": _ratio(rows[2], rows[1], "ttft_p99_s"),
        "ttft_p99_streams_over_alone": _ratio(rows[1], rows[0], "ttft_p99_s"),
        "verdict": verdict(rows, crowds),
    }  # fmt: skip


def verdict(rows: Sequence[dict[str, Any]], crowds: dict[str, dict[str, Any]]) -> str:
    """``passed``, or what was not right."""
    bad = [f"{row['phase']}: {row['wrong']} wrong answers" for row in rows if row["wrong"]]
    bad += [
        f"{row['phase']}: {row['whole']} of {row['requests']} whole" for row in rows if row["whole"] < row["requests"]
    ]
    bad += [
        f"{row['phase']}: {row['blocks_held_afterwards']} blocks held" for row in rows if row["blocks_held_afterwards"]
    ]
    for name, said in crowds.items():
        ended = said.get("ended", {})
        bad += [f"{name}: {ended[kind]} streams: {kind}" for kind in ("wrong tokens", "short") if ended.get(kind)]
    return "; ".join(bad) or "passed"


async def _held(client: AsyncClient) -> int:
    """Blocks that are still held when all clients have gone, after a while at most."""
    until_s = time.monotonic() + _LEDGER_TIMEOUT_S
    while True:
        ledger = await client.ledger()
        held = sum(o.num_blocks for node in ledger.nodes for o in node.owners if o.state != "cached")
        if not held or time.monotonic() > until_s:
            return held
        await asyncio.sleep(0.2)


def _ratio(after: dict[str, Any], before: dict[str, Any], name: str) -> float | None:
    if not after[name] or not before[name]:
        return None
    ratio: float = after[name] / before[name]
    return ratio


async def run(plan: Plan, console: Console) -> dict[str, Any]:
    with TemporaryDirectory(prefix="baton-bench-slow-") as folder:
        async with started(Shape.parse(f"1+1 {plan.options}"), str(_MODEL), Path(folder)) as cluster:
            return await measure(cluster, plan, console)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.slow", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=5.0, help="of all three phases")
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--slow", type=int, default=50, help="clients that hardly read")
    parser.add_argument("--slow-logprobs", type=int, default=0, help="that these ask for: larger answers")
    parser.add_argument("--rate", type=float, default=3.0, help="normal requests a second")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    given = parser.parse_args()
    for name, value in (("--minutes", given.minutes), ("--streams", given.streams), ("--rate", given.rate)):
        if not value > 0:
            parser.error(f"{name} is {value}, expected more than 0")
    for name, count in (("--slow", given.slow), ("--slow-logprobs", given.slow_logprobs)):
        if count < 0:
            parser.error(f"{name} is {count}, expected at least 0")
    plan = Plan(given.streams, given.slow, given.slow_logprobs, given.minutes * 60, given.rate)
    console, began = Console(width=160), datetime.now(UTC)
    found = asyncio.run(run(plan, console))
    show(console, "slow", {name: value for name, value in found.items() if name != "outcomes"})
    facts = {
        "date": began.isoformat(timespec="seconds"), "commit": commit(), "machine": machine(),
        "versions": software.versions(),
        "asked": asdict(plan),
        "results": found,
    }  # fmt: skip
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / f"slow-{began.strftime('%Y-%m-%dT%H%M%SZ')}.json"
    path.write_text(json.dumps(facts, indent=1) + "\n")
    console.print(f"saved {path}", highlight=False, soft_wrap=True)
    return 0 if found["verdict"] == "passed" else 1


if __name__ == "__main__":
    sys.exit(main())
