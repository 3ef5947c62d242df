"""Computes masks in threads of its own, each within a limit of time: a library's call cannot be ended from outside.

A mask that takes longer is given up, and its thread with it: the others are computed by a thread that takes its place.
It knows nothing of grammars.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from enum import Enum
from queue import SimpleQueue

# A limit is over when the one who waits has woken up so many times: a process that was stopped for a while has not
# computed meanwhile.
_NUM_TICKS = 10
# Threads that were given up and compute still, beyond as many as compute otherwise: so many are replaced.
MAX_LOST = 4


class Outcome(Enum):
    DONE = "done"
    # It took longer than the limit.
    LATE = "late"
    # Not begun: one of the same key was late, or all threads are lost.
    LEFT_OUT = "left out"


class Job:
    """One mask to compute. ``key``: of jobs that take as long as this one."""

    __slots__ = ("error", "has_begun", "key", "num_ticks", "outcome", "work")

    def __init__(self, key: object, work: Callable[[], None]) -> None:
        self.key = key
        self.work = work
        # What the work raised.
        self.error: BaseException | None = None
        # None: it waits, or it is being computed.
        self.outcome: Outcome | None = None
        self.has_begun = False
        # While it is being computed.
        self.num_ticks = 0


class _Batch:
    """Jobs that are waited for together."""

    __slots__ = ("is_over", "jobs", "num_left", "waiting")

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs = jobs
        # Guarded by the lock of the threads.
        self.waiting = deque(jobs)
        self.num_left = len(jobs)
        self.is_over = threading.Event()

    def end(self, job: Job, outcome: Outcome) -> None:
        job.outcome = outcome
        self.num_left -= 1
        if not self.num_left:
            self.is_over.set()


class MaskThreads:
    """`run` may be called by several threads."""

    def __init__(self, num_threads: int, *, limit_s: float, max_lost: int = MAX_LOST) -> None:
        """``limit_s``: of one job."""
        self._max_threads = num_threads
        self._limit_s = limit_s
        self._max_lost = max_lost
        self._lock = threading.Lock()
        # Guarded by it: threads that take jobs, and those that were given up and compute still.
        self._num_threads = 0
        self._num_lost = 0
        self._is_closed = False
        # Batches with jobs to take, once for each thread that may help; None ends a thread.
        self._queue: SimpleQueue[_Batch | None] = SimpleQueue()

    @property
    def num_lost(self) -> int:
        return self._num_lost

    def run(self, jobs: Sequence[Job]) -> None:
        """Returns when each job has an outcome. Each takes at most the limit once it has begun."""
        if not jobs:
            return
        batch = _Batch(jobs)
        with self._lock:
            while self._num_threads < min(len(jobs), self._max_threads) and self._add():
                pass
            if not self._num_threads:
                self._leave_out(batch)
            num_helpers = min(len(jobs), self._num_threads)
        for _ in range(num_helpers):
            self._queue.put(batch)
        while not batch.is_over.wait(self._limit_s / _NUM_TICKS):
            self._tick(batch)

    def close(self) -> None:
        """Threads end when they have computed what they are at; what is asked for later is computed by new ones."""
        with self._lock:
            self._is_closed = True
            for _ in range(self._num_threads):
                self._queue.put(None)

    def _tick(self, batch: _Batch) -> None:
        with self._lock:
            for job in batch.jobs:
                if job.has_begun and job.outcome is None:
                    job.num_ticks += 1
                    if job.num_ticks >= _NUM_TICKS:
                        self._give_up(batch, job)
            if batch.waiting and not self._num_threads:
                # Others' jobs took the last thread.
                self._replace(batch)

    def _give_up(self, batch: _Batch, late: Job) -> None:
        batch.end(late, Outcome.LATE)
        self._num_threads -= 1
        self._num_lost += 1
        for job in [job for job in batch.waiting if job.key == late.key]:
            batch.waiting.remove(job)
            batch.end(job, Outcome.LEFT_OUT)
        if batch.waiting:
            self._replace(batch)

    def _replace(self, batch: _Batch) -> None:
        """A thread for what waits, or nothing of it is computed."""
        if self._add():
            self._queue.put(batch)
        elif not self._num_threads:
            self._leave_out(batch)

    def _leave_out(self, batch: _Batch) -> None:
        while batch.waiting:
            batch.end(batch.waiting.popleft(), Outcome.LEFT_OUT)

    def _add(self) -> bool:
        """One more thread; False if there are too many that are lost."""
        if self._num_threads + self._num_lost >= self._max_threads + self._max_lost:
            return False
        threading.Thread(target=self._main, name="masks", daemon=True).start()
        self._num_threads += 1
        return True

    def _main(self) -> None:
        while (batch := self._queue.get()) is not None:
            while (job := self._taken(batch)) is not None:
                try:
                    job.work()
                except BaseException as error:  # A panic of the library is no Exception.
                    job.error = error
                if self._is_given_up(batch, job):
                    return
            if self._is_closed:
                break
        with self._lock:
            self._num_threads -= 1

    def _taken(self, batch: _Batch) -> Job | None:
        with self._lock:
            if not batch.waiting:
                return None
            job = batch.waiting.popleft()
            job.has_begun = True
            return job

    def _is_given_up(self, batch: _Batch, job: Job) -> bool:
        """Says that the job is done; whether another thread has taken the place of this one."""
        with self._lock:
            if job.outcome is None:
                batch.end(job, Outcome.DONE)
                return False
            self._num_lost -= 1
            return True
