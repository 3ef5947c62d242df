"""The launcher over real, trivial children: what starts, what is said, and that nothing is left."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import psutil
import pytest

from baton.clock import MonotonicClock
from baton.ready import write_json_atomically
from cli.launch.launcher import ClusterFailed, Launcher, Program
from cli.launch.process import ReservedPort
from cli.launch.supervise import SuperviseConfig

CONFIG = SuperviseConfig(start_timeout_s=20, stop_grace_s=2, min_backoff_s=0.05, max_backoff_s=0.2)
SLEEP = "import time; time.sleep(60)"


async def ready_at_once(pid: int) -> None:
    pass


def program(name: str, code: str) -> Program:
    return Program(name, (sys.executable, "-S", "-c", code), ready_at_once)


class Cluster:
    """A launcher and everything it said and announced."""

    def __init__(self, tmp_path: Path, router: Program, *workers: Program) -> None:
        self.said: list[str] = []
        self.announced: asyncio.Queue[Mapping[str, int]] = asyncio.Queue()
        self.launcher = Launcher(
            [router],
            workers,
            log_dir=tmp_path,
            environment=os.environ,
            clock=MonotonicClock(),
            config=CONFIG,
            say=self.said.append,
            announce=self.announced.put_nowait,
        )


async def test_starts_announces_and_stops(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, program("router", SLEEP), program("a", SLEEP), program("b", SLEEP))
    async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
        tasks.create_task(cluster.launcher.run())
        pids = await cluster.announced.get()
        assert set(pids) == {"router", "a", "b"}
        assert all(psutil.pid_exists(pid) for pid in pids.values())
        cluster.launcher.stop()
    assert not any(psutil.pid_exists(pid) for pid in pids.values())


async def test_sigterm_stops_it(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, program("router", SLEEP), program("a", SLEEP))
    async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
        tasks.create_task(cluster.launcher.run())
        await cluster.announced.get()
        os.kill(os.getpid(), signal.SIGTERM)
    (said,) = cluster.said
    assert said.startswith("stopping: ")


async def test_a_child_that_fails_at_the_start_is_quoted(tmp_path: Path) -> None:
    bad = "print('noise\\nerror: UnsupportedModel: gpt2 is not served\\nit has no RoPE'); raise SystemExit(2)"
    worker = Program("a", (sys.executable, "-S", "-c", bad), never_ready)
    cluster = Cluster(tmp_path, program("router", SLEEP), worker)
    with pytest.raises(ClusterFailed) as caught:
        async with asyncio.timeout(20):
            await cluster.launcher.run()
    assert caught.value.message == (
        "a did not start: exit code 2\nUnsupportedModel: gpt2 is not served\nit has no RoPE"
    )


async def never_ready(pid: int) -> None:
    await asyncio.Event().wait()


async def test_a_dead_worker_is_started_again_and_announced_with_its_new_pid(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, program("router", SLEEP), program("a", SLEEP))
    async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
        tasks.create_task(cluster.launcher.run())
        first = await cluster.announced.get()
        os.kill(first["a"], signal.SIGKILL)
        second = await cluster.announced.get()
        assert second["a"] != first["a"]
        assert second["router"] == first["router"]
        cluster.launcher.stop()
    assert "a ended: killed by SIGKILL" in cluster.said[0]


async def test_a_dead_router_is_started_again_and_its_workers_stay(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, program("router", SLEEP), program("a", SLEEP))
    async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
        tasks.create_task(cluster.launcher.run())
        first = await cluster.announced.get()
        os.kill(first["router"], signal.SIGKILL)
        second = await cluster.announced.get()
        assert second["router"] != first["router"]
        assert second["a"] == first["a"]
        cluster.launcher.stop()
    assert "router ended: killed by SIGKILL" in cluster.said[0]


async def test_a_router_that_is_told_to_end_ends_it_without_error(tmp_path: Path) -> None:
    fifo = tmp_path / "told"
    os.mkfifo(fifo)
    polite = "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, {15}); "
    polite += f"open({str(fifo)!r}, 'w'); signal.sigwait({{15}})"

    async def listens(pid: int) -> None:
        await asyncio.to_thread(fifo.read_bytes)

    router = Program("router", (sys.executable, "-S", "-c", polite), listens)
    cluster = Cluster(tmp_path, router, program("a", SLEEP))
    async with asyncio.timeout(20):
        run = asyncio.create_task(cluster.launcher.run())
        pids = await cluster.announced.get()
        os.kill(pids["router"], signal.SIGTERM)
        await run
    assert cluster.said == ["router was told to end: the workers end too"]
    assert not psutil.pid_exists(pids["a"])


async def test_what_one_child_alone_is_to_know_is_in_its_environment_alone(tmp_path: Path) -> None:
    router = Program("router", (sys.executable, "-S", "-c", SLEEP), ready_at_once, environment={"KEY": "secret"})
    cluster = Cluster(tmp_path, router, program("a", SLEEP))
    async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
        tasks.create_task(cluster.launcher.run())
        pids = await cluster.announced.get()
        environments = {name: psutil.Process(pid).environ() for name, pid in pids.items()}
        cluster.launcher.stop()
    assert (environments["router"].get("KEY"), environments["a"].get("KEY")) == ("secret", None)


async def test_a_child_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    fifo = tmp_path / "deaf"
    os.mkfifo(fifo)
    stubborn = f"import signal, time; signal.signal(15, signal.SIG_IGN); open({str(fifo)!r}, 'w'); time.sleep(60)"

    async def deaf(pid: int) -> None:
        await asyncio.to_thread(fifo.read_bytes)

    cluster = Cluster(tmp_path, program("router", SLEEP), Program("a", (sys.executable, "-S", "-c", stubborn), deaf))
    async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
        tasks.create_task(cluster.launcher.run())
        pids = await cluster.announced.get()
        cluster.launcher.stop()
    assert not psutil.pid_exists(pids["a"])


async def test_a_child_that_answers_its_probe_wrongly_is_killed_and_said_so(tmp_path: Path) -> None:
    async def wrong(pid: int) -> None:
        raise ConnectionError("another process answers on its port")

    cluster = Cluster(tmp_path, program("router", SLEEP), Program("a", (sys.executable, "-S", "-c", SLEEP), wrong))
    with pytest.raises(ClusterFailed, match="another process answers on its port"):
        async with asyncio.timeout(20):
            await cluster.launcher.run()


def test_children_die_with_a_launcher_that_is_killed() -> None:
    child = "import os, sys; sys.path.insert(0, ''); from cli.launch.process import die_with; die_with(os.getppid()); "
    child += "print(os.getpid(), flush=True); import time; time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        orphan = psutil.Process(int(launcher.stdout.readline()))
        launcher.kill()
    orphan.wait(timeout=10)


def test_a_reserved_port_can_be_served_on_and_is_refused_while_somebody_does() -> None:
    with contextlib.closing(ReservedPort("127.0.0.1", 0)) as reserved:
        for _ in range(2):
            server = grpc.server(ThreadPoolExecutor(1), options=[("grpc.so_reuseport", 0)])
            assert server.add_insecure_port(f"127.0.0.1:{reserved.port}") == reserved.port
            server.start()
            with pytest.raises(OSError, match="in use"):
                ReservedPort("127.0.0.1", reserved.port)
            server.stop(None).wait()
        with contextlib.closing(socket.create_server(("127.0.0.1", reserved.port))):
            pass
        with contextlib.closing(socket.socket()) as stranger, pytest.raises(OSError, match="in use"):
            stranger.bind(("127.0.0.1", reserved.port))


def test_the_ready_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "ready.json"
    write_json_atomically(path, {"http": "x"})
    write_json_atomically(path, {"http": "y"})
    assert path.read_text() == '{\n  "http": "y"\n}\n'
    assert list(tmp_path.iterdir()) == [path]
