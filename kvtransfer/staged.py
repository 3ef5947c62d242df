"""A device's blocks through pinned memory: read for a socket, filled from one, a segment ahead. Knows no socket."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from baton.errors import InternalError
from baton.types import KvLayout
from kvtransfer.digest import cut, segment_blocks
from kvtransfer.memory import DeviceMemory, Staging
from kvtransfer.plan import spans
from kvtransfer.writing import Unit


class Frame(NamedTuple):
    """Positions [first, first + num_blocks) of a lease, in ``num_layers`` layers."""

    epoch: int
    block_ids: Sequence[int]
    layer: int
    num_layers: int
    first: int
    num_blocks: int


class _Segment(NamedTuple):
    layer: int
    first: int
    num_blocks: int


def _segments(layer: int, num_layers: int, first: int, num_blocks: int, step_blocks: int) -> list[_Segment]:
    parts = list(cut(first, num_blocks, step_blocks))
    return [_Segment(i, *part) for i in range(layer, layer + num_layers) for part in parts]


def read(memory: DeviceMemory, unit: Unit, send: Callable[[memoryview], None]) -> None:
    """Give a unit's bytes to ``send``, in order. While one segment is hashed and sent, the next one is on its way.

    When this returns or raises, the device reads the source no more.
    """
    job, plan = unit.job, unit.job.plan
    if plan is None:
        raise InternalError("a unit was queued before its push had begun")
    layout = plan.src_layout
    todo = _segments(unit.layer, unit.num_layers, unit.first, unit.num_blocks, job.step_blocks)

    def gather(staging: Staging, i: int) -> None:
        layer, first, count = todo[i]
        fence = job.fence(layer)
        if fence is not None:
            staging.stream.wait_for(fence)
        parts = spans(layout, layer, plan.src_block_ids, first, count)
        staging.gather(i % 2, [(job.address(offset, size), size) for offset, size in parts])

    with memory.staging(job.step_blocks * layout.block_bytes) as staging:
        gather(staging, 0)
        for i, (layer, first, count) in enumerate(todo):
            if i + 1 < len(todo):
                gather(staging, i + 1)
            staging.wait(i % 2)
            copied = staging.view(i % 2, count * layout.block_bytes)
            job.hash_copy(copied, layer, first, count)
            send(copied.data)


def fill(
    memory: DeviceMemory,
    layout: KvLayout,
    frame: Frame,
    receive: Callable[[memoryview], bool],
    on_written: Callable[[int, int, int, int], None] | None,
) -> bool:
    """Put what ``receive`` fills a buffer with into the frame's blocks; False if it said that there is no more.

    ``on_written(epoch, layer, first, num_blocks)`` follows each segment that is in the device's memory, while the next
    one is received. When this returns or raises, nothing is being written any more.
    """
    step = segment_blocks(layout.block_bytes)
    todo = _segments(frame.layer, frame.num_layers, frame.first, frame.num_blocks, step)

    def finish(staging: Staging, i: int) -> None:
        staging.wait(i % 2)
        if on_written is not None:
            on_written(frame.epoch, *todo[i])

    with memory.staging(step * layout.block_bytes) as staging:
        for i, (layer, first, count) in enumerate(todo):
            if not receive(staging.view(i % 2, count * layout.block_bytes).data):
                return False
            parts = spans(layout, layer, frame.block_ids, first, count)
            staging.scatter(i % 2, memory.runs(parts))
            if i > 0:
                finish(staging, i - 1)
        if todo:
            finish(staging, len(todo) - 1)
    return True
