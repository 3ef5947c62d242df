"""A device and cases that fail in every way that a GPU's may, for tests of the first-run kit."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from bench.gpu_child import Context
from bench.gpu_measure import CaptureFailedError, Case, Device, Peer, Replay, Task, Work


@dataclass(frozen=True)
class PlantedDevice(Device):
    """Records by calling; a failed recording spoils the process, as torch's allocator does. Every call takes 1 ms."""

    spoiled: list[str] = field(default_factory=list)

    @property
    def torch(self) -> str:
        return "cpu"

    def free_bytes(self) -> int:
        return 1 << 30

    def check_usable(self) -> None:
        if self.spoiled:
            raise RuntimeError(self.spoiled[0])

    def record(self, calls: Sequence[Callable[[], object]]) -> Replay:
        try:
            for call in calls:
                call()
        except Exception as error:
            self.spoiled.append("the allocator is capturing")
            raise CaptureFailedError(str(error)) from error
        return Replay(lambda: [call() for call in calls], len(calls))

    def seconds(self, replays: Mapping[str, Replay]) -> dict[str, float]:
        self.check_usable()
        for replay in replays.values():
            replay.run()
        return {name: 1e-3 * (i + 1) for i, name in enumerate(replays)}


def device() -> PlantedDevice:
    return PlantedDevice("planted", is_gpu=True, l2_bytes=1 << 20, copy_bytes_per_s=1e9, flops_per_s=1e9)


def _raises_on_call(number: int) -> Callable[[object], None]:
    calls: list[object] = []

    def run(_: object) -> None:
        calls.append(None)
        if len(calls) == number:
            raise RuntimeError(f"call {number}")

    return run


def _hang(_: object) -> None:
    threading.Event().wait()


def _die(_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _out_of_memory(_: object) -> None:
    raise torch.OutOfMemoryError("tried to allocate 1 GiB")


def _work(name: str, **options: object) -> Work:
    values: dict[str, object] = {
        "make": lambda seed: torch.full((4,), float(seed)),
        "ours": lambda x: x + 1,
        "expected": lambda x: (x + 1).double(),
        "bytes": 1000.0,
        **options,
    }
    return Work("planted", name, **values)  # type: ignore[arg-type]


def cases(context: Context) -> Iterator[Case]:
    """Each with a good one behind it, whose rows nothing may cost."""
    yield _work("good first", peers={"same": Peer(lambda x: x + 1)})
    # The first call is the warm-up; the second one comes when it is timed.
    yield _work("peer raises on its second call", peers={"bad": Peer(_raises_on_call(2)), "good": Peer(lambda x: x)})
    yield _work("ours is wrong", expected=lambda x: x.double())
    yield _work("ours raises", ours=_raises_on_call(1))
    yield _work("make raises", make=_raises_on_call(1))
    yield _work("peer kills", peers={"bad": Peer(_die), "good": Peer(lambda x: x)})
    yield _work("ours kills", ours=_die)
    yield _work("peer hangs", peers={"bad": Peer(_hang), "good": Peer(lambda x: x)})
    yield _work("peer is out of memory", peers={"bad": Peer(_out_of_memory), "good": Peer(lambda x: x)})
    yield _work("peer needs too much", peers={"bad": Peer(_die, needs_bytes=2 << 30), "good": Peer(lambda x: x)})
    yield _work("inputs need too much", make=_die, needs_bytes=2 << 30)
    # Two calls of warm-up, ten that are timed for an estimate are one; the fourth is recorded.
    yield _work("peer cannot be recorded", peers={"bad": Peer(_raises_on_call(4)), "good": Peer(lambda x: x)})
    yield _work("good last", peers={"same": Peer(lambda x: x + 1)})


def slow(context: Context) -> Iterator[Case]:
    """Ten cases of a second each, for budgets that do not reach to the end."""
    for i in range(10):
        yield Task("slow", f"{i}", _wait)


def _wait() -> dict[str, object]:
    threading.Event().wait(0.5)
    return {"is_right": True}


def none(context: Context) -> Iterator[Case]:
    return iter(())


def broken(context: Context) -> Iterator[Case]:
    yield _work("before")
    raise ValueError("no more cases")


def unusable() -> Device:
    raise RuntimeError("no such device")
