"""Performs PrefillMachine's actions on one replica and one sender."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from baton.defects import Defects
from baton.errors import BatonError
from baton.node_messages import Defect, Run, Send
from baton.types import Failure, TokenChunk
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

    def perform(self, action: machine.Action) -> None:
        """Any action but Send."""
        match action:
            case Run(spec, lease):
                self._replica.submit(spec, hands_off=lease is not None, listener=self._listener)
            case machine.BeginPush():
                self._begin(action)
            case machine.CommitPush(sequence_id, first_token):
                self._spawn(self._commit(sequence_id, self._pushes[sequence_id], first_token))
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
        self._pushes[action.sequence_id] = push
        push.add_failure_callback(lambda error: self._push_failed(action.sequence_id, push, error))
        self._replica.attach(action.sequence_id, push)

    def _push_failed(self, sequence_id: str, push: Push, error: BatonError) -> None:
        if self._pushes.get(sequence_id) is push:
            self._feed(machine.PushFailed(sequence_id, Failure.of(error)))

    async def _commit(self, sequence_id: str, push: Push, first_token: TokenChunk) -> None:
        try:
            report = await push.commit(first_token)
        except Exception as error:
            self._feed(machine.PushFailed(sequence_id, self._defects.failure("prefill", error, sequence_id)))
        else:
            self._feed(machine.PushCommitted(sequence_id, report))

    async def _abort(self, sequence_id: str, push: Push, reason: str) -> None:
        # Should abort break its word and raise, the blocks stay held: better lost than overwritten while being read.
        await push.abort(reason)
        self._feed(machine.PushAborted(sequence_id))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._defects.caught("prefill", error, "the end of a push")
