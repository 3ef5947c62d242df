"""What a process does with a fault: it writes it down first, dies, stops and goes on, pauses, loses its registry."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import fakeredis
import pytest

from baton.clock import MonotonicClock
from baton.errors import BadConfig, Unavailable
from baton.faults.config import FaultsConfig
from baton.faults.faults import Elapsed, Faults, Record
from baton.faults.injector import Strike
from baton.faults.kinds import FaultKind, Layer
from baton.faults.plan import Plan
from baton.registry import Registry, RegistryConfig
from tests.support.faults import HandClock, Striking
from tests.support.root import ROOT

DROP = '[[fault]]\nlayer = "session"\nfault = "drop"\nnth = 1\n'


def test_no_schedule_no_faults() -> None:
    assert Faults.of(FaultsConfig(), "n0", "mixed", MonotonicClock()) is None


def of(folder: Path, text: str, node: str = "decode-0", *, role: str = "decode", clock: Path | None = None) -> Faults:
    file = folder / "faults.toml"
    file.write_text(text)
    faults = Faults.of(FaultsConfig(file, record=folder / "drawn", clock=clock), node, role, MonotonicClock())
    assert faults is not None
    return faults


def test_what_strikes_is_written_as_a_schedule(tmp_path: Path) -> None:
    faults = of(tmp_path, DROP + '[[fault]]\nlayer = "engine"\nfault = "slow"\nnth = 2\nseconds = 0.001\n')
    assert faults.at(Layer.SESSION, "tokens", "router", "a~0123abcd/0/1") is not None
    assert faults.at(Layer.SESSION, "tokens", "router", "a~0123abcd/0/1") is None
    faults.pause(Layer.ENGINE, "step")
    faults.pause(Layer.ENGINE, "step")
    drawn = Plan.load(tmp_path / "drawn")
    assert [(r.layer, r.fault, r.kind, r.role, r.request, r.node, r.life, r.nth) for r in drawn.rules] == [
        (Layer.SESSION, FaultKind.DROP, "tokens", "*", "a/0/1", "*", 0, (1,)),
        (Layer.ENGINE, FaultKind.SLOW, "step", "*", "*", "decode-0", 1, (2,)),
    ]
    # A prefill node may generate it this time.
    again = of(tmp_path / "drawn", drawn.as_toml(), "prefill-0", role="prefill")
    assert again.at(Layer.SESSION, "tokens", "router", "a~ffffffff/0/1") is not None


def test_each_life_of_a_node_writes_its_own(tmp_path: Path) -> None:
    lives = [Record(tmp_path / "drawn", "[::1]:7") for _ in range(3)]
    assert [record.life for record in lives] == [1, 2, 3]
    assert len({record.path for record in lives}) == 3
    assert all(record.path.parent == tmp_path / "drawn" for record in lives)


def test_a_record_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "drawn").write_text("a file")
    with pytest.raises(BadConfig, match=r"^--faults: cannot write what is drawn into .*give --faults-record"):
        of(tmp_path, DROP)


def test_a_fault_that_cannot_be_written_does_not_strike(tmp_path: Path) -> None:
    class FullDisk(Record):
        def add(self, strike: Strike, elapsed_s: float | None) -> None:
            raise OSError(28, "No space left on device")

    plan = Plan.parse(DROP.replace("nth = 1", "probability = 1"), "x")
    faults = Faults(plan, "n0", "mixed", HandClock(), record=FullDisk(tmp_path, "n0"))
    assert faults.at(Layer.SESSION, "tokens") is None
    assert faults.at(Layer.SESSION, "tokens") is None


def test_death_is_written_before_it_comes(tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    record = Record(tmp_path, "n0")

    def kill(pid: int, number: int) -> None:
        seen.append((pid, number, record.path.read_text()))

    text = '[[fault]]\nlayer = "session"\nkind = "tokens"\nfault = "die"\nnth = 3\n'
    faults = Faults(Plan.parse(text, "x"), "n0", "mixed", HandClock(), record=record, kill=kill)
    assert [faults.at(Layer.SESSION, "tokens", "r", "a/0/1") for _ in range(4)] == [None] * 4
    ((pid, number, written),) = seen
    assert (pid, number) == (os.getpid(), signal.SIGKILL)
    assert 'fault = "die"' in written


def test_times_count_from_the_file(tmp_path: Path) -> None:
    clock = HandClock()
    elapsed = Elapsed(clock, tmp_path / "began.json")
    assert (elapsed.now(), elapsed.at_start_s) == (None, None)
    clock.now_s = 1010.0
    config = FaultsConfig(tmp_path / "x.toml", clock=tmp_path / "began.json")
    config.begin(clock.now())
    clock.now_s = 1012.5
    elapsed.look()
    assert elapsed.now() == 2.5
    assert Elapsed(clock, tmp_path / "began.json").at_start_s == 2.5
    assert Elapsed(clock, None).at_start_s is None


async def test_a_process_meets_its_time_once(tmp_path: Path) -> None:
    clock = HandClock()
    faults = Striking('[[fault]]\nlayer = "process"\nfault = "die"\nat_s = 3\n', clock=clock)
    for clock.now_s in (1000.0, 1002.9, 1003.1, 1003.2):
        faults.at(Layer.PROCESS, "tick")
    assert [strike.number for strike in faults.strikes] == []
    assert faults.signals == [signal.SIGKILL]


_FREEZES = """
import sys, time
from pathlib import Path
from baton.clock import MonotonicClock
from baton.faults.config import FaultsConfig
from baton.faults.faults import Faults
from baton.faults.kinds import Layer
faults = Faults.of(FaultsConfig(Path(sys.argv[1])), "n0", "mixed", MonotonicClock())
began = time.monotonic()
print(faults.at(Layer.ENGINE, "step"), time.monotonic() - began)
"""


def test_a_process_stops_and_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_text('[[fault]]\nlayer = "engine"\nfault = "freeze"\nnth = 1\nseconds = 0.3\n')
    command = [sys.executable, "-c", _FREEZES, str(file)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as frozen:
        states = set()
        while frozen.poll() is None:
            status = Path(f"/proc/{frozen.pid}/stat").read_text()
            states.add(status.rpartition(")")[2].split()[0])
            time.sleep(0.005)
        assert frozen.stdout is not None
        strike, took_s = frozen.stdout.read().split()
    assert "T" in states
    assert (frozen.returncode, strike) == (0, "None")
    assert float(took_s) >= 0.3


def test_a_process_that_dies_while_it_is_stopped_leaves_nothing(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_text('[[fault]]\nlayer = "engine"\nfault = "freeze"\nnth = 1\nseconds = 600\n')
    # The waker holds the pipe's other end open for as long as it lives.
    watched = _FREEZES.replace("faults = ", "import subprocess\nsubprocess.DEVNULL = None\nfaults = ")
    with subprocess.Popen([sys.executable, "-c", watched, str(file)], cwd=ROOT, stdout=subprocess.PIPE) as frozen:
        while Path(f"/proc/{frozen.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            time.sleep(0.005)
        frozen.kill()
        assert frozen.stdout is not None
        assert frozen.stdout.read() == b""


REGISTRY = '[[fault]]\nlayer = "registry"\n'


async def test_a_registry_is_gone_for_a_time() -> None:
    clock = HandClock()
    faults = Striking(f'{REGISTRY}fault = "disconnect"\nnth = 2\nseconds = 5\n', clock=clock)
    client = fakeredis.FakeAsyncRedis(decode_responses=True)
    registry = Registry(RegistryConfig("redis://fake:6379"), client, faults)
    assert await registry.nodes() == ([], [])
    for clock.now_s in (1000.0, 1004.9):
        with pytest.raises(Unavailable, match=r"^a fault of the schedule: the registry is gone for"):
            await registry.nodes()
    clock.now_s = 1005.0
    assert await registry.nodes() == ([], [])
    await registry.close()


async def test_a_call_of_the_registry_is_lost_or_late() -> None:
    faults = Striking(f'{REGISTRY}fault = "drop"\nnth = 1\n{REGISTRY}fault = "delay"\nnth = 2\nseconds = 0.001\n')
    client = fakeredis.FakeAsyncRedis(decode_responses=True)
    registry = Registry(RegistryConfig("redis://fake:6379"), client, faults)
    with pytest.raises(Unavailable, match="did not answer this call"):
        await registry.check_writable()
    await registry.check_writable()
    assert [strike.fault for strike in faults.strikes] == [FaultKind.DROP, FaultKind.DELAY]
    await registry.close()
