"""Draws charts of figures as SVG: panels in columns, lines of the same name in the same colour."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from loadgen import svg

_WIDTH, _HEIGHT = 460, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 18, 34, 44
_HEAD, _LEGEND_ROW = 34, 18
# Distinct also for those who see few colours; dashes repeat them.
_COLOURS = ("#2f6fde", "#c2570c", "#1a8754", "#7a51c4", "#b3261e", "#5d636b", "#0c8a9e", "#a06a00")
_LEGEND_CHAR = 6.3


@dataclass(frozen=True, slots=True)
class Point:
    """``label`` is written beside it."""

    x: float
    y: float
    label: str = ""


@dataclass(frozen=True, slots=True)
class Line:
    """``is_joined``: a line through its points; else the points alone."""

    name: str
    points: tuple[Point, ...]
    is_joined: bool = True


@dataclass(frozen=True, slots=True)
class Panel:
    """``is_log``, ``is_log_x``: that axis is logarithmic; points that are not above 0 are left out then."""

    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    is_log: bool = False
    is_log_x: bool = False

    def can_show(self, point: Point) -> bool:
        return (point.y > 0 or not self.is_log) and (point.x > 0 or not self.is_log_x)


@dataclass(frozen=True, slots=True)
class _Axis:
    """Values from ``low`` to ``high`` on pixels from ``start`` to ``end``."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def at(self, value: float) -> float:
        low, high, value = (math.log10(v) if self.is_log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> Iterator[float]:
        if self.is_log:
            for power in range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1):
                for factor in (1, 2, 5):
                    if self.low <= factor * 10.0**power <= self.high * 1.0001:
                        yield factor * 10.0**power
            return
        step = svg.round_step(self.high - self.low, 6)
        for i in range(math.ceil(self.low / step), math.floor(self.high / step + 1e-9) + 1):
            yield i * step


def draw(title: str, panels: Sequence[Panel], columns: int = 2) -> str:
    names = list(dict.fromkeys(line.name for panel in panels for line in panel.lines))
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}
    dashes = {name: "" if i < len(_COLOURS) else ' stroke-dasharray="5 3"' for i, name in enumerate(names)}
    columns = min(columns, len(panels)) or 1
    rows = -(-len(panels) // columns)
    width = columns * _WIDTH
    legend, head = _legend(names, colours, width)
    height = head + rows * _HEIGHT
    parts = [svg.text(12, 20, title, "bold"), *legend]
    for i, panel in enumerate(panels):
        x, y = i % columns * _WIDTH, head + i // columns * _HEIGHT
        parts += [f'<g transform="translate({x} {y})">', *_panel(panel, colours, dashes), "</g>"]
    return svg.document(width, height, title, parts)


def _legend(names: Sequence[str], colours: dict[str, str], width: float) -> tuple[list[str], float]:
    """Its parts, in as many rows as it needs, and where it ends."""
    parts, x, y = [], 12.0, float(_HEAD)
    for name in names:
        length = 34 + _LEGEND_CHAR * len(name)
        if x + length > width and x > 12.0:
            x, y = 12.0, y + _LEGEND_ROW
        parts.append(f'<rect x="{x:.1f}" y="{y - 3:.1f}" width="11" height="11" rx="2" fill="{colours[name]}"/>')
        parts.append(svg.text(x + 16, y + 7, name))
        x += length
    return parts, y + _LEGEND_ROW


def _panel(panel: Panel, colours: dict[str, str], dashes: dict[str, str]) -> Iterator[str]:
    drawn = [(line, list(filter(panel.can_show, line.points))) for line in panel.lines]
    points = [point for _, shown in drawn for point in shown]
    yield svg.text(_LEFT, 22, f"{panel.title}, {panel.y_label}", "bold")
    if not points:
        yield svg.text(_LEFT, _HEIGHT / 2, "nothing was measured", "soft")
        return
    across = _axis([p.x for p in points], _LEFT, _WIDTH - _RIGHT, is_log=panel.is_log_x)
    up = _axis([p.y for p in points], _HEIGHT - _BOTTOM, _TOP, is_log=panel.is_log)
    yield from _grid(panel, across, up)
    for line, shown in drawn:
        places = [(across.at(p.x), up.at(p.y), p) for p in shown]
        for (x1, y1, _), (x2, y2, _) in pairwise(places if line.is_joined else ()):
            colour = f'stroke="{colours[line.name]}" stroke-width="1.8"{dashes[line.name]}'
            yield f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" {colour}/>'
        for x, y, point in places:
            title = escape(f"{line.name}: {panel.x_label} {point.x:.4g}, {panel.y_label} {point.y:.4g}")
            circle = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.4" fill="{colours[line.name]}">'
            yield f"{circle}<title>{title}</title></circle>"
            if point.label:
                yield svg.text(x + 6, y - 5, point.label, "soft")


def _axis(values: Sequence[float], start: float, end: float, *, is_log: bool) -> _Axis:
    """A linear one has zero on it."""
    low, high = min(values), max(values)
    if is_log:
        return _Axis(low / 1.3, high * 1.3, start, end, is_log=True)
    low = min(0.0, low)
    return _Axis(low, high * 1.08 if high > low else low + 1.0, start, end)


def _grid(panel: Panel, across: _Axis, up: _Axis) -> Iterator[str]:
    for value in up.ticks():
        y = up.at(value)
        yield f'<path d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}" stroke="#5d636b" stroke-opacity=".18"/>'
        yield svg.text(_LEFT - 6, y + 4, f"{value:g}", "end")
    for value in across.ticks():
        yield svg.text(across.at(value), _HEIGHT - _BOTTOM + 16, f"{value:g}", "middle")
    yield f'<path d="M{_LEFT} {_HEIGHT - _BOTTOM}H{_WIDTH - _RIGHT}" stroke="#5d636b"/>'
    yield svg.text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 10, panel.x_label, "middle")
