"""Access to a real cluster: a process without the key on every port of it, and TLS from the client to the KV."""

from __future__ import annotations

import os
import socket
import ssl
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil

from baton import Client
from baton.access import KEY_HEADER, AccessConfig
from baton.channels import dial_blocking
from baton.v1 import node_pb2, node_pb2_grpc, transfer_pb2
from kvtransfer.transports.tcp_socket import MAGIC, PREAMBLE
from tests.support.certificates import make_certificates
from tests.support.cluster import Cluster, StartCluster

PROMPT, ANSWER = "Months from May to July:", " May June July."


def calls() -> list[tuple[str, str]]:
    """Methods of a worker, with their kind."""
    found = []
    for service in (
        node_pb2.DESCRIPTOR.services_by_name["Node"],
        transfer_pb2.DESCRIPTOR.services_by_name["KvTransfer"],
    ):
        for method in service.methods:
            kind = (
                f"{'stream' if method.client_streaming else 'unary'}_{'stream' if method.server_streaming else 'unary'}"
            )
            found.append((f"/{service.full_name}/{method.name}", kind))
    return found


def code_of(channel: grpc.Channel, path: str, kind: str, metadata: Any) -> grpc.StatusCode:
    method: Any = getattr(channel, kind)(path)
    try:
        if kind == "unary_unary":
            method(b"", metadata=metadata, timeout=10)
        else:
            list(method(iter([b""]) if kind == "stream_stream" else b"", metadata=metadata, timeout=10))
    except grpc.RpcError as error:
        code: grpc.StatusCode = error.code()
        return code
    return grpc.StatusCode.OK


def ports_of(pid: int) -> list[int]:
    return [c.laddr.port for c in psutil.Process(pid).net_connections("tcp") if c.status == "LISTEN"]


def shared_sockets(pid: int) -> list[str]:
    names = [line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines()]
    return [name for name in names if name.startswith(f"@baton-kv-{pid}-")]


def test_a_process_without_the_key_gets_nothing_from_any_port(shared_cluster: StartCluster, demo_model: Path) -> None:
    cluster = shared_cluster(demo_model, prefill=1, decode=1)
    key = cluster.access.cluster_key
    for node in cluster.nodes.values():
        with grpc.insecure_channel(node.address) as channel:
            for metadata in (None, ((KEY_HEADER, "0" * len(key)),)):
                for path, kind in calls():
                    assert code_of(channel, path, kind, metadata) is grpc.StatusCode.UNAUTHENTICATED, (node.id, path)
        (name,) = shared_sockets(node.pid)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as rogue:
            rogue.settimeout(10)
            rogue.connect("\0" + name.removeprefix("@"))
            rogue.sendall(os.urandom(32))
            assert socket.recv_fds(rogue, 1, 4)[:2] == (b"", []), "no memory of the cache"
        for port in ports_of(node.pid):
            with socket.create_connection(("127.0.0.1", port), timeout=10) as rogue:
                rogue.sendall(PREAMBLE.pack(MAGIC, os.urandom(32), 0))
                rogue.shutdown(socket.SHUT_WR)
                assert _rest(rogue)[:1] != b"\1", "no data stream"
        lines = cluster.lines_with("was refused /baton.v1.")
        assert lines, "the log names who was refused"
    assert len(cluster.lines_with("was refused /baton.v1.")) <= 2 * 2, "once a minute and worker"
    with Client(cluster.grpc) as client:
        assert client.complete(PROMPT, max_tokens=16, temperature=0.0).text == ANSWER
    cluster.wait_baseline()
    with dial_blocking(next(iter(cluster.nodes.values())).address, cluster.access) as channel:
        ledger = node_pb2_grpc.NodeStub(channel).Ledger(
            node_pb2.LedgerRequest(), timeout=10, metadata=cluster.access.metadata
        )
    assert ledger.total_blocks > 0, "with the key"


def test_the_key_is_in_no_log_and_no_arguments(shared_cluster: StartCluster, demo_model: Path) -> None:
    cluster = shared_cluster(demo_model, prefill=1, decode=1)
    key = cluster.access.cluster_key
    assert len(key) == 64
    family = [psutil.Process(cluster.launcher.pid), *psutil.Process(cluster.launcher.pid).children(recursive=True)]
    assert len(family) >= 4
    assert not [p for p in family if key in "\0".join(p.cmdline())]
    assert not cluster.lines_with(key)
    children = {p.pid: p.environ() for p in family[1:]}
    for pid in (cluster.router_pid, *(node.pid for node in cluster.nodes.values())):
        assert children[pid]["BATON_CLUSTER_KEY"] == key


def _rest(connection: socket.socket) -> bytes:
    found = b""
    try:
        while part := connection.recv(65_536):
            found += part
    except OSError:
        pass
    return found


def completed(cluster: Cluster, access: AccessConfig, admin: str) -> str:
    """The answer over HTTP, which has to be that over gRPC; KV went over tcp."""
    context = ssl.create_default_context(cafile=str(access.tls_ca))
    body = {"model": "model", "prompt": PROMPT, "max_tokens": 16, "temperature": 0}
    answer = httpx.post(f"{cluster.http}/v1/completions", json=body, verify=context, timeout=60)
    assert answer.status_code == 200, answer.text
    with Client(cluster.grpc, api_key=admin, tls_ca=access.tls_ca) as client:
        whole = client.complete(PROMPT, max_tokens=16, temperature=0.0)
        assert whole.relay.transfer is not None
        assert whole.relay.transfer.transport == "tcp"
        assert len(client.ledger().nodes) == 2
        assert not client.ledger().unreachable
    text = answer.json()["choices"][0]["text"]
    assert text == whole.text
    return str(text)


def test_tls_and_a_key_from_the_client_to_the_kv(start_cluster: StartCluster, demo_model: Path, tmp_path: Path) -> None:
    access = make_certificates(tmp_path / "pki")
    files = ("--tls-cert", str(access.tls_cert), "--tls-key", str(access.tls_key), "--tls-ca", str(access.tls_ca))
    key = "0123456789abcdef" * 2
    cluster = start_cluster(
        demo_model, prefill=1, decode=1, transport="tcp",
        arguments=(*files, "--cluster-key", key, "--admin-key", "operators", "--prefix-cache", "off"),
    )  # fmt: skip
    assert cluster.http.startswith("https://")
    cluster.trust = AccessConfig(tls_ca=access.tls_ca)
    assert completed(cluster, access, "operators") == ANSWER
    member = replace(access, cluster_key=key)
    stranger = replace(make_certificates(tmp_path / "others"), tls_ca=access.tls_ca, cluster_key=key)
    for node in cluster.nodes.values():
        for caller, code in (
            (member, grpc.StatusCode.OK),
            (access, grpc.StatusCode.UNAUTHENTICATED),  # the certificate alone
            (stranger, grpc.StatusCode.UNAVAILABLE),
            (AccessConfig(tls_ca=access.tls_ca, cluster_key=key), grpc.StatusCode.UNAVAILABLE),  # the key alone
        ):
            with dial_blocking(node.address, caller) as channel:
                found = code_of(channel, "/baton.v1.Node/Ledger", "unary_unary", caller.metadata)
            assert found is code, (node.id, caller)
        with dial_blocking(node.address) as channel:
            assert code_of(channel, "/baton.v1.Node/Ledger", "unary_unary", member.metadata) is not grpc.StatusCode.OK
    # New certificates, and a worker that meets the others with one of them.
    make_certificates(tmp_path / "pki")
    cluster.wait_back(cluster.kill("decode-0"))
    assert completed(cluster, access, "operators") == ANSWER
    assert not cluster.lines_with(key)
