"""What the commands of `baton plan` share: the profile, the model, the workload, warnings."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from baton.errors import BadConfig, quoted

if TYPE_CHECKING:
    from planner.models import Model
    from planner.search.question import Range
    from planner.workload import Workload

DAY_S = 86_400.0
MAX_RATE = 1e6
MAX_COUNT = 10_000


class AskedProfile(Enum):
    """The values of planner.results.Profile: an option's type is there before the planner is loaded."""

    COMPAT = "compat"
    HONEST = "honest"


def model_of(name: str) -> Model:
    from planner import hugging_face, models

    return hugging_face.read(Path(name)) if Path(name).exists() else models.find(name)


def workload_of(trace: str, rate: float | None, seconds: float | None, seed: int | None) -> Workload:
    """``seed``: to be drawn."""
    from planner.workload import named

    work = named(trace)
    if seed is not None:
        if rate is None or seconds is None:
            raise BadConfig("--poisson draws requests, expected --rate and --seconds with it", param="poisson")
        return work.redrawn(rate=rate, seconds=seconds, seed=seed)
    if rate is not None:
        work = work.at_rate(rate)
    return work if seconds is None else work.until(seconds)


def range_of(text: str, option: str) -> Range:
    from planner.search.question import Range

    low, _, high = text.partition("-")
    if not (low.isdecimal() and (high or low).isdecimal()) or not int(low) <= int(high or low) <= MAX_COUNT:
        raise BadConfig(
            f"{option} is {quoted(text)}, expected numbers of machines up to {MAX_COUNT:,}: MIN-MAX, such as 1-40",
            param=option,
        )
    return Range(int(low), int(high or low))


def warn(warning: str) -> None:
    Console(file=sys.stderr, soft_wrap=True).print(f"warning: {warning}", markup=False, highlight=False, style="yellow")
