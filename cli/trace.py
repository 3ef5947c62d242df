"""Writes a cluster's recent past as a Chrome trace, for ui.perfetto.dev or chrome://tracing.

Every node becomes a process: its engine steps, its transfers below them with the part that was not hidden behind the
prompt, and the writes of its threads. Nodes are put on the router's clock by an estimated offset, so rows of two nodes
may be shifted by the error that is in the trace's metadata; every duration is measured by one clock.
"""

from __future__ import annotations

import heapq
import itertools
import json
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from baton.client import Client
from baton.errors import BadConfig
from baton.v1 import common_pb2, node_pb2, router_pb2

NodeTrace = router_pb2.ClusterTraceResponse.NodeTrace
Event = dict[str, Any]

_ROUTER_PID = 1
_STEPS_TID = 1
_TRANSFERS_TID = 100
_WRITES_TID = 200
# Stages of a request until its first token, in the order they happen.
_STAGES = ("tokenize_s", "rerun_s", "placement_s", "reserve_s", "prefill_queue_s", "prefill_s", "network_s")


def write(client: Client, last_s: float, path: Path, console: Console) -> None:
    """Fetch, convert, write, and say what is in it."""
    document = document_of(client.trace(last_s))
    try:
        path.write_text(json.dumps(document, separators=(",", ":")))
    except OSError as error:
        raise BadConfig(f"cannot write {path}: {error.strerror}; give another --output", param="output") from error
    shares = list(overlap_shares(document).values())
    said = f"{path}: {len(document['traceEvents'])} events of {len(document['otherData']['nodes'])} nodes"
    if shares:
        said += f", {len(shares)} transfers, {sum(shares) / len(shares):.0%} of their time hidden behind the prompt"
    console.print(said + "; open it in https://ui.perfetto.dev", markup=False, highlight=False, soft_wrap=True)
    for name, node in document["otherData"]["nodes"].items():
        if node["unreachable"]:
            console.print(f"{name} is not in it: {node['unreachable']}", markup=False, highlight=False)


def document_of(parts: Sequence[router_pb2.ClusterTraceResponse]) -> dict[str, Any]:
    """The JSON of the Trace Event Format; times are microseconds since the earliest event."""
    events: list[Event] = []
    nodes: dict[str, Event] = {}
    # A number for each hand-over: not every viewer reads other ids.
    flows: defaultdict[str, int] = defaultdict(itertools.count(1).__next__)
    # Prompts above tokens, as the baton goes: the numbers of the roles.
    for number, part in enumerate(sorted(parts, key=lambda x: (x.node.trace.role, x.node.trace.node_id))):
        if part.WhichOneof("message") == "router":
            events += _router_events(part.router)
            continue
        node = part.node
        name = node.trace.node_id or node.address
        nodes[name] = {
            "address": node.address,
            "unreachable": node.unreachable,
            "clock_offset_s": node.clock_offset_s,
            "clock_error_s": node.clock_error_s,
        }
        events += _node_events(node, _ROUTER_PID + number, flows)
    _rebase(events)
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {
            "clock": "the router's; nodes are shifted by clock_offset_s, which is off by clock_error_s at the most",
            "nodes": nodes,
        },
    }


def overlap_shares(document: dict[str, Any]) -> dict[str, float]:
    """By sequence, the share of a transfer's time that lay within its prompt's computation: from the slices alone."""
    whole: dict[str, float] = {}
    exposed: dict[str, float] = {}
    for event in document["traceEvents"]:
        if event.get("cat") == "transfer":
            whole[event["args"]["sequence"]] = event["dur"]
        elif event.get("cat") == "exposed":
            exposed[event["args"]["sequence"]] = event["dur"]
    return {name: 1 - exposed[name] / dur for name, dur in whole.items() if dur > 0}


def _rebase(events: list[Event]) -> None:
    start_us = min((event["ts"] for event in events if "ts" in event), default=0.0)
    for event in events:
        if "ts" in event:
            event["ts"] = round(event["ts"] - start_us, 3)


# ── Nodes ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _node_events(node: NodeTrace, pid: int, flows: Mapping[str, int]) -> Iterator[Event]:
    trace = node.trace
    role = common_pb2.Role.Name(trace.role).removeprefix("ROLE_").lower()
    yield _named("process_name", pid, 0, f"{trace.node_id or node.address} ({role})")
    yield {"ph": "M", "name": "process_sort_index", "pid": pid, "args": {"sort_index": pid}}
    yield _named("thread_name", pid, _STEPS_TID, "engine steps")

    def us(at_s: float) -> float:
        return (at_s - node.clock_offset_s) * 1e6

    # What has joined is decoded by the next step that begins.
    joined = deque(sorted(trace.joins, key=lambda join: join.at_s))
    for step in trace.steps:
        yield _slice(pid, _STEPS_TID, us(step.started_s), us(step.ended_s), **_step(step))
        while joined and joined[0].at_s <= step.started_s:
            yield _arrow("f", pid, _STEPS_TID, us(step.started_s), flows[joined.popleft().sequence_id])
    for join in trace.joins:
        yield {"ph": "i", "s": "t", "name": "KV verified", "cat": "join", "pid": pid, "tid": _STEPS_TID,
               "ts": us(join.at_s), "args": {"sequence": join.sequence_id}}  # fmt: skip
    rows = _rows((x.started_s, x.ended_s) for x in trace.transfers)
    for row, transfer in zip(rows, trace.transfers, strict=True):
        tid, computed_us, ended_us = _TRANSFERS_TID + row, us(transfer.computed_s), us(transfer.ended_s)
        yield _slice(pid, tid, us(transfer.started_s), ended_us, **_transfer(transfer))
        yield _arrow("s", pid, tid, us(transfer.started_s), flows[transfer.sequence_id])
        rest = {"name": "not hidden", "cat": "exposed", "args": {"sequence": transfer.sequence_id}}
        yield _slice(pid, tid, computed_us, ended_us, **rest)
    yield from _row_names(pid, _TRANSFERS_TID, rows, "transfers")
    # Every connection has threads of its own with numbers of their own: what is drawn is how many write at once.
    rows = _rows((x.started_s, x.ended_s) for x in trace.writes)
    for row, write in zip(rows, trace.writes, strict=True):
        yield _slice(pid, _WRITES_TID + row, us(write.started_s), us(write.ended_s), **_write(write))
    yield from _row_names(pid, _WRITES_TID, rows, "KV writes")


def _step(step: node_pb2.TraceResponse.Step) -> Event:
    args = {"prompt_tokens": step.num_prompt_tokens, "decoding": step.num_decoding, "prompts": list(step.prompts)}
    if not step.num_prompt_tokens:
        return {"name": f"decode {step.num_decoding}", "cat": "decode", "args": args}
    if not step.num_decoding:
        return {"name": f"prefill {step.num_prompt_tokens} tokens", "cat": "prefill", "args": args}
    name = f"prefill {step.num_prompt_tokens} tokens, decode {step.num_decoding}"
    return {"name": name, "cat": "mixed", "args": args}


def _transfer(transfer: node_pb2.TraceResponse.Transfer) -> Event:
    how = "layer by layer" if transfer.layerwise else "at once"
    return {
        "name": f"KV to {transfer.target}, {how}",
        "cat": "transfer",
        "args": {
            "sequence": transfer.sequence_id,
            "target": transfer.target,
            "transport": transfer.transport,
            "layerwise": transfer.layerwise,
            "bytes": transfer.num_bytes,
        },
    }


def _write(write: node_pb2.TraceResponse.Write) -> Event:
    last = write.layer + write.num_layers - 1
    name = f"layer {write.layer}" if last == write.layer else f"layers {write.layer} to {last}"
    return {"name": name, "cat": "write", "args": {"sequence": write.sequence_id, "bytes": write.num_bytes}}


def _rows(spans: Iterable[tuple[float, float]]) -> list[int]:
    """A row for each span, so that none overlaps another on its row; the lowest that is free."""
    numbered = sorted((started_s, ended_s, i) for i, (started_s, ended_s) in enumerate(spans))
    rows = [0] * len(numbered)
    busy: list[tuple[float, int]] = []
    free: list[int] = []
    for started_s, ended_s, i in numbered:
        while busy and busy[0][0] <= started_s:
            heapq.heappush(free, heapq.heappop(busy)[1])
        rows[i] = heapq.heappop(free) if free else len(busy)
        heapq.heappush(busy, (ended_s, rows[i]))
    return rows


# ── The router ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _router_events(part: router_pb2.ClusterTraceResponse.RouterTrace) -> Iterator[Event]:
    yield _named("process_name", _ROUTER_PID, 0, f"{part.router_id} (router)")
    yield {"ph": "M", "name": "process_sort_index", "pid": _ROUTER_PID, "args": {"sort_index": _ROUTER_PID}}
    rows = _rows((x.arrived_s, x.arrived_s + x.relay.e2e_s) for x in part.requests)
    for row, request in zip(rows, part.requests, strict=True):
        tid, relay, at_us = _STEPS_TID + row, request.relay, request.arrived_s * 1e6
        ended_us = at_us + relay.e2e_s * 1e6
        name = f"{request.request_id}/{request.choice}"
        args: Event = {"request": name, "outcome": request.outcome, "prefill": relay.prefill_node_id,
                "decode": relay.decode_node_id, "attempts": relay.attempts}  # fmt: skip
        if relay.HasField("transfer"):
            args |= {"transfer_total_s": relay.transfer.total_s, "transfer_exposed_s": relay.transfer.exposed_s}
        yield _slice(_ROUTER_PID, tid, at_us, ended_us, name=name, cat="request", args=args)
        if not relay.ttft_s:
            continue
        for stage in _STAGES:
            until_us = min(at_us + getattr(relay, stage) * 1e6, ended_us)
            if until_us > at_us:
                yield _slice(_ROUTER_PID, tid, at_us, until_us, name=stage.removesuffix("_s"), cat="stage", args={})
            at_us = until_us
        yield _slice(_ROUTER_PID, tid, at_us, ended_us, name="decode", cat="stage", args={})
    yield from _row_names(_ROUTER_PID, _STEPS_TID, rows, "requests")


# ── Events ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _slice(pid: int, tid: int, from_us: float, to_us: float, **rest: Any) -> Event:
    """On whole nanoseconds: viewers count in them, and a slice must not end after the one that it lies in."""
    ts_us = round(from_us, 3)
    return {"ph": "X", "pid": pid, "tid": tid, "ts": ts_us, "dur": round(round(to_us, 3) - ts_us, 3), **rest}


def _row_names(pid: int, first_tid: int, rows: Sequence[int], name: str) -> Iterator[Event]:
    for row in range(max(rows, default=-1) + 1):
        yield _named("thread_name", pid, first_tid + row, name if row == 0 else f"{name} {row + 1}")


def _arrow(phase: str, pid: int, tid: int, ts_us: float, flow: int) -> Event:
    """An end of an arrow, in the slice that begins with it and precedes it here; viewers drop one that is in none."""
    name = {"name": "hand over", "cat": "handover", "id": flow}
    end = {"ph": phase, **name, "pid": pid, "tid": tid, "ts": round(ts_us, 3)}
    return end | ({"bp": "e"} if phase == "f" else {})


def _named(what: str, pid: int, tid: int, name: str) -> Event:
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": {"name": name}}
