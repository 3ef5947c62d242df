"""The data of the status page: a snapshot of the cluster, lifelines of the last requests, latencies of the last
minutes.

All of it is bounded, and a snapshot is made about once a second for any number of viewers. It only reads the
dispatcher, on its event loop.
"""

from __future__ import annotations

import heapq
import json
import re
import time
from collections.abc import Callable, Sequence
from importlib import resources
from typing import Any

from fastapi import FastAPI
from fastapi.responses import Response

from baton import __version__
from baton.observe import Relay
from baton.types import NodeStatus, Role
from router.cluster.membership import Member, State
from router.dispatch.dispatcher import Dispatcher
from router.dispatch.records import Ended
from router.flow.machine import Flow
from router.flow.messages import Phase
from router.frontend.frontend import Frontend
from router.observe.history import History, stages
from router.observe.rolling import Slice, Window

_MAX_RECENT = 40
_MAX_IN_FLIGHT = 40
_MAX_NODES = 1000
_MAX_AGE_S = 0.9
_STAGES = ("queue", "prefill", "transfer", "decode")
_LEDGER = ("prompt", "sending", "leased", "running", "quarantined", "cached")
# No content from other hosts, no inline scripts, no framing.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}
_FILES = {
    "/status": ("status.html", "text/html"),
    "/status/status.css": ("status.css", "text/css"),
    "/status/status.js": ("status.js", "text/javascript"),
}
DATA_PATH = "/status/data"


class StatusPage:
    """The page's files, and the data that it polls once a second."""

    def __init__(
        self,
        frontend: Frontend,
        dispatcher: Dispatcher,
        history: History,
        router_id: str,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """``wall`` returns seconds since 1970; all other times are by the dispatcher's clock."""
        self._frontend = frontend
        self._dispatcher = dispatcher
        self._router_id = router_id
        self._wall = wall
        self._started_s = dispatcher.clock.now()
        self._window = Window()
        self._history = history
        self._made = b""
        self._made_s = float("-inf")
        dispatcher.records.watch(self._on_ended)

    def add_to(self, app: FastAPI) -> None:
        folder = resources.files("router.observe") / "page"
        for path, (name, media_type) in _FILES.items():
            app.add_api_route(path, _serving((folder / name).read_bytes(), media_type), methods=["GET", "HEAD"])
        app.add_api_route(DATA_PATH, self._data, methods=["GET", "HEAD"], response_model=None)

    async def _data(self) -> Response:
        now = self._dispatcher.clock.now()
        if now - self._made_s >= _MAX_AGE_S:
            self._made, self._made_s = json.dumps(self.snapshot(now), separators=(",", ":")).encode(), now
        return Response(self._made, media_type="application/json", headers=_HEADERS)

    def _on_ended(self, ended: Ended) -> None:
        relay = ended.relay
        here = self._window.current(self._dispatcher.clock.now())
        here.num_requests += 1
        here.num_tokens += relay.num_tokens
        if relay.num_tokens:
            here.num_prompt_tokens += ended.num_prompt_tokens
            here.num_cached_tokens += relay.num_cached_tokens
        if relay.num_tokens:
            here.ttft.add(relay.ttft_s)
        if relay.num_tokens > 1:
            here.tbt.add(relay.tbt_mean_s, relay.num_tokens - 1)

    def snapshot(self, now: float) -> dict[str, Any]:
        dispatcher = self._dispatcher
        members = dispatcher.nodes.members
        flows = [active.flow for active in dispatcher.scheduler.in_flight]
        counts = dict.fromkeys(_STAGES, 0)
        for flow in flows:
            counts[_stage(flow)] += 1
        oldest = heapq.nsmallest(_MAX_IN_FLIGHT, flows, key=lambda x: x.lifeline.arrived_s)
        return {
            "at_s": round(self._wall(), 3),
            "router": {
                "id": self._router_id,
                "model": self._frontend.model.name,
                "version": __version__,
                "up_s": _round(now - self._started_s),
                "is_ready": dispatcher.is_ready,
                "num_queued": dispatcher.scheduler.num_waiting,
                "num_active": dispatcher.scheduler.num_in_flight,
            },
            "pools": _pools(members),
            "num_nodes": len(members),
            "nodes": [_node(x, now) for x in sorted(members, key=_urgency)[:_MAX_NODES]],
            "relay": counts,
            "in_flight": [_running(x, now) for x in oldest],
            "recent": [_lifeline(x) for x in self._history.newest(_MAX_RECENT)],
            "series": _series(self._window.slices(now), self._window.slice_s),
        }


def _serving(content: bytes, media_type: str) -> Any:
    async def serve() -> Response:
        return Response(content, media_type=media_type, headers=_HEADERS)

    return serve


# ── Nodes ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _urgency(member: Member) -> tuple[bool, list[str]]:
    """Nodes with a problem come first and are never cut off; then by name, 2 before 10."""
    name = member.node.node_id if member.node else member.address
    return member.state is State.READY, [x.zfill(12) if x.isdigit() else x for x in re.split(r"(\d+)", name)]


def _node(member: Member, now: float) -> dict[str, Any]:
    node, status = member.node, member.status
    found: dict[str, Any] = {
        "id": node.node_id if node else "",
        "address": member.address,
        "state": member.state.value,
        "reason": "" if member.state is State.READY else member.reason,
        "device": node.device if node else "",
        "home": member.home_role.value if member.home_role else "",
    }
    if status is not None and member.is_up:
        found |= _load(status) | {"role": status.role.value, "is_pinned": status.is_pinned}
        found |= {"silent_s": _round(now - member.heard_s), "stalled_s": _round(status.stalled_s)}
    return found


def _load(status: NodeStatus) -> dict[str, Any]:
    return {
        "num_waiting": status.num_waiting,
        "num_running": status.num_running,
        "queued_prompt_tokens": status.queued_prompt_tokens,
        "running_tokens": status.running_tokens,
        "blocks": {"total": status.total_blocks, "free": status.free_blocks - status.cached_blocks}
        | {name: getattr(status, f"{name}_blocks") for name in _LEDGER},
    }


def _pools(members: Sequence[Member]) -> list[dict[str, Any]]:
    """One entry for each role that is the home of a node."""
    pools: list[dict[str, Any]] = []
    for role in Role:
        mine = [x for x in members if x.home_role is role]
        if not mine:
            continue
        statuses = [x.status for x in mine if x.is_up and x.status is not None]
        loads = [_load(status) for status in statuses]
        pool: dict[str, Any] = {"role": role.value, "num_nodes": len(mine)}
        pool["num_ready"] = sum(x.state is State.READY for x in mine)
        # They also have work of the other pool.
        pool["num_borrowed"] = sum(status.role is not role for status in statuses)
        for name in ("num_waiting", "num_running", "queued_prompt_tokens", "running_tokens"):
            pool[name] = sum(load[name] for load in loads)
        pool["blocks"] = {k: sum(load["blocks"][k] for load in loads) for k in ("total", "free", *_LEDGER)}
        pools.append(pool)
    return pools


# ── Requests ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _stage(flow: Flow) -> str:
    if flow.phase in (Phase.QUEUED, Phase.RESERVING):
        return "queue"
    if flow.phase is Phase.PREFILLING:
        return "prefill"
    return "transfer" if flow.is_handing_over else "decode"


def _running(flow: Flow, now: float) -> dict[str, Any]:
    return {
        "id": flow.request_id,
        "choice": flow.choice,
        "stage": _stage(flow),
        "prefill": flow.placement.prefill_id if flow.placement else "",
        "decode": flow.placement.decode_id if flow.placement else "",
        "num_prompt_tokens": len(flow.prompt.token_ids),
        "num_tokens": len(flow.tokens),
        "max_tokens": flow.max_tokens,
        "age_s": _round(now - flow.lifeline.arrived_s),
        "attempts": flow.lifeline.attempts,
    }


def _lifeline(ended: Ended) -> dict[str, Any]:
    relay, outcome = ended.relay, ended.outcome
    return {
        "id": ended.request_id,
        "choice": ended.choice,
        "outcome": outcome.kind.value,
        "detail": outcome.error.code if outcome.error else outcome.finish_reason.value if outcome.finish_reason else "",
        "prefill": relay.prefill_node_id,
        "decode": relay.decode_node_id,
        "placement": relay.placement_reason,
        "num_prompt_tokens": ended.num_prompt_tokens,
        "num_cached_tokens": relay.num_cached_tokens,
        "num_tokens": relay.num_tokens,
        "attempts": relay.attempts,
        "ttft_s": _round(relay.ttft_s),
        "tbt_s": _round(relay.tbt_mean_s),
        "tbt_max_s": _round(relay.tbt_max_s),
        "e2e_s": _round(relay.e2e_s),
        "missed": [name for name, is_met in relay.objectives.items() if not is_met],
        "stages": [[name, _round(start_s), _round(length_s)] for name, start_s, length_s in stages(relay)],
        "transfer": _transfer(relay),
        "moves": [[x.source_node_id, x.target_node_id, x.reason, _round(x.pause_s)] for x in relay.moves],
    }


def _transfer(relay: Relay) -> dict[str, Any] | None:
    report = relay.transfer
    if report is None:
        return None
    return {
        "transport": report.transport,
        "is_layerwise": report.layerwise,
        "num_bytes": report.num_bytes,
        "total_s": _round(report.total_s),
        "exposed_s": _round(report.exposed_s),
        "retransmits": report.retransmits,
    }


def _series(slices: Sequence[Slice | None], slice_s: float) -> dict[str, Any]:
    def quantiles(name: str, share: float) -> list[float | None]:
        return [None if x is None else _rounded(getattr(x, name).quantile(share)) for x in slices]

    return {
        "slice_s": slice_s,
        "ttft_p50_s": quantiles("ttft", 0.5),
        "ttft_p95_s": quantiles("ttft", 0.95),
        "tbt_p50_s": quantiles("tbt", 0.5),
        "tbt_p95_s": quantiles("tbt", 0.95),
        "tokens_per_s": [0 if x is None else _round(x.num_tokens / slice_s) for x in slices],
        "cached_share": [None if x is None else _rounded(x.cached_share) for x in slices],
        "requests_per_s": [0 if x is None else _round(x.num_requests / slice_s) for x in slices],
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else _round(value)


def _round(value: float) -> float:
    """Microseconds are precise enough for display, and shorter."""
    return round(value, 6)
