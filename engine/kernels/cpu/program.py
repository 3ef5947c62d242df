"""Kernel calls written down as records: run at once, or kept as a program that is run for any number of rows.

An operation of the kernels does not call its kernels. It gives records to a `Tape`, in the order in which they run; a
record starts when all tasks of the one before it are done. While a program is recorded the tape keeps the records and
nothing runs: tensors that the tape gave out then hold as many rows as the program can take, and the number of rows is a
`Count`, a number that is filled in at each run.
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
from engine.kernels.cpu.llvm import Kernel


class Count(IntEnum):
    """A number that differs from one run of a program to the next."""

    ROWS = 0
    # Rows that sample, and of which the last layer computes its output.
    SAMPLED = 1
    # Tiles of attention (attention.py), of all rows and of those that sample.
    TILES = 2
    SAMPLED_TILES = 3


class Record(NamedTuple):
    """One call of a kernel: ``units * ceil(size / per_task)`` tasks.

    A tensor among the parameters stands for its address. What a record reads and writes has to be there when it runs:
    weights are kept by who made the record, all else comes from ``Tape.empty``. A program keeps its kernels.
    """

    kernel: Kernel
    # 64-bit integers.
    parameters: tuple[Tensor | int, ...]
    # Mostly ``Tape.rows``.
    size: int
    per_task: int = 1
    units: int = 1


class Tape:
    """Where operations leave their records, and where their results lie."""

    def __init__(self) -> None:
        self._program: Program | None = None

    def rows(self, x: Tensor) -> int:
        """How many rows of ``x`` there are: a number, or while a program is recorded the count that stands for it."""
        return len(x) if self._program is None else self._program.count

    def empty(self, x: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A row of ``shape`` for every row of ``x``, of its dtype unless another is given; holds anything.

        While a program is recorded its memory is used anew for records that come after the last reference to it is
        gone. Views do not count as references: hand on the tensor itself.
        """
        if self._program is None:
            return x.new_empty(len(x), *shape, dtype=dtype or x.dtype)
        return self._program.empty(shape, dtype or x.dtype)

    def run(self, records: Iterable[Record]) -> None:
        """Run them, or append them to the program that is recorded."""
        if self._program is not None:
            for record in records:
                self._program.append(record)
            return
        kept = tuple(records)
        table = Table(len(kept))
        table.records[:] = [word for record in kept for word in _words(record)]
        crew().run(table, 0, len(kept))

    def call(self, function: Callable[[int], None], x: Tensor) -> None:
        """Have ``function`` called with the number of x's rows, after the records before and before those that follow.

        It may hold views of tensors that ``empty`` gave, and not these themselves.
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
    """Counts stand in it as themselves, until a run fills them in."""
    kernel, parameters, size, per_task, units = record
    assert len(parameters) == kernel.num_parameters, f"{len(parameters)} parameters, not {kernel.num_parameters}"
    values = [p.data_ptr() if isinstance(p, Tensor) else p for p in parameters]
    return record_words(kernel.address, units * -(-size // per_task), values)


class Program:
    """Records of a step of at most ``max_rows`` rows, of which at most ``max_sampled`` sample."""

    def __init__(self, max_rows: int, max_sampled: int) -> None:
        self._capacity = {Count.ROWS: max_rows, Count.SAMPLED: max_sampled}
        # Which rows operations are recorded for.
        self.count = Count.ROWS
        self._blocks = _Blocks()
        self._words: list[int] = []
        # The words have their addresses alone.
        self._kernels: set[Kernel] = set()
        # Places of counts among the words; for a number of tasks also its record's rows per task and units.
        self._parameters: list[tuple[int, Count]] = []
        self._tasks: list[tuple[int, Count, int, int]] = []
        # What Python does between records: number of the record before which, count of the rows it is told.
        self._calls: list[tuple[int, Count, Callable[[int], None]]] = []
        self._tables: list[Table] = []

    def __len__(self) -> int:
        return len(self._words) // RECORD_WORDS

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
        # A record without tasks: so each call has a number of its own.
        self._words += record_words(0, 0, ())

    def seal(self) -> None:
        """To be called once, when all is recorded."""
        self._template = np.array(self._words, dtype=np.int64)
        self._places, self._place_counts = np.array(self._parameters, dtype=np.int64).reshape(-1, 2).T
        self._task_places, self._task_counts, self._per_task, self._units = (
            np.array(self._tasks, dtype=np.int64).reshape(-1, 4).T
        )

    def run(self, counts: Mapping[Count, int], pauses: Iterable[tuple[int, Callable[[], None]]], stop: int) -> None:
        """Run the first ``stop`` records; a pause is called once the records before its number are done."""
        table = self._free_table()
        values = np.array([counts[count] for count in Count], dtype=np.int64)
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
        """One that no helper is inside, who may still be on its way out of an earlier run."""
        for table in self._tables:
            if crew().is_free(table):
                return table
        self._tables.append(Table(len(self)))
        return self._tables[-1]


class _Blocks:
    """Memory for the tensors of a program; what nobody holds any more is given out again."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        num_bytes = math.prod(shape) * dtype.itemsize
        fitting = [i for i, block in enumerate(self._free) if len(block) >= num_bytes]
        if fitting:
            block = self._free.pop(min(fitting, key=lambda i: len(self._free[i])))
        else:
            block = torch.empty(num_bytes, dtype=torch.uint8)
        tensor = block[:num_bytes].view(dtype).view(shape)
        weakref.finalize(tensor, self._free.append, block).atexit = False
        return tensor
