"""Transfers of a node that was started with a schedule of faults: its control messages, and its writes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Generic, TypeVar, cast

from baton.errors import TransferFailed
from baton.faults.faults import Faults
from baton.faults.kinds import FaultKind, Layer, kind_of
from baton.faults.line import Line
from kvtransfer.protocol import messages
from kvtransfer.transports.fake import DamagedJob
from kvtransfer.writing import Unit, Wire, WriteJob

M = TypeVar("M", bound=messages.SenderMessage | messages.ReceiverMessage)


class ControlLine(Generic[M]):
    """What one end of a control channel sends."""

    def __init__(self, faults: Faults, peer: str, put: Callable[[M], None], lose: Callable[[str], None]) -> None:
        self._line: Line[M] = Line(faults, Layer.CONTROL, peer, put, on_cut=lose, corrupt=_corrupted)

    def send(self, message: M) -> None:
        self._line.put(message, kind_of(message), getattr(message, "sequence_id", ""))

    def close(self) -> None:
        self._line.close()


def _corrupted(message: M, position: int) -> M:
    """A commit with another digest; other messages have no check but that of TCP or TLS, and stay whole."""
    if not isinstance(message, messages.Commit) or not message.layer_digests:
        return message
    digests = list(message.layer_digests)
    layer = position % len(digests)
    digests[layer] = bytes([digests[layer][0] ^ 0xFF]) + digests[layer][1:]
    return cast("M", replace(message, layer_digests=tuple(digests)))


class FaultyWire:
    """The sending end of a data connection: each unit meets its fault in the lane that writes it."""

    def __init__(self, inner: Wire, faults: Faults, peer: str, on_lost: Callable[[str], None]) -> None:
        self._inner = inner
        self._faults = faults
        self._peer = peer
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._closing = threading.Event()

    @property
    def num_lanes(self) -> int:
        return self._inner.num_lanes

    @property
    def max_unit_bytes(self) -> int:
        return self._inner.max_unit_bytes

    def submit(self, units: Sequence[Unit]) -> None:
        self._inner.submit(units)

    def write(self, lane: int, unit: Unit) -> int:
        strike = self._faults.at(Layer.DATA, "unit", self._peer, unit.job.sequence_id)
        if strike is None:
            return self._inner.write(lane, unit)
        match strike.fault:
            case FaultKind.DELAY | FaultKind.STALL | FaultKind.SLOW:
                self._closing.wait(strike.seconds)
            case FaultKind.DROP:
                # Digested as if it had been written.
                for layer in unit.area.layers:
                    unit.job.hash(layer, unit.area.first, unit.area.num_blocks)
                return 0
            case FaultKind.CORRUPT:
                unit = unit._replace(job=cast("WriteJob", DamagedJob(unit.job, "corrupt", strike.position)))
            case FaultKind.DUPLICATE:
                return self._inner.write(lane, unit) + self._inner.write(lane, unit)
            case FaultKind.DISCONNECT:
                reason = "a fault of the schedule cut the data connection"
                self._loop.call_soon_threadsafe(self._on_lost, reason)
                raise TransferFailed(reason)
        return self._inner.write(lane, unit)

    async def close(self) -> None:
        self._closing.set()
        await self._inner.close()
