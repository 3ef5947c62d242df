"""Clusters for tests. Each one is ended with its test, or with the last of those that share it, and looked after."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support.cluster import Cluster, StartCluster, starter

# A limit against hanging: on a machine with other work a restart alone takes half a minute.
_LONG_TIMEOUT_S = 900


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A cluster is a machine's worth of processes."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.alone)
            if item.get_closest_marker("long") and not item.get_closest_marker("timeout"):
                item.add_marker(pytest.mark.timeout(_LONG_TIMEOUT_S))


@pytest.fixture
def start_cluster(tmp_path: Path) -> Iterator[StartCluster]:
    """Starts a cluster and returns when it is ready; several may run in one test."""
    with ExitStack() as clusters:
        yield starter(tmp_path, clusters)


@pytest.fixture(scope="package")
def shared_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartCluster]:
    """The same for tests that leave a cluster as they found it: one cluster for all that ask for the same.

    A start costs more than most tests. What a test needs to be the first to see, it has to start itself.
    """
    with ExitStack() as clusters:
        start = starter(tmp_path_factory.mktemp("shared"), clusters)
        running: dict[str, Cluster] = {}

        def shared(model: Path, *, arguments: tuple[str, ...] = (), **settings: Any) -> Cluster:
            # A default that is written out asks for the same.
            bound = inspect.signature(start).bind(model, arguments=arguments, **settings)
            bound.apply_defaults()
            asked = repr(bound.arguments)
            if asked not in running:
                # Several of them are there at once, and tests on them are small.
                running[asked] = start(model, arguments=("--kv-mib", "64", *arguments), **settings)
            return running[asked]

        yield shared
        with ThreadPoolExecutor(len(running) or 1) as pool:
            list(pool.map(Cluster.stop, running.values()))
