"""The roles of a cluster's nodes over time: records them from a router, and draws them as SVG.

    python -m bench.roles --router 127.0.0.1:50051 --seconds 60 -o roles.svg

A node's row has its home role on top, its acting role below, and in it the sequences that it decodes (area) and the
prompts that it has (line). A bench records with ``record`` while it runs, and draws what it found with ``draw``.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from html import escape
from itertools import groupby
from pathlib import Path

from baton.client import Client
from baton.errors import BatonError
from baton.v1 import common_pb2, router_pb2
from loadgen import svg

# A borrowed node acts as mixed for seconds (`roles.dwell_s`).
_LOOK_EVERY_S = 0.1
_ANSWER_TIMEOUT_S = 1.0
_WIDTH, _LEFT, _RIGHT, _TOP = 1000, 110, 14, 52
_HOME, _ACTING, _GAP = 5, 30, 12
_COLOURS = {"prefill": "#8fb4f4", "decode": "#8fcfae", "mixed": "#f3c27e"}
_NOT_UP = "#ececec"


@dataclass(frozen=True, slots=True)
class NodeState:
    """What a node's last status said; both roles are empty while it is not up."""

    home: str
    acting: str
    num_prompts: int
    num_decoding: int


@dataclass(frozen=True, slots=True)
class Sample:
    # Since the record began.
    at_s: float
    nodes: dict[str, NodeState]


@dataclass(slots=True)
class Record:
    samples: list[Sample] = field(default_factory=list)
    # What began when, in the same seconds: for people.
    marks: list[tuple[float, str]] = field(default_factory=list)
    started_s: float = field(default_factory=time.monotonic)

    def mark(self, what: str) -> None:
        """``what`` begins now."""
        self.marks.append((time.monotonic() - self.started_s, what))

    @property
    def num_changes(self) -> int:
        """Changes of a role, acting or home, between one sample and the next."""
        pairs = zip(self.samples, self.samples[1:], strict=False)
        return sum(
            (x.home, x.acting) != (y.home, y.acting)
            for before, after in pairs
            for node_id, y in after.nodes.items()
            if (x := before.nodes.get(node_id)) is not None and x.home and y.home
        )

    def as_json(self) -> dict[str, object]:
        """Samples in which a node's role differs from the sample before; the picture has all."""
        told = [
            sample
            for sample, before in zip(self.samples, (None, *self.samples), strict=False)
            if before is None or _roles(sample) != _roles(before)
        ]
        return {"num_samples": len(self.samples), "samples": [asdict(each) for each in told], "marks": self.marks}


def _roles(sample: Sample) -> dict[str, tuple[str, str]]:
    return {node_id: (node.home, node.acting) for node_id, node in sample.nodes.items()}


@contextmanager
def record(router: str, every_s: float = _LOOK_EVERY_S) -> Iterator[Record]:
    """Looks at the router at host:port (gRPC) until the block ends; looks that it does not answer leave a gap."""
    found, is_over = Record(), threading.Event()

    def look() -> None:
        with Client(router) as client:
            while not is_over.wait(every_s):
                try:
                    status = client.status(_ANSWER_TIMEOUT_S)
                except BatonError:
                    continue
                found.samples.append(_sample(status, time.monotonic() - found.started_s))

    thread = threading.Thread(target=look, name="roles", daemon=True)
    thread.start()
    try:
        yield found
    finally:
        is_over.set()
        thread.join(10.0)


def _sample(status: router_pb2.StatusResponse, at_s: float) -> Sample:
    return Sample(at_s, {x.node.node_id: _state(x) for x in status.nodes if x.node.node_id})


def _state(found: router_pb2.StatusResponse.NodeState) -> NodeState:
    status = found.status
    if not found.state.startswith(("ready", "suspect", "draining")):
        return NodeState("", "", 0, 0)
    home = status.home_role or status.role
    return NodeState(_name(home), _name(status.role), status.num_waiting, status.num_running)


def _name(role: common_pb2.Role.ValueType) -> str:
    return common_pb2.Role.Name(role).removeprefix("ROLE_").lower()


# ── The picture ─────────────────────────────────────────────────────────────────────────────────────────────────────


def draw(found: Record) -> str:
    """A row for each node, by id. Raises ValueError if nothing was recorded."""
    if not found.samples:
        raise ValueError("nothing was recorded, expected at least one answer of the router")
    last_s = found.samples[-1].at_s + _LOOK_EVERY_S
    names = sorted({name for sample in found.samples for name in sample.nodes})
    states = {name: [(x.at_s, x.nodes[name]) for x in found.samples if name in x.nodes] for name in names}
    most = max((max(s.num_prompts, s.num_decoding) for row in states.values() for _, s in row), default=0)
    parts, y = [*_legend(most)], float(_TOP)
    for name in names:
        parts.append(svg.text(8, y + 24, name, "bold"))
        parts += _bands([(at_s, x.home) for at_s, x in states[name]], y, _HOME, last_s)
        parts += _bands([(at_s, x.acting) for at_s, x in states[name]], y + _HOME + 1, _ACTING, last_s)
        parts += _curves(states[name], y + _HOME + 1, last_s, most)
        y += _HOME + 1 + _ACTING + _GAP
    parts += _marks(found.marks, y, last_s)
    parts += _axis(y, last_s)
    return svg.document(_WIDTH, y + 24, "Roles of the nodes over time", parts)


def _x(at_s: float, last_s: float) -> float:
    return _LEFT + min(1.0, at_s / last_s) * (_WIDTH - _LEFT - _RIGHT)


def _bands(row: Sequence[tuple[float, str]], y: float, height: float, last_s: float) -> Iterator[str]:
    """A rectangle for each stretch of one role."""
    stretches = [(role, next(group)[0]) for role, group in groupby(row, key=lambda x: x[1])]
    ends = [start_s for _, start_s in stretches[1:]] + [last_s]
    for (role, start_s), end_s in zip(stretches, ends, strict=True):
        left, right = _x(start_s, last_s), _x(end_s, last_s)
        title = f"{role or 'not up'}, {start_s:.1f} to {end_s:.1f} s"
        yield (
            f'<rect x="{left:.1f}" y="{y}" width="{max(right - left, 0.6):.1f}" height="{height}" '
            f'fill="{_COLOURS.get(role, _NOT_UP)}"><title>{escape(title)}</title></rect>'
        )


def _curves(row: Sequence[tuple[float, NodeState]], y: float, last_s: float, most: int) -> Iterator[str]:
    def points(values: Sequence[int]) -> str:
        """Each value until the next one."""
        floor, parts = y + _ACTING, []
        for (at_s, _), value in zip(row, values, strict=True):
            parts.append(f"H{_x(at_s, last_s):.1f}V{floor - (_ACTING - 3) * value / max(1, most):.1f}")
        return f"M{_x(row[0][0], last_s):.1f} {floor}{''.join(parts)}H{_x(last_s, last_s):.1f}"

    decoding, prompts = points([x.num_decoding for _, x in row]), points([x.num_prompts for _, x in row])
    yield f'<path d="{decoding}V{y + _ACTING}Z" fill="#1c1e21" fill-opacity=".28"/>'
    yield f'<path d="{prompts}" fill="none" stroke="#1c1e21" stroke-width="1.2"/>'


def _marks(marks: Sequence[tuple[float, str]], y: float, last_s: float) -> Iterator[str]:
    for at_s, what in marks:
        x = _x(at_s, last_s)
        yield f'<path d="M{x:.1f} {_TOP - 8}V{y - _GAP}" stroke="#c2570c" stroke-dasharray="4 3"/>'
        yield svg.text(x + 3, _TOP - 10, what, "soft")


def _axis(y: float, last_s: float) -> Iterator[str]:
    step_s = next(step for step in (1, 2, 5, 10, 20, 60, 120, 600, 3600) if last_s / step <= 15 or step == 3600)
    for at_s in range(0, int(last_s) + 1, step_s):
        x = _x(at_s, last_s)
        yield f'<path d="M{x:.1f} {_TOP - 4}V{y - 4}" stroke="#5d636b" stroke-opacity=".18"/>'
        yield svg.text(min(x, _WIDTH - 40), y + 10, f"{at_s} s", "soft")


def _legend(most: int) -> Iterator[str]:
    x = float(_LEFT)
    for role, colour in _COLOURS.items():
        yield f'<rect x="{x}" y="10" width="11" height="11" rx="2" fill="{colour}"/>' + svg.text(x + 16, 20, role)
        x += 34 + 6.1 * len(role)
    said = f"thin band: home role, wide: acting role; area: sequences that decode, line: prompts there (top: {most})"
    yield svg.text(x + 10, 20, said, "soft")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--router", default="127.0.0.1:50051")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("-o", "--output", type=Path, default=Path("roles.svg"))
    parser.add_argument("--json", type=Path, help="also what was seen")
    arguments = parser.parse_args()
    with record(arguments.router) as found:
        time.sleep(arguments.seconds)
    arguments.output.writesvg.text(draw(found))
    if arguments.json is not None:
        arguments.json.writesvg.text(json.dumps(found.as_json()))


if __name__ == "__main__":
    main()
