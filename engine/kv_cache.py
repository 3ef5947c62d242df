"""The KV arena as tensors. Owns no block: who may write where is the scheduler's business."""

from __future__ import annotations

import torch
from torch import Tensor

from baton.errors import BadConfig
from baton.types import KvLayout

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class KvCache:
    """Views over one arena of ``layout.total_bytes`` bytes.

    With a ``buffer`` the cache lies in it (writable, for example a shared mapping) and keeps it alive; without one it
    allocates on ``device``. Contents are never assumed: unwritten rows may hold anything, NaN included.
    """

    def __init__(self, layout: KvLayout, buffer: memoryview | None = None, device: torch.device | None = None) -> None:
        self.layout = layout
        dtype = TORCH_DTYPES[layout.dtype]
        shape = (
            layout.num_layers,
            layout.num_blocks,
            layout.num_kv_heads,
            2,
            layout.block_tokens,
            layout.head_dim,
        )
        if buffer is None:
            self._arena = torch.empty(shape, dtype=dtype, device=device)
        else:
            if buffer.readonly or buffer.nbytes != layout.total_bytes:
                raise BadConfig(
                    f"KV buffer has {buffer.nbytes} bytes ({'read-only' if buffer.readonly else 'writable'}), "
                    f"expected {layout.total_bytes} writable bytes for {layout}"
                )
            self._arena = torch.frombuffer(buffer, dtype=dtype).view(shape)
        self._layers = tuple(self._arena.unbind(0))

    def layer(self, index: int) -> Tensor:
        """[num_blocks, num_kv_heads, 2 (K, V), block_tokens, head_dim], contiguous."""
        return self._layers[index]
