"""Clusters for tests. Each one is ended with its test, and looked after."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.cluster.harness import Cluster, StartCluster

START_TIMEOUT_S = 90.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A cluster is a machine's worth of processes."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.alone)


@pytest.fixture
def start_cluster(tmp_path: Path) -> Iterator[StartCluster]:
    """Starts a cluster and returns when it is ready; several may run in one test."""
    with ExitStack() as clusters:

        def start(
            model: Path,
            *,
            prefill: int = 2,
            decode: int = 2,
            mixed: int = 0,
            transport: str = "auto",
            dtype: str = "auto",
            arguments: tuple[str, ...] = (),
        ) -> Cluster:
            folder = tmp_path / f"cluster-{len(list(tmp_path.glob('cluster-*')))}"
            (folder / "tmp").mkdir(parents=True)
            ready_file = folder / "ready.json"
            command = [
                *(sys.executable, "-m", "cli", "up", "--model", str(model)),
                *("--prefill", str(prefill), "--decode", str(decode), "--mixed", str(mixed)),
                *("--transport", transport, "--dtype", dtype, "--http-port", "0", "--grpc-port", "0"),
                *("--ready-file", str(ready_file), "--log-dir", str(folder / "logs"), "--kv-mib", "256"),
                *arguments,
            ]
            with (folder / "up.log").open("wb") as log:
                launcher = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env={**os.environ, "TMPDIR": str(folder / "tmp")},
                )
            cluster = Cluster(launcher, ready_file, folder)
            clusters.callback(cluster.stop)
            cluster.wait_until(ready_file.exists, "ready file", START_TIMEOUT_S)
            return cluster

        yield start
