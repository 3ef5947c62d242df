"""x W^T + b with weights laid out once: one order of additions for one row or two thousand.

Weights are panels of ``tile_vectors`` vectors of outputs, [panels, in / s, outputs of the panel, s], where s elements
of the summed dimension are one step of a dot product; a panel is read front to back, which is all that a decode step
needs to run at the memory's speed. ``tile_rows`` rows by one panel are summed in registers over the whole input, so
every result is one chain of additions whatever M, and a panel stays in cache while the rows pass.
"""

from __future__ import annotations

import functools

from torch import Tensor
from torch.nn import functional

from engine.kernels.cpu.llvm import Emitter, Int, Isa, Kernel, itemsize, per_dot

# Rows that one task takes through a panel: enough that loading the panel does not show.
_TASK_ROWS = 384


class CpuLinear:
    """A layer ready for use; holds its own copy of the weights. 2 M N K operations, N K elements read."""

    def __init__(self, isa: Isa, weight: Tensor, bias: Tensor | None) -> None:
        """weight [out, in], bias [out], float32, bfloat16 or float16."""
        dtype = str(weight.dtype).removeprefix("torch.")
        self._num_out, self._num_in = weight.shape
        panel, step = isa.lanes * isa.tile_vectors, per_dot(dtype)
        missing = -self._num_out % panel, -self._num_in % step
        padded = functional.pad(weight, (0, missing[1], 0, missing[0]))
        self._padded_out, self._padded_in = padded.shape
        self._num_panels = self._padded_out // panel
        self._panels = padded.view(self._num_panels, panel, -1, step).transpose(1, 2).contiguous()
        self._bias = weight.new_zeros(self._padded_out)
        if bias is not None:
            self._bias[: self._num_out] = bias
        self._kernel = _kernel(isa, dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """x [rows, in] -> [rows, out]."""
        assert x.shape[1] == self._num_in, f"{x.shape[1]} features instead of {self._num_in}"
        x = x.contiguous()
        if self._padded_in != self._num_in:
            x = functional.pad(x, (0, self._padded_in - self._num_in))
        num_rows = len(x)
        out = x.new_empty(num_rows, self._padded_out)
        self._kernel(
            self._num_panels * -(-num_rows // _TASK_ROWS),
            *(x.data_ptr(), self._panels.data_ptr(), self._bias.data_ptr(), out.data_ptr()),
            *(num_rows, self._padded_in, self._num_panels),
        )
        return out if self._padded_out == self._num_out else out[:, : self._num_out].contiguous()


@functools.cache
def _kernel(isa: Isa, dtype: str) -> Kernel:
    width, vectors, size, step = isa.lanes, isa.tile_vectors, itemsize(dtype), per_dot(dtype)
    panel_size = width * vectors

    def build(e: Emitter, task: Int, parameters: list[Int]) -> None:
        x, weights, bias, out, num_rows, num_in, num_panels = parameters
        row_parts = (num_rows + (_TASK_ROWS - 1)) // _TASK_ROWS
        panel, part = task // row_parts, task % row_parts
        first = part * _TASK_ROWS
        weights = weights + panel * num_in * (panel_size * size)
        bias = bias + panel * (panel_size * size)
        out = out + panel * (panel_size * size)

        def tile(row: Int, num_tile_rows: int) -> None:
            """Registers [tile rows, vectors], kept over the whole input."""
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
            for i in range(num_tile_rows):
                target = out + (row + i) * num_panels * (panel_size * size)
                for v in range(vectors):
                    added = loop.values[i * vectors + v] + e.load(dtype, bias + v * width * size, width)
                    e.store(dtype, added, target + v * width * size)

        e.by_rows(first, (first + _TASK_ROWS).min(num_rows), isa.tile_rows, tile)

    return Kernel(f"linear_{dtype}", isa, 7, build)
