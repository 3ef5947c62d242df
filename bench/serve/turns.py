"""Gives each cluster its turn in rounds: starts it, warms it up, sends its loads, stops it.

One cluster stands at a time: many of them would need more memory than a machine has, and none has an idle neighbour.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console

from baton.errors import Unavailable
from bench.measure import BandwidthProbe
from loadgen.client import Asking, Server, model_of
from loadgen.clusters import Cluster, Shape, started
from loadgen.compare import Comparison, Measured, Target, alone_load, measured, uncontended
from loadgen.figures import Figures
from loadgen.load import Load, closed, same_size
from loadgen.objectives import Limits, Uncontended
from loadgen.report import Shown
from loadgen.run import run

_WARM_UP = closed("warm-up", same_size(16, 256, 16), 4, 120.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Of a run of a scenario. ``options``: of `baton up`, for every cluster."""

    model: str
    options: tuple[str, ...]
    minutes: float
    rounds: int
    # How long an open loop lasts, and the factor on other numbers of requests.
    seconds: float
    share: float
    # Only configurations that are named so, else those whose names contain it; all if there is none.
    only: tuple[str, ...]
    console: Console
    began_s: float = field(default_factory=time.monotonic)

    @property
    def until_s(self) -> float:
        return self.began_s + self.minutes * 60

    def chosen(self, shapes: Sequence[Shape]) -> tuple[Shape, ...]:
        names = {shape.name for shape in shapes}
        return tuple(
            s for s in shapes
            if not self.only or any(s.name == part if part in names else part in s.name for part in self.only)
        )  # fmt: skip

    def count(self, number: int) -> int:
        return max(1, round(number * self.share))


@dataclass(frozen=True, slots=True)
class Result:
    """What a scenario found: its record, as JSON, and pictures by name."""

    record: dict[str, Any]
    pictures: dict[str, str]


@asynccontextmanager
async def standing(setting: Setting, shape: Shape, *, keeps_ids: bool = False) -> AsyncIterator[tuple[Target, Cluster]]:
    """One cluster, warmed up: its rates are learned and its code is loaded."""
    with TemporaryDirectory(prefix="baton-bench-serve-") as folder:
        full = Shape(shape.name, (*shape.options, *setting.options))
        async with started(full, setting.model, Path(folder)) as cluster:
            server = Server.parse(cluster.http)
            asking = Asking(await model_of(server, {}), {}, {}, keeps_ids)
            target = Target(shape.name, server, asking, {"options": " ".join(full.options)})
            warm = await run(_WARM_UP, server, asking, f"warm-up {time.time()}")
            if len(warm.whole) < len(_WARM_UP.requests):
                reasons = [answer.error for answer in warm.answers if answer.error]
                raise Unavailable(f"{shape.name}: the first requests failed: {reasons or 'no answer in time'}")
            yield target, cluster


async def take_turns(
    setting: Setting, shapes: Sequence[Shape], loads: Callable[[int], Sequence[Load]], reference: Shape | None = None
) -> Comparison:
    """Rounds until the time is up: a turn is not begun that, taking as long as the longest so far, would end later.

    ``reference``: the cluster on which single requests are measured first, for the nine objectives.
    """
    chosen, probe = setting.chosen(shapes), BandwidthProbe()
    targets: dict[str, Target] = {}
    runs: list[Measured] = []
    with Shown(setting.console) as shown:
        alone = None
        if reference is not None:
            async with standing(setting, reference) as (target, _):
                single = alone_load([request for load in loads(0) for request in load.requests])
                alone = await uncontended(target, single, "0", shown.watching(target, single))
        tell, longest_s = _telling(shown, alone), 0.0
        for number, shape in turns(chosen, setting.rounds):
            began_s = time.monotonic()
            if began_s + longest_s > setting.until_s:
                setting.console.print(f"the time is up before round {number}, {shape.name}")
                break
            beside = {"read_gb_s": statistics.median(probe.read_gb_s() for _ in range(3))}
            try:
                async with asyncio.timeout(setting.until_s - began_s), standing(setting, shape) as (target, _):
                    targets.setdefault(shape.name, target)
                    for load in loads(number):
                        runs.append(await measured(target, load, number, "0", shown.watching(target, load), beside))
                        tell(runs[-1])
            except TimeoutError:
                setting.console.print(f"the time is up in round {number}, {shape.name}")
                break
            longest_s = max(longest_s, time.monotonic() - began_s)
    return Comparison(tuple(targets.values()), alone, Limits(), tuple(runs))


def _telling(shown: Shown, alone: Uncontended | None) -> Callable[[Measured], None]:
    return shown.told(lambda run: Figures.of(run.outcome, alone))


def turns(shapes: Sequence[Shape], rounds: int) -> list[tuple[int, Shape]]:
    """(round, shape): each round begins with another one."""
    order = []
    for number in range(rounds):
        shift = number % len(shapes)
        order += [(number, shape) for shape in (*shapes[shift:], *shapes[:shift])]
    return order
