"""Objectives of a search: what of them a run misses, known as soon as nothing can change it. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from baton.errors import BadConfig, quoted
from loadgen.objectives import NINE
from planner.results import Ending, Profile, Served
from planner.summary import Summary
from planner.uncontended import Ideal, Uncontended, measured, slowdown
from planner.workload import Workload

_METRICS = ("TTFT_s", "TBT_s", "E2E_s", "TTFT_slowdown", "TBT_slowdown", "E2E_slowdown")
_SHARES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
_PARTS = ("mean", *_SHARES)


@dataclass(frozen=True, slots=True)
class Slo:
    """A bound of a metric of the summary."""

    metric: str
    part: str
    limit: float

    def is_met(self, summary: Summary) -> bool:
        found: float | None = getattr(summary.metrics[self.metric], self.part)
        return found is None or found <= self.limit

    @property
    def name(self) -> str:
        return f"{self.metric}:{self.part}:{self.limit:g}"


NINE_SLOS = tuple(Slo(f"{figure.upper()}_slowdown", f"p{share * 100:.0f}", limit) for figure, share, limit in NINE)


def slo(text: str) -> Slo:
    """From TTFT_s:p99:2. Raises BadConfig."""
    metric, _, rest = text.partition(":")
    part, _, limit = rest.partition(":")
    try:
        number = float(limit)
    except ValueError:
        number = 0.0
    if metric not in _METRICS or part not in _PARTS or not 0 < number < float("inf"):
        raise BadConfig(
            f"--slo is {quoted(text)}, expected METRIC:PART:LIMIT with a metric of {', '.join(_METRICS)}, a part of "
            f"{', '.join(_PARTS)} and a limit above 0, such as TTFT_s:p99:2",
            param="--slo",
        )
    return Slo(metric, part, number)


def missed(summary: Summary, slos: Iterable[Slo]) -> tuple[str, ...]:
    """A design that leaves requests out meets nothing."""
    left_out = summary.num_requests - summary.num_served
    said = (f"{left_out} requests not served",) if left_out else ()
    return (*said, *(each.name for each in slos if not each.is_met(summary)))


class Missed(Exception):
    """Whatever else happens in the run."""


@dataclass(slots=True)
class _Count:
    """Of one percentile: requests beyond its limit, and how many of them there may be."""

    limit: float
    most: int
    num_beyond: int = 0


class Watch:
    """Follows a run and raises Missed once it misses an objective for certain.

    A percentile lies at or above the value of the rank below it. That value is beyond the limit if more requests are
    beyond it than there are ranks from that one up; no later request takes one back. Means are not followed.
    """

    def __init__(self, workload: Workload, slos: Iterable[Slo], profile: Profile, alone: Uncontended) -> None:
        self._profile = profile
        self._alone = alone
        self._ideals: dict[int, Ideal] = {}
        num_requests = len(workload.requests)
        # In the profile compat a request of one token has a time between tokens as well.
        has_gaps = [profile is Profile.COMPAT or each.num_output_tokens > 1 for each in workload.requests]
        self._counts: dict[str, list[_Count]] = {}
        for each in slos:
            if each.part in _SHARES:
                count = sum(has_gaps) if each.metric.startswith("TBT") else num_requests
                rank_below = int((count - 1) * _SHARES[each.part])
                self._counts.setdefault(each.metric, []).append(_Count(each.limit, count - rank_below - 1))

    def __call__(self, served: Served) -> None:
        """It has its first token, or has ended."""
        if served.ending is None:
            self._first_token(served)
        elif served.ending is not Ending.WHOLE:
            raise Missed("a request was not served")
        else:
            self._ended(served)

    def _first_token(self, served: Served) -> None:
        request = served.request
        ideal = self._ideals[request.number] = self._alone.of(request)
        assert served.first_token_s is not None
        ttft_s = served.first_token_s - request.arrival_s
        self._note("TTFT_s", ttft_s)
        self._note("TTFT_slowdown", ttft_s / ideal.ttft_s)

    def _ended(self, served: Served) -> None:
        real = measured(served, self._profile)
        slower = slowdown(real, self._ideals.pop(served.request.number))
        self._note("E2E_s", real.e2e_s)
        self._note("E2E_slowdown", slower.e2e)
        if real.tbt_s is not None and slower.tbt is not None:
            self._note("TBT_s", real.tbt_s)
            self._note("TBT_slowdown", slower.tbt)

    def _note(self, metric: str, value: float) -> None:
        for count in self._counts.get(metric, ()):
            if value > count.limit:
                count.num_beyond += 1
                if count.num_beyond > count.most:
                    raise Missed(f"{metric} has more requests beyond {count.limit:g} than the objective allows")
