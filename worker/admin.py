"""Serves baton.v1.Node: sessions, the node's description and load, the owners of its blocks, its prefix cache, its
trace, drain, and changes of its role."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict

import grpc
import grpc.aio

from baton import codec
from baton.clock import Clock
from baton.errors import InvalidRequest
from baton.timeline import Timeline
from baton.v1 import node_pb2, node_pb2_grpc
from worker.service import NodeService

# As of the worker's own setting.
_MAX_GRACE_S = 86_400.0


class NodeServicer(node_pb2_grpc.NodeServicer):
    """``drain`` takes the grace time (0: the worker's own) and returns how long the worker stays at the most."""

    def __init__(self, service: NodeService, drain: Callable[[float], float], timeline: Timeline, clock: Clock) -> None:
        self._sessions = service.sessions
        self._node = service.node
        self._status = service.status
        self._roles = service.roles
        self._set_role = service.set_role
        self._replica = service.replica
        self._drain = drain
        self._timeline = timeline
        self._clock = clock

    async def Describe(  # noqa: N802 - the name in the proto
        self,
        request: node_pb2.DescribeRequest,
        context: grpc.aio.ServicerContext[node_pb2.DescribeRequest, node_pb2.DescribeResponse],
    ) -> node_pb2.DescribeResponse:
        return node_pb2.DescribeResponse(node=codec.node_to_pb(self._node), status=codec.status_to_pb(self._status()))

    async def Drain(  # noqa: N802 - the name in the proto
        self,
        request: node_pb2.DrainRequest,
        context: grpc.aio.ServicerContext[node_pb2.DrainRequest, node_pb2.DrainResponse],
    ) -> node_pb2.DrainResponse:
        if not 0 <= request.grace_s <= _MAX_GRACE_S:
            expected = f"0 (the node's own) or a number of seconds up to {_MAX_GRACE_S:g}"
            raise InvalidRequest(f"grace_s is {request.grace_s}, expected {expected}", param="grace_s")
        grace_s = self._drain(request.grace_s)
        return node_pb2.DrainResponse(
            node_id=self._node.node_id,
            incarnation=self._node.incarnation,
            num_sequences=self._replica.num_sequences,
            grace_s=grace_s,
        )

    async def SetRole(  # noqa: N802 - the name in the proto
        self,
        request: node_pb2.SetRoleRequest,
        context: grpc.aio.ServicerContext[node_pb2.SetRoleRequest, node_pb2.SetRoleResponse],
    ) -> node_pb2.SetRoleResponse:
        roles = self._roles
        before = roles.home
        asked, expected = (codec.role_from_pb(x) if x else None for x in (request.role, request.expected_role))
        self._set_role(asked, expected)
        return node_pb2.SetRoleResponse(
            node_id=self._node.node_id,
            incarnation=self._node.incarnation,
            previous_role=codec.role_to_pb(before),
            home_role=codec.role_to_pb(roles.home),
            role=codec.role_to_pb(roles.acting),
            is_pinned=roles.is_pinned,
        )

    async def Ledger(  # noqa: N802 - the name in the proto
        self,
        request: node_pb2.LedgerRequest,
        context: grpc.aio.ServicerContext[node_pb2.LedgerRequest, node_pb2.LedgerResponse],
    ) -> node_pb2.LedgerResponse:
        total, free, owners = self._replica.ledger()
        roles = self._roles
        return node_pb2.LedgerResponse(
            role=codec.role_to_pb(roles.acting),
            home_role=codec.role_to_pb(roles.home),
            node_id=self._node.node_id,
            incarnation=self._node.incarnation,
            total_blocks=total,
            free_blocks=free,
            owners=[
                node_pb2.LedgerResponse.Owner(
                    owner=line.owner,
                    state=line.state.value,
                    num_blocks=line.num_blocks,
                    epoch=line.epoch,
                    age_s=line.age_s,
                )
                for line in owners
            ],
        )

    async def Cache(  # noqa: N802 - the name in the proto
        self,
        request: node_pb2.CacheRequest,
        context: grpc.aio.ServicerContext[node_pb2.CacheRequest, node_pb2.CacheResponse],
    ) -> node_pb2.CacheResponse:
        num_dropped = await asyncio.to_thread(self._replica.drop_cache) if request.drop else 0
        return node_pb2.CacheResponse(
            node_id=self._node.node_id,
            incarnation=self._node.incarnation,
            dropped_blocks=num_dropped,
            **asdict(self._replica.cache_stats()),
        )

    async def Clock(  # noqa: N802 - the name in the proto
        self,
        request: node_pb2.ClockRequest,
        context: grpc.aio.ServicerContext[node_pb2.ClockRequest, node_pb2.ClockResponse],
    ) -> node_pb2.ClockResponse:
        return node_pb2.ClockResponse(now_s=self._clock.now())

    async def Trace(  # noqa: N802 - the name in the proto
        self,
        request: node_pb2.TraceRequest,
        context: grpc.aio.ServicerContext[node_pb2.TraceRequest, node_pb2.TraceResponse],
    ) -> node_pb2.TraceResponse:
        last_s = codec.last_s_from_pb(request.last_s)
        recorded = self._timeline.since(self._clock.now() - last_s)
        # Thousands of spans: made off the loop that carries tokens.
        return await asyncio.to_thread(codec.recorded_to_pb, self._node, self._roles.acting, recorded)

    async def Session(  # type: ignore[override]  # noqa: N802 - the proto's name; grpc.aio's reader-writer style
        self,
        request_iterator: AsyncIterator[node_pb2.SessionRequest],
        context: grpc.aio.ServicerContext[node_pb2.SessionRequest, node_pb2.SessionResponse],
    ) -> None:
        await self._sessions.serve(request_iterator, context)


def add_sessions_of_protocol_1(servicer: NodeServicer, server: grpc.aio.Server) -> None:
    """Routers of protocol 1 open a session for each phase; their hello is refused with both versions."""
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.Session, node_pb2.SessionRequest.FromString, node_pb2.SessionResponse.SerializeToString
    )
    for service in ("baton.v1.PrefillNode", "baton.v1.DecodeNode"):
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {"Session": handler}),))
