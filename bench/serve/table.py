"""Two cores of work in several ways, and the frontier between a prompt's wait and the gaps between tokens.

Split, mixed, and mixed with a target for the gap between tokens (50 to 500 ms): under an open loop and two closed ones.
The aim is one configuration, two mixed workers with a target of 100 ms: gap p99 at most 110 ms, with TTFT p99 at most
1.2 times and tokens/s at least 0.9 times those of the best mixed configuration without a target.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.serve.turns import Result, Setting, take_turns
from loadgen.clusters import Shape
from loadgen.compare import Comparison
from loadgen.figures import Figures
from loadgen.load import Load, closed, poisson, same_size
from loadgen.pictures import frontier
from loadgen.report import table

TARGETS_MS = (50, 100, 200, 500)
_LIMIT_S = 180.0
_OUTPUT_TOKENS = 64
AIMED = "2 mixed, target 100 ms"
_MIXED = ("1 mixed", "2 mixed")
SHAPES = (
    Shape("1 mixed", ("--mixed", "1")),
    Shape("2 mixed", ("--mixed", "2")),
    *(Shape(f"2 mixed, target {ms} ms", ("--mixed", "2", "--tbt-target-ms", str(ms))) for ms in TARGETS_MS),
    Shape("1+1 split", ("--prefill", "1", "--decode", "1", "--disaggregation", "always")),
    Shape("1+1 auto", ("--prefill", "1", "--decode", "1", "--tbt-target-ms", "100")),
)


def loads(setting: Setting, number: int) -> tuple[Load, ...]:
    rate = 0.45
    requests = same_size(max(1, round(rate * setting.seconds)), 1024, _OUTPUT_TOKENS)
    return (
        poisson(f"open loop {rate:g}/s 1024 in", requests, rate, _LIMIT_S, str(number)),
        closed("8 streams 512 in", same_size(setting.count(16), 512, _OUTPUT_TOKENS), 8, _LIMIT_S),
        closed("32 streams 512 in", same_size(setting.count(48), 512, _OUTPUT_TOKENS), 32, _LIMIT_S),
    )


async def run(setting: Setting) -> Result:
    comparison = await take_turns(setting, SHAPES, lambda number: loads(setting, number))
    setting.console.print(table(comparison))
    record = comparison.as_json(has_requests=False) | {"aims": aims(comparison)}
    title = "Time to first token against the gap between tokens: targets for the gap, and a split cluster"
    return Result(record, {"serve-frontier": frontier(comparison, title)})


def aims(comparison: Comparison) -> list[dict[str, Any]]:
    """For each load that was measured on all: the aimed configuration beside the best mixed one."""
    by_load: dict[str, dict[str, Figures]] = {}
    for (target, load), figures in comparison.pooled().items():
        if figures.whole:
            by_load.setdefault(load, {})[target] = figures
    return [
        {"load": load, "configuration": AIMED, **_aim(found[AIMED], [found[mixed] for mixed in _MIXED])}
        for load, found in by_load.items()
        if found.keys() >= {AIMED, *_MIXED}
    ]


def _aim(ours: Figures, mixed: Sequence[Figures]) -> dict[str, Any]:
    gap_ms = (ours.gap_s.p99 or 0.0) * 1e3
    ttft = (ours.ttft_s.p99 or 0.0) / min(f.ttft_s.p99 for f in mixed if f.ttft_s.p99)
    tokens = ours.tokens_s / max(f.tokens_s for f in mixed)
    return {
        "gap_p99_ms": gap_ms, "ttft_p99_over_best": ttft, "tokens_s_over_best": tokens,
        "is_met": gap_ms <= 110 and ttft <= 1.2 and tokens >= 0.9,
    }  # fmt: skip
