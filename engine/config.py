"""The settings of one replica of a model. No torch."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from baton.errors import BadConfig
from baton.settings import check, setting
from baton.types import DTYPE_BYTES
from engine.scheduler_config import SchedulerConfig

# The processor's attention is compiled for a block's length, in a time that grows with its square: 0.2 s for 64 tokens,
# 0.6 s for 256, 1.8 s for 512, a minute for 4096.
_MAX_BLOCK_TOKENS = 256


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How one replica runs. ``num_blocks`` wins over ``kv_bytes``.

    Without either the KV cache is what the device's memory leaves (``engine/memory.py``): on a GPU up to
    ``gpu_memory_utilization`` of its total, which ``gpu_workers`` share; on a processor part of what is free.
    """

    dtype: str = field(
        default="auto",
        metadata=setting(
            "--dtype",
            "auto is what the model was saved in.",
            choices=("auto", *DTYPE_BYTES),
            synonyms=(("half", "float16"), ("float", "float32")),
        ),
    )
    kernels: str = field(
        default="auto",
        metadata=setting(
            "--kernels",
            "cpu, triton (for GPUs), reference (plain torch, slow), or auto: triton with an NVIDIA GPU from sm_80 on, "
            "else cpu.",
            choices=("auto", "cpu", "triton", "reference"),
        ),
    )
    quantization: str = field(
        default="none",
        metadata=setting(
            "--quantization",
            "int8: weights become 8-bit integers at load, activations in every step; half of bfloat16's bytes, "
            "slightly other tokens. Not on a GPU. The same for all workers.",
            choices=("none", "int8"),
        ),
    )
    # Of torch's names.
    device: str = field(
        default="auto",
        metadata=setting(
            "--device",
            "Where it computes, by torch's names (CUDA_VISIBLE_DEVICES counts). auto: the first GPU where the "
            "kernels can use it.",
            metavar="auto|cpu|cuda:N",
            up_file=False,
        ),
    )
    gpu_memory_utilization: float = field(
        default=0.9,
        metadata=setting(
            "--gpu-memory-utilization",
            "Share of a GPU's memory that all workers on it may take together, what others have of it included.",
            least=0.01,
            most=1.0,
        ),
    )
    gpu_workers: int = field(
        default=1,
        metadata=setting(
            "--gpu-workers",
            "Workers that share its GPU, which have equal parts of the memory.",
            least=1,
            most=256,
            up_file=False,
        ),
    )
    kv_bytes: int | None = field(
        default=None,
        metadata=setting(
            "--kv-mib",
            "KV cache of a worker in MiB. 0: what --gpu-memory-utilization leaves on a GPU, on a processor half of "
            "what the weights leave of the free memory.",
            unit=1 << 20,
            none=0,
            most=2**31 - 1,
        ),
    )
    num_blocks: int | None = field(
        default=None,
        metadata=setting(
            "--num-blocks",
            "KV cache of a worker in blocks, instead of --kv-mib. 0: by that.",
            aliases=("--num-gpu-blocks-override",),
            none=0,
            most=2**31 - 1,
        ),
    )
    block_tokens: int = field(
        default=64,
        metadata=setting(
            "--block-tokens",
            "Tokens in a KV block, a power of two from 16 to 256; the same in a whole cluster.",
            aliases=("--block-size",),
        ),
    )
    max_model_tokens: int | None = field(
        default=None,
        metadata=setting(
            "--max-model-len",
            "Tokens of a prompt and its answer together; the same for all workers. 0: as many as the model has.",
            none=0,
            most=2**31 - 1,
        ),
    )
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    max_graph_seqs: int = field(
        default=256,
        metadata=setting(
            "--max-graph-seqs",
            "GPUs record decode steps of up to so many sequences at the start. 0 = none.",
            least=0,
            most=1 << 16,
        ),
    )
    is_batch_invariant: bool = field(
        default=True,
        metadata=setting(
            "--batch-invariant",
            "A request's tokens depend on nothing it is batched with. off lets GPUs use cuBLAS where it is faster: "
            "tokens then vary with the load, and after a failure.",
            choices=("on", "off"),
        ),
    )
    # 0 leaves torch's setting alone.
    num_threads: int = field(
        default=0,
        metadata=setting("--threads", "Threads of a worker. 0: the cores divided by the workers.", least=0, most=1024),
    )

    def __post_init__(self) -> None:
        check(self)
        is_on_gpu = self.quantization == "int8" and self.kernels == "triton"
        self._expect(not is_on_gpu, "quantization", "none with kernels triton: int8 is not on a GPU yet")
        is_power = self.block_tokens & (self.block_tokens - 1) == 0
        is_right = is_power and 16 <= self.block_tokens <= _MAX_BLOCK_TOKENS
        self._expect(is_right, "block_tokens", f"a power of two from 16 to {_MAX_BLOCK_TOKENS}")
        is_device = re.fullmatch(r"auto|cpu|cuda(:\d{1,4})?", self.device) is not None
        self._expect(is_device, "device", "auto, cpu, cuda or cuda:N")

    def _expect(self, ok: bool, name: str, expected: str) -> None:
        if not ok:
            raise BadConfig(f"{name} is {getattr(self, name)!r}, expected {expected}", param=name)
