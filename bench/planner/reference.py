"""The profile compat beside the public simulator: summaries of 31 pairs of design and trace, and single requests."""

from __future__ import annotations

import csv
import gzip
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planner import machines, models, workload
from planner.compat.run import simulate
from planner.design import Design, parse
from planner.results import Run
from planner.summary import as_json, summarize
from planner.table import TokenTimes
from planner.uncontended import BASIS, TableUncontended, measured

DATA = Path(__file__).resolve().parents[1] / "data" / "splitwise"
# What the public simulator ran.
_MODEL = models.BUILT_IN["bloom-176b"]
_TENSOR_PARALLEL = 8
_MACHINES = {"A": "a100-80gb", "H": "h100-80gb", "Hcap": "h100-80gb-pcap"}
# Rates of 2/s and the three requests; the others queue.
_LOW_LOAD = ("_2", "_0")
SUMMARIES = tuple(f"{figure}_s_{part}" for figure in ("TTFT", "TBT", "E2E") for part in ("p50", "p90", "p99"))


@dataclass(frozen=True, slots=True)
class Pair:
    """``metrics`` are the public simulator's."""

    config: str
    trace: str
    metrics: dict[str, float]

    @property
    def tolerance(self) -> float:
        return 0.01 if self.trace.endswith(_LOW_LOAD) else 0.03


@dataclass(frozen=True, slots=True)
class Comparison:
    pair: Pair
    run: Run
    metrics: dict[str, object]
    wall_s: float

    def error(self, metric: str) -> float:
        """Relative; of what is 0 there, absolute."""
        theirs, ours = self.pair.metrics[metric], self.metrics[metric]
        assert isinstance(ours, int | float)
        return abs(ours - theirs) / (abs(theirs) or 1.0)

    @property
    def worst(self) -> tuple[str, float]:
        """Of all metrics."""
        return max(((metric, self.error(metric)) for metric in self.pair.metrics), key=lambda each: each[1])


def pairs() -> tuple[Pair, ...]:
    found: dict[tuple[str, str], dict[str, float]] = {}
    for row in _rows(DATA / "reference.csv.gz"):
        found.setdefault((row["config"], row["trace"]), {})[row["metric"]] = float(row["value"])
    return tuple(Pair(*key, metrics) for key, metrics in found.items())


def design_of(config: str) -> Design:
    """Of a name like Splitwise-HA_25P_26T or Baseline-H100_40."""
    known = machines.catalogue()
    if match := re.fullmatch(r"Baseline-([AH])100_(\d+)", config):
        return parse(known, mixed=[f"{_MACHINES[match[1]]}:{match[2]}"])
    match = re.fullmatch(r"Splitwise-(A|H)(A|Hcap|H)_(\d+)P_(\d+)T", config)
    assert match is not None, config
    return parse(known, prompt=[f"{_MACHINES[match[1]]}:{match[3]}"], token=[f"{_MACHINES[match[2]]}:{match[4]}"])


def compare(pair: Pair) -> Comparison:
    work = workload.read(DATA / "traces" / f"{pair.trace}.csv.gz")
    begin = time.perf_counter()
    run = simulate(work, design_of(pair.config), _MODEL, _TENSOR_PARALLEL)
    wall_s = time.perf_counter() - begin
    alone = TableUncontended(TokenTimes(_MODEL.name, machines.catalogue()[BASIS], _TENSOR_PARALLEL))
    return Comparison(pair, run, as_json(run, summarize(run, alone)), wall_s)


@dataclass(frozen=True, slots=True)
class Requests:
    """The largest differences of single requests, in seconds, and how many were given to other machines."""

    ttft_s: float
    e2e_s: float
    second_token_gap_s: float
    num_elsewhere: int


def _requests_file(pair: Pair) -> Path:
    return DATA / "requests" / f"{pair.config}__{pair.trace}.csv.gz"


def has_requests(pair: Pair) -> bool:
    return _requests_file(pair).exists()


def requests_of(comparison: Comparison) -> Requests | None:
    """None: the reference has no single requests of the pair."""
    run = comparison.run
    if not has_requests(comparison.pair):
        return None
    ttft_s = e2e_s = gap_s = 0.0
    num_elsewhere = 0
    for served, row in zip(run.served, _rows(_requests_file(comparison.pair)), strict=True):
        ours = measured(served, run.profile)
        assert ours.second_token_gap_s is not None
        ttft_s = max(ttft_s, abs(ours.ttft_s - float(row["ttft_s"])))
        e2e_s = max(e2e_s, abs(ours.e2e_s - float(row["e2e_s"])))
        gap_s = max(gap_s, abs(ours.second_token_gap_s - float(row["second_token_gap_s"])))
        machines_there = (row["prompt_instance"], row["token_instance"])
        num_elsewhere += (served.prompt_machine, served.token_machine) != machines_there
    return Requests(ttft_s, e2e_s, gap_s, num_elsewhere)


def table(quick: bool) -> list[dict[str, Any]]:
    """A row for each pair; ``quick`` leaves out the large ones."""
    return [_row(compare(pair)) for pair in pairs() if not (quick and "_60s_" in pair.trace)]


def _row(comparison: Comparison) -> dict[str, Any]:
    requests = requests_of(comparison)
    num_requests = len(comparison.run.served)
    row: dict[str, Any] = {"design": comparison.pair.config, "trace": comparison.pair.trace, "requests": num_requests}
    for figure in ("TTFT", "TBT", "E2E"):
        row[f"{figure} p50/p90/p99 ms"] = " / ".join(
            f"{1e3 * float(str(comparison.metrics[f'{figure}_s_{part}'])):,.1f}" for part in ("p50", "p90", "p99")
        )
    row["largest of 9 errors"] = f"{max(map(comparison.error, SUMMARIES)):.0e}"
    row["largest TTFT difference ms"] = "-" if requests is None else f"{1e3 * requests.ttft_s:.6f}"
    row["on other machines"] = "-" if requests is None else requests.num_elsewhere
    row["ms per request"] = f"{1e3 * comparison.wall_s / num_requests:.3f}"
    return row


def _rows(path: Path) -> Iterator[dict[str, str]]:
    with gzip.open(path, "rt", newline="") as file:
        yield from csv.DictReader(file)
