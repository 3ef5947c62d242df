"""A crew of threads that run a table of kernel calls together, synchronized by a few atomic counters between calls.

Each thread goes through the records in order: it takes tasks of a record from a counter until none is left, adds their
number to the record's count of done tasks, and continues when all are done. So a thread that the system has suspended
delays the others only while it holds a task, and a late one finds everything done and catches up at once. A waiting
thread spins for a while and then sleeps, which frees its processor for the thread that it waits for.

The calling thread is part of the crew. It returns when the records are done and does not wait for helpers: a table is
used again only when no helper is inside (each helper stores in its own slot which table it works on).

    Table, 64-bit words: [start, stop, 0...], then RECORD_WORDS for each record: kernel, tasks, parameters (14);
    next task, done tasks, sleepers, in a cache line of their own.
    Crew, 64-bit words: generation, current table, helpers wanted, sleepers, spins before a helper sleeps; then for
    each helper a cache line that begins with its slot: table it works on, crew, its number.
"""

from __future__ import annotations

import ctypes
import logging
import platform
import signal
import threading
from collections.abc import Sequence
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import torch
from llvmlite import ir
from numpy.typing import NDArray

from engine.kernels.cpu.once import once

_log = logging.getLogger(__name__)

_LINE_WORDS = 8
HEADER_WORDS = _LINE_WORDS
RECORD_WORDS = 3 * _LINE_WORDS
TASKS_WORD, PARAMETERS_WORD = 1, 2
MAX_PARAMETERS = 2 * _LINE_WORDS - PARAMETERS_WORD
_NEXT, _DONE, _SLEEPERS = (16 + i for i in range(3))
_GENERATION, _TABLE, _WANTED, _IDLE, _SPINS = range(5)

# Spins before a thread sleeps, 15 to 40 ns each: while waiting for the others' tasks, and for the next table.
_TASK_SPINS = 4_000
_IDLE_SPINS = 20_000
# By machine name: the number of the futex system call, and the instruction for spin loops.
_FUTEX = {"x86_64": 202, "aarch64": 98}
_FUTEX_WAIT, _FUTEX_WAKE = 128, 129  # of one process
_STACK_BYTES = 8 << 20

_I32, _I64 = ir.IntType(32), ir.IntType(64)
_WORDS = _I64.as_pointer()


class Table:
    """Records in memory, in the layout that the crew reads."""

    __slots__ = ("_memory", "address", "num_records", "words")

    def __init__(self, num_records: int) -> None:
        self.num_records = num_records
        self._memory, self.words = aligned_words(HEADER_WORDS + num_records * RECORD_WORDS)
        self.address = self.words.ctypes.data

    @property
    def records(self) -> NDArray[np.int64]:
        return self.words[HEADER_WORDS:]


def record_words(kernel_address: int, num_tasks: int, parameters: Sequence[int]) -> list[int]:
    assert len(parameters) <= MAX_PARAMETERS, f"a kernel takes at most {MAX_PARAMETERS} parameters"
    words = [kernel_address, num_tasks, *parameters]
    return words + [0] * (RECORD_WORDS - len(words))


def aligned_words(count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(owner of the memory, ``count`` zeros aligned to a cache line)."""
    memory = np.zeros(count + _LINE_WORDS, dtype=np.int64)
    first = -(memory.ctypes.data // 8) % _LINE_WORDS
    return memory, memory[first : first + count]


class Crew:
    """The threads of one process: as many as torch may use (``torch.set_num_threads``), created on first use."""

    def __init__(self, max_helpers: int = 256) -> None:
        self._max_helpers = max_helpers
        self._code = _Code()
        self._memory, self._words = aligned_words((1 + max_helpers) * _LINE_WORDS)
        self._address = self._words.ctypes.data
        self._slots = self._words[_LINE_WORDS::_LINE_WORDS]
        # Helpers outlive Python objects.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._memory))
        self._num_helpers = 0
        self._lock = threading.Lock()
        # Tables that were run while a helper had not left yet; kept until it has.
        self._late: list[Table] = []

    def is_free(self, table: Table) -> bool:
        """Whether no helper is inside any more; to be called by the thread that ran it last."""
        return not (self._slots[: self._num_helpers] == table.address).any()

    def run(self, table: Table, start: int, stop: int, *, leaves_processors: bool = False) -> None:
        """Run records [start, stop) of a table whose earlier records are done. Two threads may call it at once; one
        of them then works alone. ``leaves_processors``: helpers sleep at once, because other threads have work to do
        next."""
        table.words[:2] = start, stop
        num_helpers = min(torch.get_num_threads() - 1, self._max_helpers)
        if num_helpers <= 0 or not self._lock.acquire(blocking=False):
            self._code.work(table.address, start, stop)
            return
        try:
            while self._num_helpers < min(num_helpers, self._max_helpers):
                self._start_helper()
            self._words[_WANTED] = num_helpers
            self._words[_SPINS] = 0 if leaves_processors else _IDLE_SPINS
            self._code.lead(self._address, table.address)
            if self._late or not self.is_free(table):
                self._late = [late for late in (*self._late, table) if not self.is_free(late)]
        finally:
            self._lock.release()

    def _start_helper(self) -> None:
        at = (1 + self._num_helpers) * _LINE_WORDS
        self._words[at : at + 3] = 0, self._address, self._num_helpers
        try:
            self._code.start_helper(self._address + 8 * at)
        except OSError as error:
            # Fewer threads do the same work more slowly. A step does not fail for it, and each step would try again.
            self._max_helpers = self._num_helpers
            _log.warning("%s; this process computes on %d threads from now on", error, 1 + self._num_helpers)
        else:
            self._num_helpers += 1


@once
def crew() -> Crew:
    """The crew of the process; there is one."""
    return Crew()


class _Code:
    """The crew's machine code. Never freed: helpers may be inside until the process ends."""

    def __init__(self) -> None:
        module = ir.Module("crew")
        work = _write_work(module)
        _write_lead(module, work)
        _write_help(module, work)
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        parsed = llvm.parse_assembly(str(module))
        parsed.verify()
        machine = llvm.Target.from_default_triple().create_target_machine(opt=2, jit=True)
        engine = llvm.create_mcjit_compiler(parsed, machine)
        engine.finalize_object()
        address = engine.get_function_address
        word = ctypes.c_int64
        self.work: Any = ctypes.CFUNCTYPE(None, word, word, word)(address("work"))
        self.lead: Any = ctypes.CFUNCTYPE(None, word, word)(address("lead"))
        self._help = address("help")
        engine.detach()

    def start_helper(self, slot_address: int) -> None:
        """Starts a thread unknown to Python, which lives as long as the process."""
        libc = ctypes.CDLL(None)
        thread, attributes = ctypes.c_ulong(), ctypes.create_string_buffer(256)
        libc.pthread_attr_init(attributes)
        libc.pthread_attr_setdetachstate(attributes, 1)
        libc.pthread_attr_setstacksize(attributes, ctypes.c_size_t(_STACK_BYTES))
        # Signals must go to Python's own threads.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            failed = libc.pthread_create(
                ctypes.byref(thread), attributes, ctypes.c_void_p(self._help), ctypes.c_void_p(slot_address)
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            libc.pthread_attr_destroy(attributes)
        if failed:
            raise OSError(failed, "a thread of the kernels cannot be started; check the limit on threads")


class _Writer(ir.IRBuilder):  # type: ignore[misc]
    """A function under construction, with atomic operations, system calls and pauses."""

    def __init__(self, module: ir.Module, name: str, num_arguments: int) -> None:
        self._declared = module
        self.made = ir.Function(module, ir.FunctionType(ir.VoidType(), [_I64] * num_arguments), name)
        super().__init__(self.made.append_basic_block("entry"))

    def block_of(self, name: str) -> ir.Block:
        return self.made.append_basic_block(name)

    def place(self, base: ir.Value, word: int) -> ir.Value:
        return self.inttoptr(self.add(base, _I64(8 * word)), _WORDS)

    def word(self, base: ir.Value, word: int) -> ir.Value:
        return self.load(self.place(base, word), align=8)

    def look(self, base: ir.Value, word: int) -> ir.Value:
        """An atomic load of a word that other threads write, sequentially consistent."""
        return self.load_atomic(self.place(base, word), "seq_cst", 8)

    def put(self, base: ir.Value, word: int, value: ir.Value) -> None:
        self.store_atomic(value, self.place(base, word), "seq_cst", 8)

    def increase(self, base: ir.Value, word: int, by: ir.Value) -> ir.Value:
        """Atomic addition; returns the value before."""
        return self.atomic_rmw("add", self.place(base, word), by, "seq_cst")

    def wait_while(
        self, base: ir.Value, word: int, sleepers: int, spins: ir.Value, is_over: Any, then: ir.Block
    ) -> None:
        """Wait, then go to ``then`` once ``is_over(value)`` of a word; its writer wakes the sleepers counted in
        another word."""
        before = self.block
        wait, rest, ease, sleep, doze, awake = map(self.block_of, ("wait", "rest", "ease", "sleep", "doze", "awake"))
        self.branch(wait)
        self.position_at_end(wait)
        spun = self.phi(_I64)
        spun.add_incoming(_I64(0), before)
        self.cbranch(is_over(self.look(base, word)), then, rest)
        self.position_at_end(rest)
        self.cbranch(self.icmp_signed("<", spun, spins), ease, sleep)
        self.position_at_end(ease)
        self._ease()
        spun.add_incoming(self.add(spun, _I64(1)), ease)
        self.branch(wait)
        self.position_at_end(sleep)
        self.increase(base, sleepers, _I64(1))
        seen = self.look(base, word)
        self.cbranch(is_over(seen), awake, doze)
        self.position_at_end(doze)
        self._futex(self.place(base, word), _FUTEX_WAIT, self.trunc(seen, _I32))
        self.branch(awake)
        self.position_at_end(awake)
        self.increase(base, sleepers, _I64(-1))
        spun.add_incoming(_I64(0), awake)
        self.branch(wait)

    def wake(self, base: ir.Value, word: int, sleepers: int) -> None:
        with self.if_then(self.icmp_signed(">", self.look(base, sleepers), _I64(0)), likely=False):
            self._futex(self.place(base, word), _FUTEX_WAKE, _I32(0x7FFFFFFF))

    def _ease(self) -> None:
        name, arguments = {
            "x86_64": ("llvm.x86.sse2.pause", []),
            "aarch64": ("llvm.aarch64.hint", [_I32(1)]),
        }.get(platform.machine(), ("sched_yield", []))
        self._extern(name, ir.VoidType(), *arguments)

    def _futex(self, place: ir.Value, operation: int, value: ir.Value) -> None:
        """A futex on the lower half of a word, which comes first in memory; without futex the waiter looks again
        after yielding."""
        number = _FUTEX.get(platform.machine())
        if number is None or platform.system() != "Linux":
            self._extern("sched_yield", _I32)
            return
        kind = ir.FunctionType(_I64, [_I64], var_arg=True)
        call = self._declared.globals.get("syscall") or ir.Function(self._declared, kind, "syscall")
        nothing = _I64(0)
        self.call(
            call,
            [_I64(number), place, _I64(operation), self.sext(value, _I64), nothing, nothing, nothing],
        )

    def _extern(self, name: str, result: ir.Type, *arguments: ir.Value) -> None:
        kind = ir.FunctionType(result, [a.type for a in arguments])
        self.call(self._declared.globals.get(name) or ir.Function(self._declared, kind, name), arguments)


def _write_work(module: ir.Module) -> ir.Function:
    """work(table, start, stop): the work of every thread of the crew."""
    w = _Writer(module, "work", 3)
    table, start, stop = w.made.args
    entry = w.block
    names = ("record", "begin", "look", "claim", "task", "count", "add", "wait", "next", "end")
    record, begin, look, claim, task, count, add, wait, following, end = map(w.block_of, names)
    w.branch(record)

    w.position_at_end(record)
    index = w.phi(_I64)
    index.add_incoming(start, entry)
    w.cbranch(w.icmp_signed("<", index, stop), begin, end)

    w.position_at_end(begin)
    here = w.add(w.add(table, _I64(8 * HEADER_WORDS)), w.mul(index, _I64(8 * RECORD_WORDS)))
    kernel = w.inttoptr(w.word(here, 0), ir.FunctionType(ir.VoidType(), [_I64, _I64]).as_pointer())
    num_tasks, parameters = w.word(here, 1), w.add(here, _I64(16))
    w.branch(look)

    w.position_at_end(look)
    mine = w.phi(_I64)
    mine.add_incoming(_I64(0), begin)
    w.cbranch(w.icmp_signed("<", w.look(here, _NEXT), num_tasks), claim, count)

    w.position_at_end(claim)
    taken = w.increase(here, _NEXT, _I64(1))
    w.cbranch(w.icmp_signed("<", taken, num_tasks), task, count)

    w.position_at_end(task)
    w.call(kernel, [parameters, taken])
    mine.add_incoming(w.add(mine, _I64(1)), task)
    w.branch(look)

    w.position_at_end(count)
    w.cbranch(w.icmp_signed(">", mine, _I64(0)), add, wait)

    w.position_at_end(add)
    before = w.increase(here, _DONE, mine)
    with w.if_then(w.icmp_signed("==", w.add(before, mine), num_tasks)):
        w.wake(here, _DONE, _SLEEPERS)
    w.branch(wait)

    w.position_at_end(wait)
    spins = _I64(_TASK_SPINS)
    w.wait_while(here, _DONE, _SLEEPERS, spins, lambda done: w.icmp_signed("==", done, num_tasks), following)

    w.position_at_end(following)
    index.add_incoming(w.add(index, _I64(1)), following)
    w.branch(record)
    w.position_at_end(end)
    w.ret_void()
    return w.made


def _write_lead(module: ir.Module, work: ir.Function) -> None:
    """lead(crew, table): publish the table, work on it, take it back."""
    w = _Writer(module, "lead", 2)
    crew, table = w.made.args
    w.put(crew, _TABLE, table)
    w.increase(crew, _GENERATION, _I64(1))
    w.wake(crew, _GENERATION, _IDLE)
    w.call(work, [table, w.word(table, 0), w.word(table, 1)])
    w.put(crew, _TABLE, _I64(0))
    w.ret_void()


def _write_help(module: ir.Module, work: ir.Function) -> None:
    """help(slot): a helper's life."""
    w = _Writer(module, "help", 1)
    (slot,) = w.made.args
    crew, number = w.word(slot, 1), w.word(slot, 2)
    entry = w.block
    top, look, take, inside, out = map(w.block_of, ("top", "look", "take", "inside", "out"))
    w.branch(top)

    w.position_at_end(top)
    seen = w.phi(_I64)
    seen.add_incoming(_I64(0), entry)
    w.wait_while(crew, _GENERATION, _IDLE, w.look(crew, _SPINS), lambda now: w.icmp_signed("!=", now, seen), look)

    w.position_at_end(look)
    now = w.look(crew, _GENERATION)
    table = w.look(crew, _TABLE)
    seen.add_incoming(now, look)
    is_wanted = w.icmp_signed("<", number, w.look(crew, _WANTED))
    w.cbranch(w.and_(is_wanted, w.icmp_signed("!=", table, _I64(0))), take, top)

    # The slot is written before the table is read again: so either this thread sees that the table was withdrawn, or
    # the leader sees that it is in use.
    w.position_at_end(take)
    w.put(slot, 0, table)
    w.cbranch(w.icmp_signed("==", w.look(crew, _TABLE), table), inside, out)

    w.position_at_end(inside)
    w.call(work, [table, w.word(table, 0), w.word(table, 1)])
    w.branch(out)

    w.position_at_end(out)
    w.put(slot, 0, _I64(0))
    seen.add_incoming(now, out)
    w.branch(top)
