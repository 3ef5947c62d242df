"""Programs of the CPU kernels: order and completeness of records, counts, memory; the crew of threads; best tokens."""

from __future__ import annotations

import errno
import gc
import itertools
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.kernels.cpu.crew import Crew, Table, crew, record_words
from engine.kernels.cpu.kernel import Kernel
from engine.kernels.cpu.llvm import Emitter, Int, Isa
from engine.kernels.cpu.logits import peaks_of, summarize
from engine.kernels.cpu.once import once
from engine.kernels.cpu.program import Count, Program, Record, Tape
from engine.kernels.cpu.slabs import Slabs
from engine.runner import Runner
from engine.step import StepPlan
from kvtransfer.memory import HostMemory
from tests.support.engine_driver import Driver, random_prompt, spec
from tests.support.models import ORACLE_CASES, VOCAB_SIZE

HOST = Isa.of_host()


def _add_neighbour(e: Emitter, task: Int, parameters: list[Int]) -> None:
    """to[task] = from[task] + from[(task + 1) % size]: reads what another task of the record before wrote."""
    source, target, size = parameters
    here, beside = (e.load("float32", source + index * 4, 1) for index in (task, (task + 1) % size))
    e.store("float32", here + beside, target + task * 4)


def _add_one(e: Emitter, task: Int, parameters: list[Int]) -> None:
    (x,) = parameters
    e.store("float32", e.load("float32", x + task * 4, 1) + 1.0, x + task * 4)


NEIGHBOUR = Kernel("neighbour", HOST, 3, _add_neighbour)
ONE = Kernel("one", HOST, 1, _add_one)


@pytest.fixture(params=[1, 2, 5], ids=lambda n: f"{n}-threads")
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Also more threads than processors."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_a_record_starts_when_all_tasks_of_the_one_before_are_done(threads: int) -> None:
    size, rounds = 37, 60

    tape, buffers = Tape(), [torch.empty(size), torch.empty(size)]
    records = []
    for i in range(rounds):
        records.append(Record(NEIGHBOUR, (buffers[i % 2], buffers[(i + 1) % 2], size), size))
        records.append(Record(ONE, (buffers[(i + 1) % 2],), size))
    for _ in range(20):
        buffers[0][:] = torch.arange(size) % 5
        tape.run(records)
        again = torch.arange(size, dtype=torch.float32) % 5
        for _ in range(rounds):
            again = again + again.roll(-1) + 1
        assert torch.equal(buffers[0], again)


def test_two_threads_of_python_run_tables_at_once(threads: int) -> None:
    """One of them has the helpers, the other works alone."""
    totals = [torch.zeros(64) for _ in range(3)]

    def work(x: Tensor) -> None:
        for _ in range(200):
            ONE(64, x.data_ptr())

    workers = [threading.Thread(target=work, args=(x,)) for x in totals]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert all((x == 200).all() for x in totals)


def test_a_table_is_in_use_while_a_helper_says_so() -> None:
    team, table = Crew(max_helpers=2), Table(1)
    table.records[:] = record_words(ONE.address, 0, [0])
    assert team.is_free(table)
    team._num_helpers = 1
    team._slots[0] = table.address
    assert not team.is_free(table)
    # A helper that is still inside: the memory stays, even if all other references are gone.
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        team.run(table, 0, 1)
        assert team._late == [table]
        team._slots[0] = 0
        team.run(Table(0), 0, 0)
        assert team._late == []
    finally:
        torch.set_num_threads(before)
    program = Program(4, 1)
    program.append(Record(ONE, (torch.zeros(4),), Count.ROWS))
    program.seal()
    first = program._free_table()
    assert program._free_table() is first, "free again, used again"


def test_threads_that_cannot_be_started_cost_no_step(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A limit on threads, of a user or a container, may leave fewer than were asked for."""
    team, table, x = Crew(), Table(1), torch.zeros(64)
    start, tries = team._code.start_helper, []

    def first_alone(slot_address: int) -> None:
        tries.append(slot_address)
        if len(tries) > 1:
            raise OSError(errno.EAGAIN, "a thread cannot be started")
        start(slot_address)

    monkeypatch.setattr(team._code, "start_helper", first_alone)
    before = torch.get_num_threads()
    torch.set_num_threads(5)
    try:
        for _ in range(3):
            while not team.is_free(table):
                threading.Event().wait(0.01)
            table.records[:] = record_words(ONE.address, 64, [x.data_ptr()])
            team.run(table, 0, 1)
    finally:
        torch.set_num_threads(before)
    assert (x == 3).all()
    assert len(tries) == 2, "not tried again at each step"
    assert [r.getMessage() for r in caplog.records] == [
        f"[Errno {errno.EAGAIN}] a thread cannot be started; this process computes on 2 threads from now on"
    ]


def test_threads_that_want_the_same_get_the_same() -> None:
    """Two models that are loaded at once compile a kernel once: the code of the other would be freed while in use."""
    count, begun, go_on = itertools.count(), threading.Event(), threading.Event()

    @once
    def make(name: str) -> tuple[str, int]:
        number = next(count)
        begun.set()
        assert go_on.wait(60)
        return name, number

    got: list[tuple[str, int]] = []
    threads = [threading.Thread(target=lambda: got.append(make("a"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert begun.wait(60)
    go_on.set()
    for thread in threads:
        thread.join(60)
    assert got == [("a", 0)] * 4
    assert make("b") == ("b", 1)


def test_models_loaded_by_several_threads_at_once_compute_what_they_do_alone(tmp_path: Path) -> None:
    folders = [ORACLE_CASES[i].save(tmp_path / str(i)) for i in (0, 1, 2)]
    script = _LOAD_AT_ONCE.format(folders=[str(folder) for folder in folders])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout.strip()) == (0, "the same"), done.stderr


# In a process of its own: nothing is compiled yet.
_LOAD_AT_ONCE = """
import sys, threading
from pathlib import Path
import torch
from engine.config import EngineConfig
from engine.runner import Runner
from tests.support.engine_driver import Driver, random_prompt, spec
from tests.support.models import VOCAB_SIZE

def generate(folder):
    runner = Runner.load(Path(folder), EngineConfig(kernels="cpu", dtype="float32", num_blocks=64, block_tokens=16))
    tokens[folder] = Driver(runner).generate(spec("a", random_prompt(20, VOCAB_SIZE), max_tokens=3)).token_ids

folders, tokens = {folders}, dict()
torch.set_num_threads(3)
sys.setswitchinterval(1e-5)
threads = [threading.Thread(target=generate, args=(folder,)) for folder in folders]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
at_once = dict(tokens)
for folder in folders:
    generate(folder)
print("the same" if at_once == tokens else (at_once, tokens))
"""


def test_a_program_keeps_its_kernels() -> None:
    tape, program = Tape(), Program(4, 1)
    kernel = Kernel("one_more", HOST, 1, _add_one)
    still_there = weakref.ref(kernel)
    with tape.recording(program):
        tape.run([Record(kernel, (torch.zeros(4),), Count.ROWS)])
    del kernel
    gc.collect()
    assert still_there() is not None
    del program
    gc.collect()
    assert still_there() is None


def test_a_program_runs_for_any_number_of_rows_and_stops_where_it_is_told(threads: int) -> None:
    tape, program = Tape(), Program(8, 4)
    x, chosen = torch.zeros(8), torch.zeros(4)
    with tape.recording(program):
        assert tape.rows(x) is Count.ROWS
        tape.run([Record(ONE, (x,), tape.rows(x))])
        program.count = Count.WANTED
        tape.run([Record(ONE, (chosen,), tape.rows(chosen))])
    program.seal()
    assert not x.any(), "nothing runs while it is recorded"
    seen: list[list[float]] = []
    for rows, sampled in ((8, 4), (3, 1), (5, 0)):
        counts = {Count.ROWS: rows, Count.WANTED: sampled, Count.TILES: 0, Count.WANTED_TILES: 0}
        program.run(counts, [(1, lambda: seen.append([*x.tolist(), *chosen.tolist()]))], 2)
    assert x.tolist() == [3, 3, 3, 2, 2, 1, 1, 1]
    assert chosen.tolist() == [2, 1, 1, 1]
    assert seen[0] == [1] * 8 + [0] * 4, "the pause comes after the first record and before the second"
    program.run(counts, [], 1)
    assert chosen.tolist() == [2, 1, 1, 1]


def test_memory_of_a_program_is_used_anew_once_nobody_holds_it() -> None:
    tape, program = Tape(), Program(16, 2)
    with tape.recording(program):
        like = torch.empty(16, 1)
        first, second = tape.empty(like, 100), tape.empty(like, 100)
        addresses = {first.data_ptr(), second.data_ptr()}
        assert len(addresses) == 2
        assert first.shape == (16, 100)
        del first
        third = tape.empty(like, 50, dtype=torch.float64)
        assert third.data_ptr() in addresses - {second.data_ptr()}
        program.count = Count.WANTED
        assert tape.empty(like, 7).shape == (2, 7)
    gc.collect()


def test_a_step_is_recorded_again_only_for_one_that_is_larger(tmp_path: Path) -> None:
    runner = Runner.load(ORACLE_CASES[0].save(tmp_path), EngineConfig(dtype="float32", num_blocks=60))
    driver, seen = Driver(runner), []
    alone = Driver(runner).generate(spec("alone", random_prompt(9, VOCAB_SIZE), max_tokens=3))
    for i, length in enumerate((9, 3, 40, 40, 17, 100)):
        sequence = driver.add(spec(f"n{i}", random_prompt(length, VOCAB_SIZE)))
        runner.execute(StepPlan((driver.piece(sequence, 1 << 30),)))
        seen.append(runner._model._recorder[1]._step)  # type: ignore[union-attr]
    assert seen[0] is seen[1]
    assert seen[1] is not seen[2]
    assert seen[2] is seen[3] is seen[4]
    assert seen[4] is not seen[5]
    driver = Driver(runner, seed=2)
    assert driver.generate(spec("alone", random_prompt(9, VOCAB_SIZE), max_tokens=3)).token_ids == alone.token_ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 15, 1000, 16_384, 16_385, 40_003])
def test_the_best_token_is_the_first_of_the_largest(dtype: torch.dtype, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    logits = (torch.randn(9, size, generator=generator) * 3).to(dtype)
    logits[1] = -1.0  # All equal.
    logits[2, -1] = logits[2, size // 2] = 50.0
    logits[3, 0] = logits[3, -1] = 50.0
    logits[4] = -logits[4].abs()
    logits[4, size // 3] = -0.0
    logits[5, -1] = float("nan")
    logits[6, size // 2] = float("inf")
    logits[7, 0] = -float("inf")
    wide, summary = summarize(HOST, Tape(), logits)
    assert torch.equal(wide.nan_to_num(7.0), logits.float().nan_to_num(7.0))
    peaks = peaks_of(summary.numpy())
    assert peaks.are_finite == [True] * 5 + [False] * 3 + [True]
    for row in (0, 1, 2, 3, 4, 8):
        assert peaks.token_ids[row] == int(np.argmax(logits[row].float().numpy())), row


def test_slabs_hold_many_tensors_and_any_size() -> None:
    slabs = Slabs()
    tensors = [torch.randn(n, 3) for n in (1, 700, 5)] + [torch.randn(9 << 20, 2), torch.randn(4, 4).bfloat16()]
    kept = [slabs.copy(x.T if i == 1 else x) for i, x in enumerate(tensors)]
    del slabs
    for i, (x, copied) in enumerate(zip(tensors, kept, strict=True)):
        assert torch.equal(copied, x.T if i == 1 else x)
        assert copied.is_contiguous()
        assert copied.data_ptr() % 64 == 0


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="no huge pages in this kernel")
def test_weights_and_cache_ask_for_huge_pages() -> None:
    """``hg`` among the flags of a mapping: the advice was taken, whatever the system makes of it."""
    copied, memory = Slabs().copy(torch.zeros(1 << 20)), HostMemory.create(4 << 20)
    try:
        for address in (copied.data_ptr(), torch.frombuffer(memory.buffer, dtype=torch.uint8).data_ptr()):
            assert "hg" in _flags_of(address)
    finally:
        gc.collect()
        memory.close()


def _flags_of(address: int) -> list[str]:
    is_there = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *words = line.split()
        if "-" in name:
            start, stop = (int(bound, 16) for bound in name.split("-"))
            is_there = start <= address < stop
        elif is_there and name == "VmFlags:":
            return words
    raise AssertionError("no mapping holds the address")


def test_the_process_has_one_crew() -> None:
    assert crew() is crew()
