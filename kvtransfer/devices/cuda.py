"""A CUDA device through the driver's C interface. The only module of the package that uses torch, for the device's
number, context and current stream. Each method is one or two calls.

Not run on a GPU yet (docs/decisions/0006-device-memory.md).
"""

from __future__ import annotations

import ctypes
import os
import uuid
from collections.abc import Callable

import numpy as np

from baton.errors import BadConfig, InternalError, TransferFailed
from kvtransfer.devices.interface import HANDLE_BYTES, Event, Pinned

# Allocations of this size share no page with others, whose bytes the handle would hand over as well.
_GRANULE_BYTES = 2 << 20
_HOST_ALLOC_PORTABLE = 1
_EVENT_BLOCKING_SYNC_NO_TIMING = 1 | 2
_STREAM_NON_BLOCKING = 1
_IPC_LAZY_ENABLE_PEER_ACCESS = 1
_PID_NAMESPACE = "/proc/self/ns/pid"

_Pointer = ctypes.c_uint64
_Handle = ctypes.c_void_p


class _IpcHandle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_ubyte * HANDLE_BYTES),)


class _Uuid(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_ubyte * 16),)


# Names and types as in cuda.h; the suffix is part of the symbol.
_FUNCTIONS: dict[str, tuple[type, ...]] = {
    "cuInit": (ctypes.c_uint,),
    "cuGetErrorName": (ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)),
    "cuGetErrorString": (ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)),
    "cuDeviceGetCount": (ctypes.POINTER(ctypes.c_int),),
    "cuDeviceGet": (ctypes.POINTER(ctypes.c_int), ctypes.c_int),
    "cuDeviceGetUuid_v2": (ctypes.POINTER(_Uuid), ctypes.c_int),
    "cuDeviceCanAccessPeer": (ctypes.POINTER(ctypes.c_int), ctypes.c_int, ctypes.c_int),
    "cuDevicePrimaryCtxRetain": (ctypes.POINTER(_Handle), ctypes.c_int),
    "cuCtxSetCurrent": (_Handle,),
    "cuMemAlloc_v2": (ctypes.POINTER(_Pointer), ctypes.c_size_t),
    "cuMemFree_v2": (_Pointer,),
    "cuMemHostAlloc": (ctypes.POINTER(_Handle), ctypes.c_size_t, ctypes.c_uint),
    "cuMemFreeHost": (_Handle,),
    "cuMemcpyAsync": (_Pointer, _Pointer, ctypes.c_size_t, _Handle),
    "cuStreamCreate": (ctypes.POINTER(_Handle), ctypes.c_uint),
    "cuStreamDestroy_v2": (_Handle,),
    "cuStreamWaitEvent": (_Handle, _Handle, ctypes.c_uint),
    "cuEventCreate": (ctypes.POINTER(_Handle), ctypes.c_uint),
    "cuEventRecord": (_Handle, _Handle),
    "cuEventSynchronize": (_Handle,),
    "cuEventDestroy_v2": (_Handle,),
    "cuIpcGetMemHandle": (ctypes.POINTER(_IpcHandle), _Pointer),
    "cuIpcOpenMemHandle_v2": (ctypes.POINTER(_Pointer), _IpcHandle, ctypes.c_uint),
    "cuIpcCloseMemHandle": (_Pointer,),
}


class Driver:
    """libcuda with its functions' types, and errors as exceptions. ctypes lets go of the GIL in every call."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        for name, types in _FUNCTIONS.items():
            function = getattr(library, name)
            function.argtypes, function.restype = types, ctypes.c_int

    @classmethod
    def load(cls) -> Driver:
        """Raises BadConfig if there is no driver, or an older one than CUDA 11.4's."""
        try:
            driver = cls(ctypes.CDLL("libcuda.so.1"))
            driver("cuInit", 0)
        except (OSError, AttributeError, InternalError) as error:
            raise BadConfig(f"no usable CUDA driver: {error}; expected libcuda.so.1 of CUDA 11.4 or newer") from error
        return driver

    def __call__(self, name: str, *arguments: object) -> None:
        """Raises InternalError unless the call succeeds. Errors of work queued before come up here too."""
        code = self.try_(name, *arguments)
        if code:
            raise InternalError(f"{name} failed: {self.describe(code)}")

    def try_(self, name: str, *arguments: object) -> int:
        return int(getattr(self._library, name)(*arguments))

    def describe(self, code: int) -> str:
        texts = []
        for name in ("cuGetErrorName", "cuGetErrorString"):
            text = ctypes.c_char_p()
            self.try_(name, code, ctypes.byref(text))
            texts.append((text.value or b"unknown").decode())
        return f"{texts[0]} ({code}): {texts[1]}"


class CudaEvent:
    def __init__(self, device: CudaDevice, stream: int) -> None:
        self._device = device
        self._handle = _Handle()
        device.call("cuEventCreate", ctypes.byref(self._handle), _EVENT_BLOCKING_SYNC_NO_TIMING)
        device.call("cuEventRecord", self._handle, stream)

    @property
    def handle(self) -> ctypes.c_void_p:
        return self._handle

    def wait(self) -> None:
        self._device.call("cuEventSynchronize", self._handle)

    def __del__(self) -> None:
        # The driver frees the event once it has occurred; an error here has no consequence. Any thread may drop the
        # last reference, also one that never entered a device.
        if self._handle.value:
            self._device.try_("cuEventDestroy_v2", self._handle)


class CudaStream:
    def __init__(self, device: CudaDevice) -> None:
        self._device = device
        self._handle = _Handle()
        # Else every copy would wait for the engine's default stream, and hold it up.
        device.call("cuStreamCreate", ctypes.byref(self._handle), _STREAM_NON_BLOCKING)

    def wait_for(self, event: Event) -> None:
        assert isinstance(event, CudaEvent), "an event of another device"
        self._device.call("cuStreamWaitEvent", self._handle, event.handle, 0)

    def copy(self, target: int, source: int, num_bytes: int) -> None:
        """With unified addressing the driver sees from the addresses what lies where."""
        self._device.call("cuMemcpyAsync", target, source, num_bytes, self._handle)

    def record(self) -> CudaEvent:
        return CudaEvent(self._device, self._handle.value or 0)

    def close(self) -> None:
        self._device.call("cuStreamDestroy_v2", self._handle)


class CudaDevice:
    """One GPU, in the primary context, which is torch's too. Any thread."""

    def __init__(self, driver: Driver, index: int, current_stream: Callable[[], int]) -> None:
        """``index`` among the GPUs visible to this process, as torch counts them; ``current_stream()`` is the handle of
        the stream that the calling thread computes on."""
        self.driver = driver
        self._current_stream = current_stream
        self._index = index
        self._device = self._nth(index)
        self._context = _Handle()
        driver("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self._device)
        self.memory_id = self._id_of(self._device)
        self.reachable_ids = tuple(self._id_of(other) for other in self._reachable())
        self._exported: set[int] = set()

    @classmethod
    def of_torch(cls, name: str) -> CudaDevice:
        """The device that torch calls ``cuda:N``, or ``cuda``. Raises BadConfig if there is none."""
        import torch

        device = torch.device(name)
        if device.type != "cuda" or not torch.cuda.is_available():
            raise BadConfig(
                f"device {name!r} cannot hold a KV cache for transfers; expected a CUDA device that torch sees"
            )
        torch.cuda.init()  # type: ignore[no-untyped-call]
        index = torch.cuda.current_device() if device.index is None else device.index
        return cls(Driver.load(), index, lambda: torch.cuda.current_stream(index).cuda_stream)

    def call(self, name: str, *arguments: object) -> None:
        """In this device's context, whatever the thread was at before."""
        self.driver("cuCtxSetCurrent", self._context)
        self.driver(name, *arguments)

    def try_(self, name: str, *arguments: object) -> int:
        """``call``, the driver's code instead of an exception."""
        return self.driver.try_("cuCtxSetCurrent", self._context) or self.driver.try_(name, *arguments)

    def _nth(self, index: int) -> int:
        device = ctypes.c_int()
        self.driver("cuDeviceGet", ctypes.byref(device), index)
        return device.value

    def _id_of(self, device: int) -> str:
        """Handles are opened within one process namespace, and writers are watched by process number."""
        raw = _Uuid()
        self.driver("cuDeviceGetUuid_v2", ctypes.byref(raw), device)
        return f"GPU-{uuid.UUID(bytes=bytes(raw.bytes))}/{os.readlink(_PID_NAMESPACE)}"

    def _reachable(self) -> list[int]:
        count, can_access = ctypes.c_int(), ctypes.c_int()
        self.driver("cuDeviceGetCount", ctypes.byref(count))
        found = [self._device]
        for other in (self._nth(i) for i in range(count.value) if i != self._index):
            self.driver("cuDeviceCanAccessPeer", ctypes.byref(can_access), self._device, other)
            if can_access.value:
                found.append(other)
        return found

    def allocate(self, num_bytes: int) -> int:
        address = _Pointer()
        rounded = num_bytes + -num_bytes % _GRANULE_BYTES
        try:
            self.call("cuMemAlloc_v2", ctypes.byref(address), rounded)
        except InternalError as error:
            raise BadConfig(f"no {num_bytes} bytes for the KV cache: {error.message}; lower the blocks") from error
        return address.value

    def free(self, address: int) -> None:
        # A peer may still have it open, and freeing it under the peer is undefined: it ends with the process then.
        if address not in self._exported:
            self.call("cuMemFree_v2", address)

    def pin(self, num_bytes: int) -> Pinned:
        address = _Handle()
        self.call("cuMemHostAlloc", ctypes.byref(address), num_bytes, _HOST_ALLOC_PORTABLE)
        assert address.value is not None, "the call has succeeded"
        memory = (ctypes.c_ubyte * num_bytes).from_address(address.value)
        return Pinned(np.ctypeslib.as_array(memory), address.value)

    def unpin(self, pinned: Pinned) -> None:
        self.call("cuMemFreeHost", pinned.address)

    def stream(self) -> CudaStream:
        return CudaStream(self)

    def fence(self) -> CudaEvent:
        return CudaEvent(self, self._current_stream())

    def export(self, address: int) -> bytes:
        handle = _IpcHandle()
        try:
            self.call("cuIpcGetMemHandle", ctypes.byref(handle), address)
        except InternalError as error:
            raise TransferFailed(f"this device's memory cannot be shared: {error.message}") from error
        self._exported.add(address)
        return bytes(handle.reserved)

    def open(self, handle: bytes, num_bytes: int) -> int:
        address = _Pointer()
        raw = _IpcHandle.from_buffer_copy(handle)
        try:
            self.call("cuIpcOpenMemHandle_v2", ctypes.byref(address), raw, _IPC_LAZY_ENABLE_PEER_ACCESS)
        except InternalError as error:
            raise TransferFailed(f"cannot open the peer's {num_bytes} bytes: {error.message}") from error
        return address.value

    def close(self, address: int) -> None:
        self.call("cuIpcCloseMemHandle", address)
