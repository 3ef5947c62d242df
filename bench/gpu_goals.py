"""The goals of the GPU benchmark: floor, goal and stretch of each kernel, as shares of the copy and product rates of
the same run, or relative to a peer.

Written for an H200 (copies 4.3 TB/s, read and written; bf16 products 790 TFLOP/s). Does not import torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Goal:
    """A goal for rows whose kernel, shape and part match. Values of ``key`` must be at least these, or at most if they
    are times."""

    kernel: str
    shape: str
    part: str
    key: str
    levels: tuple[float, ...]
    is_most: bool = False

    def matches(self, line: dict[str, Any]) -> bool:
        return all(
            re.fullmatch(pattern, line[name])
            for name, pattern in (("kernel", self.kernel), ("shape", self.shape), ("part", self.part))
        )

    def reached(self, value: float) -> int:
        """The number of levels reached."""
        return sum(value <= level if self.is_most else value >= level for level in self.levels)


def _peer(kernel: str, shape: str, peer: str, *levels: float) -> Goal:
    return Goal(kernel, shape, f"peer {peer}", "ratio", levels)


_DECODE, _PREFILL = "decode attention, .*", "prefill attention, .*"
_NORMS = "RMSNorm|add and RMSNorm|SwiGLU|RoPE and KV write"
GOALS = (
    # Three sizes: 512 MB of keys and values and more; 128 to 512 MB; one sequence.
    Goal(_DECODE, "(32|64) x (4096|8192)|256 x 1024", "time", "percent_of_copy", (80, 90, 95)),
    Goal(_DECODE, "8 x 4096", "time", "percent_of_copy", (65, 75, 85)),
    Goal(_DECODE, "1 x 32768", "time", "percent_of_copy", (55, 65, 72)),
    Goal(_DECODE, "1 x 4096", "time", "us", (20, 16, 12), is_most=True),
    _peer(_DECODE, ".*", "sdpa_.*", 1.1),
    Goal(_PREFILL, r"\d+ x (8192|16384|32768)", "time", "percent_of_products", (45, 60, 76)),
    Goal(_PREFILL, r"\d+ x 2048", "time", "percent_of_products", (30, 40, 55)),
    _peer(_PREFILL, ".*", "sdpa_flash", 1.0, 1.25, 1.6),
    _peer(_PREFILL, ".*", "sdpa_cudnn", 0.65, 0.80, 0.95),
    _peer("prefill attention, blocks .*", ".*", "own_contiguous", 0.92),
    _peer("shared prefix", "64 rows, prefix 8192, suffix 256", "own_plain", 5, 8, 12),
    _peer("shared prefix", ".*", "own_plain", 0.97),
    _peer("product, .*", "(1024|4096|8192) rows", "cublas", 0.85, 0.93, 0.99),
    # Weights of 100 MB and more; smaller ones are rotated through more than the cache.
    Goal("product, (gate and up|down|head) .*", "(1|16|64|128) rows", "time", "percent_of_copy", (80, 88, 94)),
    Goal("product, (qkv|output) .*", "(1|16|64|128) rows", "time", "percent_of_copy", (60, 70, 80)),
    _peer("product, .*", "(1|16|64|128) rows", "cublas", 0.90, 0.97, 1.05),
    Goal(_NORMS, "16384 .*", "time", "percent_of_copy", (85, 92, 97)),
    Goal(_NORMS, "(1|64) .*", "time", "us", (4, 3, 2.5), is_most=True),
    Goal("sampling, (greedy|plain)", ".*", "time", "us", (100,), is_most=True),
    Goal("sampling, .*", ".*", "time", "us", (200,), is_most=True),
    Goal("blocks (in|out)", ".*", "time", "percent_of_copy", (75, 85, 92)),
    Goal("decode step, 8B", "1 x 1024", "time", "us", (5000, 4400, 4000), is_most=True),
    Goal("decode step, 8B", "64 x 4096", "time", "us", (16400, 14400, 13000), is_most=True),
    _peer("decode step, .*", ".*", "transformers_eager", 3.0),
    _peer("decode step, .*", ".*", "transformers_static", 1.2),
    Goal("decode step, 0.6B", ".*", "time", "percent_of_copy", (40, 55, 70)),
    Goal("prefill, 8B", ".*", "time", "percent_of_products", (60, 70, 78)),
)  # fmt: skip
_NAMES = ("below the floor", "floor", "goal", "stretch")


def goals_of(line: dict[str, Any]) -> Iterator[Goal]:
    """For each figure of the row, the first goal that matches."""
    seen = set()
    for goal in GOALS:
        if goal.key in line and goal.key not in seen and goal.matches(line):
            seen.add(goal.key)
            yield goal


def verdicts(line: dict[str, Any]) -> list[str]:
    """The goals of a row and whether they were reached, for a table."""
    found = []
    for goal in goals_of(line):
        levels = "/".join(f"{level:g}" for level in goal.levels)
        unit = {"us": " us", "ratio": "x"}.get(goal.key, f" % of {goal.key[11:]}")
        reached = goal.reached(line[goal.key])
        names = _NAMES if len(goal.levels) > 1 else ("not met", "met")
        found.append(f"{'<=' if goal.is_most else '>='} {levels}{unit}: {names[reached]}")
    return found
