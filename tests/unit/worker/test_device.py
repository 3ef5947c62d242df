"""Two whole workers whose KV lies on (fake) devices that compute late: the relay gives the tokens of one node."""

from __future__ import annotations

from array import array
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from baton.errors import BadConfig
from baton.types import SequenceSpec, TokenChunk
from engine.fake import FakeRunner, Row, expected_tokens
from engine.kv_cache import KvCache
from engine.runner import _allocated
from kvtransfer.config import TRANSPORTS
from kvtransfer.device_memory import DeviceMemory
from kvtransfer.devices.fake import FakeDevice
from tests.support.node import spec
from tests.support.relay import LAYOUT, Load, Pair, pair, worker
from worker.config import WorkerConfig
from worker.loading import Allocate, LoadedModel


class DeviceRunner(FakeRunner):
    """Queues its writes on the device and goes on; waits for them when it needs a token, as an engine on a GPU does."""

    device = "fake"

    def __init__(self, memory: DeviceMemory, **settings: Any) -> None:
        assert isinstance(memory.device, FakeDevice)
        self._on = memory.device
        self._address = memory.address
        super().__init__(LAYOUT, buffer=self._on.bytes_at(self._address, memory.num_bytes).data, **settings)

    def _write(self, layer: int, row: Row, tokens: Sequence[int]) -> None:
        for position, cell, count in self._runs(layer, row.block_ids, row.start, row.stop):
            first = position - row.start
            values = array("I", (token + 1 + layer for token in tokens[first : first + count]))
            self._on.compute.write(self._address + 4 * cell, np.frombuffer(values, dtype=np.uint8))

    def _draw(self, row: Row) -> TokenChunk:
        self._on.compute.settle()
        return super()._draw(row)


def load(config: WorkerConfig, allocate: Allocate) -> LoadedModel:
    memory = allocate(LAYOUT.total_bytes, "cuda:0")
    assert isinstance(memory, DeviceMemory)
    return DeviceRunner(memory, vocab_size=1000, max_model_tokens=600)


@asynccontextmanager
async def device_pair(tmp_path: Path, **settings: Any) -> AsyncIterator[Pair]:
    devices: list[FakeDevice] = []

    def open_device(name: str) -> FakeDevice:
        devices.append(FakeDevice(seed=len(devices), max_delay_s=0.001))
        return devices[-1]

    async with pair(tmp_path, load=load, open_device=open_device, **settings) as relay:
        yield relay
    assert len(devices) == 2
    for device in devices:
        device.shut_down()


@pytest.mark.parametrize("transports", [("cuda_ipc", "shm", "tcp"), ("tcp",)])
@pytest.mark.parametrize("layerwise_from_bytes", [0, 1 << 40])
async def test_the_relay_gives_the_tokens_of_one_node(
    tmp_path: Path, transports: tuple[str, ...], layerwise_from_bytes: int
) -> None:
    settings = {"transports": transports, "layerwise_from_bytes": dict.fromkeys(TRANSPORTS, layerwise_from_bytes)}
    sequences = [spec(f"r{n}/0/1", n, max_tokens=12) for n in (1, 16, 17, 33, 100, 150)]
    async with device_pair(tmp_path, **settings) as relay:
        found = await Load(relay, sequences, at_once=4).run()
        assert found == {s.sequence_id: expected_tokens(s, LAYOUT, 1000) for s in sequences}
        await relay.settled()


async def test_damage_on_the_way_is_repaired(tmp_path: Path) -> None:
    settings = {"prefill_transports": ("fake:corrupt=1,over=cuda_ipc",), "decode_transports": ("cuda_ipc",)}
    async with device_pair(tmp_path, **settings) as relay:
        sequence: SequenceSpec = spec("r/0/1", 40, max_tokens=12)
        assert await relay.relay(sequence) == expected_tokens(sequence, LAYOUT, 1000)
        await relay.settled()


async def test_a_transport_that_cannot_reach_the_device_stops_the_start(tmp_path: Path) -> None:
    device = FakeDevice()
    with pytest.raises(BadConfig, match="shm do not reach a KV cache on a device; expected cuda_ipc or tcp"):
        async with worker(tmp_path, "w0", load=load, open_device=lambda name: device, transports=("shm",)):
            pass
    device.shut_down()


def test_a_cache_lies_in_memory_that_is_not_the_processors() -> None:
    """torch takes an array of numpy's the same way as one of CUDA's; the first needs no GPU."""
    buffer = np.zeros(LAYOUT.total_bytes, dtype=np.uint8)
    cache = KvCache(LAYOUT, buffer, torch.device("cpu"))
    cache.layer(1)[2].fill_(1.0)
    start = LAYOUT.offset(1, 2)
    assert (buffer[start : start + LAYOUT.block_bytes].view(np.float32) == 1).all()
    assert not buffer[:start].any()
    with pytest.raises(BadConfig, match="expected"):
        KvCache(LAYOUT, buffer[:8], torch.device("cpu"))


def test_memory_is_asked_for_where_the_kernels_compute() -> None:
    asked: list[tuple[object, ...]] = []

    def allocate(*arguments: object) -> memoryview:
        asked.append(arguments)
        return memoryview(bytearray())

    _allocated(allocate, 10, torch.device("cpu"))
    _allocated(allocate, 10, torch.device("cuda", 1))
    assert asked == [(10,), (10, "cuda:1")]
    with pytest.raises(BadConfig, match="lies on xpu:0, which no transport reaches"):
        _allocated(allocate, 10, torch.device("xpu", 0))
