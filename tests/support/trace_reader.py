"""Reads a trace as viewers do, and strictly: what Perfetto would drop, or count as an error of the file, fails.

After Perfetto's importer of the Trace Event Format (json_trace_parser, slice_tracker, flow_tracker): events by time,
those of one time as they come in the file; a stack of open slices per thread, which an instant is one of; both ends of
an arrow lie in the slice that is open there, or it is dropped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

_METADATA = {"process_name": "name", "thread_name": "name", "process_sort_index": "sort_index"}
Track = tuple[int, int]


@dataclass(eq=False)
class Slice:
    track: Track
    name: str
    category: str
    start_ns: int
    end_ns: int
    args: dict[str, Any]
    parent: Slice | None = None


@dataclass
class Reading:
    slices: list[Slice] = field(default_factory=list)
    # Arrows that arrived: from which slice to which.
    arrows: list[tuple[Slice, Slice]] = field(default_factory=list)
    processes: dict[int, str] = field(default_factory=dict)
    threads: dict[Track, str] = field(default_factory=dict)

    def overlap(self) -> dict[str, float]:
        """By sequence: the share of a transfer outside the slice within it that says what was not hidden."""
        found: dict[str, float] = {}
        for inner in self.slices:
            if inner.category == "exposed":
                outer = inner.parent
                assert outer is not None
                assert outer.category == "transfer"
                assert (outer.args["sequence"], outer.end_ns) == (inner.args["sequence"], inner.end_ns)
                found[outer.args["sequence"]] = 1 - (inner.end_ns - inner.start_ns) / (outer.end_ns - outer.start_ns)
        return found


def read(document: dict[str, Any]) -> Reading:
    assert set(document) <= {"traceEvents", "displayTimeUnit", "otherData"}
    assert document["displayTimeUnit"] in ("ms", "ns")
    found = Reading()
    events = [event for event in document["traceEvents"] if not _is_metadata(event, found)]
    stacks: dict[Track, list[Slice]] = {}
    flows: dict[int, Slice] = {}
    ends: list[tuple[int, Slice]] = []
    for event in sorted(events, key=lambda event: _ns(event["ts"])):
        track, start_ns = (event["pid"], event["tid"]), _ns(event["ts"])
        assert event["name"]
        stack = stacks.setdefault(track, [])
        while stack and stack[-1].end_ns <= start_ns:
            stack.pop()
        if event["ph"] in "Xi":
            length_ns = _ns(event["dur"]) if event["ph"] == "X" else 0
            assert event["ph"] == "X" or event["s"] == "t"
            new = Slice(track, event["name"], event["cat"], start_ns, start_ns + length_ns, event["args"])
            if stack:
                new.parent = stack[-1]
                assert new.end_ns <= stack[-1].end_ns, f"{new} overlaps {stack[-1]}: one of them is not drawn"
            stack.append(new)
            found.slices.append(new)
        else:
            flow = event["id"]
            assert type(flow) is int, "other ids are not read by every version"
            assert event["ph"] in "sf", f"unknown phase in {event}"
            assert stack, f"no slice is open where {event} is"
            assert stack[-1].start_ns == start_ns, "older versions take the slice that began last, be it over or not"
            if event["ph"] == "s":
                assert flow not in flows, f"{event} starts twice"
                flows[flow] = stack[-1]
            else:
                assert event["bp"] == "e"
                ends.append((flow, stack[-1]))
    # The sender's part may lie before the window that was asked for.
    found.arrows = [(flows[flow], end) for flow, end in ends if flow in flows]
    for track in stacks:
        assert track[0] in found.processes, f"process {track[0]} has no name"
        assert track in found.threads, f"thread {track} has no name"
    return found


def _is_metadata(event: dict[str, Any], found: Reading) -> bool:
    assert type(event["pid"]) is int
    if event["ph"] != "M":
        assert type(event["tid"]) is int
        return False
    value = event["args"][_METADATA[event["name"]]]
    if event["name"] == "process_name":
        assert event["pid"] not in found.processes
        found.processes[event["pid"]] = value
    elif event["name"] == "thread_name":
        assert (event["pid"], event["tid"]) not in found.threads
        found.threads[event["pid"], event["tid"]] = value
    else:
        assert type(value) is int
    return True


def _ns(microseconds: float) -> int:
    assert math.isfinite(microseconds)
    assert microseconds >= 0
    return round(microseconds * 1000)
