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
from planner.fitted import NO_PACE, NO_SHARING, NO_WAKE, Line, Pace, Point, Sharing, Wake, fitted

# KV tokens of one cell differ by less than a fifth.
_KV_CELLS = 4.0
# A step counts as beside a whole number of nodes if it is so near to it.
_NEAR = 0.15
_MIN_SHARED = 8
# Cells of steps with no other node beside them from which the fit begins; else from all.
_MIN_ALONE = 6
# Steps in a row begin where the one before ends, but for rounding.
_PAUSE_S = 1e-5
_MIN_WOKEN = 4
# What took so many times the median of its like was interrupted.
_INTERRUPTED = 2.5
# The line makes the factors, and these the line.
_ROUNDS = 6


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
    wake: Wake
    sharing: Sharing
    pace: Pace = NO_PACE


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


class _Row(NamedTuple):
    """A step, and what it ran under."""

    shape: StepShape
    turn_s: float
    num_beside: float
    # Nothing ran before it on its node.
    is_woken: bool


def _rows(steps: Sequence[RecordedStep]) -> list[_Row]:
    rows = []
    before_s: dict[tuple[str, str], float] = {}
    ordered = sorted(steps, key=lambda step: step.ended_s)
    for step, num_beside in zip(ordered, nodes_beside(ordered), strict=True):
        name = (step.host, step.node)
        is_woken = step.ended_s - step.turn_s > before_s.get(name, -math.inf) + _PAUSE_S
        before_s[name] = step.ended_s
        rows.append(_Row(step.shape, step.turn_s, num_beside, is_woken))
    return rows


def found_in(steps: Sequence[RecordedStep], known: Sequence[Point] = ()) -> Found:
    """``known``: points of other measurements, which count as well. Raises BadConfig if there are too few."""
    rows = _rows([step for step in steps if step.turn_s > 0 and not step.shape.is_empty])
    alone = [row for row in rows if row.num_beside <= _NEAR]
    in_line = [row for row in alone if not row.is_woken]
    wake, sharing = NO_WAKE, NO_SHARING
    points: tuple[Point, ...] = ()
    for part in (in_line, alone, rows):
        if len(points) < _MIN_ALONE:
            points = _points(part, wake, sharing)
    line = fitted((*points, *known))
    for _ in range(_ROUNDS):
        wake = Wake(*(_wake(rows, line, sharing, is_prompt=is_prompt) for is_prompt in (True, False)))
        sharing = _sharing(rows, line, wake)
        points = (*_points(rows, wake, sharing), *known)
        line = fitted(points)
    return _paced(Found(line, points, wake, sharing), rows)


def paced(found: Found, steps: Sequence[RecordedStep]) -> Found:
    """With the pace of these steps; as before where they are too few."""
    return _paced(found, _rows(steps))


def predicted_s(found: Found, steps: Sequence[RecordedStep]) -> list[tuple[float, float]]:
    """Of each step: the time that it is said to take, and what it took."""
    return [(_said_s(found, row), row.turn_s) for row in _rows(steps)]


def _said_s(found: Found, row: _Row) -> float:
    alone_s = found.line.step_s(row.shape) * found.pace.of(row.shape)
    woken_s = found.wake.of(row.shape) if row.is_woken else 0.0
    return (alone_s + woken_s) * found.sharing.factor(row.shape, row.num_beside)


def _paced(found: Found, rows: Sequence[_Row]) -> Found:
    calm, before = found._replace(pace=NO_PACE), found.pace
    prompt = _pace(calm, rows, before.prompt, is_prompt=True)
    return calm._replace(pace=Pace(prompt, _pace(calm, rows, before.decode, is_prompt=False)))


def _pace(found: Found, rows: Sequence[_Row], before: float, *, is_prompt: bool) -> float:
    """Of all that such steps took: a single one that was interrupted says nothing, and how often they are does."""
    of_kind = [row for row in rows if (row.shape.num_prompt_tokens > 0) is is_prompt]
    said_s = sum(_said_s(found, row) for row in of_kind)
    return sum(row.turn_s for row in of_kind) / said_s if len(of_kind) >= _MIN_SHARED and said_s > 0 else before


def _wake(rows: Sequence[_Row], line: Line, sharing: Sharing, *, is_prompt: bool) -> float:
    more_s = [
        row.turn_s / sharing.factor(row.shape, row.num_beside) - line.step_s(row.shape)
        for row in rows
        if row.is_woken and (row.shape.num_prompt_tokens > 0) is is_prompt
    ]
    return max(0.0, median(more_s)) if len(more_s) >= _MIN_WOKEN else 0.0


def _points(rows: Sequence[_Row], wake: Wake, sharing: Sharing) -> tuple[Point, ...]:
    """One for each cell of steps that are alike, as long as they would take alone and in a row."""
    cells: dict[tuple[int, ...], list[tuple[StepShape, float]]] = {}
    for row in rows:
        shape = row.shape
        kv_cell = round(_KV_CELLS * math.log2(shape.num_kv_tokens)) if shape.num_kv_tokens else 0
        key = (shape.num_prompt_tokens, shape.num_prompt_pairs, shape.num_decoding, kv_cell)
        seconds = row.turn_s / sharing.factor(shape, row.num_beside)
        if row.is_woken:
            # A quick one is no step of no time.
            seconds = max(seconds - wake.of(shape), seconds / 4)
        cells.setdefault(key, []).append((shape, seconds))
    return tuple(_point(cells[key]) for key in sorted(cells))


def _point(cell: Sequence[tuple[StepShape, float]]) -> Point:
    shape = cell[0][0]._replace(num_kv_tokens=round(fmean(shape.num_kv_tokens for shape, _ in cell)))
    return Point(shape, steady([seconds for _, seconds in cell]), len(cell))


def steady(values: Sequence[float]) -> float:
    """The mean of those that were not interrupted: what a sequence waits for is the mean of its steps, not their
    median."""
    limit = _INTERRUPTED * median(values)
    return fmean(value for value in values if value <= limit)


def _sharing(rows: Sequence[_Row], line: Line, wake: Wake) -> Sharing:
    by_kind: dict[tuple[bool, int], list[float]] = {}
    for row in rows:
        count = round(row.num_beside)
        if count and abs(row.num_beside - count) <= _NEAR:
            alone_s = line.step_s(row.shape) + (wake.of(row.shape) if row.is_woken else 0.0)
            # Of others that were there for the whole step.
            ratio = 1 + (row.turn_s / alone_s - 1) * count / row.num_beside
            by_kind.setdefault((row.shape.num_prompt_tokens > 0, count), []).append(
                max(ratio, row.turn_s / alone_s / 2)
            )
    return Sharing(_factors(by_kind, is_prompt=True), _factors(by_kind, is_prompt=False))


def _factors(by_kind: dict[tuple[bool, int], list[float]], *, is_prompt: bool) -> tuple[float, ...]:
    """Each is at least that beside fewer nodes."""
    factors: list[float] = []
    while len(ratios := by_kind.get((is_prompt, len(factors) + 1), [])) >= _MIN_SHARED:
        factors.append(max(steady(ratios), factors[-1] if factors else 1.0))
    return tuple(factors)
