"""The measured step times that come with Baton, and curves through them. Pure.

``data/README.md`` says where ``splitwise_perf_model.csv`` is from, and what in it was not measured.
"""

from __future__ import annotations

import csv
from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from math import inf
from pathlib import Path
from statistics import median

from baton.errors import BadConfig, quoted
from engine.step import StepShape
from planner.machines import Machine

_FILE = Path(__file__).resolve().parent / "data" / "splitwise_perf_model.csv"
_MS = 1000


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement: ``batch_size`` prompts of equal length in one step, then their decoding in one batch."""

    model: str
    hardware: str
    tensor_parallel: int
    num_prompt_tokens: int
    batch_size: int
    num_output_tokens: int
    prompt_s: float
    # One step of decoding, on average over the output.
    decode_s: float
    # Of the GPUs while measured, as a share of what they may draw; 0: not measured.
    power_share: float


@cache
def rows() -> tuple[Row, ...]:
    with _FILE.open(newline="") as file:
        return tuple(
            Row(
                row["model"], row["hardware"], int(row["tensor_parallel"]), int(row["prompt_size"]),
                int(row["batch_size"]), int(row["token_size"]), float(row["prompt_time"]) / _MS,
                float(row["token_time"]) / _MS, float(row["average_power"]),
            )
            for row in csv.DictReader(file)
        )  # fmt: skip


def rows_of(model: str, machine: Machine, tensor_parallel: int) -> tuple[Row, ...]:
    """Raises BadConfig if there are none."""
    hardware = machine.measured_as or machine.name
    found = tuple(
        row for row in rows() if (row.model, row.hardware, row.tensor_parallel) == (model, hardware, tensor_parallel)
    )
    if not found:
        there = sorted({f"{row.model} on {row.hardware} with TP {row.tensor_parallel}" for row in rows()})
        raise BadConfig(
            f"the table of step times has no {quoted(model)} on {quoted(hardware)} with TP {tensor_parallel}; expected "
            f"one of {', '.join(there)}; or give the machine the field measured_as",
            param="model",
        )
    return found


class Curve:
    """Straight lines through points, and on beyond the first and the last. Remembers what was asked beyond them."""

    def __init__(self, points: Iterable[tuple[float, float]]) -> None:
        found = sorted(points)
        if len(found) < 2 or any(x == next_x for (x, _), (next_x, _) in pairwise(found)):
            raise ValueError(f"a curve needs two points or more of different x, not {found}")
        self._x = [x for x, _ in found]
        self._y = [y for _, y in found]
        self._least_asked, self._most_asked = inf, -inf

    def at(self, x: float) -> float:
        self._least_asked = min(self._least_asked, x)
        self._most_asked = max(self._most_asked, x)
        right = min(max(bisect_left(self._x, x), 1), len(self._x) - 1)
        x0, y0 = self._x[right - 1], self._y[right - 1]
        slope = (self._y[right] - y0) / (self._x[right] - x0)
        return slope * (x - x0) + y0

    @property
    def extrapolated(self) -> str:
        """Of a warning: "7 to 2,048, measured are 128 to 32,768"; empty if nothing was."""
        first, last = self._x[0], self._x[-1]
        if self._least_asked >= first and self._most_asked <= last:
            return ""
        return f"{self._least_asked:,g} to {self._most_asked:,g}, measured are {first:,g} to {last:,g}"


def medians(found: Iterable[Row], x: Callable[[Row], float], y: Callable[[Row], float]) -> Curve:
    """Through the median of ``y`` at each ``x``."""
    by_x: dict[float, list[float]] = {}
    for row in found:
        by_x.setdefault(x(row), []).append(y(row))
    return Curve((at, median(values)) for at, values in by_x.items())


class TokenTimes:
    """The times as the public simulator has them: over the number of tokens that a step computes, and nothing else.

    Both curves are over the prompt tokens of a measured batch. So a decode is looked up by the number of decoding
    requests on a curve whose x was prompt tokens: it hardly depends on the batch, and not at all on the context.
    """

    # A step of prompts and decodes costs a prompt of so many tokens, times this.
    _MIXED_FACTOR = 1.1

    def __init__(self, model: str, machine: Machine, tensor_parallel: int) -> None:
        found = rows_of(model, machine, tensor_parallel)

        def batch_tokens(row: Row) -> float:
            return row.num_prompt_tokens * row.batch_size

        self._name = f"{model} on {machine.name} with TP {tensor_parallel}"
        self._prompt = medians(found, batch_tokens, lambda row: row.prompt_s)
        self._decode = medians(found, batch_tokens, lambda row: row.decode_s)
        self._prompt_s: dict[int, float] = {}
        self._decode_s: dict[int, float] = {}

    @property
    def source(self) -> str:
        return f"table of SplitwiseSim, {self._name}, by tokens of the step"

    def prompt_s(self, num_tokens: int) -> float:
        if (found := self._prompt_s.get(num_tokens)) is None:
            found = self._prompt_s[num_tokens] = self._prompt.at(num_tokens)
        return found

    def decode_s(self, num_tokens: int) -> float:
        if (found := self._decode_s.get(num_tokens)) is None:
            found = self._decode_s[num_tokens] = self._decode.at(num_tokens)
        return found

    def batch_s(self, num_prompt_tokens: int, num_decoding: int) -> float:
        if not num_prompt_tokens:
            return self.decode_s(num_decoding)
        if not num_decoding:
            return self.prompt_s(num_prompt_tokens)
        return self.prompt_s(num_prompt_tokens + num_decoding) * self._MIXED_FACTOR

    def step_s(self, shape: StepShape) -> float:
        return self.batch_s(shape.num_prompt_tokens, shape.num_decoding)

    @property
    def warnings(self) -> tuple[str, ...]:
        return tuple(
            f"{name} times of {self._name} are extrapolated: tokens of steps were {extrapolated}"
            for name, curve in (("prompt", self._prompt), ("decode", self._decode))
            if (extrapolated := curve.extrapolated)
        )
