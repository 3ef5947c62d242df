"""Predictions beside runs: both models, split and aggregated clusters, three rates of each trace.

``python -m bench.planner validate``. One profile of each model, measured on the first cluster, predicts all runs. A
cluster is started once for both traces, and the record is written after each trace.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from statistics import median
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
from planner.validation import Limits, Report, Verdict

_ROOT = Path(__file__).resolve().parents[2]
RESULTS = _ROOT / "bench" / "results"
_LIMITS = Limits()
_LIMIT_S = 120.0
# To start a cluster, warm it up and stop it, and until the last answers of three loads are there.
_TURN_S = 30.0


@dataclass(frozen=True, slots=True)
class Subject:
    """A model with loads that two cores can serve. ``options``: of `baton up`, for each cluster; ``times_as_long``: its
    loads are, as its requests are fewer."""

    name: str
    options: str
    scale: traces.Scale
    rates: dict[str, tuple[float, ...]]
    times_as_long: float = 1.0

    @property
    def folder(self) -> str:
        return str(_ROOT / "demo" / "model" if self.name == "demo" else bench_model.bench_model())


SUBJECTS = (
    # About a fifth, a half and nearly all of what the split cluster does.
    Subject("demo", "--kv-mib 64", traces.Scale(0.2, 0.25, 1500, 64), {"code": (5, 10, 20), "conv": (5, 10, 20)}),
    Subject(
        "bench", "--kv-mib 1024 --dtype bfloat16", traces.Scale(0.25, 0.25, 1500, 128),
        {"code": (0.2, 0.4, 0.6), "conv": (0.4, 0.8, 1.2)}, 2.0,
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
            trace=self.trace, scale=self.subject.scale, rates=self.subject.rates[self.trace],
            seconds=self.subject.times_as_long * seconds, limit_s=_LIMIT_S,
        )  # fmt: skip

    def lasts_s(self, seconds: float) -> float:
        """At least."""
        return _TURN_S + self.subject.times_as_long * seconds * len(self.subject.rates[self.trace])


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


@dataclass(frozen=True, slots=True)
class Time:
    """``until_s``: no turn is begun that would end later, by `time.monotonic`."""

    load_s: float
    until_s: float

    def has_room_for(self, turn: Turn) -> bool:
        return time.monotonic() + turn.lasts_s(self.load_s) <= self.until_s


class Record:
    """What was found so far."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.profiles: dict[str, Measured] = {}
        self.reports: list[tuple[Turn, Report]] = []
        self.left_out: list[str] = []

    def as_json(self) -> dict[str, Any]:
        return {
            "profiles": {name: as_json(of) for name, of in self.profiles.items()},
            "left out": self.left_out,
            "summary": list(summary(self.reports)),
            "table": [row(turn, report) for turn, report in self.reports],
            "reports": [
                {
                    "model": turn.subject.name,
                    "options": " ".join(turn.shape.options),
                    **report.as_json(has_requests=False),
                }
                for turn, report in self.reports
            ],
        }


async def run(only: Sequence[str], limits: Time, record: Record) -> AsyncGenerator[None, None]:
    """Each cluster is started once for all of its turns; goes on after each turn, for the record to be saved."""
    for (subject, shape), of_cluster in groupby(turns(only), key=lambda turn: (turn.subject, turn.shape)):
        waiting = list(of_cluster)
        if not limits.has_room_for(waiting[0]):
            record.left_out += [turn.name for turn in waiting]
            continue
        with TemporaryDirectory(prefix="baton-bench-planner-") as folder:
            async with started(shape, subject.folder, Path(folder)) as cluster:
                if subject.name not in record.profiles:
                    record.profiles[subject.name] = await _profile(cluster.grpc, record.console)
                for turn in waiting:
                    if limits.has_room_for(turn):
                        found = await _turn(turn, limits.load_s, cluster.grpc, record)
                        record.reports += [(turn, report) for report in found]
                    else:
                        record.left_out.append(turn.name)
                    yield


async def _profile(address: str, console: Console) -> Measured:
    async with AsyncClient(address) as client:
        measured = await profile.measure(await live(client, address), {}, profile.Shapes(), console)
    profile.show(console, measured)
    return measured


async def _turn(turn: Turn, seconds: float, address: str, record: Record) -> tuple[Report, ...]:
    asked = Asked(
        shape=turn.shape, plan=turn.plan(seconds), limits=_LIMITS, router=address,
        measured=record.profiles[turn.subject.name],
    )  # fmt: skip
    found = await validated(asked, record.console)
    show(found, record.console)
    return found.reports


def summary(reports: Sequence[tuple[Turn, Report]]) -> Iterator[dict[str, Any]]:
    """Of each model and figure: how many loads are within the limit, and the median and the worst error."""
    for name in dict.fromkeys(turn.subject.name for turn, _ in reports):
        for shown in _SHOWN:
            found = [each for turn, report in reports if turn.subject.name == name for each in report.rows
                     if each.name == shown and each.error is not None]  # fmt: skip
            errors = [each.error for each in found if each.error is not None]
            if errors:
                yield {
                    "model": name, "figure": shown, "loads": len(found),
                    "within": sum(each.verdict is Verdict.MET for each in found),
                    "median error": f"{median(map(abs, errors)):.0%}", "worst error": f"{max(errors, key=abs):+.0%}",
                }  # fmt: skip


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
    parser.add_argument("--seconds", type=float, default=20.0, help="of each load; of the bench model's twice as many")
    parser.add_argument("--minutes", type=float, default=40.0, help="no turn is begun that would end later")
    parser.add_argument("--note", default="", help="what the record says of the machine meanwhile")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    given = parser.parse_args(arguments)
    console, began = Console(width=200), datetime.now(UTC)
    facts = {
        "date": began.isoformat(timespec="seconds"), "commit": measure.commit(), "machine": measure.machine(),
        "versions": machine.versions(), "note": given.note, "seconds": given.seconds, "limits": asdict(_LIMITS),
    }  # fmt: skip
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / f"planner-validate-{began.strftime('%Y-%m-%dT%H%M%SZ')}.json"
    record = Record(console)

    def save() -> None:
        path.write_text(json.dumps({**facts, "results": record.as_json()}, indent=1) + "\n")

    async def saved() -> None:
        until_s = time.monotonic() + 60 * given.minutes
        async with aclosing(run(given.only, Time(given.seconds, until_s), record)) as turns_over:
            async for _ in turns_over:
                # A run that is stopped is not lost.
                save()

    asyncio.run(saved())
    # With what was left out since.
    save()
    for each in summary(record.reports):
        console.print("  ".join(f"{name} {value}" for name, value in each.items()), highlight=False)
    if record.left_out:
        console.print(f"left out: {', '.join(record.left_out)}", highlight=False, soft_wrap=True)
    console.print(f"saved {path}", highlight=False, soft_wrap=True)
