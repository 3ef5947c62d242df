"""Profiles: what steps and transfers of a running node took, a line through the steps, and a file of both. Pure.

`baton profile` measures and writes one; the planner reads it as Times.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from statistics import median
from typing import Any

from baton.errors import BadConfig, quoted
from engine.step import StepShape
from engine.step_times import not_negative

FORMAT = 1
_MIN_POINTS = 3
_NUM_FEATURES = 5


@dataclass(frozen=True, slots=True)
class Point:
    """A step of this shape took so long, by the median of its repeats."""

    shape: StepShape
    seconds: float


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


@dataclass(frozen=True, slots=True)
class Transfers:
    """KV from node to node: seconds before the first byte, and bytes a second."""

    latency_s: float
    bytes_s: float


@dataclass(frozen=True, slots=True)
class Measured:
    """One node's profile."""

    model: str
    device: str
    software_version: str
    line: Line
    points: tuple[Point, ...]
    # None: no KV was moved.
    transfers: Transfers | None = None

    @property
    def errors(self) -> list[float]:
        """Of each point: predicted by measured, less 1."""
        return [self.line.step_s(point.shape) / point.seconds - 1 for point in self.points]

    @property
    def median_error(self) -> float:
        return median(map(abs, self.errors))

    @property
    def worst_error(self) -> float:
        return max(self.errors, key=abs)


def fitted(points: Sequence[Point]) -> Line:
    """The line with the least squares of relative errors and no coefficient below 0. Raises BadConfig: too few."""
    if len(points) < _MIN_POINTS or any(not (point.seconds > 0 and isfinite(point.seconds)) for point in points):
        raise BadConfig(
            f"{len(points)} measured steps, expected at least {_MIN_POINTS}, each with a time above 0", param="profile"
        )
    rows = [[feature / point.seconds for feature in (1, *point.shape)] for point in points]
    products = [[sum(row[i] * row[j] for row in rows) for j in range(_NUM_FEATURES)] for i in range(_NUM_FEATURES)]
    for i, row in enumerate(products):
        # Features that always go together, as sequences and their KV in a few points, are told apart by this alone.
        row[i] *= 1 + 1e-9
    return Line(*not_negative(products, [sum(row[i] for row in rows) for i in range(_NUM_FEATURES)]))


def fitted_transfers(moved: Sequence[tuple[float, float]]) -> Transfers | None:
    """Of (bytes, seconds). One size alone says nothing of the latency: it is 0 then."""
    found = [(num_bytes, seconds) for num_bytes, seconds in moved if num_bytes > 0 and seconds > 0]
    if not found:
        return None
    rows = [(1 / seconds, num_bytes / seconds) for num_bytes, seconds in found]
    products = [[sum(row[i] * row[j] for row in rows) for j in range(2)] for i in range(2)]
    for i in range(2):
        products[i][i] *= 1 + 1e-9
    latency_s, byte_s = not_negative(products, [sum(row[i] for row in rows) for i in range(2)])
    if len({num_bytes for num_bytes, _ in found}) == 1 or not byte_s:
        latency_s, byte_s = 0.0, median(seconds / num_bytes for num_bytes, seconds in found)
    return Transfers(latency_s, 1 / byte_s)


class FittedTimes:
    """Times of steps by a profile. Warns of steps larger than any that was measured."""

    def __init__(self, measured: Measured) -> None:
        self._measured = measured
        self._most = StepShape(*(max(values) for values in zip(*(p.shape for p in measured.points), strict=True)))
        self._asked = self._most

    @property
    def source(self) -> str:
        of = self._measured
        return f"profile of {of.model} on {of.device}, {len(of.points)} steps within {of.median_error:.1%} (median)"

    def step_s(self, shape: StepShape) -> float:
        if any(asked > most for asked, most in zip(shape, self._asked, strict=True)):
            self._asked = StepShape(*map(max, shape, self._asked))
        return self._measured.line.step_s(shape)

    @property
    def warnings(self) -> tuple[str, ...]:
        return tuple(
            f"the profile of {self._measured.model} is extrapolated: {name} of a step up to {asked:,}, measured are "
            f"{most:,}"
            for name, asked, most in zip(
                ("prompt tokens", "pairs", "sequences", "KV tokens"), self._asked, self._most, strict=True
            )
            if asked > most
        )


def write(path: Path, measured: Measured) -> None:
    """Raises BadConfig if the file cannot be written."""
    as_dict = {
        "format": FORMAT,
        **asdict(measured),
        "points": [{**point.shape._asdict(), "seconds": point.seconds} for point in measured.points],
        "median_error": measured.median_error,
        "worst_error": measured.worst_error,
    }
    try:
        path.write_text(json.dumps(as_dict, indent=2) + "\n")
    except OSError as error:
        raise BadConfig(f"the profile {quoted(str(path))} cannot be written: {error}", param="profile") from error


def read(path: Path) -> Measured:
    """Raises BadConfig."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BadConfig(f"the profile {quoted(str(path))} cannot be read: {error}", param="profile") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise BadConfig(
            f"{quoted(str(path))} is no profile of format {FORMAT}; write one with `baton profile`", param="profile"
        )
    try:
        return _measured(found)
    except (KeyError, TypeError, ValueError) as error:
        raise BadConfig(
            f"the profile {quoted(str(path))} is damaged: {quoted(str(error))}; write it anew with `baton profile`",
            param="profile",
        ) from error


def _measured(found: dict[str, Any]) -> Measured:
    points = tuple(
        Point(StepShape(*(int(point[name]) for name in StepShape._fields)), _number(point["seconds"], 1e-12))
        for point in found["points"]
    )
    if not points:
        raise ValueError("no points")
    moved = found["transfers"]
    return Measured(
        model=str(found["model"]),
        device=str(found["device"]),
        software_version=str(found["software_version"]),
        line=Line(**{name: _number(value, 0) for name, value in found["line"].items()}),
        points=points,
        transfers=None
        if moved is None
        else Transfers(_number(moved["latency_s"], 0), _number(moved["bytes_s"], 1e-12)),
    )


def _number(value: Any, least: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < float("inf"):
        raise ValueError(f"{value!r} is no number from {least:g} on")
    return float(value)
