"""A profile: what one node of a running cluster is and costs, and the file that holds it.

`baton profile` measures and writes one; the planner reads it instead of a machine and a model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from baton.errors import BadConfig, BatonError, quoted
from baton.types import DTYPE_BYTES, KvLayout
from engine.step import StepShape
from planner.fitted import (
    FREE_REQUESTS,
    NO_PACE,
    NO_SHARING,
    NO_WAKE,
    FittedTimes,
    Line,
    Pace,
    Point,
    RequestTimes,
    Sharing,
    Transfers,
    Wake,
)
from planner.machines import Machine
from planner.models import Model
from planner.overhead import NO_OVERHEAD, LoopTimes, Overhead
from planner.sim.config import SimulationConfig

FORMAT = 4
# What designs call the machine of a profile.
MACHINE = "measured"
# No KV was moved: as if it took no time.
_FREE = Transfers(0.0, 1e15)


@dataclass(frozen=True, slots=True)
class Power:
    """Of a node, in watts."""

    idle_w: float
    busy_w: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One kind of node with one model."""

    model: str
    device: str
    software_version: str
    kv_layout: KvLayout
    line: Line
    points: tuple[Point, ...]
    wake: Wake = NO_WAKE
    pace: Pace = NO_PACE
    sharing: Sharing = NO_SHARING
    # None: no KV was moved.
    transfers: Transfers | None = None
    # The least size that was sent layer by layer; None: none was.
    layerwise_from_bytes: int | None = None
    requests: RequestTimes = FREE_REQUESTS
    overhead: Overhead = NO_OVERHEAD
    # Processors of the host that other work took meanwhile: then it is a profile of a busy machine.
    other_cores: float = 0.0
    # None: no counter of energy was there.
    power: Power | None = None

    @property
    def errors(self) -> list[float]:
        """Of each point: predicted by measured, less 1."""
        return [self.line.error(point) for point in self.points]

    @property
    def median_error(self) -> float:
        return median(map(abs, self.errors))

    @property
    def worst_error(self) -> float:
        return max(self.errors, key=abs)

    def times(self) -> FittedTimes:
        return FittedTimes(f"{self.model} on {self.device}", self.line, self.points, self.pace)

    def as_model(self) -> Model:
        """Its KV alone: what the weights take is not in the KV cache that was measured."""
        layout = self.kv_layout
        return Model(
            name=self.model, num_layers=layout.num_layers, hidden_size=layout.num_kv_heads * layout.head_dim,
            num_heads=layout.num_kv_heads, num_kv_heads=layout.num_kv_heads, head_dim=layout.head_dim,
            num_parameters=0.0, num_active_parameters=0.0, bytes_per_kv_value=DTYPE_BYTES[layout.dtype],
        )  # fmt: skip

    def as_machine(self) -> Machine:
        """Its memory is the KV cache; what a profile does not have is 0."""
        transfers, power = self.transfers or _FREE, self.power or Power(0.0, 0.0)
        # Half a block more: the number of blocks is rounded down.
        layout = replace(self.kv_layout, num_blocks=1)
        return Machine(
            name=MACHINE, num_gpus=1, memory_bytes=(self.kv_layout.num_blocks + 0.5) * layout.total_bytes,
            peak_flops=0.0, memory_bytes_s=0.0, power_w=power.busy_w, idle_power_w=power.idle_w, dollars_per_hour=0.0,
            link_bytes_s=transfers.bytes_s, link_latency_s=transfers.latency_s, power_units=0.0,
        )  # fmt: skip

    def configured(self, config: SimulationConfig) -> SimulationConfig:
        """A cluster of such nodes, which have served before."""
        return replace(
            config, memory_share=1.0, commit_s=self.requests.join_s, message_s=self.requests.message_s,
            request_s=self.requests.fixed_s, wake=self.wake, sharing=self.sharing, overhead=self.overhead,
            seen_steps=tuple((point.shape, point.seconds * self.pace.of(point.shape)) for point in self.points),
            scheduler=replace(config.scheduler, block_tokens=self.kv_layout.block_tokens),
        )  # fmt: skip


def as_json(measured: Measured) -> dict[str, Any]:
    """With the error of each point."""
    return {
        "format": FORMAT,
        **asdict(measured),
        "points": [
            {**point.shape._asdict(), "seconds": point.seconds, "count": point.count, "error": error}
            for point, error in zip(measured.points, measured.errors, strict=True)
        ],
        "median_error": measured.median_error,
        "worst_error": measured.worst_error,
    }


def write(path: Path, measured: Measured) -> None:
    """Raises BadConfig if the file cannot be written."""
    try:
        path.write_text(json.dumps(as_json(measured), indent=1) + "\n")
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
    except (KeyError, TypeError, ValueError, AttributeError, BatonError) as error:
        raise BadConfig(
            f"the profile {quoted(str(path))} is damaged: {quoted(str(error))}; write it anew with `baton profile`",
            param="profile",
        ) from error


def _measured(found: Mapping[str, Any]) -> Measured:
    points = tuple(
        Point(
            StepShape(*(int(_number(point[name], 0)) for name in StepShape._fields)),
            _number(point["seconds"], 1e-12),
            int(_number(point["count"], 1)),
        )
        for point in found["points"]
    )
    if not points:
        raise ValueError("no points")
    moved, power, least = found["transfers"], found["power"], found["layerwise_from_bytes"]
    sharing = {kind: tuple(_number(factor, 1) for factor in factors) for kind, factors in found["sharing"].items()}
    return Measured(
        model=str(found["model"]),
        device=str(found["device"]),
        software_version=str(found["software_version"]),
        kv_layout=_layout(found["kv_layout"]),
        line=Line(**_numbers(found["line"])),
        points=points,
        wake=Wake(**_numbers(found["wake"])),
        pace=Pace(**{kind: _number(factor, 1e-12) for kind, factor in found["pace"].items()}),
        sharing=Sharing(**sharing),
        transfers=None
        if moved is None
        else Transfers(_number(moved["latency_s"], 0), _number(moved["bytes_s"], 1e-12)),
        layerwise_from_bytes=None if least is None else int(_number(least, 0)),
        requests=RequestTimes(**_numbers(found["requests"])),
        overhead=_overhead(found["overhead"]),
        other_cores=_number(found["other_cores"], 0),
        power=None if power is None else Power(**_numbers(power)),
    )


def _overhead(found: Mapping[str, Any]) -> Overhead:
    router, client = (LoopTimes(**_numbers(found[name])) for name in ("router", "client"))
    numbers = {name: value for name, value in found.items() if name not in ("router", "client")}
    return Overhead(router=router, client=client, **_numbers(numbers))


def _layout(found: Mapping[str, Any]) -> KvLayout:
    counts = {name: int(_number(value, 1)) for name, value in found.items() if name != "dtype"}
    return KvLayout(**counts, dtype=str(found["dtype"]))


def _numbers(found: Mapping[str, Any]) -> dict[str, float]:
    return {name: _number(value, 0) for name, value in found.items()}


def _number(value: Any, least: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < float("inf"):
        raise ValueError(f"{value!r} is no number from {least:g} on")
    return float(value)
