"""How long steps take on this replica: a line through the newest ones, and how many prompt tokens fit into a time.

Pure: durations come in as arguments. Nothing here decides what a step computes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations_with_replacement

from baton.types import StepTimes
from engine.step import StepShape

# Of each kind of step (prompts, decodes, both) the newest count: one that is so many steps old weighs 1/e.
_MEMORY_STEPS = 128
# If the newest so many steps took much longer or shorter than predicted, the machine has changed: older ones of all
# kinds fade, down to so many. One step counts as twice or half its prediction at most.
_NEWEST_STEPS = 16
_CHANGED_SHARE = 0.25
_KEPT_STEPS = 4
# The line is fitted anew after so many steps, and after each of the first ones: it takes 20 us, a step is added in 4.
_FIT_EVERY = 32
_MIN_STEPS = 4
# A coefficient that the newest steps say nothing of (as that of sequences, if it is always 8 that decode) stays near
# its last value. Share of what the steps themselves say.
_INERTIA = 0.01
# The share of a bounded step's predicted time that 95 % of such steps stay below, its range, and how fast it follows.
_SAFE_SHARE = 0.95
_MIN_EXCESS, _MAX_EXCESS = 0.7, 2.0
_EXCESS_STEP = 0.02
# Chunks grow so many times beyond the largest that was measured.
_MAX_GROWTH = 2

_NUM_FEATURES = 5
# Places of a symmetric matrix of the features and the seconds, that of (i, j) and (j, i) once.
_PAIRS = tuple(combinations_with_replacement(range(_NUM_FEATURES + 1), 2))
_PLACES = {pair: place for place, (i, j) in enumerate(_PAIRS) for pair in ((i, j), (j, i))}


class MeasuredSteps:
    """The steps of one replica so far. Written by the engine thread alone."""

    def __init__(self) -> None:
        # By kind of step, weighted sums of products of (1, prompt tokens, their pairs, sequences, KV tokens, seconds).
        # A step is divided by its seconds first: of short and long ones the same share of their time is explained, and
        # one that took far longer than others like it, because the machine did something else, weighs nothing.
        self._moments = [[0.0] * len(_PAIRS) for _ in range(3)]
        self._coefficients: tuple[float, ...] = (0.0,) * _NUM_FEATURES
        self._num_steps = 0
        self._most_prompt_tokens = 0
        # Time of the newest steps, in those predicted, less 1.
        self._change = 0.0
        # Time of a step with prompts and decodes, in those predicted: 95 % are below.
        self._excess = 1.0
        self._told: StepTimes | None = None

    def add(self, shape: StepShape, seconds: float) -> None:
        """A step of this shape took so long; anything but a positive time is ignored."""
        if not seconds > 0 or shape.is_empty:
            return
        if self._num_steps >= _MIN_STEPS:
            self._compare(shape, seconds / max(self.step_s(shape), 1e-9))
        kind = 0 if not shape.num_decoding else 1 if not shape.num_prompt_tokens else 2
        keep = 1 - 1 / _MEMORY_STEPS
        self._moments[kind] = [
            keep * m + product for m, product in zip(self._moments[kind], _products(shape, seconds), strict=True)
        ]
        self._most_prompt_tokens = max(self._most_prompt_tokens, shape.num_prompt_tokens)
        self._num_steps += 1
        if self._num_steps < _FIT_EVERY or self._num_steps % _FIT_EVERY == 0:
            self._fit()

    def step_s(self, shape: StepShape) -> float:
        """The predicted time of a step; 0 before the first one."""
        base_s, prompt_token_s, pair_s, sequence_s, kv_token_s = self._coefficients
        return (
            base_s
            + prompt_token_s * shape.num_prompt_tokens
            + pair_s * shape.num_prompt_pairs
            + sequence_s * shape.num_decoding
            + kv_token_s * shape.num_kv_tokens
        )

    def fitting_tokens(self, limit_s: float, beside: StepShape, start: int) -> int:
        """How many tokens of a prompt, from position ``start`` on, a step may compute beside that and most likely stay
        below ``limit_s``; negative if it does not even without."""
        rest_s = limit_s / self._excess - self.step_s(beside)
        _, prompt_token_s, pair_s, _, _ = self._coefficients
        # Token i of them is computed with start + i others: a * n + b * n^2 = rest.
        a, b = prompt_token_s + pair_s * (start + 0.5), pair_s / 2
        most = _MAX_GROWTH * self._most_prompt_tokens
        if rest_s <= 0:
            return -1
        if a <= 0:
            return most
        fitting = 2 * rest_s / (a + math.sqrt(a * a + 4 * b * rest_s))
        return int(min(fitting, most))

    @property
    def told(self) -> StepTimes | None:
        """The line for others; None until some steps were measured. What the KV before a prompt token costs is in
        ``prompt_token_s``, as much as the newest prompts had of it."""
        return self._told

    def _compare(self, shape: StepShape, excess: float) -> None:
        """``excess``: time of a step in that predicted."""
        if shape.num_prompt_tokens and shape.num_decoding:
            # One step's part in a quantile: as many move it up as down when it is where it should be.
            step = _SAFE_SHARE if excess > self._excess else _SAFE_SHARE - 1
            self._excess = min(_MAX_EXCESS, max(_MIN_EXCESS, self._excess + step * _EXCESS_STEP))
        self._change += (min(2.0, max(0.5, excess)) - 1 - self._change) / _NEWEST_STEPS
        if abs(self._change) > _CHANGED_SHARE:
            # The last moment is the weight of all steps of a kind.
            keep = 1 - 1 / _NEWEST_STEPS
            self._moments = [[m * keep for m in ms] if ms[-1] > _KEPT_STEPS else ms for ms in self._moments]

    def _fit(self) -> None:
        moments = [sum(parts) for parts in zip(*self._moments, strict=True)]
        products = [[moments[_PLACES[i, j]] for j in range(_NUM_FEATURES)] for i in range(_NUM_FEATURES)]
        values = [moments[_PLACES[i, _NUM_FEATURES]] for i in range(_NUM_FEATURES)]
        for i, coefficient in enumerate(self._coefficients):
            inertia = _INERTIA * products[i][i]
            products[i][i] += inertia
            values[i] += inertia * coefficient
        self._coefficients = not_negative(products, values)
        if self._num_steps >= _MIN_STEPS:
            base_s, prompt_token_s, pair_s, sequence_s, kv_token_s = self._coefficients
            _, num_tokens, num_pairs, _, _ = products[1]
            if num_tokens > 0:
                prompt_token_s += pair_s * num_pairs / num_tokens
            self._told = StepTimes(base_s, prompt_token_s, sequence_s, kv_token_s)


def _products(shape: StepShape, seconds: float) -> tuple[float, ...]:
    """Of `_PAIRS`, written out: it is done in each step."""
    a, b, c = 1 / seconds, shape.num_prompt_tokens / seconds, shape.num_prompt_pairs / seconds
    d, e = shape.num_decoding / seconds, shape.num_kv_tokens / seconds
    return (
        a * a, a * b, a * c, a * d, a * e, a, b * b, b * c, b * d, b * e, b,
        c * c, c * d, c * e, c, d * d, d * e, d, e * e, e, 1.0,
    )  # fmt: skip


def not_negative(products: Sequence[Sequence[float]], values: Sequence[float]) -> tuple[float, ...]:
    """Least squares from the normal equations with no coefficient below 0: the most negative one is left out, until
    none is. One whose row is empty is 0."""
    found = [0.0] * len(values)
    # In units in which the diagonal is 1: the features differ by six orders of magnitude.
    scale = [row[i] ** -0.5 if row[i] > 0 else 0.0 for i, row in enumerate(products)]
    kept = [i for i, unit in enumerate(scale) if unit]
    while kept:
        solved = _solved(
            [[products[i][j] * scale[i] * scale[j] for j in kept] for i in kept], [values[i] * scale[i] for i in kept]
        )
        least = min(solved)
        if least >= 0:
            for i, value in zip(kept, solved, strict=True):
                found[i] = value * scale[i]
            break
        del kept[solved.index(least)]
    return tuple(found)


def _solved(matrix: list[list[float]], values: list[float]) -> list[float]:
    """The solution of a symmetric positive definite system, by elimination without pivoting: the inertia keeps pivots
    away from 0."""
    size = len(values)
    rows = [[*row, value] for row, value in zip(matrix, values, strict=True)]
    for i, pivot in enumerate(rows):
        for other in rows[i + 1 :]:
            factor = other[i] / pivot[i]
            for j in range(i, size + 1):
                other[j] -= factor * pivot[j]
    for i in reversed(range(size)):
        rest = sum(rows[i][j] * rows[j][size] for j in range(i + 1, size))
        rows[i][size] = (rows[i][size] - rest) / rows[i][i]
    return [row[size] for row in rows]
