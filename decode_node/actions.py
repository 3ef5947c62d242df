"""Performs DecodeMachine's actions on one replica and one receiver."""

from __future__ import annotations

from collections.abc import Callable

from baton.errors import TransferFailed
from baton.node_messages import Defect, LetGo, Reserve, Send
from baton.types import Failure
from decode_node import machine
from engine.replica import Listener, Replica
from kvtransfer.protocol.receiver_events import Arrived
from kvtransfer.receiver import Receiver


class DecodeActions:
    """All calls come from one event loop. ``feed`` takes the events that actions lead to, ``listener`` the engine's,
    and ``let_go`` the sequences that are to move."""

    # What these raise is also the answer to an Arrived: the receiver does not acknowledge it.
    raised: tuple[type, ...] = (Arrived, machine.Join, machine.RejectArrival)

    def __init__(
        self,
        replica: Replica,
        receiver: Receiver,
        feed: Callable[[machine.Event], None],
        listener: Listener,
        let_go: Callable[[LetGo], None],
        config: machine.DecodeConfig,
    ) -> None:
        self._replica = replica
        self._receiver = receiver
        self._feed = feed
        self._listener = listener
        self._let_go = let_go
        self._config = config

    def perform(self, action: machine.Action) -> None:  # noqa: C901 (a flat table)
        """Any action but Send."""
        match action:
            case Reserve():
                self._grant(action)
            case machine.Expect(sequence_id):
                self._replica.expect(sequence_id)
            case machine.Join(sequence_id, first_token):
                self._replica.join(sequence_id, first_token, self._listener)
            case machine.RejectArrival(_, reason):
                raise TransferFailed(reason)
            case machine.RevokeLease(sequence_id, reason):
                self._receiver.revoke(sequence_id, reason)
            case machine.Quarantine(sequence_id):
                self._replica.quarantine(sequence_id)
            case machine.ReturnBlocks(sequence_id):
                self._replica.return_lease(sequence_id)
            case machine.StopCompute(sequence_id):
                self._replica.cancel(sequence_id)
            case LetGo():
                self._let_go(action)
            case Send():
                raise AssertionError("messages are sent by the service")

    def answer(self, about: machine.Event | machine.Action, failure: Failure) -> machine.Event | None:
        """The event that says that handling or performing ``about`` raised; None if the machine knows."""
        match about:
            case Reserve():
                return machine.GrantRefused(about.sequence_id, failure)
            case machine.Join():
                return machine.JoinRefused(about.sequence_id, failure)
            case machine.RejectArrival():
                return None
            case _:
                return Defect(about.sequence_id, failure)

    def _grant(self, message: Reserve) -> None:
        sequence_id = message.sequence_id
        ttl_s = min(message.ttl_s, self._config.max_ttl_s) if message.ttl_s > 0 else self._config.default_ttl_s
        reserved = self._replica.reserve(message.spec, message.num_headroom_tokens)
        try:
            lease = self._receiver.grant(
                sequence_id, reserved.block_ids, ttl_s,
                min_blocks=reserved.min_filled_blocks, num_cached_blocks=reserved.num_cached_blocks,
            )  # fmt: skip
        except Exception:
            self._replica.return_lease(sequence_id)
            raise
        self._feed(lease)
        self._replica.set_epoch(sequence_id, lease.epoch)
