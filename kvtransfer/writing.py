"""The writing threads of a push: tracks which bytes are ready, being written, and landed.

``layer_ready`` comes from the engine thread and only takes a short lock; the copying happens in the lanes, threads that
belong to a wire. Results are reported by callbacks, in the thread where they occur.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

from baton.clock import Clock, MonotonicClock
from baton.errors import BatonError, InternalError, InvalidRequest, described
from baton.timeline import Timeline, Write
from baton.types import KvLayout
from kvtransfer.devices.interface import Event
from kvtransfer.digest import LayerDigests
from kvtransfer.hashing import ByteArray, cut, segment_blocks
from kvtransfer.host import keep_apart
from kvtransfer.memory import HostMemory, Memory, Send
from kvtransfer.plan import Area, BlockList, Copy, TransferPlan

_MIN_SPLIT_BYTES = 256 << 10


class Unit(NamedTuple):
    """What one lane does in one go."""

    job: WriteJob
    attempt: int
    area: Area


class Wire(Protocol):
    """The sending end of one data connection."""

    @property
    def num_lanes(self) -> int: ...

    @property
    def max_unit_bytes(self) -> int: ...

    def submit(self, units: Sequence[Unit]) -> None:
        """Queue units for the lanes, which call ``write`` of the wire that the unit's job was started with."""

    def write(self, lane: int, unit: Unit) -> int:
        """Read the source and write or send it, in the lane's thread. When it returns, one-sided, the bytes are in the
        target; else so many bytes are on the data connection. Raises if they will not get there."""

    async def close(self) -> None:
        """Begin no further write, wait for those under way, let go of the connection."""


class Lanes:
    """A few threads that take units from one queue."""

    def __init__(
        self, name: str, num_threads: int, run: Callable[[int, Unit], int], clock: Clock | None = None
    ) -> None:
        self._run = run
        self._clock = clock or MonotonicClock()
        self._queue: deque[Unit] = deque()
        self._has_work = threading.Condition()
        self._is_closing = False
        self._threads = [
            threading.Thread(target=self._loop, args=(i,), name=f"{name}-{i}", daemon=True) for i in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, units: Iterable[Unit]) -> None:
        with self._has_work:
            before = len(self._queue)
            self._queue.extend(units)
            self._has_work.notify(len(self._queue) - before)

    def _take(self) -> Unit | None:
        with self._has_work:
            while not self._queue and not self._is_closing:
                self._has_work.wait()
            return self._queue.popleft() if self._queue else None

    def _loop(self, lane: int) -> None:
        keep_apart(lane)
        while (unit := self._take()) is not None:
            if not unit.job.enter():
                continue
            started_s = self._clock.now()
            num_sent_bytes = 0
            try:
                num_sent_bytes = self._run(lane, unit)
                unit.job.record(lane, unit, started_s, self._clock.now())
            except BatonError as error:
                unit.job.fail(error)
            except Exception as error:  # the owner hears of every failure, whatever it is
                logging.getLogger(__name__).exception("kv write failed")
                unit.job.fail(InternalError(f"write failed: {described(error)}"))
            finally:
                unit.job.leave(num_sent_bytes)

    def close(self) -> None:
        """Let the threads end after the queued units (those of stopped jobs are skipped)."""
        with self._has_work:
            self._is_closing = True
            self._has_work.notify_all()

    def join(self, timeout_s: float) -> bool:
        """Wait for the threads; False if one is still at work."""
        for thread in self._threads:
            thread.join(timeout_s)
        return not any(thread.is_alive() for thread in self._threads)


class WriteJobListener(Protocol):
    """Called from any thread, never with a lock held."""

    def on_drained(self, attempt: int) -> None: ...

    def on_stopped(self) -> None: ...

    def on_failed(self, error: BatonError) -> None: ...

    def on_caught_up(self) -> None: ...


class WriteJob:
    """The bytes of one push. Invariant: after ``on_stopped`` or ``on_drained`` no lane touches source or target.

    ``num_blocks`` may be more than there is to push in the end: ``end_at`` says how many that are.
    """

    def __init__(
        self,
        source: Memory,
        layout: KvLayout,
        block_ids: Sequence[int],
        epoch: int,
        *,
        is_layerwise: bool,
        has_digest: bool,
        listener: WriteJobListener,
        sequence_id: str = "",
        timeline: Timeline | None = None,
    ) -> None:
        self.sequence_id = sequence_id
        self._timeline = timeline
        self.epoch = epoch
        self.num_blocks = len(block_ids)
        self.num_layers = layout.num_layers
        self.is_layerwise = is_layerwise
        self.plan: TransferPlan | None = None
        self.wire: Wire | None = None
        self._source = source
        self._blocks = BlockList(layout, block_ids)
        # A device may not have computed yet what it was told to.
        self._fences: list[Event | None] = [None] * layout.num_layers
        self.has_digest = has_digest
        self._digests = LayerDigests(source, layout, block_ids)
        self._block_bytes = layout.block_bytes
        # Units are cut where segments are, so that each is hashed in one go.
        self.step_blocks = segment_blocks(layout.block_bytes)
        self._listener = listener
        self._lock = threading.Lock()
        # Per layer, how many leading blocks are final, and how many were handed to the wire.
        self._ready = [0] * layout.num_layers
        self._submitted = [0] * layout.num_layers
        self._attempt = 1
        # Units queued or being written; units a lane is at.
        self._num_unwritten = 0
        self._num_entered = 0
        # Of this attempt, on the data connection of a two-sided wire.
        self._num_sent_bytes = 0
        self._is_draining = False
        self._is_stopping = False
        self._has_failed = False
        # ``on_caught_up`` is still to come.
        self._is_catching_up = False

    # Engine thread.

    def layer_ready(self, layer: int, num_blocks: int) -> None:
        """The first ``num_blocks`` source blocks of the layer hold final bytes. Never blocks, never goes back."""
        if not 0 <= layer < self.num_layers:
            raise InternalError(f"layer {layer} is outside 0..{self.num_layers - 1}")
        fence = self._source.fence()
        with self._lock:
            if self._ready[layer] <= num_blocks:
                self._fences[layer] = fence
            self._ready[layer] = max(self._ready[layer], min(num_blocks, self.num_blocks))
            if not self.is_layerwise:
                return
            self._submit_ready([layer])
            has_caught_up = self._take_caught_up()
        if has_caught_up:
            self._listener.on_caught_up()

    @property
    def first_unready_layer(self) -> int | None:
        with self._lock:
            return next((i for i, ready in enumerate(self._ready) if ready < self.num_blocks), None)

    # Event loop.

    def start(self, wire: Wire, plan: TransferPlan) -> None:
        with self._lock:
            self.wire, self.plan = wire, plan
            if self.is_layerwise:
                self._submit_ready(range(self.num_layers))
            has_caught_up = self._take_caught_up()
        if has_caught_up:
            self._listener.on_caught_up()

    def catch_up(self) -> None:
        """Say once, with ``on_caught_up``, that all blocks that are ready are written, or all but one ready."""
        with self._lock:
            self._is_catching_up = True
            has_caught_up = self._take_caught_up()
        if has_caught_up:
            self._listener.on_caught_up()

    def end_at(self, num_blocks: int) -> None:
        """So many blocks are all that there is to push. Raises InvalidRequest if they are more than were planned."""
        with self._lock:
            if num_blocks > self.num_blocks:
                raise InvalidRequest(
                    f"{self.sequence_id} has {num_blocks} blocks to push, expected at most the {self.num_blocks} that "
                    "were there, or leased, when its push began"
                )
            self.num_blocks = num_blocks

    def drain(self, attempt: int, rewrite_layers: Sequence[int]) -> None:
        with self._lock:
            if attempt != self._attempt:
                self._attempt, self._num_sent_bytes = attempt, 0
            self._is_draining = True
            for layer in rewrite_layers:
                if 0 <= layer < self.num_layers:
                    self._submitted[layer] = 0
            self._submit_ready(range(self.num_layers))
            is_drained = self._take_drained()
        if is_drained:
            self._listener.on_drained(attempt)

    def stop(self) -> None:
        with self._lock:
            self._is_stopping = True
            is_stopped = self._num_entered == 0
        if is_stopped:
            self._listener.on_stopped()

    def layer_digests(self) -> tuple[bytes, ...]:
        if not self.has_digest:
            return ()
        return tuple(self._digests.layer_digest(layer, self.num_blocks) for layer in range(self.num_layers))

    # Lanes.

    def enter(self) -> bool:
        """A lane is about to read the source; False if it must not."""
        with self._lock:
            if self._is_stopping:
                return False
            self._num_entered += 1
            return True

    @property
    def num_sent_bytes(self) -> int:
        with self._lock:
            return self._num_sent_bytes

    def leave(self, num_sent_bytes: int) -> None:
        """The lane reads the source no more."""
        with self._lock:
            self._num_entered -= 1
            self._num_unwritten -= 1
            self._num_sent_bytes += num_sent_bytes
            is_stopped = self._is_stopping and self._num_entered == 0
            attempt, is_drained = self._attempt, self._take_drained()
            has_caught_up = self._take_caught_up()
        if is_stopped:
            self._listener.on_stopped()
        elif is_drained:
            self._listener.on_drained(attempt)
        elif has_caught_up:
            self._listener.on_caught_up()

    def send(self, area: Area, send: Send) -> None:
        """Give source bytes to ``send``, in order, and digest them."""
        self._source.gather(self._blocks, area, send, self._digest, self.fence)

    def copies(self, layer: int, first: int, num_blocks: int) -> list[Copy]:
        """From where to where in the two caches."""
        if self.plan is None:
            raise InternalError("a unit was queued before its push had begun")
        return self.plan.copies(layer, first, num_blocks)

    def fence(self, layer: int) -> Event | None:
        """What a stream has to wait for before it reads what is ready of the layer."""
        with self._lock:
            return self._fences[layer]

    def _digest(self, layer: int, first: int, num_blocks: int, copied: ByteArray | None) -> None:
        """Digest source blocks, from a copy of them if it is one segment's."""
        if copied is None or first % self.step_blocks:
            self.hash(layer, first, num_blocks)
        elif self.has_digest:
            self._digests.update_from(copied, layer, first, num_blocks)

    def hash(self, layer: int, first: int, num_blocks: int) -> None:
        """Digest source blocks."""
        if self.has_digest:
            # A segment that an earlier unit began: blocks before these are final as well.
            begun = first % self.step_blocks
            self._digests.update(layer, first - begun, num_blocks + begun)

    def copy(self, source: HostMemory, target: ByteArray, layer: int, first: int, num_blocks: int) -> None:
        """Copy source blocks to where the plan says and digest them, in one pass where that can be done."""
        head = min(-first % self.step_blocks, num_blocks)
        rest = first + head, num_blocks - head
        if rest[1] and self._digests.copy(source, layer, *rest, self.copies(layer, *rest), target):
            num_blocks = head
        for start, count in cut(first, num_blocks, self.step_blocks):
            source.copy(self.copies(layer, start, count), target)
            self.hash(layer, start, count)  # While the bytes are in the cache.

    def record(self, lane: int, unit: Unit, started_s: float, ended_s: float) -> None:
        if self._timeline is not None:
            area = unit.area
            self._timeline.write(
                Write(self.sequence_id, lane, area.layer, area.num_layers, self.num_bytes(area), started_s, ended_s)
            )

    def num_bytes(self, area: Area) -> int:
        return area.num_layers * area.num_blocks * self._block_bytes

    def fail(self, error: BatonError) -> None:
        with self._lock:
            if self._has_failed or self._is_stopping:
                return
            self._has_failed = True
        self._listener.on_failed(error)

    # With the lock held.

    def _take_drained(self) -> bool:
        if not self._is_draining or self._is_stopping or self._has_failed:
            return False
        if self._num_unwritten:
            return False
        self._is_draining = False
        return True

    def _take_caught_up(self) -> bool:
        if not self._is_catching_up or self.wire is None or self._is_stopping or self._has_failed:
            return False
        if self._num_unwritten and min(self._ready) + 1 < self.num_blocks:
            return False
        self._is_catching_up = False
        return True

    def _submit_ready(self, layers: Iterable[int]) -> None:
        wire = self.wire
        if wire is None or self._is_stopping or self._has_failed:
            return
        units: list[Unit] = []
        for layer in layers:
            first, stop = self._submitted[layer], self._ready[layer]
            if first < stop:
                self._submitted[layer] = stop
                self._add_units(units, wire, layer, first, stop)
        self._num_unwritten += len(units)
        wire.submit(units)

    def _add_units(self, units: list[Unit], wire: Wire, layer: int, first: int, stop: int) -> None:
        """Cut a layer's range for the lanes, or append it to the unit before if both are small."""
        num_bytes = (stop - first) * self._block_bytes
        last = units[-1].area if units else None
        if last is not None and (last.first, last.num_blocks) == (first, stop - first):
            is_next = last.layer + last.num_layers == layer
            if is_next and (last.num_layers + 1) * num_bytes <= min(wire.max_unit_bytes, 4 * _MIN_SPLIT_BYTES):
                units[-1] = units[-1]._replace(area=last._replace(num_layers=last.num_layers + 1))
                return
        num_units = max(-(-num_bytes // wire.max_unit_bytes), min(wire.num_lanes, num_bytes // _MIN_SPLIT_BYTES), 1)
        step = -(-(stop - first) // num_units)
        step += -step % self.step_blocks
        for start in range(first - first % self.step_blocks, stop, step):
            begin = max(first, start)
            area = Area(layer, 1, begin, min(start + step, stop) - begin)
            units.append(Unit(self, self._attempt, area))


def write_unit(lane: int, unit: Unit) -> int:
    assert unit.job.wire is not None, "units are queued after the push has begun"
    return unit.job.wire.write(lane, unit)
