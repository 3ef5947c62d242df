"""A real cluster of real processes, started as a user starts it; its end is demanded to be clean."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import grpc
import psutil
import pytest

from baton.access import OPEN, AccessConfig
from baton.channels import dial_blocking
from baton.v1 import router_pb2, router_pb2_grpc
from tests.support.models import ModelCase

START_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 30.0
CALL_TIMEOUT_S = 10.0
# How often a condition that another process brings about is looked at.
LOOK_EVERY_S = 0.02
# Of a block, where no argument says another.
BLOCK_TOKENS = 64
# For clusters that ask for keys: the one of docs/clients.md, and another.
KEYS = ("secret", "key-of-somebody")
ADMIN_KEY = "key-of-the-operators"
WITH_KEYS = ("--api-key", KEYS[0], "--api-key", KEYS[1], "--admin-key", ADMIN_KEY)


@dataclass(frozen=True, slots=True)
class Node:
    id: str
    role: str
    pid: int
    address: str
    metrics: str


class Cluster:
    """A running `baton up`: where it is, and what a test can do to it."""

    def __init__(self, launcher: subprocess.Popen[bytes], ready_file: Path, folder: Path) -> None:
        self.launcher = launcher
        self._ready_file = ready_file
        self._folder = folder
        self._pids: set[int] = set()
        self._sockets: set[str] = set()
        self._channel: grpc.Channel | None = None
        self._is_abandoned = False
        # How a client knows the router, if that has a certificate.
        self.trust = OPEN

    @property
    def ready(self) -> dict[str, object]:
        """The ready file as it is now; it is replaced when a worker came back."""
        content: dict[str, object] = json.loads(self._ready_file.read_text())
        return content

    @property
    def http(self) -> str:
        return str(self.ready["http"])

    @property
    def grpc(self) -> str:
        return str(self.ready["grpc"])

    @property
    def router_pid(self) -> int:
        pid = self.ready["router_pid"]
        assert isinstance(pid, int)
        return pid

    @property
    def nodes(self) -> dict[str, Node]:
        listed = self.ready["nodes"]
        assert isinstance(listed, list)
        return {node["id"]: Node(**node) for node in listed}

    @property
    def access(self) -> AccessConfig:
        """For calls to workers: the key that `up` made for its cluster."""
        file = Path(str(self.ready["cluster_key_file"]))
        assert file.stat().st_mode & 0o777 == 0o600, "a secret of the user who started it"
        return AccessConfig(cluster_key=file.read_text().strip())

    def stub(self) -> router_pb2_grpc.RouterStub:
        if self._channel is None:
            self._channel = dial_blocking(self.grpc, self.trust)
        return router_pb2_grpc.RouterStub(self._channel)

    def kill(self, node_id: str) -> Node:
        """kill -9; the launcher will start the node again."""
        node = self.nodes[node_id]
        os.kill(node.pid, signal.SIGKILL)
        return node

    def wait_until(self, condition: Callable[[], bool], what: str, deadline_s: float) -> None:
        gives_up_at = time.monotonic() + deadline_s
        while not condition():
            assert self.launcher.poll() is None, f"baton up has ended while a test waited for {what}: {self.logs()}"
            assert time.monotonic() < gives_up_at, f"no {what} within {deadline_s} s: {self.logs()}"
            time.sleep(LOOK_EVERY_S)

    def wait_back(self, dead: Node, deadline_s: float = 60.0) -> Node:
        """Until a killed node runs again, as another process on the same address, and the router sees it ready."""
        self.wait_until(lambda: self.nodes[dead.id].pid != dead.pid, f"new {dead.id}", deadline_s)
        back = self.nodes[dead.id]
        assert back.address == dead.address
        self.remember()

        def is_ready() -> bool:
            return any(n.state == "ready" and n.node.pid == back.pid for n in self.status().nodes)

        self.wait_until(is_ready, f"ready {dead.id}", deadline_s)
        return back

    def status(self) -> router_pb2.StatusResponse:
        return self.stub().Status(router_pb2.StatusRequest(), timeout=CALL_TIMEOUT_S)

    def ledger(self) -> router_pb2.ClusterLedgerResponse:
        return self.stub().Ledger(router_pb2.ClusterLedgerRequest(), timeout=CALL_TIMEOUT_S)

    def wait_baseline(self, deadline_s: float = 10.0) -> None:
        """Until every node answers and every block of every node is free, or kept for prompts that begin alike."""

        def is_baseline() -> bool:
            found = self.ledger()
            return (
                not found.unreachable
                and len(found.nodes) == len(self.nodes)
                and all(owner.state == "cached" for node in found.nodes for owner in node.owners)
                and all(n.free_blocks + sum(o.num_blocks for o in n.owners) == n.total_blocks for n in found.nodes)
            )

        try:
            self.wait_until(is_baseline, "baseline", deadline_s)
        except AssertionError:
            pytest.fail(f"blocks did not come back:\n{self.ledger()}")

    def logs(self) -> str:
        """The end of every log there is."""
        return "".join(
            f"\n--- {log.name}\n{log.read_text(errors='replace')[-3000:]}"
            for log in sorted(self._folder.rglob("*.log"))
        )

    def lines_with(self, text: str) -> set[str]:
        """Of every log, from its beginning."""
        logs = (log.read_text(errors="replace") for log in self._folder.rglob("*.log"))
        return {line for log in logs for line in log.splitlines() if text in line}

    def remember(self) -> None:
        """Notes processes and abstract unix sockets, to ask after the end whether they are gone."""
        family = [psutil.Process(self.launcher.pid), *psutil.Process(self.launcher.pid).children(recursive=True)]
        self._pids |= {process.pid for process in family}
        for process in family:
            self._sockets |= {str(c.laddr) for c in process.net_connections("unix") if c.laddr}

    def abandon(self) -> None:
        """The test ends the launcher itself."""
        self._is_abandoned = True

    def stop(self) -> None:
        """SIGTERM; then exit code 0 and nothing left are demanded."""
        if self._channel is not None:
            self._channel.close()
        if self._is_abandoned:
            return
        if self.launcher.poll() is None:
            self.remember()
        addresses = [node.address for node in self.nodes.values()] if self._ready_file.exists() else []
        self.launcher.send_signal(signal.SIGTERM)
        try:
            code = self.launcher.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.launcher.kill()
            self.launcher.wait(STOP_TIMEOUT_S)
            pytest.fail(f"baton up did not end within {STOP_TIMEOUT_S} s of SIGTERM: {self.logs()}")
        assert code == 0, f"baton up ended with {code}: {self.logs()}"
        self._assert_nothing_left(addresses)

    def _assert_nothing_left(self, addresses: list[str]) -> None:
        alive = [pid for pid in self._pids if psutil.pid_exists(pid)]
        assert not alive, f"processes {alive} outlived baton up: {self.logs()}"
        listed = Path("/proc/net/unix").read_text()
        left = [name for name in self._sockets if name in listed]
        assert not left, f"unix sockets {left} were left"
        listening = {":".join(map(str, c.laddr)) for c in psutil.net_connections("tcp") if c.status == "LISTEN"}
        assert not listening & set(addresses)
        assert not self._ready_file.exists()
        assert not [*(self._folder / "tmp").iterdir()], "temporary files were left"


def layerwise_from_kib(case: ModelCase, num_blocks: int) -> int:
    """The setting by which prompts from this many blocks on are pushed layer by layer, in float32."""
    per_token = case.layers * case.kv_heads * case.head_dim * 2 * 4
    return num_blocks * BLOCK_TOKENS * per_token >> 10


class StartCluster(Protocol):
    """Of the fixtures: starts a cluster and returns when it is ready, or finds one that runs."""

    def __call__(
        self,
        model: Path,
        *,
        prefill: int = 2,
        decode: int = 2,
        mixed: int = 0,
        transport: str = "auto",
        dtype: str = "auto",
        disaggregation: str = "always",
        arguments: tuple[str, ...] = (),
    ) -> Cluster:
        """``disaggregation``: most tests are about requests that are split; "auto" is what users have."""
        ...


def starter(folder: Path, clusters: ExitStack) -> StartCluster:
    """Starts clusters whose files lie in ``folder``; ``clusters`` ends them."""

    def start(
        model: Path,
        *,
        prefill: int = 2,
        decode: int = 2,
        mixed: int = 0,
        transport: str = "auto",
        dtype: str = "auto",
        disaggregation: str = "always",
        arguments: tuple[str, ...] = (),
    ) -> Cluster:
        own = folder / f"cluster-{len(list(folder.glob('cluster-*')))}"
        (own / "tmp").mkdir(parents=True)
        ready_file = own / "ready.json"
        command = [
            *(sys.executable, "-m", "cli", "up", "--model", str(model)),
            *("--prefill", str(prefill), "--decode", str(decode), "--mixed", str(mixed)),
            *("--transport", transport, "--dtype", dtype, "--disaggregation", disaggregation),
            *("--http-port", "0", "--grpc-port", "0"),
            *("--ready-file", str(ready_file), "--log-dir", str(own / "logs"), "--kv-mib", "256"),
            *arguments,
        ]
        with (own / "up.log").open("wb") as log:
            launcher = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "TMPDIR": str(own / "tmp")},
            )
        cluster = Cluster(launcher, ready_file, own)
        clusters.callback(cluster.stop)
        cluster.wait_until(ready_file.exists, "ready file", START_TIMEOUT_S)
        return cluster

    return start
