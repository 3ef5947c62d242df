"""What every test shares."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

import demo
from tests.support.redis_server import RedisServer

# Before torch is imported. Tests use small tensors: a second thread saves nothing, and on a busy machine every parallel
# loop would wait for it. Tests about threads ask torch for more.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Before grpc is imported: connections that tests cut would be told on the terminal.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
# `--kernels auto` would take a GPU; what the suite expects is the processor's.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

# How long an example takes says something about the machine, not about what is tested.
settings.register_profile("baton", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("baton")


@pytest.fixture(scope="session")
def demo_model() -> Path:
    folder = Path(demo.__file__).parent / "model"
    assert (folder / "config.json").exists(), "demo/model is part of the repository"
    return folder


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    folder = tmp_path / "redis"
    folder.mkdir()
    server = RedisServer(folder, password="s3cret")
    try:
        yield server.start()
    finally:
        server.close()
