"""What a simulated run predicts of a cluster that has been serving for a while. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from planner.results import Run
from planner.summary import SHARES, Figures
from planner.uncontended import measured

# Figures of the first part of a run are those of an empty cluster.
_WARM_SHARE = 0.2
# Of fewer requests nothing is said: then all count.
_MIN_COUNTED = 20
Values = tuple[tuple[float, int], ...]


@dataclass(frozen=True, slots=True)
class Predicted:
    """``values`` of each metric, and how often each was there; ``metrics`` are their figures."""

    values: Mapping[str, Values]
    metrics: Mapping[str, Figures]
    requests_s: float
    tokens_s: float
    num_left_out: int
    dollars_per_hour: float
    # None: it is not known what a node draws.
    watts: float | None

    @property
    def joules_per_token(self) -> float | None:
        return self.watts / self.tokens_s if self.watts and self.tokens_s else None


def predicted(run: Run) -> Predicted:
    """Of the requests that ended after the first part of the run and before the last one came, as a router counts
    them. Times between tokens are those of the whole run."""
    span_s = run.workload.seconds
    whole = [served for served in run.served if served.is_whole and served.ended_s is not None]
    steady = [served for served in whole if _WARM_SHARE * span_s <= (served.ended_s or 0.0) <= span_s]
    counted, seconds = (steady, (1 - _WARM_SHARE) * span_s) if len(steady) >= _MIN_COUNTED else (whole, run.ended_s)
    found = [measured(served, run.profile) for served in counted]
    values: dict[str, Values] = {
        "TTFT_s": tuple((each.ttft_s, 1) for each in found),
        "TBT_s": tuple(sorted(run.gaps_s)),
        "E2E_s": tuple((each.e2e_s, 1) for each in found),
    }
    joules = sum(use.prompt_energy_j + use.decode_energy_j + use.idle_energy_j for use in run.machines)
    return Predicted(
        values=values,
        metrics={name: figures(of) for name, of in values.items()},
        requests_s=len(counted) / seconds if seconds else 0.0,
        tokens_s=sum(served.num_tokens for served in counted) / seconds if seconds else 0.0,
        num_left_out=len(run.served) - len(whole),
        dollars_per_hour=run.design.dollars_per_hour,
        watts=joules / run.ended_s if joules and run.ended_s else None,
    )


def figures(values: Sequence[tuple[float, int]]) -> Figures:
    """Of values that were there so often each; the percentiles are values."""
    ordered = sorted(values)
    upto = list(accumulate(count for _, count in ordered))
    if not upto:
        return Figures(None, None, None, None)
    mean = sum(value * count for value, count in ordered) / upto[-1]
    p50, p90, p99 = (ordered[bisect_left(upto, share * upto[-1])][0] for share in SHARES)
    return Figures(mean, p50, p90, p99)
