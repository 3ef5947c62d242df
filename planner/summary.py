"""What a run comes to: a summary with the metric names of the public simulator, and a table of its requests."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from loadgen.objectives import Verdict
from planner import picture
from planner.energy import bill
from planner.results import Run
from planner.uncontended import Uncontended, judge, measured, percentile, slowdowns

SHARES = (0.5, 0.9, 0.99)
# Of requests.csv. Times are in seconds; those of a request that was not served are empty.
COLUMNS = (
    "request_id", "e2e_s", "ttft_s", "tbt_s", "second_token_gap_s", "prompt_size", "token_size", "arrival_timestamp",
    "prompt_instance", "token_instance",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one metric over requests; None if no request has it."""

    mean: float | None
    p50: float | None
    p90: float | None
    p99: float | None

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Figures:
        ordered = sorted(value for value in values if value is not None)
        if not ordered:
            return cls(None, None, None, None)
        return cls(fmean(ordered), *(percentile(ordered, share) for share in SHARES))


@dataclass(frozen=True, slots=True)
class Summary:
    """Metrics are of the requests that were served whole."""

    # By name: TTFT_s, TBT_s, E2E_s, second_token_gap_s, TTFT_slowdown, TBT_slowdown, E2E_slowdown.
    metrics: dict[str, Figures]
    verdicts: tuple[Verdict, ...]
    num_requests: int
    num_served: int

    @property
    def meets_all_nine(self) -> bool:
        """A run that left requests out meets nothing."""
        return self.num_served == self.num_requests and all(verdict.is_met for verdict in self.verdicts)


def summarize(run: Run, alone: Uncontended) -> Summary:
    whole = [measured(served, run.profile) for served in run.served if served.is_whole]
    slower = slowdowns(run, alone)
    metrics = {
        "TTFT_s": Figures.of(each.ttft_s for each in whole),
        "TBT_s": Figures.of(each.tbt_s for each in whole),
        "E2E_s": Figures.of(each.e2e_s for each in whole),
        "second_token_gap_s": Figures.of(each.second_token_gap_s for each in whole),
        "TTFT_slowdown": Figures.of(each.ttft for each in slower),
        "TBT_slowdown": Figures.of(each.tbt for each in slower),
        "E2E_slowdown": Figures.of(each.e2e for each in slower),
    }
    return Summary(metrics, judge(slower), len(run.served), len(whole))


def as_json(run: Run, summary: Summary) -> dict[str, object]:
    """Flat, but for the lists of what is wrong. It has no time of this machine: the same run gives the same bytes."""
    flat: dict[str, object] = {
        "profile": run.profile.value,
        "workload": run.workload.name,
        "rate": run.workload.rate,
        "design": run.design.name,
        "machines": run.design.num_machines,
        "dollars_per_hour": run.design.dollars_per_hour,
        "power_units": run.design.power_units,
    }
    for name, figures in summary.metrics.items():
        for part in ("mean", "p50", "p90", "p99"):
            flat[f"{name}_{part}"] = getattr(figures, part)
    flat |= {"requests": summary.num_requests, "completed": summary.num_served, "sim_end_s": run.ended_s}
    flat |= {**run.counters, **bill(run).as_json()}
    flat["all_9_SLOs_met"] = int(summary.meets_all_nine)
    flat["missed_SLOs"] = [
        f"{v.figure} p{v.percentile * 100:g} slowdown {v.found:.2f}, limit {v.limit:g}"
        for v in summary.verdicts
        if v.found is not None and not v.is_met
    ]
    flat["warnings"] = list(run.warnings)
    return flat


def requests_csv(run: Run) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for served in run.served:
        request = served.request
        ttft_s = tbt_s = e2e_s = gap_s = None
        if served.is_whole:
            ttft_s, tbt_s, e2e_s, gap_s = measured(served, run.profile)
        writer.writerow(
            (
                request.number, e2e_s, ttft_s, tbt_s, gap_s, request.num_prompt_tokens, request.num_output_tokens,
                request.arrival_s, served.prompt_machine, served.token_machine,
            )
        )  # fmt: skip
    return text.getvalue()


def write(folder: Path, run: Run, summary: Summary) -> None:
    """``summary.json``, ``requests.csv`` and ``run.svg``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(as_json(run, summary), indent=2) + "\n")
    (folder / "requests.csv").write_text(requests_csv(run))
    (folder / "run.svg").write_text(picture.draw(run), encoding="utf-8")
