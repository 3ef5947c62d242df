"""The cells of the engine comparison, the upper bound of each figure, and the probes beside each sample."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random

from bench import model as bench_model
from bench.measure import BandwidthProbe

CONTEXT_TOKENS = 512
# Limits between the memory regimes of a virtual machine, by read bandwidth.
REGIME_EDGES_GB_S = (35.0, 55.0)
_HEAD_PARAMETERS = bench_model.HIDDEN * bench_model.VOCAB_SIZE
_DTYPE_BYTES = 2


@dataclass(frozen=True, slots=True)
class Cell:
    """One line of the table. A prefill computes ``tokens``; a decode takes ``steps`` of ``batch`` sequences."""

    name: str
    kind: str  # prefill | decode
    tokens: int = CONTEXT_TOKENS
    batch: int = 1
    steps: int = 0
    repeats: int = 1

    def floor(self, context: float) -> tuple[float, float]:
        """The minimum operations and bytes of a sample's unit: a prefill or a step."""
        attention = 4.0 * bench_model.NUM_HEADS * bench_model.HEAD_DIM * bench_model.NUM_LAYERS
        weights = float(bench_model.NUM_STEP_PARAMETERS)
        kv_bytes = bench_model.kv_bytes_per_token(_DTYPE_BYTES)
        if self.kind == "prefill":
            # Each token attends to half of them on average; the head computes one.
            linear = 2.0 * (self.tokens * (weights - _HEAD_PARAMETERS) + _HEAD_PARAMETERS)
            return linear + attention * self.tokens * self.tokens / 2, weights * _DTYPE_BYTES + self.tokens * kv_bytes
        flops = self.batch * (2.0 * weights + attention * context)
        return flops, weights * _DTYPE_BYTES + self.batch * context * kv_bytes


CELLS = (
    Cell("prefill 512", "prefill", 512, repeats=3),
    Cell("prefill 2048", "prefill", 2048),
    Cell("decode batch 1", "decode", batch=1, steps=32),
    Cell("decode batch 8", "decode", batch=8, steps=16),
    Cell("decode batch 32", "decode", batch=32, steps=12),
)
QUICK_CELLS = tuple(cell for cell in CELLS if cell.name in ("prefill 512", "decode batch 1", "decode batch 8"))


def prompts(seed: str, count: int, num_tokens: int) -> list[list[int]]:
    """Prompts, the same for every engine; no two share a beginning."""
    rng = Random(seed)
    return [[rng.randrange(1, bench_model.VOCAB_SIZE) for _ in range(num_tokens)] for _ in range(count)]


def regime(read_gb_s: float, edges: tuple[float, float] = REGIME_EDGES_GB_S) -> str:
    low, high = edges
    if read_gb_s < low:
        return f"below {low:g} GB/s"
    return f"{low:g} to {high:g} GB/s" if read_gb_s < high else f"above {high:g} GB/s"


@dataclass(frozen=True, slots=True)
class Reading:
    """The machine's rates at one moment, with all measured cores."""

    read_gb_s: float
    gflop_s: float


class Probes:
    """Read bandwidth and oneDNN's bfloat16 product, each the best of a few: an interrupted probe is useless."""

    _ROWS, _OUT, _IN = 512, 5632, 1024
    _TRIES = 3

    def __init__(self, num_threads: int) -> None:
        import torch

        torch.set_num_threads(num_threads)
        self._memory = BandwidthProbe()
        self._x = torch.randn(self._ROWS, self._IN, dtype=torch.bfloat16)
        self._weight = torch.randn(self._OUT, self._IN, dtype=torch.bfloat16)
        # oneDNN's product; with prepacked weights it was no faster at this size.
        self._product = torch.nn.functional.linear
        self.read()

    def read(self) -> Reading:
        bandwidth = max(self._memory.read_gb_s() for _ in range(self._TRIES))
        return Reading(bandwidth, max(self._gflop_s() for _ in range(self._TRIES)))

    def _gflop_s(self) -> float:
        started = time.perf_counter()
        self._product(self._x, self._weight)
        return 2.0 * self._ROWS * self._OUT * self._IN / (time.perf_counter() - started) / 1e9


def between(before: Reading, after: Reading) -> Reading:
    return Reading(
        statistics.mean((before.read_gb_s, after.read_gb_s)), statistics.mean((before.gflop_s, after.gflop_s))
    )


def processor() -> dict[str, object]:
    """Family, model, name and the flags by which kernels are chosen."""
    wanted = ("vendor_id", "cpu family", "model", "model name", "stepping")
    found: dict[str, object] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = (part.strip() for part in line.partition(":"))
        if key in wanted:
            found.setdefault(key, value)
        elif key in ("flags", "Features"):
            families = ("avx", "amx", "fma", "f16c", "sve", "bf16", "i8mm", "asimd")
            found.setdefault("flags", [flag for flag in value.split() if flag.startswith(families)])
    return found
