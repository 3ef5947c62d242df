"""What a chaos run found: as JSON, as lines for a terminal, and as a picture."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from baton.faults.plan import Plan
from cli.chaos.verdict import Ledger, Outcome, Verdict
from cli.chaos.watch import Look, absences
from loadgen import chart
from loadgen.chart import Line, Panel, Point
from loadgen.samples import Percentiles

_MIB = 1 << 20
_WHEN = re.compile(r"^# ([0-9.]+) s$", re.MULTILINE)
_MAX_DETAILS = 20


@dataclass(frozen=True, slots=True)
class Asked:
    """One request of the disturbed run. Times are seconds since faults began."""

    number: int
    kind: str
    outcome: Outcome
    began_s: float
    ended_s: float
    num_tokens: int
    num_refused: int
    # At another router, or at the same one when it was back.
    num_resumed: int
    longest_gap_s: float
    # Why it is not whole.
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Struck:
    """The faults that struck, by layer and kind, and when."""

    counts: Mapping[str, int]
    times_s: Mapping[str, tuple[float, ...]]

    @classmethod
    def of(cls, folder: Path) -> Struck:
        """From what the processes wrote."""
        counts: Counter[str] = Counter()
        times: dict[str, list[float]] = {}
        for file in sorted(folder.glob("*.toml")):
            text = file.read_text()
            # One comment before each entry; without times there is none.
            whens = [float(when) for when in _WHEN.findall(text)]
            rules = Plan.parse(text, str(file)).rules
            counts.update(f"{rule.layer} {rule.fault}" for rule in rules)
            for rule, when in zip(rules, whens, strict=False):
                times.setdefault(rule.layer.value, []).append(when)
        return cls(dict(sorted(counts.items())), {layer: tuple(sorted(found)) for layer, found in times.items()})

    @property
    def total(self) -> int:
        return sum(self.counts.values())


@dataclass(frozen=True, slots=True)
class Report:
    seconds: float
    num_planned: int
    struck: Struck
    asked: tuple[Asked, ...]
    # Of the undisturbed run: questions, and those with a known answer that were answered right.
    num_questions: int
    num_known: int
    num_known_right: int
    ledger: Ledger
    looks: tuple[Look, ...]
    nodes: tuple[str, ...]
    routers: tuple[str, ...]
    # By second, tokens that came.
    tokens: Mapping[int, int]
    verdict: Verdict

    @property
    def outcomes(self) -> Counter[Outcome]:
        return Counter(each.outcome for each in self.asked)

    def as_json(self) -> dict[str, Any]:
        return {
            "seconds": self.seconds,
            "verdict": "passed" if self.verdict.passed else "failed",
            "reasons": list(self.verdict.reasons),
            "requests": len(self.asked),
            "requests_by_kind": dict(Counter(each.kind for each in self.asked)),
            "outcomes": {outcome.value: self.outcomes[outcome] for outcome in Outcome},
            "asked_again_after_a_refusal": sum(each.num_refused for each in self.asked),
            "resumed_at_a_router": sum(each.num_resumed for each in self.asked),
            "faults_planned": self.num_planned,
            "faults_struck": self.struck.total,
            "faults": dict(self.struck.counts),
            "undisturbed": {
                "questions": self.num_questions, "known": self.num_known, "known_right": self.num_known_right
            },
            "ledger": asdict(self.ledger),
            "node_absent_s": asdict(self.absent_s),
            "longest_gap_s": asdict(self.gap_s),
            "tokens": sum(self.tokens.values()),
            "processes": self.processes(),
            "not_whole": [_as_json(each) for each in self.asked if each.detail][:_MAX_DETAILS],
        }  # fmt: skip

    @property
    def absent_s(self) -> Percentiles:
        return Percentiles.of(absences(self.looks, self.nodes))

    @property
    def gap_s(self) -> Percentiles:
        """The longest wait between two tokens of each stream that was whole."""
        return Percentiles.of(each.longest_gap_s for each in self.asked if each.outcome is Outcome.WHOLE)

    def processes(self) -> dict[str, dict[str, float]]:
        """Of the last life of each: memory and descriptors when it was first and last seen, and at most."""
        found: dict[str, dict[str, float]] = {}
        for name in (*self.routers, *self.nodes):
            seen = [look.processes[name] for look in self.looks if name in look.processes]
            last = [each for each in seen if each.pid == seen[-1].pid]
            if last:
                found[name] = {
                    "lives": len({each.pid for each in seen}),
                    "rss_mib_first": round(last[0].rss_bytes / _MIB, 1),
                    "rss_mib_last": round(last[-1].rss_bytes / _MIB, 1),
                    "rss_mib_max": round(max(each.rss_bytes for each in seen) / _MIB, 1),
                    "descriptors_first": last[0].num_descriptors,
                    "descriptors_last": last[-1].num_descriptors,
                    "descriptors_max": max(each.num_descriptors for each in seen),
                }
        return found


def _as_json(asked: Asked) -> dict[str, Any]:
    return {**asdict(asked), "outcome": asked.outcome.value}


def show(report: Report, console: Console) -> None:
    outcomes = report.outcomes
    told = ", ".join(f"{count} {outcome.value}" for outcome, count in outcomes.items())
    lines = [
        f"{len(report.asked)} requests in {report.seconds:.0f} s: {told}",
        f"{report.struck.total} faults struck, {report.num_planned} were planned",
        f"the ledger of {report.ledger.nodes} nodes: {report.ledger.held} blocks held, {report.ledger.off} off",
        f"a node was absent for {_spread(report.absent_s)} s; the longest wait in a stream was {_spread(report.gap_s)} "
        "s (p50 / p99 / max)",
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    table = Table("fault", "struck")
    for name, count in report.struck.counts.items():
        table.add_row(name, str(count))
    console.print(table)
    processes = Table("process", "lives", "RSS first / last / max MiB", "descriptors first / last / max")
    for name, f in report.processes().items():
        processes.add_row(
            name, f"{f['lives']:.0f}",
            f"{f['rss_mib_first']:.0f} / {f['rss_mib_last']:.0f} / {f['rss_mib_max']:.0f}",
            f"{f['descriptors_first']:.0f} / {f['descriptors_last']:.0f} / {f['descriptors_max']:.0f}",
        )  # fmt: skip
    console.print(processes)
    for each in [each for each in report.asked if each.detail][:_MAX_DETAILS]:
        said = f"request {each.number} ({each.kind}): {each.outcome.value}: {each.detail}"
        console.print(said, markup=False, highlight=False, soft_wrap=True)
    if report.verdict.passed:
        console.print("passed: no token was wrong, repeated or lost, and every block came back", highlight=False)
    else:
        console.print(f"failed: {'; '.join(report.verdict.reasons)}", markup=False, highlight=False, soft_wrap=True)


def _spread(of: Percentiles) -> str:
    return " / ".join("-" if value is None else f"{value:.1f}" for value in (of.p50, of.p99, of.max))


def picture(report: Report) -> str:
    """Over time: tokens, faults, nodes that are ready, and memory."""
    tokens = [Point(float(second), float(report.tokens.get(second, 0))) for second in range(int(report.seconds) + 1)]
    faults = [
        Line(layer, tuple(Point(at_s, float(i)) for i, at_s in enumerate(times, 1)))
        for layer, times in report.struck.times_s.items()
    ]
    ready = [Point(look.at_s, float(len(look.ready))) for look in report.looks if look.ready is not None]
    memory = [Line(name, _memory(report.looks, name)) for name in (*report.routers, *report.nodes)]
    across = "seconds since the first fault could strike"
    panels = [
        Panel("tokens", across, "tokens/s", (Line("all streams", tuple(tokens)),)),
        Panel("faults that struck, by layer", across, "faults so far", tuple(faults)),
        Panel("nodes that are ready", across, "nodes", (Line("nodes", tuple(ready)),)),
        Panel("memory of each process", across, "RSS, MiB", tuple(memory)),
    ]
    told = "passed" if report.verdict.passed else "failed"
    return chart.draw(f"{len(report.asked)} requests under {report.struck.total} faults: {told}", panels)


def _memory(looks: Sequence[Look], name: str) -> tuple[Point, ...]:
    return tuple(
        Point(look.at_s, look.processes[name].rss_bytes / _MIB) for look in looks[::4] if name in look.processes
    )
