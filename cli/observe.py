"""Asks a running cluster what it is, and what its router and its nodes recorded."""

from __future__ import annotations

import time
from dataclasses import dataclass

from baton import codec
from baton.address import host_of, join_address
from baton.client import AsyncClient, relay_from_pb
from baton.errors import BadConfig, Unavailable
from baton.types import NodeDescription, NodeStatus, TransferReport
from baton.v1 import node_pb2, router_pb2
from cli.environment import trust
from engine.step import StepShape
from loadgen.client import Server
from planner.observed import Observed
from planner.steps import RecordedStep

# The question takes a while to reach a node.
_MORE_S = 0.1


@dataclass(frozen=True, slots=True)
class Live:
    """A cluster whose ready nodes are of one kind."""

    client: AsyncClient
    server: Server
    nodes: tuple[NodeDescription, ...]
    statuses: tuple[NodeStatus, ...]

    async def since(self, began_s: float) -> Observed:
        """What was recorded since then, by `time.monotonic`. Raises Unavailable if a node does not answer."""
        parts = await self.client.trace(time.monotonic() - began_s + _MORE_S)
        hosts = {node.node_id: node.host_id for node in self.nodes}
        relays = [
            relay_from_pb(request.relay, router_pb2.Usage())
            for part in parts
            for request in sorted(part.router.requests, key=lambda request: request.arrived_s)
            if request.outcome == "finished"
        ]
        steps, reports = [], []
        for node in (part.node for part in parts if part.WhichOneof("message") == "node"):
            if node.unreachable:
                raise Unavailable(f"{node.address} did not say what it did: {node.unreachable}")
            trace = node.trace
            steps += [_step(trace.node_id, hosts.get(trace.node_id, trace.node_id), step) for step in trace.steps]
            reports += sorted(trace.transfers, key=lambda each: each.ended_s)
        return Observed(
            tuple(step for step in steps if step.turn_s > 0), tuple(map(_report, reports)), tuple(relays)
        )  # fmt: skip


async def live(client: AsyncClient, address: str, *, is_idle: bool = True) -> Live:
    """``address``: of the router, which has TLS on both faces or on none; ``is_idle``: it has to be. Raises Unavailable
    if no node is ready or others use the cluster, BadConfig if its nodes differ, or it has no HTTP."""
    status = await client.status()
    ready = [state for state in status.nodes if state.state.startswith("ready")]
    if not ready:
        raise Unavailable("no node of the cluster is ready, expected at least one; look at `baton status`")
    if is_idle and (busy := status.num_queued + status.num_running):
        raise Unavailable(
            f"the cluster has {busy} requests, expected none: they would be measured too; repeat when it is idle"
        )
    nodes = tuple(codec.node_from_pb(state.node) for state in ready)
    kinds = sorted({(node.device, node.model.name, str(node.kv_layout)) for node in nodes})
    if len(kinds) > 1:
        listed = " and ".join(", ".join(kind) for kind in kinds)
        raise BadConfig(
            f"the cluster has nodes with {listed}, expected one kind: a profile is of one kind of node", param="router"
        )
    if not status.http_port:
        raise BadConfig(
            "the router has no HTTP API, or is older than this command: expected one to send requests to; start it "
            "with --http-port",
            param="router",
        )
    trusts = trust()
    scheme = "http" if trusts["tls_ca"] is None else "https"
    http = f"{scheme}://{join_address(host_of(address).strip('[]'), status.http_port)}"
    server = Server.parse(http, **trusts)
    return Live(client, server, nodes, tuple(codec.status_from_pb(state.status) for state in ready))


def _step(node_id: str, host_id: str, step: node_pb2.TraceResponse.Step) -> RecordedStep:
    shape = StepShape(step.num_prompt_tokens, step.num_prompt_pairs, step.num_decoding, step.num_kv_tokens)
    return RecordedStep(node_id, host_id, shape, step.ended_s, step.turn_s)


def _report(transfer: node_pb2.TraceResponse.Transfer) -> TransferReport:
    return TransferReport(
        transfer.transport, transfer.layerwise, transfer.num_bytes, 0, transfer.ended_s - transfer.started_s,
        transfer.ended_s - transfer.computed_s,
    )  # fmt: skip
