"""x W^T + b with 8-bit weights: activations are quantized row by row, and sums of products are exact integers.

Both sides have a scale for each group of inputs (int8.py). Within a group the sum is exact in any order; groups are
added in float32 in ascending order, so a result does not depend on the other rows.

Weights are in panels as in linear.py, one byte an element, stored as level + 128: [panels, groups, (float32 scales of
the panel's outputs, then bytes [GROUP / s, outputs of the panel, s])], s elements being one step of a product. A
quantized row is [groups, (levels, float32 scale, int32 -128 * sum of the levels)]; the last term removes the offset of
128. Levels of a row are bytes on processors with VNNI, else int16.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from engine.kernels.cpu.kernel import Kernel
from engine.kernels.cpu.linear import TASK_ROWS, PanelLinear, PanelTask
from engine.kernels.cpu.llvm import Emitter, Int, Isa, itemsize
from engine.kernels.cpu.once import once
from engine.kernels.cpu.pointwise import dtype_name, rows_per_task
from engine.kernels.cpu.program import Record, Tape
from engine.kernels.cpu.slabs import Slabs
from engine.kernels.int8 import GROUP, LARGEST, SMALLEST_SCALE, quantized

_OFFSET = 128
# Weights that are quantized at a time: their float32 values fit into a cache.
_PART_ELEMENTS = 1 << 18


class CpuLinearInt8(PanelLinear):
    """A layer ready for use; holds its own weights. 2 M N K operations, 1.03 N K bytes read."""

    def __init__(self, isa: Isa, tape: Tape, slabs: Slabs, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(isa, tape, weight, bias)
        dtype = dtype_name(weight)
        self._num_groups = -(-self._num_in // GROUP)
        self._row_bytes = self._num_groups * _row_group_bytes(isa)
        self._panels = slabs.copy(_panels(isa, weight))
        self._quantize = _quantize(isa, dtype, self._num_in)
        self._product = _product(isa, dtype)

    def records(self, x: Tensor, out: Tensor) -> Iterator[Record]:
        rows = self._tape.rows(x)
        quantized = self._tape.empty(x, self._row_bytes, dtype=torch.uint8)
        yield Record(self._quantize, (x, quantized, rows), rows, rows_per_task(self._num_in))
        parameters = (quantized, self._panels, self._bias, out, rows, self._num_groups, self._num_out)
        yield Record(self._product, parameters, rows, TASK_ROWS, self._num_panels)


def _panels(isa: Isa, weight: Tensor) -> Tensor:
    """[panels, groups, bytes]; a few panels at a time, as float32 needs four times the memory."""
    panel, step = isa.lanes * isa.tile_vectors, isa.per_int8_dot
    num_panels, num_groups = -(-len(weight) // panel), -(-weight.shape[1] // GROUP)
    panels = torch.empty(num_panels, num_groups, panel * (4 + GROUP), dtype=torch.uint8)
    per_part = max(1, _PART_ELEMENTS // (panel * weight.shape[1]))
    for first in range(0, num_panels, per_part):
        part, rows = panels[first : first + per_part], weight[first * panel : (first + per_part) * panel]
        levels, scales = quantized(functional.pad(rows, (0, 0, 0, -len(rows) % panel)))
        unsigned = (levels.to(torch.int16) + _OFFSET).to(torch.uint8)
        columns = scales.view(-1, panel, num_groups).transpose(1, 2).contiguous()
        part[:, :, : 4 * panel] = columns.view(torch.uint8)
        elements = unsigned.view(-1, panel, num_groups, GROUP // step, step).permute(0, 2, 3, 1, 4)
        part[:, :, 4 * panel :] = elements.flatten(2)
    return panels


def _row_group_bytes(isa: Isa) -> int:
    return GROUP * _level_bytes(isa) + 8


def _level_bytes(isa: Isa) -> int:
    """Bytes of one level of a row: a step is four bytes."""
    return 4 // isa.per_int8_dot


@once
def _quantize(isa: Isa, dtype: str, size: int) -> Kernel:
    item, level = itemsize(dtype), _level_bytes(isa)
    num_whole, rest = divmod(size, GROUP)
    group_bytes = _row_group_bytes(isa)
    row_bytes = -(-size // GROUP) * group_bytes

    def build(e: Emitter, task: Int, parameters: list[Int]) -> None:
        x, out, num_rows = parameters

        def group(source: Int, target: Int, count: int) -> None:
            width = isa.width(count)
            zero = e.constant(0.0, width)
            with e.loop(0, count, width, [zero, zero]) as loop:
                value = e.load(dtype, source + loop.index * item, width)
                # max ignores NaN; the second sum, 0 for finite values, keeps NaN and infinities.
                loop.following = [loop.values[0].max(value.max(value * -1.0)), loop.values[1] + value * 0.0]
            scale = (e.lane_max(loop.values[0]) / LARGEST).max(SMALLEST_SCALE)
            marked = scale + e.lane_sum(loop.values[1])
            inverse = e.constant(1.0, width) / scale
            with e.loop(0, count, width, [zero]) as loop:
                value = e.nearest(e.load(dtype, source + loop.index * item, width) * inverse)
                e.store_integers(value, target + loop.index * level, level)
                loop.following = [loop.values[0] + value]
            with e.loop(count, GROUP) as fill:
                e.store_integers(e.constant(0.0, 1), target + fill.index * level, level)
            e.store_lane(marked, target + GROUP * level)
            sums = e.resize(e.lane_sum(loop.values[0]) * -_OFFSET, 1)
            e.store_integers(sums, target + (GROUP * level + 4), 4)

        first = task * rows_per_task(size)
        with e.loop(first, (first + rows_per_task(size)).min(num_rows)) as rows:
            source, target = x + rows.index * (size * item), out + rows.index * row_bytes
            with e.loop(0, num_whole) as loop:
                group(source + loop.index * (GROUP * item), target + loop.index * group_bytes, GROUP)
            if rest:
                group(source + num_whole * GROUP * item, target + num_whole * group_bytes, rest)

    return Kernel(f"quantize_{dtype}", isa, 3, build)


@once
def _product(isa: Isa, dtype: str) -> Kernel:
    width, vectors, step = isa.lanes, isa.tile_vectors, isa.per_int8_dot
    panel = width * vectors
    panel_group, row_group, levels = panel * (4 + GROUP), _row_group_bytes(isa), GROUP * _level_bytes(isa)

    def build(e: Emitter, task: Int, parameters: list[Int]) -> None:
        x, weights, bias, out, num_rows, num_groups, num_out = parameters
        part = PanelTask(e, dtype, task, num_rows, bias, out, num_out)
        weights = weights + part.panel * num_groups * panel_group

        def tile(row: Int, num_tile_rows: int) -> None:
            """Two sets of [tile rows, vectors]: integers of the group, and float32 sums of the groups before it."""
            tile_rows = [x + (row + i) * num_groups * row_group for i in range(num_tile_rows)]
            zeros = [e.constant(0.0, width)] * (num_tile_rows * vectors)
            with e.loop(0, num_groups, values=zeros) as groups:
                columns = weights + groups.index * panel_group
                rows = [address + groups.index * row_group for address in tile_rows]
                starts = [e.spread_integers(address + (levels + 4), width) for address in rows]
                with e.loop(0, GROUP // step, values=[s for s in starts for _ in range(vectors)]) as loop:
                    at = columns + panel * 4 + loop.index * (panel * step)
                    w = [e.int8_load(at + v * width * step, width) for v in range(vectors)]
                    for i, address in enumerate(rows):
                        one = e.spread_integers(address + loop.index * 4, width)
                        totals = loop.values[i * vectors : (i + 1) * vectors]
                        loop.following += [e.int8_dot(total, w[v], one) for v, total in enumerate(totals)]
                scales = [e.load("float32", columns + v * width * 4, width) for v in range(vectors)]
                for i, address in enumerate(rows):
                    scale = e.spread("float32", address + levels, width)
                    for v in range(vectors):
                        place = i * vectors + v
                        share = loop.values[place].to_float() * scale
                        groups.following.append(e.fma(share, scales[v], groups.values[place]))
            part.finish(row, groups.values)

        part.by_rows(tile)

    return Kernel(f"linear_int8_{dtype}", isa, 7, build)
