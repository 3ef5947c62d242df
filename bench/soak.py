"""Many short requests through one cluster: every token as before, and memory and descriptors that do not grow.

    python -m bench.soak --cluster 1+1 --requests 100000

Each of a few hundred requests is first answered alone; then all come again and again in a closed loop, and each answer
must have the same token ids. The resident memory and the open files of every process are taken once a second; their
growth is the slope of a line through the second half, with its standard error.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
from rich.console import Console
from rich.progress import Progress

from baton.client import AsyncClient
from baton.errors import BatonError
from bench.__main__ import RESULTS, show
from bench.measure import commit, machine
from demo.tasks import mixed_prompts
from loadgen import machine as software
from loadgen.clusters import Cluster, Shape, started

_MODEL = Path(__file__).resolve().parents[1] / "demo" / "model"
_DISTINCT = 300
_MAX_TOKENS = 8
_STREAMS = 16
_LOOK_EVERY_S = 1.0


@dataclass(frozen=True, slots=True)
class Job:
    prompt: str
    settings: dict[str, Any]


@dataclass(slots=True)
class Watch:
    """What the processes of a cluster hold over time."""

    processes: dict[str, psutil.Process]
    at_s: list[float] = field(default_factory=list)
    rss_mib: dict[str, list[float]] = field(default_factory=dict)
    files: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def of(cls, cluster: Cluster) -> Watch:
        nodes = {node.id: psutil.Process(node.pid) for node in cluster.nodes}
        launcher = next(iter(nodes.values())).parent()
        assert launcher is not None, "a cluster's processes have their launcher as parent"
        ours = {process.pid for process in nodes.values()}
        routers = [child for child in launcher.children() if child.pid not in ours]
        return cls({**{f"router-{i}": process for i, process in enumerate(routers)}, **nodes})

    async def run(self) -> None:
        """Until it is cancelled."""
        began_s = time.monotonic()
        while True:
            self.at_s.append(time.monotonic() - began_s)
            for name, process in self.processes.items():
                self.rss_mib.setdefault(name, []).append(process.memory_info().rss / 2**20)
                self.files.setdefault(name, []).append(float(process.num_fds()))
            await asyncio.sleep(_LOOK_EVERY_S)

    def rows(self) -> list[dict[str, Any]]:
        """Of the second half: the first fills caches."""
        half = len(self.at_s) // 2
        found = []
        for name in self.processes:
            rss, files = self.rss_mib[name], self.files[name]
            slope, error = slope_of(self.at_s[half:], rss[half:])
            files_slope, files_error = slope_of(self.at_s[half:], files[half:])
            found.append(
                {
                    "process": name, "rss_mib_first": rss[0], "rss_mib_half": rss[half], "rss_mib_last": rss[-1],
                    "rss_kib_per_s": 1024 * slope, "rss_error_kib_per_s": 1024 * error, "files_first": files[0],
                    "files_last": files[-1], "files_per_s": files_slope, "files_error_per_s": files_error,
                }
            )  # fmt: skip
        return found


def slope_of(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Of the line with the least squares, and its standard error. Needs three points at least."""
    count = len(x)
    if count < 3:
        return float("nan"), float("nan")
    mean_x, mean_y = sum(x) / count, sum(y) / count
    spread = sum((a - mean_x) ** 2 for a in x)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread
    rest = sum((b - mean_y - slope * (a - mean_x)) ** 2 for a, b in zip(x, y, strict=True))
    return slope, (rest / (count - 2) / spread) ** 0.5


def jobs(count: int, seed: int) -> list[Job]:
    """Every other one is sampled."""
    rng = random.Random(seed)
    made = []
    for number, task in enumerate(mixed_prompts(seed, count)):
        sampled = {"temperature": 0.9, "seed": rng.getrandbits(32)} if number % 2 else {"temperature": 0.0}
        made.append(Job(task.prompt, {**sampled, "max_tokens": rng.randint(1, _MAX_TOKENS)}))
    return made


async def soak(cluster: Cluster, num_requests: int, console: Console) -> dict[str, Any]:
    asked = jobs(min(_DISTINCT, num_requests), seed=1)
    ended: Counter[str] = Counter()
    async with AsyncClient(cluster.grpc) as client:
        oracle = [(await client.complete(job.prompt, **job.settings)).token_ids for job in asked]
        watch = Watch.of(cluster)
        watching = asyncio.create_task(watch.run())
        # Shared by all streams: each takes the next one.
        left = iter(islice(cycle(range(len(asked))), num_requests))
        began_s = time.monotonic()
        with Progress(console=console) as progress:
            bar = progress.add_task(cluster.shape.name, total=num_requests)

            async def stream() -> None:
                for number in left:
                    try:
                        done = await client.complete(asked[number].prompt, **asked[number].settings)
                        ended["whole" if done.token_ids == oracle[number] else "wrong tokens"] += 1
                    except BatonError as error:
                        ended[f"failed: {error.code}"] += 1
                    progress.advance(bar)

            async with asyncio.TaskGroup() as group:
                for _ in range(_STREAMS):
                    group.create_task(stream())
        took_s = time.monotonic() - began_s
        watching.cancel()
        ledger = await client.ledger()
    held = sum(o.num_blocks for node in ledger.nodes for o in node.owners if o.state != "cached")
    return {
        "cluster": cluster.shape.name, "requests": num_requests, "seconds": took_s,
        "requests_per_s": num_requests / took_s, "ended": dict(ended), "blocks_held_at_the_end": held,
        "processes": watch.rows(),
    }  # fmt: skip


async def run(shapes: Sequence[Shape], num_requests: int, console: Console) -> dict[str, Any]:
    found = {}
    for shape in shapes:
        with TemporaryDirectory(prefix="baton-bench-soak-") as folder:
            async with started(shape, str(_MODEL), Path(folder)) as cluster:
                found[shape.name] = await soak(cluster, num_requests, console)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cluster", action="append", metavar="SHAPE", help="as of baton bench; default: 1+1 and 2+2")
    parser.add_argument("--requests", type=int, default=100_000, help="of each cluster")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    given = parser.parse_args()
    if given.requests < 1:
        parser.error(f"--requests is {given.requests}, expected at least 1")
    shapes = [Shape.parse(f"{text} --kv-mib 128") for text in given.cluster or ("1+1", "2+2")]
    console, began = Console(width=160), datetime.now(UTC)
    found = asyncio.run(run(shapes, given.requests, console))
    for name, result in found.items():
        show(console, name, result)
    facts = {
        "date": began.isoformat(timespec="seconds"), "commit": commit(), "machine": machine(),
        "versions": software.versions(), "results": found,
    }  # fmt: skip
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / f"soak-{began.strftime('%Y-%m-%dT%H%M%SZ')}.json"
    path.write_text(json.dumps(facts, indent=1) + "\n")
    console.print(f"saved {path}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
