"""What steps, transfers and requests of a running cluster cost, fitted to what was measured. Pure.

`planner/steps.py` makes points of recorded steps; `planner/measured.py` is the file that `baton profile` writes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from statistics import median

from baton.errors import BadConfig
from engine.step import StepShape
from engine.step_times import not_negative

_MIN_POINTS = 3
_NUM_FEATURES = 5
# A point that is further off than so many times the median, and than this share, is left out of the fit: the machine
# did something else meanwhile. Its error is told all the same.
_FAR_MEDIANS, _FAR_SHARE = 6.0, 0.25
_MAX_WEIGHT = 16
# Keeps features that always go together, as sequences and their KV in a few points, apart.
_RIDGE = 1 + 1e-9


@dataclass(frozen=True, slots=True)
class Point:
    """A step of this shape took so long on a host with no other work, by the mean of so many."""

    shape: StepShape
    seconds: float
    count: int = 1


@dataclass(frozen=True, slots=True)
class Line:
    """Seconds of a step, of each prompt token, (query, key) pair, sequence that decodes and token of its KV."""

    base_s: float
    prompt_token_s: float
    pair_s: float
    sequence_s: float
    kv_token_s: float

    def step_s(self, shape: StepShape) -> float:
        if shape.is_empty:
            return 0.0
        return (
            self.base_s
            + self.prompt_token_s * shape.num_prompt_tokens
            + self.pair_s * shape.num_prompt_pairs
            + self.sequence_s * shape.num_decoding
            + self.kv_token_s * shape.num_kv_tokens
        )

    def error(self, point: Point) -> float:
        """Predicted by measured, less 1."""
        return self.step_s(point.shape) / point.seconds - 1


@dataclass(frozen=True, slots=True)
class Sharing:
    """How many times as long a step takes while other nodes of its host compute as well: element i beside i + 1 of
    them. Beyond those that were measured, as beside the most."""

    prompt: tuple[float, ...] = ()
    decode: tuple[float, ...] = ()

    def __bool__(self) -> bool:
        return any(factor != 1 for factor in (*self.prompt, *self.decode))

    def num_known(self, shape: StepShape) -> int:
        """Beside so many it was measured."""
        return len(self.prompt if shape.num_prompt_tokens else self.decode)

    def factor(self, shape: StepShape, num_beside: float) -> float:
        """Between two numbers of nodes, which are there for a part of the time, on a straight line."""
        known = (1.0, *(self.prompt if shape.num_prompt_tokens else self.decode))
        below = int(num_beside)
        if below >= len(known) - 1:
            return known[-1]
        return known[below] + (known[below + 1] - known[below]) * (num_beside - below)


NO_SHARING = Sharing()


@dataclass(frozen=True, slots=True)
class Wake:
    """What the first step of an engine that had nothing to do takes more: its thread wakes up, caches are cold."""

    prompt_s: float = 0.0
    decode_s: float = 0.0

    def of(self, shape: StepShape) -> float:
        return self.prompt_s if shape.num_prompt_tokens else self.decode_s


NO_WAKE = Wake()


@dataclass(frozen=True, slots=True)
class Pace:
    """How many times as long steps took, all together, as by the line. That is of steps which nothing interrupted;
    other threads and processes do interrupt them, and what a stream waits for is the mean."""

    prompt: float = 1.0
    decode: float = 1.0

    def of(self, shape: StepShape) -> float:
        return self.prompt if shape.num_prompt_tokens else self.decode


NO_PACE = Pace()


@dataclass(frozen=True, slots=True)
class Transfers:
    """KV from node to node: seconds before the first byte, and bytes a second."""

    latency_s: float
    bytes_s: float

    def seconds(self, num_bytes: float) -> float:
        return self.latency_s + num_bytes / self.bytes_s


@dataclass(frozen=True, slots=True)
class RequestTimes:
    """What a request takes beside its steps and its transfer."""

    # From its client to the router's queue and back: connection, parsing, tokenizer, the first chunk of the answer.
    fixed_s: float = 0.0
    # A message between router and node, one way, with the turns of both event loops.
    message_s: float = 0.0
    # Of a hand-over, beside its transfer and the first step after it: commit, acknowledgement, the turns of both loops.
    join_s: float = 0.0


FREE_REQUESTS = RequestTimes()


def fitted(points: Sequence[Point]) -> Line:
    """The line with the least squares of relative errors and no coefficient below 0. Raises BadConfig: too few."""
    if len(points) < _MIN_POINTS or any(not (point.seconds > 0 and isfinite(point.seconds)) for point in points):
        raise BadConfig(
            f"{len(points)} measured steps, expected at least {_MIN_POINTS}, each with a time above 0", param="profile"
        )
    first = _least_squares(points)
    errors = [abs(first.error(point)) for point in points]
    far = max(_FAR_SHARE, _FAR_MEDIANS * median(errors))
    near = [point for point, error in zip(points, errors, strict=True) if error <= far]
    return first if len(near) == len(points) or len(near) < _MIN_POINTS else _least_squares(near)


def _least_squares(points: Sequence[Point]) -> Line:
    """Points of many steps count for more, up to a limit: noise is not all that they are off by."""
    weights = [math.sqrt(min(point.count, _MAX_WEIGHT)) for point in points]
    rows = [
        [weight * feature / point.seconds for feature in (1, *point.shape)]
        for point, weight in zip(points, weights, strict=True)
    ]
    products = [[sum(row[i] * row[j] for row in rows) for j in range(_NUM_FEATURES)] for i in range(_NUM_FEATURES)]
    for i, row in enumerate(products):
        row[i] *= _RIDGE
    values = [sum(row[i] * weight for row, weight in zip(rows, weights, strict=True)) for i in range(_NUM_FEATURES)]
    return Line(*not_negative(products, values))


def fitted_transfers(moved: Sequence[tuple[float, float]]) -> Transfers | None:
    """Of (bytes, seconds). Sizes that hardly differ say nothing of the latency: it is 0 then."""
    by_size: dict[float, list[float]] = {}
    for num_bytes, seconds in moved:
        if num_bytes > 0 and seconds > 0:
            by_size.setdefault(num_bytes, []).append(seconds)
    if not by_size:
        return None
    found = [(num_bytes, median(seconds)) for num_bytes, seconds in by_size.items()]
    rows = [(1 / seconds, num_bytes / seconds) for num_bytes, seconds in found]
    products = [[sum(row[i] * row[j] for row in rows) for j in range(2)] for i in range(2)]
    for i in range(2):
        products[i][i] *= _RIDGE
    latency_s, byte_s = not_negative(products, [sum(row[i] for row in rows) for i in range(2)])
    if len(found) == 1 or not byte_s:
        latency_s, byte_s = 0.0, median(seconds / num_bytes for num_bytes, seconds in found)
    return Transfers(latency_s, 1 / byte_s)


class FittedTimes:
    """Times of steps by a line and a pace. Warns of steps larger than any that was measured."""

    def __init__(self, name: str, line: Line, points: Sequence[Point], pace: Pace = NO_PACE) -> None:
        self._name = name
        self._line = line
        self._pace = pace
        self._median_error = median(abs(line.error(point)) for point in points)
        self._num_points = len(points)
        self._most = StepShape(*(max(values) for values in zip(*(p.shape for p in points), strict=True)))
        self._asked = self._most

    @property
    def source(self) -> str:
        return f"profile of {self._name}, {self._num_points} steps within {self._median_error:.1%} (median)"

    def step_s(self, shape: StepShape) -> float:
        if any(asked > most for asked, most in zip(shape, self._asked, strict=True)):
            self._asked = StepShape(*map(max, shape, self._asked))
        return self._line.step_s(shape) * self._pace.of(shape)

    @property
    def warnings(self) -> tuple[str, ...]:
        return tuple(
            f"the profile of {self._name} is extrapolated: {name} of a step up to {asked:,}, measured are {most:,}"
            for name, asked, most in zip(
                ("prompt tokens", "pairs", "sequences", "KV tokens"), self._asked, self._most, strict=True
            )
            if asked > most
        )
