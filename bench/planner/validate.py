"""Predictions beside runs: both models, split and aggregated clusters, three rates of each trace.

``python -m bench.planner validate``. One profile of each model, measured on the largest cluster, predicts all runs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console

from baton.client import AsyncClient
from bench import measure
from bench import model as bench_model
from cli import profile
from cli.observe import live
from cli.plan_validate import show
from cli.validate import Asked, validated
from loadgen import machine, traces
from loadgen.clusters import Shape, started
from loadgen.plan import Plan
from planner.measured import Measured, as_json
from planner.validation import Limits, Report

_ROOT = Path(__file__).resolve().parents[2]
RESULTS = _ROOT / "bench" / "results"
_LIMITS = Limits()
_LIMIT_S = 120.0
# To start a cluster, warm it up and stop it.
_TURN_S = 40.0


@dataclass(frozen=True, slots=True)
class Subject:
    """A model with loads that two cores can serve. ``options``: of `baton up`, for every cluster."""

    name: str
    options: str
    scale: traces.Scale
    rates: dict[str, tuple[float, ...]]

    @property
    def folder(self) -> str:
        return str(_ROOT / "demo" / "model" if self.name == "demo" else bench_model.bench_model())


SUBJECTS = (
    # About a fifth, a half and nearly all of what the split cluster does.
    Subject("demo", "--kv-mib 64", traces.Scale(0.2, 0.25, 1500, 64), {"code": (5, 10, 20), "conv": (5, 10, 20)}),
    Subject(
        "bench", "--kv-mib 1024 --dtype bfloat16", traces.Scale(0.25, 0.25, 1500, 128),
        {"code": (0.2, 0.4, 0.6), "conv": (0.4, 0.8, 1.2)},
    ),
)  # fmt: skip
# The first one is measured: it has the most nodes on the host, and moves KV.
SHAPES = (
    "2+1 --disaggregation always", "1+1 --disaggregation always", "1+2 --disaggregation always", "2",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Turn:
    subject: Subject
    shape: Shape
    trace: str

    @property
    def name(self) -> str:
        return f"{self.subject.name} {self.shape.name} {self.trace}"

    def plan(self, seconds: float) -> Plan:
        return Plan(
            trace=self.trace, scale=self.subject.scale, rates=self.subject.rates[self.trace], seconds=seconds,
            limit_s=_LIMIT_S,
        )  # fmt: skip


def shape_of(subject: Subject, text: str) -> Shape:
    counts, _, _ = text.partition(" ")
    name = counts if "+" in counts else "aggregated"
    return Shape.parse(f"{name}={text} --prefix-cache off {subject.options}")


def turns(only: Sequence[str]) -> Iterator[Turn]:
    """Those whose names have all words of one of ``only``; all if there is none."""
    for subject in SUBJECTS:
        for text in SHAPES:
            for trace in subject.rates:
                turn = Turn(subject, shape_of(subject, text), trace)
                if not only or any(all(word in turn.name.split() for word in each.split()) for each in only):
                    yield turn


async def profile_of(subject: Subject, console: Console) -> Measured:
    with TemporaryDirectory(prefix="baton-bench-planner-") as folder:
        shape = shape_of(subject, SHAPES[0])
        async with started(shape, subject.folder, Path(folder)) as cluster, AsyncClient(cluster.grpc) as client:
            return await profile.measure(await live(client, cluster.grpc), {}, profile.Shapes(), console)


async def run(only: Sequence[str], seconds: float, minutes: float, console: Console) -> dict[str, Any]:
    """A turn is not begun that would end later."""
    until_s = time.monotonic() + 60 * minutes
    profiles: dict[str, Measured] = {}
    reports: list[tuple[Turn, Report]] = []
    left_out = []
    for turn in turns(only):
        name = turn.subject.name
        wants_s = _TURN_S + seconds * len(turn.subject.rates[turn.trace])
        if time.monotonic() + wants_s > until_s:
            left_out.append(turn.name)
            continue
        if name not in profiles:
            profiles[name] = await profile_of(turn.subject, console)
            profile.show(console, profiles[name])
        asked = Asked(
            shape=turn.shape, plan=turn.plan(seconds), limits=_LIMITS, model=turn.subject.folder,
            measured=profiles[name],
        )  # fmt: skip
        found = await validated(asked, console)
        show(found, console)
        reports += [(turn, report) for report in found.reports]
    return {
        "profiles": {name: as_json(of) for name, of in profiles.items()},
        "left out": left_out,
        "table": [row(turn, report) for turn, report in reports],
        "reports": [
            {"model": turn.subject.name, "options": " ".join(turn.shape.options), **report.as_json()}
            for turn, report in reports
        ],
    }


_SHOWN = tuple(f"{figure} {part}" for figure in ("TTFT", "TBT", "E2E") for part in ("p50", "p99"))


def row(turn: Turn, report: Report) -> dict[str, Any]:
    """Predicted / measured in milliseconds, and the error."""
    made: dict[str, Any] = {"model": turn.subject.name, "cluster": turn.shape.name, "load": report.load}
    by_name = {each.name: each for each in report.rows if each.unit in ("s", "tokens/s")}
    for name in _SHOWN:
        each = by_name[name]
        if each.predicted is None or each.measured is None or each.error is None:
            made[f"{name} ms"] = "-"
        else:
            made[f"{name} ms"] = f"{1e3 * each.predicted:,.1f} / {1e3 * each.measured:,.1f} {each.error:+.0%}"
    tokens = by_name["throughput"]
    made["tokens/s"] = f"{tokens.predicted or 0:.1f} / {tokens.measured or 0:.1f}"
    made["within limits"] = "yes" if report.is_met else "no"
    return made


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.planner validate")
    parser.add_argument("--only", action="append", default=[], metavar="WORDS", help="such as 'demo 1+1 conv'")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each load")
    parser.add_argument("--minutes", type=float, default=70.0, help="no turn is begun that would end later")
    parser.add_argument("--note", default="", help="what the record says of the machine meanwhile")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    given = parser.parse_args(arguments)
    console, began = Console(width=200), datetime.now(UTC)
    facts = {
        "date": began.isoformat(timespec="seconds"), "commit": measure.commit(), "machine": measure.machine(),
        "versions": machine.versions(), "note": given.note, "seconds": given.seconds, "limits": asdict(_LIMITS),
    }  # fmt: skip
    found = asyncio.run(run(given.only, given.seconds, given.minutes, console))
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / f"planner-validate-{began.strftime('%Y-%m-%dT%H%M%SZ')}.json"
    path.write_text(json.dumps({**facts, "results": found}, indent=1) + "\n")
    console.print(f"saved {path}", highlight=False, soft_wrap=True)
