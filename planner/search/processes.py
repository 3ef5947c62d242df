"""Searches kinds of designs in processes of their own, which end with the search, however it ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from threading import Thread

from baton.errors import BatonError, InternalError
from planner.search.kind import Answer, KindSearch
from planner.search.question import Kind, Question
from planner.search.trial import Simulations

# A process that is told to end does so at once, unless the machine hardly runs it.
_END_S = 5.0

_Tick = Callable[[int], None]


def answer(question: Question, kind: Kind, tick: _Tick) -> Answer:
    return KindSearch(question, kind, Simulations(question), tick).answer()


def answers(question: Question, most: int, tick: _Tick) -> tuple[Answer, ...]:
    """One for each kind, in the question's order; at most ``most`` processes at a time. Raises what a process raised:
    BatonError as it is, anything else as InternalError, as it does if a process is killed."""
    waiting = list(reversed(question.kinds))
    running: dict[object, _Search] = {}
    found: dict[Kind, Answer] = {}
    try:
        while waiting or running:
            while waiting and len(running) < most:
                search = _Search(question, waiting.pop())
                running[search.pipe] = search
            for pipe in wait([search.pipe for search in running.values()]):
                said = running[pipe].hear()
                if isinstance(said, int):
                    tick(said)
                else:
                    found[said.kind] = said
                    running.pop(pipe).end()
    finally:
        for search in running.values():
            search.end()
    return tuple(found[kind] for kind in question.kinds)


@dataclass(frozen=True, slots=True)
class _Failure:
    error: BatonError
    traceback: str


class _Search:
    """Of one kind, in a process."""

    def __init__(self, question: Question, kind: Kind) -> None:
        context = multiprocessing.get_context("spawn")
        self._kind = kind
        self.pipe, its_end = context.Pipe(duplex=False)
        self._process = context.Process(target=_search, args=(question, kind, its_end), daemon=True)
        with _without_interrupts():
            self._process.start()
        # So that the pipe ends with the process.
        its_end.close()

    def hear(self) -> int | Answer:
        """Parts that were done, or the answer."""
        try:
            said: int | Answer | _Failure = self.pipe.recv()
        except (EOFError, OSError):
            self._process.join(_END_S)
            raise InternalError(
                f"the process that searched {self._kind.name} ended with code {self._process.exitcode}, expected an "
                "answer (-9: it was killed, maybe for lack of memory: fewer --workers need less)"
            ) from None
        if isinstance(said, _Failure):
            raise said.error from RuntimeError(said.traceback)
        return said

    def end(self) -> None:
        self._process.terminate()
        self._process.join(_END_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join(_END_S)
        self.pipe.close()


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """A process that is started meanwhile never gets Ctrl-C, which goes to all of a terminal: this one ends it."""
    # The first process would start it and unblock the signal.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _search(question: Question, kind: Kind, pipe: Connection) -> None:
    """In a process of its own."""
    Thread(target=_end_with_parent, daemon=True).start()
    try:
        pipe.send(answer(question, kind, pipe.send))
    except BatonError as error:
        pipe.send(_Failure(error, traceback.format_exc()))
    except Exception as error:
        said = InternalError(f"the search of {kind.name} failed: {type(error).__name__}: {error}")
        pipe.send(_Failure(said, traceback.format_exc()))


def _end_with_parent() -> None:
    """Which ends this process itself, unless it is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
