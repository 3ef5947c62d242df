"""baton.v1.Node of a worker: who it is, how busy it is, and who owns each of its blocks. Changes nothing."""

from __future__ import annotations

from collections.abc import Callable

import grpc.aio

from baton import codec
from baton.types import NodeDescription, NodeStatus
from baton.v1 import node_pb2, node_pb2_grpc
from engine.replica import Replica


class NodeService(node_pb2_grpc.NodeServicer):
    def __init__(self, node: NodeDescription, status: Callable[[], NodeStatus], replica: Replica) -> None:
        self._node = node
        self._status = status
        self._replica = replica

    async def Describe(  # noqa: N802 - the name in the proto
        self,
        request: node_pb2.DescribeRequest,
        context: grpc.aio.ServicerContext[node_pb2.DescribeRequest, node_pb2.DescribeResponse],
    ) -> node_pb2.DescribeResponse:
        return node_pb2.DescribeResponse(node=codec.node_to_pb(self._node), status=codec.status_to_pb(self._status()))

    async def Ledger(  # noqa: N802 - the name in the proto
        self,
        request: node_pb2.LedgerRequest,
        context: grpc.aio.ServicerContext[node_pb2.LedgerRequest, node_pb2.LedgerResponse],
    ) -> node_pb2.LedgerResponse:
        total, free, owners = self._replica.ledger()
        return node_pb2.LedgerResponse(
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
