"""Threads that compute masks: each job within its limit, and the others with it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from engine.mask_threads import Job, MaskThreads, Outcome

LIMIT_S = 0.02


class Gate:
    """A job that does not end before it is told to."""

    def __init__(self) -> None:
        self.has_begun = threading.Event()
        self.may_end = threading.Event()

    def __call__(self) -> None:
        self.has_begun.set()
        assert self.may_end.wait(30)


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.may_end.set()


def until_none_is_lost(threads: MaskThreads) -> None:
    end_s = time.monotonic() + 10
    while threads.num_lost:
        assert time.monotonic() < end_s, "a thread does not come back"
        time.sleep(0.001)


def outcomes(jobs: list[Job]) -> list[Outcome | None]:
    return [job.outcome for job in jobs]


def test_every_job_is_done_once() -> None:
    threads, done = MaskThreads(3, limit_s=30), []
    for count in (0, 1, 2, 50):
        jobs = [Job("k", lambda i=i: done.append(i)) for i in range(count)]  # type: ignore[misc]
        threads.run(jobs)
        assert sorted(done) == list(range(count))
        assert outcomes(jobs) == [Outcome.DONE] * count
        done.clear()
    threads.close()


def test_what_a_job_raises_is_its_own() -> None:
    threads = MaskThreads(1, limit_s=30)
    jobs = [Job("a", lambda: [][1]), Job("b", lambda: None)]  # type: ignore[func-returns-value, misc]
    threads.run(jobs)
    assert outcomes(jobs) == [Outcome.DONE, Outcome.DONE]
    assert [type(job.error) for job in jobs] == [IndexError, type(None)]
    threads.close()


def test_a_late_job_is_given_up_and_the_others_are_done(gate: Gate) -> None:
    threads = MaskThreads(1, limit_s=LIMIT_S)
    # Jobs of its key would take as long.
    jobs = [Job("a", lambda: None), Job("slow", gate), Job("slow", gate), Job("b", lambda: None)]
    threads.run(jobs)
    assert outcomes(jobs) == [Outcome.DONE, Outcome.LATE, Outcome.LEFT_OUT, Outcome.DONE]
    assert threads.num_lost == 1
    again = [Job("a", lambda: None)]
    threads.run(again)
    assert outcomes(again) == [Outcome.DONE]
    gate.may_end.set()
    until_none_is_lost(threads)
    assert jobs[1].outcome is Outcome.LATE
    threads.close()


def test_when_too_many_are_lost_nothing_is_begun_until_one_comes_back(gate: Gate) -> None:
    threads = MaskThreads(1, limit_s=LIMIT_S, max_lost=1)
    jobs = [Job(i, gate) for i in range(3)]
    threads.run(jobs)
    assert outcomes(jobs) == [Outcome.LATE, Outcome.LATE, Outcome.LEFT_OUT]
    assert threads.num_lost == 2
    refused = [Job("a", lambda: None)]
    threads.run(refused)
    assert outcomes(refused) == [Outcome.LEFT_OUT]
    gate.may_end.set()
    until_none_is_lost(threads)
    served = [Job("a", lambda: None)]
    threads.run(served)
    assert outcomes(served) == [Outcome.DONE]
    threads.close()


def test_a_job_waits_for_others_without_being_late(gate: Gate) -> None:
    """Its time begins when it does."""
    threads = MaskThreads(1, limit_s=30)
    first = threading.Thread(target=threads.run, args=([Job("a", gate)],))
    first.start()
    assert gate.has_begun.wait(10)
    jobs = [Job("b", lambda: None)]
    second = threading.Thread(target=threads.run, args=(jobs,))
    second.start()
    gate.may_end.set()
    for thread in (first, second):
        thread.join(10)
        assert not thread.is_alive()
    assert outcomes(jobs) == [Outcome.DONE]
    threads.close()


def test_threads_that_others_lost_are_replaced(gate: Gate) -> None:
    threads = MaskThreads(1, limit_s=LIMIT_S)
    late = [Job("slow", gate)]
    first = threading.Thread(target=threads.run, args=(late,))
    first.start()
    assert gate.has_begun.wait(10)
    jobs = [Job("b", lambda: None)]
    threads.run(jobs)
    first.join(10)
    assert (outcomes(late), outcomes(jobs)) == ([Outcome.LATE], [Outcome.DONE])
    threads.close()


def test_threads_end_with_it() -> None:
    threads = MaskThreads(2, limit_s=30)
    before = threading.active_count()
    threads.run([Job(i, lambda: None) for i in range(8)])
    threads.close()
    end_s = time.monotonic() + 10
    while threading.active_count() > before:
        assert time.monotonic() < end_s, "a thread stays"
        time.sleep(0.001)
    late = [Job("a", lambda: None)]
    threads.run(late)
    assert outcomes(late) == [Outcome.DONE]
