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
# The prompts and outputs of the measured batches.
_BATCHED, _DECODED = 512, 128
# Runs in one batch are within 3 % of their steps.
_MOST_BEYOND_STEPS = 1.1


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
    # The whole run: the prompts, then all steps of decoding.
    run_s: float

    @property
    def is_one_batch(self) -> bool:
        """Whether the run took as long as its one prompt step and its decoding: of some large batches it took far
        longer, so not all of the batch was computed at once. Long outputs end before their number of tokens."""
        steps_s = self.prompt_s + self.decode_s * (self.num_output_tokens - 1)
        return self.run_s < _MOST_BEYOND_STEPS * steps_s

    @property
    def num_decoded(self) -> int:
        """Tokens behind the first that were generated: fewer than asked for where the outputs ended early."""
        return max(1, min(self.num_output_tokens - 1, round((self.run_s - self.prompt_s) / self.decode_s)))

    @property
    def num_kv_tokens(self) -> float:
        """In a step of the decoding, on average."""
        return self.batch_size * (self.num_prompt_tokens + (self.num_decoded + 1) / 2)

    @property
    def num_batch_tokens(self) -> int:
        return self.batch_size * self.num_prompt_tokens

    @property
    def num_prompt_pairs(self) -> int:
        return self.batch_size * self.num_prompt_tokens * (self.num_prompt_tokens + 1) // 2


@cache
def rows() -> tuple[Row, ...]:
    with _FILE.open(newline="") as file:
        return tuple(
            Row(
                row["model"], row["hardware"], int(row["tensor_parallel"]), int(row["prompt_size"]),
                int(row["batch_size"]), int(row["token_size"]), float(row["prompt_time"]) / _MS,
                float(row["token_time"]) / _MS, float(row["average_power"]), float(row["e2e_time"]) / _MS,
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
    def points(self) -> list[tuple[float, float]]:
        return list(zip(self._x, self._y, strict=True))

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


class ShapeTimes:
    """The times as the table's rows have them: prompts over tokens and pairs, decodes over batch and KV tokens.

    A batch's decode is between those of the measured batches at their KV, 576 tokens a sequence; a KV token more or
    less costs what it did in the runs of one sequence. A prompt is between the measured single prompts, beyond 8,192
    tokens between batches; where long prompts cost more than batches of as many tokens, it is for their pairs. Several
    prompts in one step took up to 42 % longer than one of as many tokens (Llama2-70B on A100), which a step's shape
    does not show. No row measures a step of both phases: it reads the weights once, so it is the sum of both less an
    empty decode.
    """

    def __init__(self, model: str, machine: Machine, tensor_parallel: int) -> None:
        found = [row for row in rows_of(model, machine, tensor_parallel) if row.is_one_batch]
        self._name = f"{model} on {machine.name} with TP {tensor_parallel}"
        alone = [row for row in found if row.batch_size == 1]
        batches = [row for row in found if row.num_prompt_tokens == _BATCHED and row.num_output_tokens == _DECODED]
        self._kv_token_s = _slope((row.num_kv_tokens, row.decode_s) for row in alone)
        self._batch_kv_tokens = median(row.num_kv_tokens / row.batch_size for row in batches)
        self._decode = medians(batches, lambda row: row.batch_size, lambda row: row.decode_s)
        self._empty_decode_s = self._decode.at(1) - self._kv_token_s * self._batch_kv_tokens
        # (tokens, pairs) of a prompt step: single prompts, and batches of more tokens than the longest of them has.
        longest = max(row.num_prompt_tokens for row in alone)
        prompts = [row for row in found if row.batch_size == 1 or row.num_batch_tokens > longest]
        batched = medians(batches, lambda row: row.num_batch_tokens, lambda row: row.prompt_s)
        # Of single prompts, beyond batches of as many tokens: pairs that those do not have.
        self._pair_s = _proportion(
            (row.num_prompt_pairs - _pairs_of_batches(row.num_prompt_tokens),
             row.prompt_s - batched.at(row.num_prompt_tokens))
            for row in alone if row.num_prompt_tokens > _BATCHED
        )  # fmt: skip
        points = medians(
            prompts, lambda row: row.num_batch_tokens, lambda row: row.prompt_s - self._pair_s * row.num_prompt_pairs
        )
        # A prompt of one token is a decode without KV.
        self._prompt = Curve([(1, self._empty_decode_s), *points.points])

    @property
    def source(self) -> str:
        return f"table of SplitwiseSim, {self._name}, by batch and KV tokens"

    def step_s(self, shape: StepShape) -> float:
        step_s = 0.0
        if shape.num_prompt_tokens:
            step_s = self._prompt.at(shape.num_prompt_tokens) + self._pair_s * shape.num_prompt_pairs
        if shape.num_decoding:
            kv_tokens = shape.num_kv_tokens - shape.num_decoding * self._batch_kv_tokens
            step_s += self._decode.at(shape.num_decoding) + self._kv_token_s * kv_tokens
            if shape.num_prompt_tokens:
                step_s -= self._empty_decode_s
        return step_s

    @property
    def warnings(self) -> tuple[str, ...]:
        return tuple(
            f"{name} times of {self._name} are extrapolated: {what} of steps were {extrapolated}"
            for name, what, curve in (("prompt", "tokens", self._prompt), ("decode", "sequences", self._decode))
            if (extrapolated := curve.extrapolated)
        )


def _pairs_of_batches(num_tokens: int) -> int:
    """(query, key) pairs of prompts of 512 tokens that have so many together."""
    return num_tokens * (_BATCHED + 1) // 2


def _slope(points: Iterable[tuple[float, float]]) -> float:
    """Of the straight line with the least squares; 0 if it falls, which is noise."""
    found = list(points)
    middle_x, middle_y = sum(x for x, _ in found) / len(found), sum(y for _, y in found) / len(found)
    squares = sum((x - middle_x) * (x - middle_x) for x, _ in found)
    return max(0.0, sum((x - middle_x) * (y - middle_y) for x, y in found) / squares)


def _proportion(points: Iterable[tuple[float, float]]) -> float:
    """The same through 0."""
    found = list(points)
    return max(0.0, sum(x * y for x, y in found) / sum(x * x for x, _ in found))
