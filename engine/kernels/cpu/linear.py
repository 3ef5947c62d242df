"""x W^T + b with weights in panels: one order of additions for any number of rows.

Weights are panels of ``tile_vectors`` vectors of outputs, [panels, in / s, outputs of the panel, s], where s elements
of the summed dimension are one step of a dot product. A panel is read front to back, so a decode step runs at the
memory's speed. ``tile_rows`` rows by one panel are summed in registers over the whole input, so every result is one
chain of additions whatever M, and a panel stays in cache while the rows pass.

A layer of another kind (such as quantized weights) is a class like `CpuLinear`: ``records(x, out)`` yields the kernel
calls of one use, and ``__call__`` puts them on the tape. Intermediate results are in ``tape.empty``, with one row per
row of x. The number of rows is ``tape.rows(x)`` and goes into the records unchanged: while a step is recorded it stands
for the number of a later run. For products of quantized rows:

    def records(self, x, out):
        rows = self._tape.rows(x)
        quantized = self._tape.empty(x, self._num_in, dtype=torch.int8)
        scales = self._tape.empty(x, dtype=torch.float32)
        yield Record(self._quantize, (x, quantized, scales, rows), rows, per_task=16)
        yield Record(self._product, (quantized, scales, self._panels, ..., rows), rows, TASK_ROWS, self._num_panels)

Weights are in ``slabs.copy(weights)``: decoding reads them all in every step. The kernel decides which rows and which
panel belong to a task's number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor
from torch.nn import functional

from engine.kernels.cpu.llvm import Emitter, Int, Isa, Kernel, Vec, itemsize, per_dot
from engine.kernels.cpu.once import once
from engine.kernels.cpu.program import Record, Tape
from engine.kernels.cpu.slabs import Slabs

# Rows that one task multiplies with a panel: enough to hide the loading of the panel.
TASK_ROWS = 384


class CpuLinear:
    """A layer ready for use; holds its own copy of the weights. 2 M N K operations, N K elements read."""

    def __init__(self, isa: Isa, tape: Tape, slabs: Slabs, weight: Tensor, bias: Tensor | None) -> None:
        """weight [out, in], bias [out], float32, bfloat16 or float16."""
        dtype = str(weight.dtype).removeprefix("torch.")
        self._tape = tape
        self._num_out, self._num_in = weight.shape
        panel, step = isa.lanes * isa.tile_vectors, per_dot(dtype)
        missing = -self._num_out % panel, -self._num_in % step
        padded = functional.pad(weight, (0, missing[1], 0, missing[0]))
        self._num_panels, self._padded_in = len(padded) // panel, padded.shape[1]
        self._panels = slabs.copy(padded.view(self._num_panels, panel, -1, step).transpose(1, 2))
        self._bias = weight.new_zeros(len(padded))
        if bias is not None:
            self._bias[: self._num_out] = bias
        self._kernel = _kernel(isa, dtype)
        self._pad = _pad(isa, dtype) if missing[1] else None

    def __call__(self, x: Tensor) -> Tensor:
        """x [rows, in], contiguous -> [rows, out]."""
        out = self._tape.empty(x, self._num_out)
        self._tape.run(self.records(x, out))
        return out

    def records(self, x: Tensor, out: Tensor) -> Iterator[Record]:
        assert x.shape[1] == self._num_in, f"{x.shape[1]} features instead of {self._num_in}"
        assert x.is_contiguous(), "rows lie one behind the other"
        rows = self._tape.rows(x)
        if self._pad is not None:
            padded = self._tape.empty(x, self._padded_in)
            yield Record(self._pad, (x, padded, self._num_in, rows), rows, TASK_ROWS)
            x = padded
        parameters = (x, self._panels, self._bias, out, rows, self._padded_in, self._num_out)
        yield Record(self._kernel, parameters, rows, TASK_ROWS, self._num_panels)


@once
def _kernel(isa: Isa, dtype: str) -> Kernel:
    width, vectors, size, step = isa.lanes, isa.tile_vectors, itemsize(dtype), per_dot(dtype)
    panel_size = width * vectors

    def build(e: Emitter, task: Int, parameters: list[Int]) -> None:
        x, weights, bias, out, num_rows, num_in, num_out = parameters
        row_parts = (num_rows + (TASK_ROWS - 1)) // TASK_ROWS
        panel, part = task // row_parts, task % row_parts
        first = part * TASK_ROWS
        weights = weights + panel * num_in * (panel_size * size)
        bias = bias + panel * (panel_size * size)
        out = out + panel * (panel_size * size)
        write = row_writer(e, dtype, (num_out - panel * panel_size).min(panel_size), panel_size)

        def tile(row: Int, num_tile_rows: int) -> None:
            """Accumulators [tile rows, vectors], in registers over the whole input."""
            rows = [x + (row + i) * num_in * size for i in range(num_tile_rows)]
            zeros = [e.constant(0.0, width)] * (num_tile_rows * vectors)
            with e.loop(0, num_in // step, values=zeros) as loop:
                at = loop.index * (step * size)
                columns = weights + at * panel_size
                w = [e.dot_load(dtype, columns + v * width * step * size, width) for v in range(vectors)]
                for i, address in enumerate(rows):
                    one = e.dot_spread(dtype, address + at, width)
                    totals = loop.values[i * vectors : (i + 1) * vectors]
                    loop.following += [e.dot(dtype, total, w[v], one) for v, total in enumerate(totals)]
            biases = [e.load(dtype, bias + v * width * size, width) for v in range(vectors)]
            for i in range(num_tile_rows):
                sums = [loop.values[i * vectors + v] + biases[v] for v in range(vectors)]
                write(sums, out + (row + i) * num_out * size)

        e.by_rows(first, (first + TASK_ROWS).min(num_rows), isa.tile_rows, tile)

    return Kernel(f"linear_{dtype}", isa, 7, build)


def row_writer(e: Emitter, dtype: str, num_columns: Int, panel_size: int) -> Callable[[list[Vec], Int], None]:
    """Writes the vectors of a panel to an address: its first ``num_columns`` outputs; the rest is padding."""
    size = itemsize(dtype)
    spare = e.scratch(panel_size * size)

    def store(sums: list[Vec], target: Int) -> None:
        for v, value in enumerate(sums):
            e.store(dtype, value, target + v * value.width * size)

    def write(sums: list[Vec], target: Int) -> None:
        with e.b.if_else(num_columns < panel_size) as (in_part, whole):
            with whole:
                store(sums, target)
            with in_part:
                store(sums, spare)
                with e.loop(0, num_columns * size, size) as column:
                    e.copy(spare + column.index, target + column.index, size)

    return write


@once
def _pad(isa: Isa, dtype: str) -> Kernel:
    """Rows padded with zeros to a whole number of steps."""
    size, step = itemsize(dtype), per_dot(dtype)

    def build(e: Emitter, task: Int, parameters: list[Int]) -> None:
        x, out, num_in, num_rows = parameters
        padded = (num_in + (step - 1)) // step * step
        first = task * TASK_ROWS
        with e.loop(first, (first + TASK_ROWS).min(num_rows)) as rows:
            source, target = x + rows.index * num_in * size, out + rows.index * padded * size
            with e.loop(0, num_in) as element:
                e.copy(source + element.index * size, target + element.index * size, size)
            with e.loop(num_in, padded) as element:
                e.store(dtype, e.constant(0.0, 1), target + element.index * size)

    return Kernel(f"pad_{dtype}", isa, 4, build)
