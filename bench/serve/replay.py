"""The Azure traces at three rates each: split, aggregated and conditional disaggregation.

Lengths are a quarter of the trace's, so that one core computes a prompt in about a second. Conditional disaggregation
is to be within 5 % of the better of the other two in every cell.
"""

from __future__ import annotations

from typing import Any

from bench.serve.turns import Result, Setting, take_turns
from loadgen import traces
from loadgen.clusters import Shape
from loadgen.compare import Comparison
from loadgen.figures import Figures
from loadgen.load import Load, replayed
from loadgen.pictures import against_load
from loadgen.report import counters_table, table

_SCALE = traces.Scale(prompt=0.25, output=0.25, max_prompt_tokens=1500, max_output_tokens=128)
# Requests a second: about a third, two thirds and nearly all of what the split cluster can do on two cores.
RATES = {"code": (0.3, 0.6, 0.9), "conv": (0.5, 1.0, 1.5)}
_LIMIT_S = 120.0
_TARGET = ("--tbt-target-ms", "100")
_SPLIT = ("--prefill", "1", "--decode", "1")
AGGREGATED, CONDITIONAL = "aggregated", "conditional"
SHAPES = (
    Shape("split", (*_SPLIT, "--disaggregation", "always")),
    Shape(AGGREGATED, ("--mixed", "2", *_TARGET)),
    Shape(CONDITIONAL, (*_SPLIT, *_TARGET)),
)
# What the cluster counted, by the beginnings of the counters' names.
_COUNTED = {
    "baton_role_changes_total": "role changes",
    "baton_transfer_bytes_total": "bytes moved",
    "baton_computed_tokens_total{phase=prefill": "prompt tokens computed",
    "baton_placements_total{reason=pools": "split",
    "baton_placements_total{reason=whole": "whole",
    "baton_placements_total{reason=borrowed": "borrowed",
    "baton_preemptions_total": "preempted",
}


def loads(setting: Setting, number: int) -> tuple[Load, ...]:
    """Each round replays the next part of the traces, the same for all clusters."""
    made = []
    for name, rates in RATES.items():
        rows = traces.read(name)
        for rate in rates:
            count = max(2, round(rate * setting.seconds))
            part = rows[number * count : (number + 1) * count]
            made.append(replayed(f"{name} {rate:g}/s", part, _SCALE, rate, _LIMIT_S))
    return tuple(made)


async def run(setting: Setting) -> Result:
    reference = next(shape for shape in SHAPES if shape.name == AGGREGATED)
    comparison = await take_turns(setting, SHAPES, lambda number: loads(setting, number), reference)
    setting.console.print(table(comparison), counters_table(comparison, _COUNTED))
    record = comparison.as_json(has_requests=False) | {"conditional_over_best": against_best(comparison)}
    pictures = {}
    for name in RATES:
        title = f"The {name} trace, a quarter of its lengths: split, aggregated, conditional"
        pictures[f"serve-replay-{name}"] = against_load(comparison.of_loads(f"{name} "), title)
    return Result(record, pictures)


def against_best(comparison: Comparison) -> list[dict[str, Any]]:
    """For each load: figures of conditional over the better of the other two; above 1 is worse but for goodput."""
    cells = comparison.pooled()
    rows = []
    for load in dict.fromkeys(load for _, load in cells):
        names = [name for name, of in cells if of == load]
        others = [cells[name, load] for name in names if name != CONDITIONAL]
        if CONDITIONAL in names and len(others) == 2:
            ours = _figures(cells[CONDITIONAL, load])
            best = [_figures(other) for other in others]
            row: dict[str, Any] = {"load": load}
            for key, value in ours.items():
                found = [other for each in best if (other := each[key])]
                bound = (max if key == "goodput_requests_s" else min)(found, default=None)
                row[key] = None if value is None or bound is None else value / bound
            rows.append(row)
    return rows


def _figures(figures: Figures) -> dict[str, float | None]:
    return {
        "ttft_p50": figures.ttft_s.p50, "ttft_p99": figures.ttft_s.p99, "gap_p50": figures.gap_s.p50,
        "gap_p99": figures.gap_s.p99, "e2e_p50": figures.e2e_s.p50, "e2e_p99": figures.e2e_s.p99,
        "goodput_requests_s": figures.tolerable_requests_s,
    }  # fmt: skip
