"""From the steps that nodes recorded to points and a line: what a step costs alone, and what other nodes of its host
add to it. Pure."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from statistics import fmean, median
from typing import NamedTuple

from engine.step import StepShape
from planner.fitted import NO_SHARING, Line, Point, Sharing, fitted

# KV tokens of one cell differ by less than a fifth.
_KV_CELLS = 4.0
# A step counts as beside a whole number of nodes if it is so near to it.
_NEAR = 0.15
_MIN_SHARED = 8
# Cells of steps with no other node beside them from which the fit begins; else from all.
_MIN_ALONE = 6
# What took so many times the median of its like was interrupted.
_INTERRUPTED = 2.5
# The line makes the factors, and these the line.
_ROUNDS = 3


class RecordedStep(NamedTuple):
    """``turn_s``: from the end of the step before it, or from when work came, to its end."""

    node: str
    # Nodes of one host have one clock.
    host: str
    shape: StepShape
    ended_s: float
    turn_s: float


class Found(NamedTuple):
    line: Line
    points: tuple[Point, ...]
    sharing: Sharing


class _Busy:
    """When a node computed."""

    def __init__(self, steps: Iterable[RecordedStep]) -> None:
        spans = sorted((step.ended_s - step.turn_s, step.turn_s) for step in steps)
        self._began_s = [began_s for began_s, _ in spans]
        self._lengths_s = [length_s for _, length_s in spans]
        self._before_s = [0.0, *accumulate(self._lengths_s)]

    def until(self, at_s: float) -> float:
        """How long, until then."""
        index = bisect_right(self._began_s, at_s) - 1
        if index < 0:
            return 0.0
        return self._before_s[index] + min(self._lengths_s[index], at_s - self._began_s[index])


def nodes_beside(steps: Sequence[RecordedStep]) -> list[float]:
    """How many other nodes of its host computed during each step, on average."""
    by_node: dict[tuple[str, str], list[RecordedStep]] = {}
    for step in steps:
        by_node.setdefault((step.host, step.node), []).append(step)
    busy = {name: _Busy(of) for name, of in by_node.items()}
    found = []
    for step in steps:
        others = [each for (host, node), each in busy.items() if host == step.host and node != step.node]
        began_s = step.ended_s - step.turn_s
        shared_s = sum(each.until(step.ended_s) - each.until(began_s) for each in others)
        found.append(shared_s / step.turn_s if step.turn_s > 0 else 0.0)
    return found


def found_in(steps: Sequence[RecordedStep], known: Sequence[Point] = ()) -> Found:
    """``known``: points of other measurements, which count as well. Raises BadConfig if there are too few."""
    steps = [step for step in steps if step.turn_s > 0 and not step.shape.is_empty]
    beside = nodes_beside(steps)
    alone = [step for step, num_beside in zip(steps, beside, strict=True) if num_beside <= _NEAR]
    points = _points(alone, [0.0] * len(alone), NO_SHARING)
    if len(points) < _MIN_ALONE:
        points = _points(steps, beside, NO_SHARING)
    line, sharing = fitted((*points, *known)), NO_SHARING
    for _ in range(_ROUNDS):
        sharing = _sharing(steps, beside, line)
        points = (*_points(steps, beside, sharing), *known)
        line = fitted(points)
    return Found(line, points, sharing)


def _points(steps: Sequence[RecordedStep], beside: Sequence[float], sharing: Sharing) -> tuple[Point, ...]:
    """One for each cell of steps that are alike, as long as they would take alone."""
    cells: dict[tuple[int, ...], list[tuple[StepShape, float]]] = {}
    for step, num_beside in zip(steps, beside, strict=True):
        shape = step.shape
        kv_cell = round(_KV_CELLS * math.log2(shape.num_kv_tokens)) if shape.num_kv_tokens else 0
        key = (shape.num_prompt_tokens, shape.num_prompt_pairs, shape.num_decoding, kv_cell)
        cells.setdefault(key, []).append((shape, step.turn_s / sharing.factor(shape, num_beside)))
    return tuple(_point(cells[key]) for key in sorted(cells))


def _point(cell: Sequence[tuple[StepShape, float]]) -> Point:
    shape = cell[0][0]._replace(num_kv_tokens=round(fmean(shape.num_kv_tokens for shape, _ in cell)))
    return Point(shape, steady([seconds for _, seconds in cell]), len(cell))


def steady(values: Sequence[float]) -> float:
    """The mean of those that were not interrupted: what a sequence waits for is the mean of its steps, not their
    median."""
    limit = _INTERRUPTED * median(values)
    return fmean(value for value in values if value <= limit)


def _sharing(steps: Sequence[RecordedStep], beside: Sequence[float], line: Line) -> Sharing:
    by_kind: dict[tuple[bool, int], list[float]] = {}
    for step, num_beside in zip(steps, beside, strict=True):
        count = round(num_beside)
        if count and abs(num_beside - count) <= _NEAR:
            ratio = step.turn_s / line.step_s(step.shape)
            by_kind.setdefault((step.shape.num_prompt_tokens > 0, count), []).append(ratio)
    return Sharing(_factors(by_kind, is_prompt=True), _factors(by_kind, is_prompt=False))


def _factors(by_kind: dict[tuple[bool, int], list[float]], *, is_prompt: bool) -> tuple[float, ...]:
    """Each is at least that beside fewer nodes."""
    factors: list[float] = []
    while len(ratios := by_kind.get((is_prompt, len(factors) + 1), [])) >= _MIN_SHARED:
        factors.append(max(steady(ratios), factors[-1] if factors else 1.0))
    return tuple(factors)
