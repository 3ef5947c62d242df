"""Matrix products by oneDNN, through torch, for processors with matrix instructions that our own vector code does not
use.

These are AMX on x86 and bfmmla on ARM. The bits of a row of such a product depend on the number of rows, except, as far
as observed, when that is a multiple of 8. Since this is not guaranteed, `is_exact` tests it at start. The operators are
private to torch and may change.

Not measured on such a processor: none was at hand. Forced on one with avx512_bf16 it gives correct and exact results.
"""

from __future__ import annotations

import platform
from functools import partial

import torch
from llvmlite import binding as llvm
from torch import Tensor
from torch.nn import functional

from engine.kernels.cpu.program import Tape

_ROW_MULTIPLE = 8
# Numbers of rows to compare with a single row: tails of tiles, the largest usual chunk.
_PROBED_ROWS = (8, 24, 40, 64, 136, 512)


def has_matrix_units() -> bool:
    """Whether the processor has matrix instructions for bfloat16 that our code does not use."""
    features = llvm.get_host_cpu_features()
    return bool(features.get("amx-bf16") or (platform.machine() == "aarch64" and features.get("bf16")))


def is_exact() -> bool:
    """Whether torch has the operators and a row's bits do not depend on the others; takes a tenth of a second."""
    generator = torch.Generator().manual_seed(0)
    try:
        for num_out, num_in in ((192, 256), (1000, 1056)):
            weight = torch.randn(num_out, num_in, generator=generator).bfloat16()
            linear = OneDnnLinear(Tape(), weight, None)
            x = torch.randn(max(_PROBED_ROWS), num_in, generator=generator).bfloat16()
            alone = torch.cat([linear(row[None]) for row in x[:: len(x) // 16]])
            for rows in _PROBED_ROWS:
                found = linear(x[:rows].clone())[:: len(x) // 16]
                if not torch.equal(found, alone[: len(found)]):
                    return False
    except (AttributeError, RuntimeError):
        return False
    return True


class OneDnnLinear:
    """A layer with the weights as packed by oneDNN."""

    def __init__(self, tape: Tape, weight: Tensor, bias: Tensor | None) -> None:
        """weight [out, in], bias [out]."""
        self._tape = tape
        self._num_out = len(weight)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROW_MULTIPLE)  # noqa: SLF001
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        out = self._tape.empty(x, self._num_out)
        self._tape.call(partial(self._apply, x.view(x.shape), out.view(out.shape)), x)
        return out

    def _apply(self, x: Tensor, out: Tensor, num_rows: int) -> None:
        padded = -(-num_rows // _ROW_MULTIPLE) * _ROW_MULTIPLE
        # The contents of rows beyond are irrelevant: no result depends on them.
        rows = x[:padded] if padded <= len(x) else functional.pad(x[:num_rows], (0, 0, 0, padded - num_rows))
        product = torch.ops.mkldnn._linear_pointwise(rows, self._weight, self._bias, "none", [], "")  # noqa: SLF001
        out[:num_rows] = product[:num_rows]
