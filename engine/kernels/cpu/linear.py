"""x W^T + b with weights in panels: one order of additions for any number of rows.

Weights are panels of ``tile_vectors`` vectors of outputs, [panels, in / s, outputs of the panel, s], where s elements
of the summed dimension are one step of a dot product. A panel is read front to back, so a decode step runs at the
memory's speed. ``tile_rows`` rows by one panel are summed in registers over the whole input, so every result is one
chain of additions whatever M, and a panel stays in cache while the rows pass.

A layer of another kind (such as quantized weights) is another `PanelLinear`: ``records(x, out)`` yields the kernel
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

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

from torch import Tensor
from torch.nn import functional

from engine.kernels.cpu.kernel import Kernel
from engine.kernels.cpu.llvm import Emitter, Int, Isa, Vec, itemsize, per_dot
from engine.kernels.cpu.once import once
from engine.kernels.cpu.pointwise import dtype_name
from engine.kernels.cpu.program import Record, Tape
from engine.kernels.cpu.slabs import Slabs

# Rows that one task multiplies with a panel: enough to hide the loading of the panel.
TASK_ROWS = 384


class PanelLinear(ABC):
    """What layers have in common whose weights lie in panels; each adds how, and the records of its products."""

    def __init__(self, isa: Isa, tape: Tape, weight: Tensor, bias: Tensor | None) -> None:
        """weight [out, in], bias [out], float32, bfloat16 or float16."""
        self._tape = tape
        self._num_out, self._num_in = weight.shape
        panel = isa.lanes * isa.tile_vectors
        self._num_panels = -(-self._num_out // panel)
        self._bias = weight.new_zeros(self._num_panels * panel)
        if bias is not None:
            self._bias[: self._num_out] = bias

    def __call__(self, x: Tensor) -> Tensor:
        """x [rows, in], contiguous -> [rows, out]."""
        assert x.shape[1] == self._num_in, f"{x.shape[1]} features instead of {self._num_in}"
        assert x.is_contiguous(), "rows lie one behind the other"
        out = self._tape.empty(x, self._num_out)
        self._tape.run(self.records(x, out))
        return out

    @abstractmethod
    def records(self, x: Tensor, out: Tensor) -> Iterator[Record]:
        """The calls that compute x [rows, in] -> out [rows, out]."""


class CpuLinear(PanelLinear):
    """A layer ready for use; holds its own copy of the weights. 2 M N K operations, N K elements read."""

    def __init__(self, isa: Isa, tape: Tape, slabs: Slabs, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(isa, tape, weight, bias)
        dtype = dtype_name(weight)
        panel, step = isa.lanes * isa.tile_vectors, per_dot(dtype)
        missing = -self._num_out % panel, -self._num_in % step
        padded = functional.pad(weight, (0, missing[1], 0, missing[0]))
        self._padded_in = padded.shape[1]
        self._panels = slabs.copy(padded.view(self._num_panels, panel, -1, step).transpose(1, 2))
        self._kernel = _kernel(isa, dtype)
        self._pad = _pad(isa, dtype) if missing[1] else None

    def records(self, x: Tensor, out: Tensor) -> Iterator[Record]:
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
        part = PanelTask(e, dtype, task, num_rows, bias, out, num_out)
        weights = weights + part.panel * num_in * (panel_size * size)

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
            part.finish(row, loop.values)

        part.by_rows(tile)

    return Kernel(f"linear_{dtype}", isa, 7, build)


class PanelTask:
    """One task of a product: up to ``TASK_ROWS`` rows by one panel of outputs."""

    def __init__(self, e: Emitter, dtype: str, task: Int, num_rows: Int, bias: Int, out: Int, num_out: Int) -> None:
        self._e, self._dtype, self._num_out = e, dtype, num_out
        self._size = itemsize(dtype)
        self._panel_size = e.isa.lanes * e.isa.tile_vectors
        row_parts = (num_rows + (TASK_ROWS - 1)) // TASK_ROWS
        self.panel = task // row_parts
        self._first = task % row_parts * TASK_ROWS
        self._stop = (self._first + TASK_ROWS).min(num_rows)
        begin = self.panel * self._panel_size
        self._bias, self._out = bias + begin * self._size, out + begin * self._size
        # Of the panel's outputs these exist.
        self._num_columns = (num_out - begin).min(self._panel_size)
        self._spare = e.scratch(self._panel_size * self._size)

    def by_rows(self, tile: Callable[[Int, int], None]) -> None:
        """``tile(row, num_rows)`` over the task's rows."""
        self._e.by_rows(self._first, self._stop, self._e.isa.tile_rows, tile)

    def finish(self, row: Int, totals: list[Vec]) -> None:
        """Of some rows from ``row`` on, one behind the other the vectors of the panel: add the bias and write them."""
        e, vectors = self._e, self._e.isa.tile_vectors
        width = e.isa.lanes * self._size
        biases = [e.load(self._dtype, self._bias + v * width, e.isa.lanes) for v in range(vectors)]
        for i in range(len(totals) // vectors):
            sums = [totals[i * vectors + v] + biases[v] for v in range(vectors)]
            self._write(sums, self._out + (row + i) * self._num_out * self._size)

    def _write(self, sums: list[Vec], target: Int) -> None:
        with self._e.b.if_else(self._num_columns < self._panel_size) as (in_part, whole):
            with whole:
                self._store(sums, target)
            with in_part:
                self._store(sums, self._spare)
                with self._e.loop(0, self._num_columns * self._size, self._size) as column:
                    self._e.copy(self._spare + column.index, target + column.index, self._size)

    def _store(self, sums: list[Vec], target: Int) -> None:
        for v, value in enumerate(sums):
            self._e.store(self._dtype, value, target + v * value.width * self._size)


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
