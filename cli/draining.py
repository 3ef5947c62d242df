"""Asks a worker to leave and waits until it has; asks a process for its health. Starts and stops no process itself."""

from __future__ import annotations

import time
from collections.abc import Callable

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from rich.console import Console

from baton.access import AccessConfig
from baton.channels import dial_blocking
from baton.client import Client
from baton.errors import DeadlineExceeded, Unauthenticated, Unavailable
from baton.server import LIVENESS
from baton.v1 import node_pb2, node_pb2_grpc

_LOOK_EVERY_S = 0.1
_CALL_TIMEOUT_S = 10.0
# What closing may take beyond the grace time.
_CLOSING_S = 10.0


def drain(client: Client, node: str, grace_s: float, console: Console, *, waits: bool) -> None:
    """Through a router. Raises UnknownNode, Unavailable, DeadlineExceeded if the node did not leave in time."""
    answer = client.drain(node, grace_s).drain

    def is_gone() -> bool:
        for found in client.status().nodes:
            if found.node.node_id == answer.node_id and found.node.incarnation == answer.incarnation:
                return not found.state.startswith(("ready", "suspect", "draining"))
        return True

    _report(answer, is_gone, console, waits=waits)


def drain_directly(address: str, grace_s: float, console: Console, access: AccessConfig, *, waits: bool) -> None:
    """As `drain`, without a router: for who stands beside the worker and has the key of its cluster, if it has one."""
    with dial_blocking(address, access) as channel:
        stub = node_pb2_grpc.NodeStub(channel)
        metadata = access.metadata
        try:
            answer = stub.Drain(node_pb2.DrainRequest(grace_s=grace_s), timeout=_CALL_TIMEOUT_S, metadata=metadata)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                raise Unauthenticated(f"{address}: {error.details()}") from error
            raise Unavailable(f"no worker answers at {address}: {error.code().name} {error.details()}") from error

        def is_gone() -> bool:
            try:
                found = stub.Describe(node_pb2.DescribeRequest(), timeout=_CALL_TIMEOUT_S, metadata=metadata)
            except grpc.RpcError:
                return True
            return found.node.incarnation != answer.incarnation

        _report(answer, is_gone, console, waits=waits)


def _report(answer: node_pb2.DrainResponse, is_gone: Callable[[], bool], console: Console, *, waits: bool) -> None:
    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False)

    say(f"{answer.node_id} drains: {answer.num_sequences} sequences are there, {answer.grace_s:.0f} s at the most")
    if not waits:
        return
    started_s = time.monotonic()
    while not is_gone():
        # Neither side has a call that waits for this, and a person or an orchestrator asks once in a node's life.
        if time.monotonic() - started_s > answer.grace_s + _CLOSING_S:
            raise DeadlineExceeded(f"{answer.node_id} is still there after {answer.grace_s + _CLOSING_S:.0f} s")
        time.sleep(_LOOK_EVERY_S)
    say(f"{answer.node_id} has left after {time.monotonic() - started_s:.1f} s")


def check_health(address: str, access: AccessConfig, *, live: bool, timeout_s: float) -> str:
    """What is wrong with the process, empty if nothing is."""
    request = health_pb2.HealthCheckRequest(service=LIVENESS if live else "")
    with dial_blocking(address, access) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=timeout_s)
        except grpc.RpcError as error:
            return f"{address}: {error.code().name} {error.details()}"
    if answer.status == health_pb2.HealthCheckResponse.SERVING:
        return ""
    return f"{address}: {health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)}"
