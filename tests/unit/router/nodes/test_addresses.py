"""Nodes that listen on every interface: peers reach them where the router did."""

from __future__ import annotations

import os
from pathlib import Path

import httpx
import psutil
import pytest

import baton
from baton.access import AccessConfig
from baton.address import as_dialled, is_anywhere
from baton.types import Role, SamplingParams, SequenceSpec
from engine.fake import expected_tokens
from router.cluster.membership import State
from router.config import RouterConfig
from router.serve import running
from tests.support.relay import LAYOUT, worker
from tests.support.router import until


@pytest.mark.parametrize(
    ("told", "dialled", "expected"),
    [
        ("0.0.0.0:5", "10.0.0.7:5", "10.0.0.7:5"),
        ("0.0.0.0:9", "node-a.example:5", "node-a.example:9"),
        ("[::]:9", "[fd00::1]:5", "[fd00::1]:9"),
        (":9", "h:5", "h:9"),
        ("10.0.0.8:9", "10.0.0.7:5", "10.0.0.8:9"),
        ("", "10.0.0.7:5", ""),
        # Endpoints of shared memory are names.
        ("baton-kv-1", "10.0.0.7:5", "baton-kv-1"),
    ],
)
def test_an_address_that_says_nothing_is_the_one_that_was_dialled(told: str, dialled: str, expected: str) -> None:
    assert as_dialled(told, dialled) == expected
    assert is_anywhere("0.0.0.0")
    assert not is_anywhere("127.0.0.1")


def dialled() -> set[tuple[str, int]]:
    """What this process is connected to, gRPC and data, wherever the other end is."""
    found = psutil.Process(os.getpid()).net_connections("tcp")
    return {(c.raddr.ip.removeprefix("::ffff:"), c.raddr.port) for c in found if c.status == "ESTABLISHED"}


async def test_data_is_listened_for_where_the_worker_listens_and_not_where_it_is_advertised(tmp_path: Path) -> None:
    """Others may reach it by a name that this machine does not know, or by an address of a proxy."""
    settings = {"listen": "127.0.0.1:0", "advertise_host": "nobody.invalid", "transports": ("tcp",)}
    async with worker(tmp_path, "d0", Role.DECODE, **settings) as decode:
        assert decode.address.startswith("nobody.invalid:")
        own = {
            c.laddr.ip.removeprefix("::ffff:")
            for c in psutil.Process(os.getpid()).net_connections("tcp")
            if c.status == "LISTEN"
        }
        assert own == {"127.0.0.1"}


async def test_kv_moves_between_nodes_that_listen_everywhere(tmp_path: Path) -> None:
    everywhere = {"listen": "0.0.0.0:0", "transports": ("tcp",), "access": AccessConfig(allow_open=True)}
    async with (
        worker(tmp_path, "p0", Role.PREFILL, **everywhere) as prefill,
        worker(tmp_path, "d0", Role.DECODE, **everywhere) as decode,
    ):
        ports = [x.address.rpartition(":")[2] for x in (prefill, decode)]
        addresses = (f"127.0.0.2:{ports[0]}", f"127.0.0.3:{ports[1]}")
        async with running(RouterConfig(nodes=addresses)) as router:
            await until(lambda: all(x.state is State.READY for x in router.dispatcher.nodes.members))
            assert [x.node.address for x in router.dispatcher.nodes.members if x.node] == list(addresses)
            assert router.grpc is not None
            async with baton.AsyncClient(router.grpc) as client:
                done = await client.complete([1, 2, 3], max_tokens=8, temperature=0.0, seed=0)
            spec = SequenceSpec("a", (1, 2, 3), SamplingParams(temperature=0.0, seed=0, max_tokens=8))
            assert list(done.token_ids) == expected_tokens(spec, LAYOUT, 1000)
            assert (done.relay.prefill_node_id, done.relay.decode_node_id) == ("p0", "d0")
            assert done.relay.attempts == 1
            assert done.relay.transfer is not None
            assert done.relay.transfer.transport == "tcp"
            # Neither the lease nor the endpoint of the data sent a peer to 0.0.0.0, which is the peer itself.
            assert ("127.0.0.3", int(ports[1])) in dialled()
            assert not {("127.0.0.1", int(port)) for port in ports} & dialled()
            data = {where for where in dialled() if where[0] == "127.0.0.3"} - {("127.0.0.3", int(ports[1]))}
            assert data, "the data streams went to the decode node's own address"
            assert router.http is not None
            async with httpx.AsyncClient() as http:
                targets = (await http.get(f"{router.http}/metrics/targets")).json()
            assert sorted(x["targets"][0].rpartition(":")[0] for x in targets) == ["127.0.0.2", "127.0.0.3"]
