"""The KV arena as tensors. The scheduler decides which block is written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from baton.errors import BadConfig
from baton.types import KvLayout

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class DeviceBuffer(Protocol):
    """GPU memory that was allocated outside the engine."""

    @property
    def __cuda_array_interface__(self) -> Mapping[str, object]: ...


class Allocate(Protocol):
    def __call__(self, num_bytes: int, device: str = "cpu") -> memoryview | DeviceBuffer:
        """The memory of a KV cache, where the kernels want it."""


class KvCache:
    """Views over one arena of ``layout.total_bytes`` bytes.

    With a ``buffer`` the cache lies in it (writable, for example a shared mapping) and keeps it alive. Without one it
    allocates on ``device``, where a buffer that is not the processor's lies as well. Contents are never assumed:
    unwritten rows may hold anything, NaN included.
    """

    def __init__(
        self, layout: KvLayout, buffer: memoryview | DeviceBuffer | None = None, device: torch.device | None = None
    ) -> None:
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
            if isinstance(buffer, memoryview):
                num_bytes, is_readonly = buffer.nbytes, buffer.readonly
            else:
                buffer = torch.as_tensor(buffer, dtype=torch.uint8, device=device)
                num_bytes, is_readonly = buffer.nbytes, False
            if is_readonly or num_bytes != layout.total_bytes:
                raise BadConfig(
                    f"KV buffer has {num_bytes} bytes ({'read-only' if is_readonly else 'writable'}), "
                    f"expected {layout.total_bytes} writable bytes for {layout}"
                )
            given = torch.frombuffer(buffer, dtype=dtype) if isinstance(buffer, memoryview) else buffer.view(dtype)
            self._arena = given.view(shape)
        self._layers = tuple(self._arena.unbind(0))

    def layer(self, index: int) -> Tensor:
        """[num_blocks, num_kv_heads, 2 (K, V), block_tokens, head_dim], contiguous."""
        return self._layers[index]
