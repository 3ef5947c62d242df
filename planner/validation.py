"""A prediction beside the measured run of the same requests: the figures of both, their errors, and a verdict. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from statistics import fmean
from typing import Any

from loadgen.client import Answer
from loadgen.run import Outcome
from planner.observed import Observed
from planner.results import Run
from planner.uncontended import Measured as Times
from planner.uncontended import measured as times_of
from planner.uncontended import percentile
from planner.workload import Request, Workload

SHARES = (0.5, 0.9, 0.99)
_ROLE_CHANGES = "baton_role_changes_total"


class Verdict(Enum):
    MET = "met"
    MISSED = "missed"
    # Of no limit: for people.
    SHOWN = "shown"
    # Neither the prediction nor the run has it, as no gap between tokens where each answer is one token.
    NOT_MEASURED = "not measured"


@dataclass(frozen=True, slots=True)
class Limits:
    """Largest errors, as shares of what was measured: of medians, throughput and the number of whole requests, and of
    p90 and p99."""

    p50: float = 0.10
    p99: float = 0.20

    def of(self, share: float) -> float:
        return self.p50 if share == SHARES[0] else self.p99


@dataclass(frozen=True, slots=True)
class Row:
    """One figure; None where there is none."""

    name: str
    unit: str
    predicted: float | None
    measured: float | None
    # None: shown, not judged.
    limit: float | None = None

    @property
    def error(self) -> float | None:
        """Predicted by measured, less 1."""
        if self.predicted is None or self.measured is None:
            return None
        if not self.measured:
            return 0.0 if not self.predicted else float("inf")
        return self.predicted / self.measured - 1

    @property
    def verdict(self) -> Verdict:
        if self.predicted is None and self.measured is None:
            return Verdict.NOT_MEASURED
        if self.unit == "s" and self.measured == 0.0:
            # Both ends came together: no clock tells them apart.
            return Verdict.NOT_MEASURED
        if self.limit is None:
            return Verdict.SHOWN
        # What only one of the two has is no agreement.
        error = self.error
        return Verdict.MET if error is not None and abs(error) <= self.limit else Verdict.MISSED


@dataclass(frozen=True, slots=True)
class Pair:
    """One request in both; None: it was not answered whole."""

    request: Request
    predicted: Times | None
    measured: Times | None


@dataclass(frozen=True, slots=True)
class Report:
    """Of one load on one cluster."""

    cluster: str
    load: str
    rows: tuple[Row, ...]
    pairs: tuple[Pair, ...]
    warnings: tuple[str, ...]

    def having(self, verdict: Verdict) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.verdict is verdict)

    @property
    def is_met(self) -> bool:
        return not self.having(Verdict.MISSED)

    @property
    def mean_error(self) -> float:
        """Of what is judged, in size."""
        errors = [abs(row.error) for row in self.rows if row.limit is not None and row.error is not None]
        return fmean(errors) if errors else 0.0

    def as_json(self, *, has_requests: bool = True) -> dict[str, Any]:
        found: dict[str, Any] = {
            "cluster": self.cluster,
            "load": self.load,
            "is_met": self.is_met,
            "mean_error": self.mean_error,
            "rows": [{**asdict(row), "error": row.error, "verdict": row.verdict.value} for row in self.rows],
            "warnings": list(self.warnings),
        }
        if has_requests:
            found["requests"] = [
                {
                    "number": pair.request.number,
                    "arrival_s": pair.request.arrival_s,
                    "prompt_tokens": pair.request.num_prompt_tokens,
                    "output_tokens": pair.request.num_output_tokens,
                    "predicted": None if pair.predicted is None else pair.predicted._asdict(),
                    "measured": None if pair.measured is None else pair.measured._asdict(),
                }
                for pair in self.pairs
            ]
        return found


def workload_of(outcome: Outcome) -> Workload:
    """The requests, at the times that they were sent; those that were not, when they were due."""
    sent_s = {answer.number: answer.sent_s for answer in outcome.answers}
    requests = [
        Request(number, sent_s.get(number, each.due_s), each.prompt_tokens, each.output_tokens)
        for number, each in enumerate(outcome.load.requests)
    ]
    return Workload(outcome.load.name, tuple(sorted(requests, key=lambda each: each.arrival_s)))


def compared(
    cluster: str, run: Run, outcome: Outcome, observed: Observed, counted: Mapping[str, float], limits: Limits
) -> Report:
    """``run`` is of `workload_of` ``outcome``. Latencies are over the requests that both answered whole."""
    answers = {answer.number: _times(answer) for answer in outcome.whole}
    predicted = [times_of(each, run.profile) if each.is_whole else None for each in run.served]
    pairs = tuple(
        Pair(each.request, ours, answers.get(each.request.number))
        for each, ours in zip(run.served, predicted, strict=True)
    )
    both = [(pair.predicted, pair.measured) for pair in pairs if pair.predicted and pair.measured]
    rows = [Row("requests answered", "", sum(1 for x in predicted if x), len(answers), limits.p50)]
    for name, figure in _FIGURES:
        ours, theirs = ([x for pair in both if (x := figure(pair[side])) is not None] for side in (0, 1))
        rows += [Row(f"{name} p{share * 100:g}", "s", _at(ours, share), _at(theirs, share), limits.of(share))
                 for share in SHARES]  # fmt: skip
    rows += _throughput(run, outcome, limits)
    moved = [report.exposed_s for report in run.transfers], [report.exposed_s for report in observed.transfers]
    rows += [Row(f"transfer p{share * 100:g}", "s", *(_at(of, share) for of in moved)) for share in SHARES]
    rows.append(Row("transfers", "", len(moved[0]), len(moved[1])))
    rows.append(Row("role changes", "", len(run.role_changes), sum(_of(counted, _ROLE_CHANGES))))
    return Report(cluster, outcome.load.name, tuple(rows), pairs, (*run.warnings, *_warnings(outcome)))


_FIGURES: tuple[tuple[str, Callable[[Times], float | None]], ...] = (
    ("TTFT", lambda times: times.ttft_s), ("TBT", lambda times: times.tbt_s), ("E2E", lambda times: times.e2e_s),
)  # fmt: skip


def _times(answer: Answer) -> Times:
    """From when it was sent: what the generator is late by is no time of the cluster."""
    return Times(answer.stamps_s[0] - answer.sent_s, answer.tbt_s, answer.stamps_s[-1] - answer.sent_s, None)


def _at(values: list[float], share: float) -> float | None:
    return percentile(sorted(values), share) if values else None


def _throughput(run: Run, outcome: Outcome, limits: Limits) -> Iterable[Row]:
    """Of an open loop that lasts at least as long as its rate says."""
    least_s = len(run.served) / outcome.load.rate if outcome.load.rate else 0.0
    ours = [each.num_tokens for each in run.served if each.is_whole]
    theirs = [len(answer.stamps_s) for answer in outcome.whole]
    walls_s = max(run.ended_s, least_s), max((answer.stamps_s[-1] for answer in outcome.whole), default=0.0)
    for name, unit, predicted, measured in (
        ("throughput", "requests/s", len(ours), len(theirs)), ("throughput", "tokens/s", sum(ours), sum(theirs)),
    ):  # fmt: skip
        rates = predicted / walls_s[0] if walls_s[0] else None, measured / max(walls_s[1], least_s) if theirs else None
        yield Row(name, unit, *rates, limits.p50)


def _of(counted: Mapping[str, float], name: str) -> Iterable[float]:
    return (value for key, value in counted.items() if key.startswith(name))


# A generator that sends so late has measured something else.
_LATE_S = 0.05


def _warnings(outcome: Outcome) -> Iterable[str]:
    if failed := [answer.error for answer in outcome.answers if answer.error is not None]:
        yield f"{len(failed)} requests failed: {failed[0]}"
    if outcome.num_cut:
        yield f"{outcome.num_cut} requests were cut off"
    late_s = max((answer.sent_s - answer.due_s for answer in outcome.answers), default=0.0)
    if late_s > _LATE_S:
        yield f"requests were sent up to {late_s:.2f} s after they were due: the load was not as asked for"
