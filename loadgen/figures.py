"""The figures of a run, and what is written of it: JSON with every request, and CSV with a line for each."""

from __future__ import annotations

import csv
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loadgen.client import Answer
from loadgen.objectives import Limits, Slowdown, Uncontended, Verdict, judge
from loadgen.run import Outcome
from loadgen.samples import Percentiles

_TOO_MANY_REQUESTS = 429
_MS_DIGITS = 3


@dataclass(frozen=True, slots=True)
class Figures:
    """Rates are per second of the whole run; percentiles are over whole answers."""

    requests: int
    whole: int
    # Answered with status 429 before any token.
    refused: int
    errors: int
    # Without an outcome when the run's time was up.
    cut: int
    first_error: str | None
    wall_s: float
    # The largest delay of the generator itself, due to sent: what it may have added.
    max_late_s: float
    requests_s: float
    prompt_tokens_s: float
    tokens_s: float
    ttft_s: Percentiles
    # Over every gap between two tokens.
    gap_s: Percentiles
    # Over the requests' means.
    tbt_s: Percentiles
    e2e_s: Percentiles
    # Time to the answer of those that were refused.
    refusal_s: Percentiles
    # The nine objectives; empty if single requests were not measured.
    nine: tuple[Verdict, ...] = ()
    # Requests a second within the largest limit of each kind of the nine.
    tolerable_requests_s: float | None = None
    # Requests a second within the absolute objectives, if there are any.
    goodput_requests_s: float | None = None

    @property
    def meets_nine(self) -> bool | None:
        """All nine, with every request answered; None if they were not looked at."""
        return self.whole == self.requests and all(v.is_met for v in self.nine) if self.nine else None

    @classmethod
    def of(cls, outcome: Outcome, alone: Uncontended | None = None, limits: Limits | None = None) -> Figures:
        whole, wall_s = outcome.whole, outcome.wall_s
        failed = [answer for answer in outcome.answers if answer.error is not None]
        refused = [answer for answer in failed if answer.status == _TOO_MANY_REQUESTS]
        errors = [answer.error for answer in failed if answer.status != _TOO_MANY_REQUESTS]
        slowdowns = [] if alone is None else [Slowdown.of(answer, alone) for answer in whole]
        has_limits = limits is not None and limits.is_set
        return cls(
            requests=len(outcome.load.requests),
            whole=len(whole),
            refused=len(refused),
            errors=len(errors),
            cut=outcome.num_cut,
            first_error=errors[0] if errors else None,
            wall_s=wall_s,
            max_late_s=max((answer.sent_s - answer.due_s for answer in outcome.answers), default=0.0),
            requests_s=len(whole) / wall_s,
            prompt_tokens_s=sum(answer.request.prompt_tokens for answer in whole) / wall_s,
            tokens_s=sum(len(answer.stamps_s) for answer in whole) / wall_s,
            ttft_s=Percentiles.of(answer.ttft_s for answer in whole),
            gap_s=Percentiles.of(gap for answer in whole for gap in answer.gaps_s),
            tbt_s=Percentiles.of(answer.tbt_s for answer in whole if answer.tbt_s is not None),
            e2e_s=Percentiles.of(answer.e2e_s for answer in whole),
            refusal_s=Percentiles.of(answer.ended_s - answer.sent_s for answer in refused),
            nine=judge(slowdowns) if slowdowns else (),
            tolerable_requests_s=sum(s.is_tolerable for s in slowdowns) / wall_s if alone is not None else None,
            goodput_requests_s=sum(map(limits.is_met, whole)) / wall_s if limits and has_limits else None,
        )

    def as_json(self) -> dict[str, Any]:
        """Its fields, and whether all nine objectives are met."""
        fields = asdict(self)
        fields["nine"] = [{**asdict(verdict), "is_met": verdict.is_met} for verdict in self.nine]
        return {**fields, "meets_nine": self.meets_nine}


def record_of(answer: Answer) -> dict[str, Any]:
    """One request, as JSON; gaps in milliseconds, rounded to microseconds."""
    record: dict[str, Any] = {
        "number": answer.number,
        "due_s": round(answer.due_s, 6),
        "prompt_tokens": answer.request.prompt_tokens,
        "output_tokens": answer.request.output_tokens,
        "status": answer.status,
        "late_ms": round((answer.sent_s - answer.due_s) * 1e3, _MS_DIGITS),
    }
    if answer.error is not None:
        record |= {"error": answer.error, "ended_s": round(answer.ended_s, 6)}
    if answer.stamps_s:
        record["ttft_s"] = round(answer.ttft_s, 6)
        record["gaps_ms"] = [round(gap * 1e3, _MS_DIGITS) for gap in answer.gaps_s]
    return record


_COLUMNS = ("due_s", "prompt_tokens", "output_tokens", "status", "ttft_s", "tbt_s", "max_gap_s", "e2e_s", "error")


def write_csv(path: Path, runs: dict[str, Outcome]) -> None:
    """A line for each request of every run, the run's name first."""
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("run", "number", *_COLUMNS))
        for name, outcome in runs.items():
            for answer in outcome.answers:
                has_tokens = bool(answer.stamps_s)
                table.writerow((
                    name, answer.number, f"{answer.due_s:.6f}", answer.request.prompt_tokens,
                    answer.request.output_tokens, answer.status,
                    f"{answer.ttft_s:.6f}" if has_tokens else "",
                    "" if not has_tokens or answer.tbt_s is None else f"{answer.tbt_s:.6f}",
                    f"{max(answer.gaps_s):.6f}" if answer.gaps_s else "",
                    f"{answer.e2e_s:.6f}" if has_tokens else "", answer.error or "",
                ))  # fmt: skip
