"""The layer over CUDA's driver, on a driver made of C callbacks: argument types, contexts, and what errors become."""

# Functions are called what cuda.h calls them.
# ruff: noqa: N802, N815, E731

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np
import pytest

from baton.errors import BadConfig, InternalError, TransferFailed
from kvtransfer.device_memory import DeviceMemory
from kvtransfer.devices import cuda
from kvtransfer.devices.cuda import CudaDevice, Driver
from kvtransfer.plan import ByteRange

OUT_OF_MEMORY, INVALID_CONTEXT = 2, 201
COMPUTE_STREAM = 77


class FakeLibrary:
    """Every function of libcuda that we call, with C's calling convention. Copies are carried out at once."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.arguments: dict[str, tuple[object, ...]] = {}
        self.fails: dict[str, int] = {}
        self._memory: dict[int, object] = {}
        self._next_handle = 1
        for name, types in cuda._FUNCTIONS.items():
            setattr(self, name, ctypes.CFUNCTYPE(ctypes.c_int, *types)(self._function(name)))

    def _function(self, name: str) -> Callable[..., int]:
        def call(*arguments: object) -> int:
            self.calls.append(name)
            self.arguments[name] = arguments
            if name in self.fails:
                return self.fails[name]
            act = getattr(self, f"_{name}", None)
            if act is not None:
                act(*arguments)
            return 0

        return call

    def _give(self, out: object) -> None:
        out[0] = self._next_handle
        self._next_handle += 1

    _cuStreamCreate = _cuEventCreate = lambda self, out, flags: self._give(out)
    _cuDevicePrimaryCtxRetain = lambda self, out, device: self._give(out)

    def _cuGetErrorName(self, code: int, out: object) -> None:
        out[0] = b"CUDA_ERROR_OUT_OF_MEMORY"

    _cuGetErrorString = _cuGetErrorName

    def _cuDeviceGetCount(self, out: object) -> None:
        out[0] = 3

    def _cuDeviceGet(self, out: object, index: int) -> None:
        out[0] = 10 + index

    def _cuDeviceGetUuid_v2(self, out: object, device: int) -> None:
        out[0].bytes[:] = bytes([device]) * 16

    def _cuDeviceCanAccessPeer(self, out: object, device: int, peer: int) -> None:
        assert device == 11
        out[0] = int(peer == 12)

    def _cuMemAlloc_v2(self, out: object, num_bytes: int) -> None:
        memory = (ctypes.c_ubyte * num_bytes)()
        self._memory[ctypes.addressof(memory)] = memory
        out[0] = ctypes.addressof(memory)

    def _cuMemHostAlloc(self, out: object, num_bytes: int, flags: int) -> None:
        self._cuMemAlloc_v2(out, num_bytes)

    def _cuMemFree_v2(self, address: int) -> None:
        del self._memory[address]

    _cuMemFreeHost = _cuMemFree_v2

    def _cuMemcpyAsync(self, target: int, source: int, num_bytes: int, stream: int) -> None:
        ctypes.memmove(target, source, num_bytes)

    def _cuIpcGetMemHandle(self, out: object, address: int) -> None:
        ctypes.memmove(out[0].reserved, address.to_bytes(8, "little").ljust(64, b"\x11"), 64)

    def _cuIpcOpenMemHandle_v2(self, out: object, handle: cuda._IpcHandle, flags: int) -> None:
        raw = bytes(handle.reserved)
        assert raw[8:] == b"\x11" * 56, "the handle goes by value, all of it"
        assert flags == 1
        out[0] = int.from_bytes(raw[:8], "little")


@pytest.fixture
def library() -> FakeLibrary:
    return FakeLibrary()


@pytest.fixture
def device(library: FakeLibrary) -> CudaDevice:
    return CudaDevice(Driver(library), 1, lambda: COMPUTE_STREAM)


def test_a_device_names_itself_and_whom_it_reaches(device: CudaDevice) -> None:
    mine, peer = device.reachable_ids
    assert mine == device.memory_id
    assert mine.startswith("GPU-0b0b0b0b-0b0b-0b0b-0b0b-0b0b0b0b0b0b/pid:[")
    assert peer.startswith("GPU-0c0c0c0c")


def test_bytes_go_through_staging_and_are_hashed(device: CudaDevice, library: FakeLibrary) -> None:
    data = np.random.default_rng(0).integers(0, 256, 3000, dtype=np.uint8)
    with DeviceMemory.create(3000, device) as memory:
        assert library.arguments["cuMemAlloc_v2"][1] == 2 << 20, "no page is shared with another allocation"
        assert memory.__cuda_array_interface__["data"] == (memory.address, False)
        with memory.staging(3000) as staging:
            staging.view(0, 3000)[:] = data
            staging.scatter(0, [(memory.address + 1000, 2000), (memory.address, 1000)])
            staging.wait(0)
            staging.gather(1, [(memory.address + 1000, 2000), (memory.address, 1000)])
            staging.wait(1)
            assert np.array_equal(staging.view(1, 3000), data)
        swapped = np.concatenate([data[2000:], data[:2000]])
        with DeviceMemory.create(3000, device) as other:
            ctypes.memmove(other.address, swapped.ctypes.data, 3000)
            whole = bytes(next(iter(other.hash(0, [[ByteRange(0, 3000)]]))))
        assert bytes(next(iter(memory.hash(0, [[ByteRange(0, 3000)]])))) == whole
    assert not library._memory, "pinned buffers and allocations are given back"


def test_a_fence_is_recorded_on_the_stream_that_computes(device: CudaDevice, library: FakeLibrary) -> None:
    event = device.fence()
    assert library.arguments["cuEventRecord"] == (event.handle.value, COMPUTE_STREAM)
    assert library.arguments["cuEventCreate"][1] == 3, "waiting for it yields the core, and it measures nothing"
    stream = device.stream()
    stream.wait_for(event)
    assert library.arguments["cuStreamWaitEvent"] == (stream._handle.value, event.handle.value, 0)
    event.wait()
    assert library.calls[-2:] == ["cuCtxSetCurrent", "cuEventSynchronize"], "a thread may have been at another device"
    stream.close()
    del event
    assert library.calls[-2:] == ["cuCtxSetCurrent", "cuEventDestroy_v2"], "any thread may let go of it"


def test_what_was_handed_over_is_not_freed_under_a_peer(device: CudaDevice, library: FakeLibrary) -> None:
    address = device.allocate(100)
    opened = device.open(device.export(address), 100)
    assert opened == address
    device.close(opened)
    device.free(address)
    assert "cuMemFree_v2" not in library.calls
    other = device.allocate(100)
    device.free(other)
    assert library.arguments["cuMemFree_v2"] == (other,)


def test_errors_say_which_call_failed_and_why(device: CudaDevice, library: FakeLibrary) -> None:
    library.fails = dict.fromkeys(("cuMemAlloc_v2", "cuIpcGetMemHandle", "cuIpcOpenMemHandle_v2"), OUT_OF_MEMORY)
    with pytest.raises(BadConfig, match=r"no 100 bytes for the KV cache: cuMemAlloc_v2 failed: CUDA_ERROR_OUT"):
        device.allocate(100)
    with pytest.raises(TransferFailed, match="cannot be shared: cuIpcGetMemHandle failed"):
        device.export(1)
    with pytest.raises(TransferFailed, match="cannot open the peer's 100 bytes"):
        device.open(bytes(64), 100)
    library.fails = {"cuEventSynchronize": INVALID_CONTEXT}
    with pytest.raises(InternalError, match="cuEventSynchronize failed"):
        device.fence().wait()


def test_without_a_driver_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_library(name: str) -> ctypes.CDLL:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(cuda.ctypes, "CDLL", no_library)
    with pytest.raises(BadConfig, match=r"no usable CUDA driver: libcuda.so.1"):
        Driver.load()


def test_torch_without_a_gpu_is_refused() -> None:
    with pytest.raises(BadConfig, match="expected a CUDA device that torch sees"):
        CudaDevice.of_torch("cpu")
