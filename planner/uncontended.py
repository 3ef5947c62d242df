"""What a request takes on a machine of its own, and how much slower it was in a run: the basis of the nine SLOs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from engine.step import StepShape
from loadgen.objectives import NINE, Slowdown, Verdict
from planner.results import Profile, Run, Served
from planner.table import TokenTimes
from planner.times import Times
from planner.workload import Request

# The machine of the Splitwise paper's SLOs.
BASIS = "a100-80gb"


class Ideal(NamedTuple):
    """Of one request, with no other on the machine; ``tbt_s`` is the mean time between two tokens."""

    ttft_s: float
    tbt_s: float
    e2e_s: float


class Uncontended(Protocol):
    def of(self, request: Request) -> Ideal: ...


class TableUncontended:
    """As the public simulator has it: the decode curve is looked up at the prompt's length."""

    def __init__(self, times: TokenTimes) -> None:
        self._times = times

    def of(self, request: Request) -> Ideal:
        ttft_s = self._times.prompt_s(request.num_prompt_tokens)
        tbt_s = self._times.decode_s(request.num_prompt_tokens)
        return Ideal(ttft_s, tbt_s, ttft_s + tbt_s * (request.num_output_tokens - 1))


class StepUncontended:
    """From times of steps: a step for the prompt, then decodes of one request whose KV is half generated."""

    def __init__(self, times: Times) -> None:
        self._times = times

    def of(self, request: Request) -> Ideal:
        ttft_s = self._times.step_s(StepShape().with_prompt(0, request.num_prompt_tokens))
        num_kv_tokens = request.num_prompt_tokens + request.num_output_tokens // 2
        tbt_s = self._times.step_s(StepShape(num_decoding=1, num_kv_tokens=num_kv_tokens))
        return Ideal(ttft_s, tbt_s, ttft_s + tbt_s * (request.num_output_tokens - 1))


class Measured(NamedTuple):
    """Of one request that was served whole; None for what it does not have."""

    ttft_s: float
    tbt_s: float | None
    e2e_s: float
    # From the end of the prompt to the beginning of decoding.
    second_token_gap_s: float | None


def measured(served: Served, profile: Profile) -> Measured:
    """In the profile compat TBT is over all tokens, not over the gaps between them, as the public simulator has it."""
    request = served.request
    assert served.first_token_s is not None and served.ended_s is not None  # noqa: PT018 - it is whole
    ttft_s, e2e_s = served.first_token_s - request.arrival_s, served.ended_s - request.arrival_s
    num_gaps = served.num_tokens if profile is Profile.COMPAT else served.num_tokens - 1
    tbt_s = (e2e_s - ttft_s) / num_gaps if num_gaps else None
    # Both where it is computed: its first token is on its way to the client meanwhile.
    began_s, ended_s = served.decode_start_s, served.prompt_end_s
    gap_s = None if began_s is None or ended_s is None else began_s - ended_s
    return Measured(ttft_s, tbt_s, e2e_s, gap_s)


def slowdowns(run: Run, alone: Uncontended) -> tuple[Slowdown, ...]:
    """Of the requests that were served whole."""
    found = []
    for served in run.served:
        if served.is_whole:
            found.append(slowdown(measured(served, run.profile), alone.of(served.request)))
    return tuple(found)


def slowdown(real: Measured, ideal: Ideal) -> Slowdown:
    tbt = None if real.tbt_s is None else real.tbt_s / ideal.tbt_s
    return Slowdown(real.ttft_s / ideal.ttft_s, tbt, real.e2e_s / ideal.e2e_s)


def percentile(ordered: Sequence[float], share: float) -> float:
    """Of ascending values; between two ranks on a straight line, as NumPy has it."""
    rank = (len(ordered) - 1) * share
    below = int(rank)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (rank - below)


def judge(found: Sequence[Slowdown]) -> tuple[Verdict, ...]:
    """The nine."""
    ordered = {
        figure: sorted(value for each in found if (value := each.value(figure)) is not None)
        for figure in dict.fromkeys(figure for figure, _, _ in NINE)
    }
    return tuple(
        Verdict(figure, share, limit, percentile(ordered[figure], share) if ordered[figure] else None)
        for figure, share, limit in NINE
    )
