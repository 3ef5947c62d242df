"""Records kernel calls and runs them: at once, or as a program for any number of rows.

An operation does not call its kernels. It yields records to a `Tape`, in order; a record starts when all tasks of the
one before it are done. While a program is recorded, the tape stores the records and nothing runs: its tensors then have
as many rows as the program can take, and the number of rows is a `Count`, which is filled in at each run.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from enum import IntEnum
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.kernels.cpu.crew import PARAMETERS_WORD, RECORD_WORDS, TASKS_WORD, Table, crew, record_words
from engine.kernels.cpu.kernel import Kernel


class Count(IntEnum):
    """A number that differs between runs of a program."""

    ROWS = 0
    # Rows whose logits are wanted: the last layer computes its output for these only.
    WANTED = 1
    # Tiles of attention (attention.py) of all rows, and of those.
    TILES = 2
    WANTED_TILES = 3
    # Tiles that are many tasks (long_attention.py), and the pieces of their contexts.
    LONG_TILES = 4
    LONG_PIECES = 5


class Record(NamedTuple):
    """One call of a kernel: ``units * ceil(size / per_task)`` tasks.

    A tensor among the parameters stands for its address. The memory that a record uses must exist when it runs: weights
    are kept by the creator of the record, all else comes from ``Tape.empty``. A program keeps its kernels.
    """

    kernel: Kernel
    # 64-bit integers.
    parameters: tuple[Tensor | int, ...]
    # Mostly ``Tape.rows``.
    size: int
    per_task: int = 1
    units: int = 1


class Tape:
    """Collects the records of operations and allocates their results."""

    def __init__(self) -> None:
        self._program: Program | None = None

    def rows(self, x: Tensor) -> int:
        """The number of rows of ``x``: an integer, or while a program is recorded the count that stands for it."""
        return len(x) if self._program is None else self._program.count

    def empty(self, x: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Uninitialized memory: a row of ``shape`` for every row of ``x``, of its dtype by default.

        While a program is recorded, memory is reused for later records once the last reference to it is gone. Views do
        not count as references: pass the tensor itself.
        """
        if self._program is None:
            return x.new_empty(len(x), *shape, dtype=dtype or x.dtype)
        return self._program.empty(shape, dtype or x.dtype)

    def run(self, records: Iterable[Record]) -> None:
        """Run the records, or append them to the program that is being recorded."""
        if self._program is not None:
            for record in records:
                self._program.append(record)
            return
        kept = tuple(records)
        table = Table(len(kept))
        table.records[:] = [word for record in kept for word in _words(record)]
        crew().run(table, 0, len(kept))

    def call(self, function: Callable[[int], None], x: Tensor) -> None:
        """Call ``function`` with the number of x's rows, after the records before it and before the following ones.

        It may hold views of tensors from ``empty``, but not the tensors themselves.
        """
        if self._program is None:
            function(len(x))
        else:
            self._program.append_call(function)

    @contextmanager
    def recording(self, program: Program) -> Iterator[None]:
        assert self._program is None, "one program is recorded at a time"
        self._program = program
        try:
            yield
        finally:
            self._program = None


def _words(record: Record) -> list[int]:
    """The words of a record. Counts are included as such until a run fills them in."""
    kernel, parameters, size, per_task, units = record
    assert len(parameters) == kernel.num_parameters, f"{len(parameters)} parameters, not {kernel.num_parameters}"
    values = [p.data_ptr() if isinstance(p, Tensor) else p for p in parameters]
    return record_words(kernel.address, units * -(-size // per_task), values)


class Program:
    """Records of a step of at most ``max_rows`` rows, of which the logits of at most ``max_wanted`` are wanted."""

    def __init__(self, max_rows: int, max_wanted: int) -> None:
        self._capacity = {Count.ROWS: max_rows, Count.WANTED: max_wanted}
        # The rows for which operations are recorded.
        self.count = Count.ROWS
        self._blocks = _Blocks()
        self._words: list[int] = []
        # The words contain only their addresses.
        self._kernels: set[Kernel] = set()
        # Indices of counts among the words; for a number of tasks also the record's rows per task and units.
        self._parameters: list[tuple[int, Count]] = []
        self._tasks: list[tuple[int, Count, int, int]] = []
        # Python calls between records: index of the record that follows, count of the rows it gets.
        self._calls: list[tuple[int, Count, Callable[[int], None]]] = []
        self._tables: list[Table] = []

    def __len__(self) -> int:
        return len(self._words) // RECORD_WORDS

    @property
    def num_bytes(self) -> int:
        """Of the tensors that were taken; they are kept as long as the program."""
        return self._blocks.num_bytes

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return self._blocks.take((self._capacity[self.count], *shape), dtype)

    def append(self, record: Record) -> None:
        at = len(self._words)
        self._words += _words(record)
        self._kernels.add(record.kernel)
        if isinstance(record.size, Count):
            self._tasks.append((at + TASKS_WORD, record.size, record.per_task, record.units))
        for i, parameter in enumerate(record.parameters):
            if isinstance(parameter, Count):
                self._parameters.append((at + PARAMETERS_WORD + i, parameter))

    def append_call(self, function: Callable[[int], None]) -> None:
        self._calls.append((len(self), self.count, function))
        # A record without tasks, so that each call has an index of its own.
        self._words += record_words(0, 0, ())

    def seal(self) -> None:
        """To be called once, at the end of the recording."""
        self._template = np.array(self._words, dtype=np.int64)
        self._places, self._place_counts = np.array(self._parameters, dtype=np.int64).reshape(-1, 2).T
        self._task_places, self._task_counts, self._per_task, self._units = (
            np.array(self._tasks, dtype=np.int64).reshape(-1, 4).T
        )

    def run(self, counts: Mapping[Count, int], pauses: Iterable[tuple[int, Callable[[], None]]], stop: int) -> None:
        """Run the first ``stop`` records; a pause is called once the records before its number are done. Counts that
        are not given are 0."""
        table = self._free_table()
        values = np.array([counts.get(count, 0) for count in Count], dtype=np.int64)
        records = table.records
        records[:] = self._template
        records[self._places] = values[self._place_counts]
        records[self._task_places] = self._units * -(-values[self._task_counts] // self._per_task)
        calls: list[tuple[int, Callable[[], None]]] = [
            (at, partial(function, counts[count])) for at, count, function in self._calls if at < stop
        ]
        start = 0
        for at, call in sorted([*pauses, *calls], key=lambda event: event[0]):
            crew().run(table, start, at, leaves_processors=bool(calls))
            call()
            start = at
        crew().run(table, start, stop, leaves_processors=bool(calls))

    def _free_table(self) -> Table:
        """A table without a helper inside; one may still be leaving an earlier run."""
        for table in self._tables:
            if crew().is_free(table):
                return table
        self._tables.append(Table(len(self)))
        return self._tables[-1]


class _Blocks:
    """Memory for the tensors of a program; memory without references is reused."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._free: list[Tensor] = []

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        num_bytes = math.prod(shape) * dtype.itemsize
        fitting = [i for i, block in enumerate(self._free) if len(block) >= num_bytes]
        if fitting:
            block = self._free.pop(min(fitting, key=lambda i: len(self._free[i])))
        else:
            block = torch.empty(num_bytes, dtype=torch.uint8)
            self.num_bytes += num_bytes
        tensor = block[:num_bytes].view(dtype).view(shape)
        weakref.finalize(tensor, self._free.append, block).atexit = False
        return tensor
