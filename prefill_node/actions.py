"""Performs PrefillMachine's actions on one replica and one sender."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from baton.defects import Defects
from baton.node_messages import Defect, Run, Send
from baton.types import Failure
from engine.replica import Listener, Replica
from kvtransfer.sender import Push, Sender
from prefill_node import machine


class PrefillActions:
    """All calls come from one event loop. ``feed`` takes the events that actions lead to, ``listener`` the engine's."""

    # Exceptions are answered with an event and reach no caller.
    raised: tuple[type, ...] = ()

    def __init__(
        self,
        replica: Replica,
        sender: Sender,
        feed: Callable[[machine.Event], None],
        listener: Listener,
        defects: Defects,
    ) -> None:
        self._replica = replica
        self._sender = sender
        self._feed = feed
        self._listener = listener
        self._defects = defects
        self._pushes: dict[str, Push] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def perform(self, action: machine.Action) -> None:  # noqa: C901 - one case per action
        """Any action but Send."""
        match action:
            case Run(spec, lease):
                self._replica.submit(spec, hands_off=lease is not None, listener=self._listener)
            case machine.BeginPush():
                self._begin(action)
            case machine.BeginMove():
                self._begin_move(action)
            case machine.HoldCompute(sequence_id):
                self._replica.hold(sequence_id)
            case machine.Resume(sequence_id):
                self._pushes.pop(sequence_id, None)
                self._replica.resume(sequence_id)
            case machine.CommitPush():
                self._spawn(self._commit(action, self._pushes[action.sequence_id]))
            case machine.AbortPush(sequence_id, reason):
                self._spawn(self._abort(sequence_id, self._pushes[sequence_id], reason))
            case machine.StopCompute(sequence_id):
                self._replica.cancel(sequence_id)
            case machine.ReleaseBlocks(sequence_id):
                self._pushes.pop(sequence_id, None)
                self._replica.release(sequence_id)
            case Send():
                raise AssertionError("messages are sent by the service")

    def answer(self, about: machine.Event | machine.Action, failure: Failure) -> machine.Event:
        """The event that says that handling or performing ``about`` raised."""
        match about:
            case Run():
                return machine.SubmitRefused(about.sequence_id, failure)
            case machine.BeginPush() if about.sequence_id not in self._pushes:
                return machine.PushRefused(about.sequence_id, failure)
            case machine.BeginMove() if about.sequence_id not in self._pushes:
                return machine.MoveRefused(about.sequence_id, failure)
            case _:
                return Defect(about.sequence_id, failure)

    async def close(self, timeout_s: float) -> bool:
        """Wait for pushes to end; False if some did not."""
        if not self._tasks:
            return True
        _, pending = await asyncio.wait(self._tasks, timeout=timeout_s)
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        return not pending

    def _begin(self, action: machine.BeginPush) -> None:
        push = self._sender.begin(action.lease, action.block_ids, num_known_tokens=action.num_known_tokens)
        self._attach(action.sequence_id, push)

    def _begin_move(self, action: machine.BeginMove) -> None:
        sequence_id, lease = action.sequence_id, action.lease
        block_ids = self._replica.lend(sequence_id, lease.num_cached_blocks + len(lease.block_ids))
        try:
            push = self._sender.begin(lease, block_ids, num_known_tokens=None)
        except Exception:
            self._replica.resume(sequence_id)
            raise
        self._attach(sequence_id, push)
        push.call_when_caught_up(lambda: self._tell(push, machine.PushCaughtUp(sequence_id)))

    def _attach(self, sequence_id: str, push: Push) -> None:
        self._pushes[sequence_id] = push
        push.add_failure_callback(
            lambda error: self._tell(push, machine.PushFailed(sequence_id, Failure.of(error)))
        )  # fmt: skip
        self._replica.attach(sequence_id, push)

    def _tell(self, push: Push, event: machine.Event) -> None:
        """What became of a push, unless its sequence has gone on without it."""
        if self._pushes.get(event.sequence_id) is push:
            self._feed(event)

    async def _commit(self, action: machine.CommitPush, push: Push) -> None:
        sequence_id = action.sequence_id
        try:
            report = await push.commit(action.tokens, action.num_blocks)
        except Exception as error:
            failure = self._defects.failure("prefill", error, sequence_id)
            self._tell(push, machine.PushFailed(sequence_id, failure))
        else:
            self._tell(push, machine.PushCommitted(sequence_id, report))

    async def _abort(self, sequence_id: str, push: Push, reason: str) -> None:
        # Should abort break its word and raise, the blocks stay held: better lost than overwritten while being read.
        await push.abort(reason)
        self._tell(push, machine.PushAborted(sequence_id))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._defects.caught("prefill", error, "the end of a push")
