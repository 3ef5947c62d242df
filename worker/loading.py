"""Loads a worker's model in a thread beside the event loop; the process can exit without waiting for it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any, Protocol

from baton.errors import InternalError
from baton.types import KvLayout, ModelDescription, PrefixCaching
from engine.cost import CostModel
from engine.replica import RunnerLike
from kvtransfer.device_memory import DeviceMemory
from kvtransfer.devices.interface import Device
from kvtransfer.memory import HostMemory, Memory
from worker.config import WorkerConfig
from worker.leaving import Leaving

# Fresh pages of shared memory come at 0.25 to 1.8 GB/s, 10 to 50 times slower than a copy.
_PREFAULT_BYTES = 256 << 20


class LoadedModel(RunnerLike, Protocol):
    """A runner that says what it runs."""

    @property
    def layout(self) -> KvLayout: ...

    @property
    def description(self) -> ModelDescription: ...

    @property
    def device(self) -> str: ...

    @property
    def kernels(self) -> str: ...

    @property
    def prefix_caching(self) -> PrefixCaching: ...

    @property
    def cost(self) -> CostModel | None: ...


class Allocate(Protocol):
    """Gives the bytes of the KV cache, in memory that peers on this host can map, or on a device by torch's name."""

    def __call__(self, num_bytes: int, device: str = "cpu") -> memoryview | DeviceMemory: ...


Load = Callable[[WorkerConfig, Allocate], LoadedModel]


def load_model(config: WorkerConfig, allocate: Allocate) -> LoadedModel:
    """The model in ``config.model``. Raises UnsupportedModel, BadConfig. Takes seconds: call it off the event loop."""
    # Torch takes seconds to import; a worker with a fake model does without.
    from engine.runner import Runner

    return Runner.load(config.model, config.engine, allocate=allocate)


def cuda_device(name: str) -> Device:
    from kvtransfer.devices.cuda import CudaDevice

    return CudaDevice.of_torch(name)


class Loading:
    """Loads the model in a thread that the process need not wait for, and owns the memory of its KV cache."""

    def __init__(self, load: Callable[[Allocate], LoadedModel], open_device: Callable[[str], Device]) -> None:
        self._open_device = open_device
        self._memories: list[Memory] = []
        self._loop = asyncio.get_running_loop()
        self._model: asyncio.Future[LoadedModel] = self._loop.create_future()
        self._is_abandoned = False
        self._thread = threading.Thread(target=self._main, args=(load,), name="load", daemon=True)
        self._thread.start()

    @property
    def memory(self) -> Memory:
        if len(self._memories) != 1:
            raise InternalError(f"the model's KV cache lies in {len(self._memories)} allocations, expected 1")
        return self._memories[0]

    async def unless(self, leaving: Leaving) -> LoadedModel | None:
        """The model, or None if the worker is to leave before it is there. Raises what loading raised."""
        closing = asyncio.create_task(leaving.closing())
        try:
            ends: set[asyncio.Future[Any]] = {self._model, closing}
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            closing.cancel()
        if not self._model.done():
            return None
        model = self._model.result()
        self.memory.prefault_in_background(_first_pages(model.layout))
        return model

    def abandon(self) -> bool:
        """Leave the thread to itself, with its memory; whether it has ended already."""
        self._is_abandoned = self._thread.is_alive()
        return not self._is_abandoned

    def close(self) -> None:
        if not self._is_abandoned:
            for memory in self._memories:
                memory.close()

    def _main(self, load: Callable[[Allocate], LoadedModel]) -> None:
        try:
            model = load(self._allocate)
        except BaseException as error:
            self._report(self._model.set_exception, error)
        else:
            self._report(self._model.set_result, model)

    def _report(self, settle: Callable[[Any], None], outcome: Any) -> None:
        def report() -> None:
            if not self._model.done():
                settle(outcome)

        # The loop is closed if the worker has left meanwhile: the result is not needed.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(report)

    def _allocate(self, num_bytes: int, device: str = "cpu") -> memoryview | DeviceMemory:
        if device == "cpu":
            memory = HostMemory.create(num_bytes)
            self._memories.append(memory)
            return memory.buffer
        on_device = DeviceMemory.create(num_bytes, self._open_device(device))
        self._memories.append(on_device)
        return on_device


def _first_pages(layout: KvLayout) -> list[tuple[int, int]]:
    """The leading blocks of each layer, which the pool hands out first. Not all: a generous default costs no memory."""
    num_blocks = min(layout.num_blocks, _PREFAULT_BYTES // (layout.num_layers * layout.block_bytes))
    return [(layout.offset(i, 0), layout.offset(i, num_blocks)) for i in range(layout.num_layers)]
