"""Misbehaviour on a seeded schedule, for tests of everything above: wraps a real wire on the sending side.

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
from kvtransfer.devices.interface import Event
from kvtransfer.digest import ByteArray
from kvtransfer.writing import Unit, Wire, WriteJob

T = TypeVar("T")
_PARSERS: Mapping[str, Callable[[str], object]] = {"str": str, "int": int, "float": float}


@dataclass(frozen=True, slots=True)
class Mischief:
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


class _DamagedJob:
    """Stands in for a job while one unit is written: the first run of bytes read is damaged."""

    def __init__(self, job: WriteJob, kind: str, position: int) -> None:
        self._job = job
        self._kind = kind
        self._position = position
        self._is_spent = False
        self.plan = job.plan
        self.epoch = job.epoch
        self.step_blocks = job.step_blocks
        self.has_digest = job.has_digest
        self.device_memory = job.device_memory

    def read(self, offset: int, num_bytes: int) -> ByteArray:
        data = self._job.read(offset, num_bytes)
        if self._is_spent:
            return data
        self._is_spent = True
        data = data.copy()
        _damage(self._kind, data, self._position)
        return data

    def copy(self, target: ByteArray, layer: int, first: int, num_blocks: int) -> None:
        self._job.copy(target, layer, first, num_blocks)
        if not self._is_spent and self.plan is not None:
            self._is_spent = True
            _, dst, size = self.plan.copies(layer, first, num_blocks)[0]
            _damage(self._kind, target[dst : dst + size], self._position)

    def address(self, offset: int, num_bytes: int) -> int:
        """A device's copy is damaged by taking it from one byte further on, whatever the kind."""
        if self._is_spent:
            return self._job.address(offset, num_bytes)
        self._is_spent = True
        return self._job.address(offset, num_bytes) + (1 if offset == 0 else -1)

    def fence(self, layer: int) -> Event | None:
        return self._job.fence(layer)

    def hash_copy(self, copied: ByteArray, layer: int, first: int, num_blocks: int) -> None:
        self._job.hash(layer, first, num_blocks)  # The copy is damaged.

    def hash(self, layer: int, first: int, num_blocks: int) -> None:
        self._job.hash(layer, first, num_blocks)


class FakeWire:
    """A wire whose units are delayed, shuffled, lost, damaged, or whose connection breaks, as ``mischief`` says."""

    def __init__(
        self, inner: Wire, mischief: Mischief, loop: asyncio.AbstractEventLoop, on_lost: Callable[[str], None]
    ) -> None:
        self._inner = inner
        self._mischief = mischief
        self._loop = loop
        self._on_lost = on_lost
        self._random = random.Random(mischief.seed)
        self._lock = threading.Lock()
        self._num_units = 0
        self._closing = threading.Event()

    @property
    def name(self) -> str:
        return self._inner.name

    @property
    def num_lanes(self) -> int:
        return self._inner.num_lanes

    @property
    def max_unit_bytes(self) -> int:
        return self._inner.max_unit_bytes

    @property
    def is_one_sided(self) -> bool:
        return self._inner.is_one_sided

    def submit(self, units: Sequence[Unit]) -> None:
        if self._mischief.reorder:
            with self._lock:
                units = self._random.sample(units, len(units))
        self._inner.submit(units)

    def write(self, lane: int, unit: Unit) -> int:
        mischief = self._mischief
        with self._lock:
            self._num_units += 1
            number = self._num_units
            delay_s = self._random.random() * mischief.delay_s
            position = self._random.randrange(1 << 30)
        if delay_s:
            self._closing.wait(delay_s)
        if mischief.die and number >= mischief.die:
            self._loop.call_soon_threadsafe(self._on_lost, f"fake died at unit {number}")
            raise TransferFailed(f"fake died at unit {number}")
        kind = mischief.kind(number)
        if kind == "drop":
            for layer in range(unit.layer, unit.layer + unit.num_layers):
                unit.job.hash(layer, unit.first, unit.num_blocks)
            return 0
        if kind:
            unit = unit._replace(job=cast("WriteJob", _DamagedJob(unit.job, kind, position)))
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
