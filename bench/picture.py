"""Draws a window of a trace written by `baton trace` as SVG: a row per node, with transfers below the steps that hide
them.

    python -m bench.picture trace.json picture.svg --from-ms 100 --to-ms 900
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from loadgen import svg

_WIDTH, _LEFT, _RIGHT, _TOP = 1000, 120, 12, 46
_ROW, _GAP = 15, 12
_COLOURS = {"prefill": "#2f6fde", "mixed": "#2f6fde", "decode": "#1a8754", "transfer": "#f0c9a6", "exposed": "#c2570c",
            "write": "#7a51c4"}  # fmt: skip
_LEGEND = [("prefill", "prefill step"), ("decode", "decode step"), ("transfer", "KV transfer, hidden by the prompt"),
           ("exposed", "not hidden"), ("write", "layers being written")]  # fmt: skip
# Rows of a node, top down, and the slices in each.
_ROWS = (("prefill", "decode", "mixed"), ("transfer", "exposed"), ("write",))


@dataclass(frozen=True, slots=True)
class _Window:
    from_ms: float
    to_ms: float

    def x(self, at_us: float) -> float:
        share = (at_us / 1e3 - self.from_ms) / (self.to_ms - self.from_ms)
        return _LEFT + min(1.0, max(0.0, share)) * (_WIDTH - _LEFT - _RIGHT)

    def has(self, event: dict[str, Any]) -> bool:
        return bool(event["ts"] / 1e3 < self.to_ms and (event["ts"] + event["dur"]) / 1e3 > self.from_ms)


def draw(document: dict[str, Any], window: _Window) -> str:
    events = [e for e in document["traceEvents"] if e["ph"] == "X" and e.get("cat") in _COLOURS and window.has(e)]
    names = {e["pid"]: e["args"]["name"] for e in document["traceEvents"] if e["name"] == "process_name"}
    parts: list[str] = []
    y = _TOP
    for pid in sorted({e["pid"] for e in events}):
        name, _, _ = names[pid].partition(" ")
        parts.append(svg.text(8, y + 11, name, "bold"))
        for categories in _ROWS:
            mine = [e for e in events if e["pid"] == pid and e["cat"] in categories]
            for row in sorted({e["tid"] for e in mine}):
                parts += _bars([e for e in mine if e["tid"] == row], window, y)
                y += _ROW + 2
        y += _GAP
        parts.append(f'<path d="M8 {y - _GAP / 2}H{_WIDTH - _RIGHT}" stroke="#dfe1e4"/>')
    parts += _axis(window, y)
    return svg.document(_WIDTH, y + 22, "Timeline of a run", [*_legend(), *parts])


def _bars(events: Sequence[dict[str, Any]], window: _Window, y: float) -> Iterator[str]:
    for event in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
        left, right = window.x(event["ts"]), window.x(event["ts"] + event["dur"])
        width = max(right - left, 0.6)
        title = escape(f"{event['name']}, {event['dur'] / 1e3:.1f} ms")
        yield (
            f'<rect x="{left:.1f}" y="{y}" width="{width:.1f}" height="{_ROW}" rx="1.5" '
            f'fill="{_COLOURS[event["cat"]]}"><title>{title}</title></rect>'
        )
        if event["cat"] in ("prefill", "mixed") and width > 7 * len(event["name"]):
            yield svg.text(left + 5, y + 11, event["name"], "in")


def _axis(window: _Window, y: float) -> Iterator[str]:
    length_ms = window.to_ms - window.from_ms
    step_ms = svg.round_step(length_ms)
    for i in range(int(length_ms / step_ms) + 1):
        x = window.x((window.from_ms + i * step_ms) * 1e3)
        yield f'<path d="M{x:.1f} {_TOP - 6}V{y - 4}" stroke="#5d636b" stroke-opacity=".18"/>'
        yield svg.text(min(x, _WIDTH - 50), y + 12, f"{i * step_ms:g} ms", "soft")


def _legend() -> Iterator[str]:
    x = float(_LEFT)
    for category, said in _LEGEND:
        yield f'<rect x="{x}" y="12" width="11" height="11" rx="2" fill="{_COLOURS[category]}"/>' + svg.text(
            x + 16, 22, said
        )
        x += 34 + 6.1 * len(said)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--from-ms", type=float, default=0.0)
    parser.add_argument("--to-ms", type=float, default=float("inf"))
    arguments = parser.parse_args()
    document = json.loads(arguments.trace.readsvg.text())
    last_ms = max((e["ts"] + e["dur"]) / 1e3 for e in document["traceEvents"] if e["ph"] == "X")
    window = _Window(arguments.from_ms, min(arguments.to_ms, last_ms))
    arguments.picture.writesvg.text(draw(document, window))


if __name__ == "__main__":
    main()
