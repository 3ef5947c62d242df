"""Faults on a seeded schedule, for tests of everything above: a transport over another one, faulty at its sending end.

Written as a transport name: ``fake:corrupt=1,seed=7,over=shm``. Keys, all optional:
``over`` the real transport (shm) · ``seed`` · ``corrupt=N`` flip one byte in each of the first N units written ·
``drop=N`` never write the next N units · ``swap=N`` exchange the halves of one run of bytes in each of the next N ·
``tear=N`` zero 2 KiB in each of the next N · ``delay_s=X`` hold every unit up to X seconds · ``reorder=1``
shuffle what is queued together · ``die=N`` break the connection at the Nth unit.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Generic, Self, TypeVar, cast

import numpy as np

from baton.errors import BadConfig, TransferFailed
from baton.types import NodeDescription
from kvtransfer.hashing import ByteArray
from kvtransfer.memory import HostMemory, Send
from kvtransfer.plan import Area, Copy
from kvtransfer.transports.interface import DataPlane, Dial, PlaneSite, Transport
from kvtransfer.writing import Unit, Wire, WriteJob

T = TypeVar("T")
_PARSERS: Mapping[str, Callable[[str], object]] = {"str": str, "int": int, "float": float}


@dataclass(frozen=True, slots=True)
class FaultPlan:
    over: str = "shm"
    seed: int = 0
    corrupt: int = 0
    drop: int = 0
    swap: int = 0
    tear: int = 0
    delay_s: float = 0.0
    reorder: int = 0
    die: int = 0

    @classmethod
    def parse(cls, spec: str) -> Self:
        """Raises BadConfig for an unknown key or a value that is not a number."""
        kind, _, rest = spec.partition(":")
        if kind != "fake":
            raise BadConfig(f"transport {spec!r} is not a fake")
        types: dict[str, Callable[[str], object]] = {f.name: _PARSERS[str(f.type)] for f in fields(cls)}
        values: dict[str, object] = {}
        for item in filter(None, rest.split(",")):
            key, _, value = item.partition("=")
            if key not in types:
                raise BadConfig(f"{spec!r}: unknown key {key!r}, expected some of {', '.join(types)}")
            try:
                values[key] = types[key](value)
            except ValueError as error:
                raise BadConfig(f"{spec!r}: {key} is {value!r}, expected a number") from error
        return cls(**values)  # type: ignore[arg-type]

    def kind(self, number: int) -> str:
        """What is done to the unit of this number, counted from 1; empty for nothing."""
        for name in ("corrupt", "drop", "swap", "tear"):
            number -= getattr(self, name)
            if number <= 0:
                return name
        return ""


_TORN_BYTES = 2 << 10


def _damage(kind: str, run: ByteArray, position: int) -> None:
    match kind:
        case "corrupt":
            run[position % len(run)] ^= 0xFF
        case "swap":
            run[:] = np.roll(run, len(run) // 2)
        case "tear":
            start = position % max(1, len(run) - _TORN_BYTES + 1)
            run[start : start + _TORN_BYTES] = 0


class DamagedJob:
    """Stands in for a job while one unit is written: the first run of bytes is damaged."""

    def __init__(self, job: WriteJob, kind: str, position: int) -> None:
        self._job = job
        self._kind = kind
        self._position = position
        self._is_spent = False
        self.epoch = job.epoch
        self.step_blocks = job.step_blocks
        self.has_digest = job.has_digest
        self.fence = job.fence
        self.hash = job.hash
        self.num_bytes = job.num_bytes

    def send(self, area: Area, send: Send) -> None:
        """What is digested is the source; what is sent is not."""

        def damaged(views: list[memoryview]) -> None:
            if not self._is_spent:
                self._is_spent = True
                run = np.frombuffer(views[0], dtype=np.uint8).copy()
                _damage(self._kind, run, self._position)
                views = [run.data, *views[1:]]
            send(views)

        self._job.send(area, damaged)

    def copy(self, source: HostMemory, target: ByteArray, layer: int, first: int, num_blocks: int) -> None:
        self._job.copy(source, target, layer, first, num_blocks)
        if not self._is_spent:
            self._is_spent = True
            _, dst, size = self._job.copies(layer, first, num_blocks)[0]
            _damage(self._kind, target[dst : dst + size], self._position)

    def copies(self, layer: int, first: int, num_blocks: int) -> list[Copy]:
        """A device's copy is damaged by taking it from one byte further on, whatever the kind."""
        found = self._job.copies(layer, first, num_blocks)
        if not self._is_spent:
            self._is_spent = True
            src = found[0].src_offset
            found[0] = found[0]._replace(src_offset=src + (1 if src == 0 else -1))
        return found


class Faulty:
    """A transport whose sending end misbehaves as ``plan`` says."""

    def __init__(self, over: Transport, plan: FaultPlan) -> None:
        self._over = over
        self._plan = plan
        self.name = over.name
        self.is_one_sided = over.is_one_sided
        self.layerwise_from_bytes = over.layerwise_from_bytes

    def takes(self, *, on_device: bool) -> bool:
        return self._over.takes(on_device=on_device)

    def reaches(self, mine: NodeDescription, theirs: NodeDescription, *, can_reach_memory: bool) -> bool:
        return self._over.reaches(mine, theirs, can_reach_memory=can_reach_memory)

    async def connect(self, dial: Dial) -> FakeWire:
        return FakeWire(await self._over.connect(dial), self._plan, asyncio.get_running_loop(), dial.on_lost)

    def plane(self, site: PlaneSite) -> DataPlane:
        return self._over.plane(site)


class FakeWire:
    """A wire whose units are delayed, shuffled, lost, damaged, or whose connection breaks, as ``plan`` says."""

    def __init__(
        self, inner: Wire, plan: FaultPlan, loop: asyncio.AbstractEventLoop, on_lost: Callable[[str], None]
    ) -> None:
        self._inner = inner
        self._plan = plan
        self._loop = loop
        self._on_lost = on_lost
        self._random = random.Random(plan.seed)
        self._lock = threading.Lock()
        self._num_units = 0
        self._closing = threading.Event()

    @property
    def num_lanes(self) -> int:
        return self._inner.num_lanes

    @property
    def max_unit_bytes(self) -> int:
        return self._inner.max_unit_bytes

    def submit(self, units: Sequence[Unit]) -> None:
        if self._plan.reorder:
            with self._lock:
                units = self._random.sample(units, len(units))
        self._inner.submit(units)

    def write(self, lane: int, unit: Unit) -> int:
        plan, area = self._plan, unit.area
        with self._lock:
            self._num_units += 1
            number = self._num_units
            delay_s = self._random.random() * plan.delay_s
            position = self._random.randrange(1 << 30)
        if delay_s:
            self._closing.wait(delay_s)
        if plan.die and number >= plan.die:
            self._loop.call_soon_threadsafe(self._on_lost, f"fake died at unit {number}")
            raise TransferFailed(f"fake died at unit {number}")
        kind = plan.kind(number)
        if kind == "drop":
            for layer in area.layers:
                unit.job.hash(layer, area.first, area.num_blocks)
            return 0
        if kind:
            unit = unit._replace(job=cast("WriteJob", DamagedJob(unit.job, kind, position)))
        return self._inner.write(lane, unit)

    async def close(self) -> None:
        self._closing.set()
        await self._inner.close()


class Link(Generic[T]):
    """One direction of a lossy control channel: messages under way, taken out in any order, lost or taken twice."""

    def __init__(self) -> None:
        self._under_way: list[T] = []

    def __len__(self) -> int:
        return len(self._under_way)

    def put(self, message: T) -> None:
        self._under_way.append(message)

    def take(self, index: int = 0) -> T:
        return self._under_way.pop(index % len(self._under_way))

    def take_copy(self, index: int) -> T:
        """Deliver a message that will come again."""
        return self._under_way[index % len(self._under_way)]
