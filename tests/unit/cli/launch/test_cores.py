"""Cores for workers: on machines that are made up in a folder like sysfs, and on this one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import BadConfig
from cli.launch import cluster, cores, host, placement
from cli.launch.cores import Core
from cli.launch.placement import Place
from engine.config import EngineConfig
from engine.devices import Accelerator
from engine.fake_devices import FakeDevices


def machine(folder: Path, nodes: Mapping[int, Sequence[tuple[int, ...]]], siblings: str = "core_cpus_list") -> Path:
    """``nodes``: the cores of each, as tuples of their threads. Nodes without cores have memory alone."""
    for node, own in nodes.items():
        place = folder / "node" / f"node{node}"
        place.mkdir(parents=True)
        cpus = sorted(cpu for core in own for cpu in core)
        (place / "cpulist").write_text(cores.shown(cpus) + "\n")
        for core in own:
            for cpu in core:
                topology = folder / "cpu" / f"cpu{cpu}" / "topology"
                topology.mkdir(parents=True)
                (topology / siblings).write_text(",".join(map(str, core)) + "\n")
    # Beside them lie files that are no nodes.
    (folder / "node" / "possible").write_text("0-1\n")
    return folder


def two_sockets(folder: Path) -> Path:
    """Four cores each with two threads: 0-3 and 8-11 on one socket, 4-7 and 12-15 on the other."""
    return machine(folder, {n: [(4 * n + i, 8 + 4 * n + i) for i in range(4)] for n in range(2)})


@pytest.mark.parametrize("siblings", ["core_cpus_list", "thread_siblings_list"])
def test_threads_of_a_core_are_one_core(tmp_path: Path, siblings: str) -> None:
    system = machine(tmp_path, {0: [(0, 4), (1, 5)], 1: [(2, 6), (3, 7)], 2: []}, siblings)
    assert cores.topology(range(8), system) == (
        Core((0, 4), 0), Core((1, 5), 0), Core((2, 6), 1), Core((3, 7), 1),
    )  # fmt: skip
    # Of a core that is not all ours, what is.
    assert cores.topology((1, 2, 4, 5), system) == (Core((1, 5), 0), Core((4,), 0), Core((2,), 1))


def test_without_a_topology_every_cpu_is_a_core(tmp_path: Path) -> None:
    assert cores.topology((3, 1), tmp_path) == (Core((1,), 0), Core((3,), 0))


@pytest.mark.parametrize(
    ("num_workers", "expected"),
    [
        (1, ["0-15"]),
        (2, ["0-3,8-11", "4-7,12-15"]),
        # One node has one worker more; neither has one that straddles.
        (3, ["0-1,8-9", "4-7,12-15", "2-3,10-11"]),
        # Successive workers, which are of one pool, are on different nodes.
        (4, ["0-1,8-9", "4-5,12-13", "2-3,10-11", "6-7,14-15"]),
        (8, ["0,8", "4,12", "1,9", "5,13", "2,10", "6,14", "3,11", "7,15"]),
        # More than cores: those of a node have all of it, none has a thread of a core whose other one is assigned.
        (10, ["0-3,8-11", "4-7,12-15"] * 5),
    ],
)
def test_workers_get_whole_cores_of_one_node(tmp_path: Path, num_workers: int, expected: list[str]) -> None:
    found = cores.shares(cores.topology(range(16), two_sockets(tmp_path)), num_workers)
    assert [cores.shown(share) for share in found] == expected


def test_fewer_workers_than_nodes_get_whole_nodes(tmp_path: Path) -> None:
    system = machine(tmp_path, {n: [(2 * n,), (2 * n + 1,)] for n in range(4)})
    found = cores.shares(cores.topology(range(8), system), 3)
    assert [cores.shown(share) for share in found] == ["0-1", "2-3", "4-7"]


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    num_threads=st.integers(1, 2),
    num_workers=st.integers(1, 12),
)
def test_shares_are_fair_and_whole(sizes: list[int], num_threads: int, num_workers: int) -> None:
    all_cores: list[Core] = []
    for node, size in enumerate(sizes):
        for _ in range(size):
            first = len(all_cores) * num_threads
            all_cores.append(Core(tuple(range(first, first + num_threads)), node))
    found = cores.shares(all_cores, num_workers)
    assert len(found) == num_workers
    assert all(found)
    assert {cpu for share in found for cpu in share} == {cpu for core in all_cores for cpu in core.cpus}
    for share in found:
        inside = [core for core in all_cores if set(core.cpus) & set(share)]
        assert all(set(core.cpus) <= set(share) for core in inside), "no core is split"
        if num_workers >= len(sizes):
            assert len({core.node for core in inside}) == 1
        for other in found:
            assert share == other or not set(share) & set(other)


@pytest.mark.parametrize(("text", "cpus"), [("0", (0,)), ("0-3,8", (0, 1, 2, 3, 8)), (" 2 , 1", (1, 2)), ("3-3", (3,))])
def test_lists_are_linuxs(text: str, cpus: tuple[int, ...]) -> None:
    assert cores.parse(text, "--cpus") == cpus
    assert cores.parse(cores.shown(cpus), "--cpus") == cpus


@pytest.mark.parametrize("text", ["", "a", "3-1", "1,", "-1", "0-99999", "1;2", "9" * 50])
def test_other_lists_are_refused(text: str) -> None:
    with pytest.raises(BadConfig, match=r"--cpus is .*, expected CPUs such as 0-3,8, or all"):
        cores.parse(text, "--cpus")


def test_a_process_is_bound_to_cpus_that_it_has_and_to_no_others() -> None:
    mine = cores.allowed()
    code = "import sys; from cli.launch import cores; cores.bind(cores.parse(sys.argv[1], '--cpus'), '--cpus'); "
    code += "print(cores.shown(cores.allowed()))"
    command = [sys.executable, "-c", code]
    done = subprocess.run([*command, str(mine[-1])], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == str(mine[-1])
    with pytest.raises(BadConfig, match=f"names CPU 9999, expected some of {cores.shown(mine)}"):
        cores.bind((mine[0], 9999), "--cpus")
    assert cores.allowed() == mine


def test_workers_on_the_processor_share_the_cpus() -> None:
    mine = cores.allowed()
    (alone,) = placement.on_cores("auto", [Place()])
    assert (alone.cpus, alone.threads) == (mine if len(mine) > 1 else (), host.usable_cores())
    # A CPU each: what a worker does beside computing may go elsewhere.
    each = placement.on_cores("auto", [Place()] * len(mine))
    assert [(place.cpus, place.threads) for place in each] == [((), 1)] * len(mine)
    crowd = placement.on_cores("auto", [Place()] * 999)
    assert {place.threads for place in crowd} == {1}
    (named,) = placement.on_cores(str(mine[0]), [Place()])
    assert (named.cpus, named.threads) == ((mine[0],), 1)
    assert placement.on_cores("all", [Place()])[0].cpus == ()
    # The cores of a GPU's worker are not what it computes on.
    assert placement.on_cores("auto", [Place("cuda:0")])[0].cpus == ()
    with pytest.raises(BadConfig, match="--cpus names CPU 9999"):
        placement.on_cores("9999", [Place()])


H200, T4 = Accelerator("NVIDIA H200", (9, 0)), Accelerator("NVIDIA T4", (7, 5))


@pytest.mark.parametrize(
    ("gpus", "num_workers", "devices", "shared"),
    [
        ("auto", 1, ["cuda:0"], [1]),
        ("auto", 3, ["cuda:0", "cuda:1", "cuda:3"], [1, 1, 1]),
        # Round robin; GPU 2 is none that the kernels can use.
        ("auto", 4, ["cuda:0", "cuda:1", "cuda:3", "cuda:0"], [2, 1, 1, 2]),
        ("3,1", 3, ["cuda:3", "cuda:1", "cuda:3"], [2, 1, 2]),
        ("none", 2, ["cpu", "cpu"], [1, 1]),
    ],
)
def test_workers_get_gpus_in_turn(gpus: str, num_workers: int, devices: list[str], shared: list[int]) -> None:
    places = placement.on_devices(gpus, "auto", num_workers, FakeDevices([H200, H200, T4, H200]))
    assert [place.device for place in places] == devices
    assert [place.gpu_workers for place in places] == shared


def test_without_gpus_or_with_kernels_of_the_processor_workers_stay_on_it() -> None:
    assert placement.on_devices("auto", "auto", 2, FakeDevices()) == (Place(), Place())
    assert placement.on_devices("auto", "cpu", 1, FakeDevices([H200])) == (Place(),)
    assert placement.on_devices("auto", "triton", 1, FakeDevices([T4])) == (Place("cuda:0"),), (
        "it was asked for by name"
    )


@pytest.mark.parametrize(
    ("gpus", "kernels", "said"),
    [
        ("0,2", "auto", r"--gpus 0,2: GPU 2 is not there; torch sees 2 GPUs \(0: NVIDIA H200; 1: NVIDIA T4\)"),
        ("1,1", "auto", "GPU 1 is named twice"),
        ("x", "auto", "--gpus is 'x', expected auto, none or indices such as 0,1"),
        ("", "auto", "expected auto, none"),
        ("0", "cpu", "--gpus 0 with --kernels cpu, which compute on the processor"),
    ],
)
def test_gpus_that_cannot_be_had_are_refused(gpus: str, kernels: str, said: str) -> None:
    with pytest.raises(BadConfig, match=said) as caught:
        placement.on_devices(gpus, kernels, 2, FakeDevices([H200, T4]))
    assert caught.value.param == "gpus"


def test_who_shares_a_gpu_is_told_with_the_share() -> None:
    names = ["prefill-0", "decode-0", "decode-1"]
    places = placement.on_devices("auto", "auto", 3, FakeDevices([H200, H200]))
    assert list(placement.described(names, places, 0.9)) == [
        "cuda:0: prefill-0, decode-1, which share it: each may use 45% of its memory",
        "cuda:1: decode-0",
    ]
    assert list(placement.described(["mixed-0"], (Place(),), 0.9)) == []


def test_a_worker_is_told_its_place() -> None:
    engine = EngineConfig(gpu_memory_utilization=0.8)
    assert cluster.placed(engine, Place("cuda:1", 2)) == EngineConfig(
        gpu_memory_utilization=0.8, device="cuda:1", gpu_workers=2, num_threads=1
    )
    assert cluster.placed(engine, Place(cpus=(0, 1, 2, 5), threads=4)) == EngineConfig(
        gpu_memory_utilization=0.8, device="cpu", num_threads=4
    )
    assert cluster.placed(EngineConfig(num_threads=3), Place(threads=4)).num_threads == 3


def test_a_worker_refuses_a_gpu_that_is_not_there(demo_model: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cli", "worker", "--role", "mixed", "--device", "cuda:1", "--model", str(demo_model)],
        capture_output=True, text=True, timeout=100, check=False, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "device is cuda:1, but torch sees no GPUs" in done.stderr
    assert "Traceback" not in done.stderr
