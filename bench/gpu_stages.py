"""The stages of `bench.gpu` in order of value, and their shares of the time limit. Does not import torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# Time limits in minutes for which stages have shares; a limit in between has the shares of the smaller one.
PLANS = (2, 5, 9)
# Reserved for ending the running stage and writing the report.
RESERVED_S = 10.0


@dataclass(frozen=True, slots=True)
class Stage:
    """``cases``: module:function that takes a `gpu_child.Context` and returns cases; runs in a process of its own."""

    name: str
    about: str
    cases: str
    # Its share in each of PLANS in seconds; 0: not run. Estimates until a GPU has been measured.
    shares_s: tuple[float, float, float]
    # Longest time without output; then the stage counts as hung.
    part_limit_s: float = 45.0
    # Left out if less than this is left.
    least_s: float = 8.0
    # Its figures are times, so nothing else should run beside it.
    is_timed: bool = False
    # Kernels to compile beside it (arguments of `bench.aot`), but not beside the first stages.
    ahead: tuple[str, ...] = ()


STAGES = (
    Stage("machine", "versions, memory, compiler, copy and product rates", "bench.gpu_cases:machine", (25, 25, 25)),
    Stage("tiny", "every kernel at tiny, odd shapes in three dtypes", "bench.gpu_cases:tiny", (35, 40, 40)),
    Stage("real", "every kernel at Llama-3-8B's shapes", "bench.gpu_cases:real", (30, 40, 45)),
    Stage("models", "demo model and four families beside transformers", "bench.gpu_families:cases", (20, 40, 45)),
    Stage("graph", "a recorded decode step gives the bits of an unrecorded one", "bench.gpu_model:graphs", (0, 15, 15)),
    Stage(
        "cluster", "1+1 on one GPU gives the tokens of one node", "bench.gpu_cluster:cases", (0, 70, 80),
        part_limit_s=75, least_s=30,
    ),
    Stage("time", "kernels beside cuBLAS, SDPA and torch", "bench.gpu_cases:timed", (0, 60, 110), is_timed=True),
    # Torch's compiler prints nothing for minutes.
    Stage("steps-0.6b", "whole steps of a 0.6B model", "bench.gpu_model:small", (0, 0, 35), 150, is_timed=True),
    Stage("steps-8b", "whole steps of an 8B model", "bench.gpu_model:large", (0, 0, 75), 150, 20, is_timed=True),
    Stage("tune", "tiles of each kernel, in sections", "bench.tune:cases", (0, 0, 60), 60, 15, ahead=("--tune",)),
)  # fmt: skip


def shares(stages: Sequence[Stage], minutes: float) -> dict[str, float]:
    """Seconds of each stage; stages without a share are left out."""
    column = max((i for i, plan in enumerate(PLANS) if plan <= minutes), default=0)
    return {stage.name: stage.shares_s[column] for stage in stages if stage.shares_s[column]}


class Clock:
    """The time of the whole run. A stage may use its share, unused shares of others, and the rest of the limit."""

    def __init__(self, minutes: float, planned: dict[str, float], now: float) -> None:
        self._ends_at = now + minutes * 60 - RESERVED_S
        self._planned = dict(planned)

    def limit(self, stage: Stage, now: float) -> float:
        """Seconds that a stage may take; 0 if it is left out. Must be called in the order of the stages."""
        own = self._planned.pop(stage.name, 0.0)
        left = self._ends_at - now
        # Later stages keep their shares as far as the time is there.
        limit = min(left, max(own, left - sum(self._planned.values()))) if own else 0.0
        return limit if limit >= stage.least_s else 0.0

    def left(self, now: float) -> float:
        return self._ends_at - now


def planned_lines(stages: Sequence[Stage], minutes: float) -> Iterator[str]:
    planned = shares(stages, minutes)
    for stage in stages:
        seconds = planned.get(stage.name)
        yield f"{stage.name:11} {f'{seconds:4.0f} s' if seconds else '  left out'}  {stage.about}"
