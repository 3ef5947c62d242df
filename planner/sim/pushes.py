"""A push of KV into a lease: what the sender of one node and the receiver of another do together, in simulated time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from baton.errors import Unavailable
from baton.types import Failure, Lease, TransferReport, blocks_for
from kvtransfer.protocol.receiver_events import Arrived, Released, WriterBegan
from planner.sim.links import Transfer
from prefill_node import machine

if TYPE_CHECKING:
    from planner.sim.node import Node

TRANSPORT = "simulated"


class Push:
    """From ``source`` to the node of the lease. ``goes_on``: its sequence generates meanwhile."""

    def __init__(self, source: Node, target: Node, lease: Lease, num_known_tokens: int, *, goes_on: bool) -> None:
        self._source = source
        self._target = target
        self._lease = lease
        self._goes_on = goes_on
        config = source.config
        self.is_layerwise = goes_on or num_known_tokens >= config.layerwise_from_tokens
        # KV of the tokens before is told; that of leading ones is at the target already.
        self._num_told = lease.num_cached_blocks * config.scheduler.block_tokens
        self._transfer = Transfer(source.events, source.link_out, target.link_in, self._sent)
        self._commit: machine.CommitPush | None = None
        self._began_s = source.events.now_s
        self._committed_s = 0.0
        self._is_over = False
        target.arriving[lease.sequence_id] = self
        began = WriterBegan(lease.sequence_id, lease.epoch)
        at_s = source.events.now_s + source.machine.link_latency_s
        source.events.at(at_s, target.lease_told, target.incarnation, began)

    @property
    def sequence_id(self) -> str:
        return self._lease.sequence_id

    @property
    def source_id(self) -> str:
        return self._source.node_id

    def compute(self, num_tokens: int) -> None:
        """The KV of so many leading tokens is there, or will be when the step that begins now is over: then its last
        layer comes with the commit."""
        if self.is_layerwise:
            num_layers = self._source.description.kv_layout.num_layers
            self._tell(num_tokens, 1.0 if self._goes_on else 1 - 1 / num_layers)

    def commit(self, action: machine.CommitPush, num_tokens: int) -> None:
        """All of it is there: so many tokens."""
        self._commit, self._committed_s = action, self._source.events.now_s
        layout_share = 0.0
        if self.is_layerwise and not self._goes_on:
            layout_share = self._transfer.num_bytes / max(1, self._source.description.kv_layout.num_layers - 1)
        self._tell(num_tokens, 1.0, layout_share)

    def _tell(self, num_tokens: int, share: float, more_bytes: float = 0.0) -> None:
        """Whole blocks are sent."""
        block_tokens = self._source.config.scheduler.block_tokens
        new = max(0, blocks_for(num_tokens, block_tokens) * block_tokens - self._num_told)
        self._num_told += new
        num_bytes = new * self._source.token_bytes * share + more_bytes
        if num_bytes > 0:
            self._transfer.send(num_bytes)
        elif not self._transfer.is_under_way:
            self._sent()

    def _sent(self) -> None:
        source = self._source
        if self._commit is None:
            if self._goes_on:
                source.tell_push(self, machine.PushCaughtUp(self.sequence_id))
            return
        latency_s = source.machine.link_latency_s + self._target.join_s
        source.events.at(source.events.now_s + latency_s, self._arrive)

    def _arrive(self) -> None:
        if self._is_over or self._commit is None:
            return
        self._end()
        target, source, now = self._target, self._source, self._source.events.now_s
        if not target.arrived(Arrived(self.sequence_id, self._lease.epoch, self._commit.tokens)):
            error = Unavailable(f"{self.sequence_id} is not expected on {target.node_id} any more")
            source.tell_push(self, machine.PushFailed(self.sequence_id, Failure.of(error)))
            return
        num_bytes = round(self._transfer.num_bytes)
        report = TransferReport(
            TRANSPORT, self.is_layerwise, num_bytes, self._commit.num_blocks, now - self._began_s,
            now - self._committed_s,
        )  # fmt: skip
        source.transfers.append(report)
        source.counters["transfers"] += 1
        source.counters["transferred_bytes"] += num_bytes
        source.counters["transfer_exposed_s"] += report.exposed_s
        source.events.at(
            now + source.machine.link_latency_s, source.tell_push, self,
            machine.PushCommitted(self.sequence_id, report),
        )  # fmt: skip

    def abort(self, reason: str) -> None:
        """By the source: it writes no more, and gives the lease back."""
        latency_s, events = self._source.machine.link_latency_s, self._source.events
        was_over = self._is_over
        self._end()
        if not was_over:
            released = Released(self.sequence_id, self._lease.epoch, reason, is_given_back=True)
            events.at(events.now_s + latency_s, self._target.lease_told, self._target.incarnation, released)
        events.at(events.now_s + latency_s, self._source.tell_push, self, machine.PushAborted(self.sequence_id))

    def fail(self, reason: str) -> None:
        """By the target, or since it is gone."""
        if not self._is_over:
            self._end()
            failure = Failure.of(Unavailable(reason))
            self._source.tell_push(self, machine.PushFailed(self.sequence_id, failure))

    def lose_source(self) -> None:
        """The source is gone; the target finds out."""
        if not self._is_over:
            self._end()
            released = Released(self.sequence_id, self._lease.epoch, f"{self.source_id} is gone")
            self._target.lease_told(self._target.incarnation, released)

    def _end(self) -> None:
        self._is_over = True
        self._transfer.stop()
        self._target.arriving.pop(self.sequence_id, None)
