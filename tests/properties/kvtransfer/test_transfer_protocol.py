"""Two senders and a receiver joined by the fake link, under every disorder: loss, duplicates, reordering, late arrival,
damage, death, time-outs, cancellation.

Conserved: every lease ends in exactly one of arrived or released; a block is written only while its lease is live or in
quarantine; a sequence that arrived has its very bytes, and keeps them; every push ends once, with no write under way.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from baton.errors import InternalError, NodeLost
from baton.machine import Tick
from baton.types import Failure, TokenChunk
from kvtransfer.protocol import receiver_events as r
from kvtransfer.protocol import sender_events as s
from kvtransfer.protocol.messages import ReceiverMessage, SenderMessage
from kvtransfer.protocol.receiver import LeaseMachine, ReceiverConfig
from kvtransfer.protocol.sender import PushMachine, SenderConfig
from kvtransfer.transports.fake import Link

NUM_LAYERS = 2
NUM_BLOCKS = 6
INDEX = st.integers(0, 1 << 10)
# The undisturbed way of a push; what else a stretch may do; what may happen on the way.
PATH = ["connect", "up", "down", "write", "lane", "up", "quiet", "verify", "take over", "down"]
STEPS = st.sampled_from(sorted({*PATH, "gone"}))
TROUBLES = ["none", "revoke", "abort", "lost", "lost there", "dies", "late", "write fails", "again"]


@dataclass
class Writer:
    """The bytes' side of a push: what a lane does."""

    push: int
    sequence_id: str
    epoch: int
    block_ids: tuple[int, ...]
    channel: int | None = None
    may_write: bool = False
    todo: list[int] = field(default_factory=list)
    # Frames put on a two-sided wire in this attempt.
    num_sent: int = 0
    draining_attempt: int | None = None
    stop_asked: bool = False
    outcome: object = "none"
    has_committed: bool = False


@dataclass
class Open:
    """An epoch that the receiving process takes frames for; a frame counts as one byte."""

    channel: int
    num_written: int = 0
    stop_at: int | None = None

    @property
    def is_closed(self) -> bool:
        return self.stop_at is not None and self.num_written >= self.stop_at


@dataclass
class Wire:
    """A channel with its data connection. ``frames`` are under way in a two-sided transport."""

    number: int
    peer: int
    up: Link[SenderMessage] = field(default_factory=Link)
    down: Link[ReceiverMessage] = field(default_factory=Link)
    frames: list[tuple[int, int, str]] = field(default_factory=list)
    lost_at_sender: bool = False
    lost_at_receiver: bool = False
    # The sender has let go of the data connection (or died).
    let_go: bool = False
    gone_told: bool = False


class Peer:
    def __init__(self, number: int, one_sided: bool) -> None:
        self.number, self.one_sided = number, one_sided
        self.machine = PushMachine(f"decode via {number}", SenderConfig(heartbeat_s=0.9))
        self.writers: dict[int, Writer] = {}
        self.wire: Wire | None = None
        self.connect_asked = False
        self.is_dropping = False


class TransferMachine(RuleBasedStateMachine):
    @initialize(one_sided=st.tuples(st.booleans(), st.booleans()))
    def start(self, one_sided: tuple[bool, bool]) -> None:
        self.now = 0.0
        self.receiver = LeaseMachine(ReceiverConfig(max_attempts=2, heartbeat_s=1.0))
        self.peers = [Peer(i, kind) for i, kind in enumerate(one_sided)]
        self.wires: dict[int, Wire] = {}
        self.next_number = 1
        # Receiver's side: who owns a block, what its bytes say, how a lease ended.
        self.owner: dict[int, str] = {}
        self.memory: dict[tuple[int, int], str] = {}
        self.leases: dict[str, tuple[int, tuple[int, ...]]] = {}
        self.ended: dict[str, str] = {}
        self.unused: list[str] = []
        self.open_epochs: dict[int, Open] = {}
        self.receiving: list[tuple[int, int, str]] = []
        self.verifying: list[r.Verify] = []
        self.arriving: list[r.Arrived] = []
        self.quiet: list[int] = []
        self.dropped: list[Wire] = []

    # Time and plumbing.

    def number(self) -> int:
        self.next_number += 1
        return self.next_number - 1

    def to_receiver(self, event: r.ReceiverEvent) -> None:
        for action in self.receiver.handle(event, self.now):
            self.receiver_acts(action)
        self.receiver.check()
        while self.dropped:
            self.lose_at_receiver(self.dropped.pop())

    def to_sender(self, peer: Peer, event: s.SenderEvent) -> None:
        for action in peer.machine.handle(event, self.now):
            self.sender_acts(peer, action)
        peer.machine.check()
        if peer.is_dropping:
            peer.is_dropping = False
            self.lose_at_sender(peer)

    def receiver_acts(self, action: r.ReceiverAction) -> None:  # noqa: C901
        match action:
            case r.Send():
                assert not self.wires[action.channel].lost_at_receiver
                self.wires[action.channel].down.put(action.message)
            case r.OpenEpoch():
                assert action.epoch not in self.open_epochs
                self.open_epochs[action.epoch] = Open(action.channel)
            case r.CloseEpoch():
                if action.epoch in self.open_epochs:
                    self.open_epochs[action.epoch].stop_at = action.after_bytes
                    self.settle_epoch(action.epoch)
                else:
                    self.quiet.append(action.epoch)
            case r.Verify():
                wire = self.wires[self.channel_of(action.epoch) or 0]
                assert all(epoch != action.epoch for epoch, _, _ in wire.frames), "verified before all of it is here"
                assert action.epoch not in self.open_epochs, "verified while it may be written into"
                self.verifying.append(action)
            case r.Arrived():
                self.arriving.append(action)
            case r.Released():
                self.end(action.sequence_id, "released")
                _, blocks = self.leases[action.sequence_id]
                for block in blocks:
                    assert self.owner.pop(block) == action.sequence_id
            case r.Quarantined():
                assert action.sequence_id not in self.ended
            case r.DropChannel():
                self.dropped.append(self.wires[action.channel])
            case r.WriterBegan():
                assert action.sequence_id not in self.ended
                assert action.epoch in self.open_epochs
            case r.Digest() | r.ForgetDigests():
                pass

    def settle_epoch(self, epoch: int) -> None:
        if self.open_epochs[epoch].is_closed and all(e != epoch for e, _, _ in self.receiving):
            del self.open_epochs[epoch]
            self.quiet.append(epoch)

    def end(self, sequence_id: str, how: str) -> None:
        assert sequence_id not in self.ended, "a lease ends once"
        self.ended[sequence_id] = how

    def sender_acts(self, peer: Peer, action: s.SenderAction) -> None:
        match action:
            case s.Connect():
                assert not peer.connect_asked
                peer.connect_asked = True
            case s.Send():
                assert peer.wire is not None
                assert peer.wire.number == action.channel
                peer.wire.up.put(action.message)
                self.check_quiet_before(peer, action.message)
            case s.StartWriting():
                assert peer.wire is not None
                writer = peer.writers[action.push]
                writer.may_write, writer.channel, writer.todo = True, peer.wire.number, list(range(NUM_LAYERS))
            case s.Drain():
                writer = peer.writers[action.push]
                if action.attempt > 1:
                    writer.num_sent = 0
                writer.draining_attempt = action.attempt
                writer.may_write = True
                writer.todo += action.rewrite_layers
            case s.StopWriting():
                peer.writers[action.push].stop_asked = True
            case s.Finish():
                writer = peer.writers[action.push]
                assert writer.outcome == "none", "a push ends once"
                assert not writer.may_write, "source blocks are freed under a writer"
                writer.outcome = action.error
                if action.error is None:
                    assert self.ended[writer.sequence_id] == "arrived"
            case s.DropChannel():
                assert peer.wire is not None
                peer.is_dropping = True

    def check_quiet_before(self, peer: Peer, message: SenderMessage) -> None:
        if type(message).__name__ in ("Commit", "Abort", "Revoked"):
            for writer in peer.writers.values():
                if writer.epoch == message.epoch:
                    assert not writer.may_write, f"{message} while writing"

    # Leases.

    @precondition(lambda self: NUM_BLOCKS - len(self.owner) > 0)
    @rule(num=st.integers(0, 2), ttl_s=st.sampled_from([0.5, 3.0, 100.0]))
    def grant(self, num: int, ttl_s: float) -> None:
        free = [b for b in range(NUM_BLOCKS) if b not in self.owner][:num]
        epoch = self.number()
        sequence_id = f"seq{epoch}"
        for block in free:
            self.owner[block] = sequence_id
        self.leases[sequence_id] = (epoch, tuple(free))
        self.unused.append(sequence_id)
        self.to_receiver(r.Granted(sequence_id, epoch, tuple(free), ttl_s, min_blocks=len(free)))

    @precondition(lambda self: self.leases)
    @rule(index=INDEX)
    def revoke(self, index: int) -> None:
        self.to_receiver(r.RevokeAsked(sorted(self.leases)[index % len(self.leases)], "cancelled"))

    @precondition(lambda self: self.unused)
    @rule(index=INDEX, peer=st.integers(0, 1), stale=st.integers(0, 9), keep=st.integers(0, 4))
    def begin(self, index: int, peer: int, stale: int, keep: int) -> None:
        sequence_id = self.unused[index % len(self.unused)]
        if keep:  # Else the same lease is offered to a second push.
            self.unused.remove(sequence_id)
        epoch, blocks = self.leases[sequence_id]
        number = self.number()
        at = self.peers[peer]
        at.writers[number] = Writer(number, sequence_id, epoch, blocks)
        self.to_sender(at, s.PushBegun(number, sequence_id, epoch, 2 if stale == 9 else 1, 10.0))

    def live(self) -> list[tuple[Peer, Writer]]:
        return [(p, w) for p in self.peers for w in p.writers.values() if w.outcome == "none"]

    @precondition(lambda self: self.live())
    @rule(index=INDEX)
    def commit(self, index: int) -> None:
        peer, writer = self.live()[index % len(self.live())]
        writer.has_committed = True
        self.to_sender(peer, s.CommitAsked(writer.push, TokenChunk(writer.sequence_id, 0, (1,))))

    @precondition(lambda self: self.live())
    @rule(index=INDEX)
    def abort(self, index: int) -> None:
        peer, writer = self.live()[index % len(self.live())]
        self.to_sender(peer, s.AbortAsked(writer.push, "cancelled"))

    # Bytes.

    def writing(self) -> list[tuple[Peer, Writer]]:
        return [(p, w) for p, w in self.live() if w.may_write]

    @precondition(lambda self: self.writing())
    @rule(index=INDEX, is_damaged=st.sampled_from([False, False, False, True]))
    def write_layer(self, index: int, is_damaged: bool) -> None:
        """A lane writes one layer; it may also be one that was written already (a lane that lags behind)."""
        peer, writer = self.writing()[index % len(self.writing())]
        if not writer.todo:
            return
        layer = writer.todo.pop(0)
        tag = "damaged" if is_damaged else writer.sequence_id
        wire = self.wires[writer.channel or 0]
        if peer.one_sided:
            self.put(writer.epoch, writer.block_ids, layer, tag, writer.sequence_id)
        elif not wire.lost_at_sender:
            wire.frames.append((writer.epoch, layer, tag))
            writer.num_sent += 1

    def put(self, epoch: int, blocks: tuple[int, ...], layer: int, tag: str, sequence_id: str) -> None:
        assert sequence_id not in self.ended, f"a write into {sequence_id} after it was {self.ended[sequence_id]}"
        for block in blocks:
            assert self.owner[block] == sequence_id
            self.memory[layer, block] = tag

    def frames(self) -> list[Wire]:
        return [w for w in self.wires.values() if w.frames and not w.gone_told]

    @precondition(lambda self: self.frames())
    @rule(index=INDEX, order=st.integers(0, 3))
    def frame_comes(self, index: int, order: int) -> None:
        """The receiving process starts to fill its memory from a stream, if the fence lets it. There are several
        streams, and none knows how far the control channel is."""
        wire = self.frames()[index % len(self.frames())]
        epoch, layer, tag = wire.frames.pop(order % len(wire.frames))
        if epoch not in self.open_epochs:
            self.to_receiver(r.DataCame(wire.number, epoch))
        opened = self.open_epochs.get(epoch)
        if opened is not None and opened.channel == wire.number and not opened.is_closed:
            self.receiving.append((epoch, layer, tag))

    @precondition(lambda self: self.receiving)
    @rule(index=INDEX)
    def frame_ends(self, index: int) -> None:
        epoch, layer, tag = self.receiving.pop(index % len(self.receiving))
        sequence_id = f"seq{epoch}"
        self.put(epoch, self.leases[sequence_id][1], layer, tag, sequence_id)
        self.open_epochs[epoch].num_written += 1
        self.settle_epoch(epoch)

    @precondition(lambda self: self.quiet)
    @rule(index=INDEX)
    def quiet_told(self, index: int) -> None:
        self.to_receiver(r.EpochQuiet(self.quiet.pop(index % len(self.quiet))))

    @precondition(lambda self: self.writing())
    @rule(index=INDEX)
    def lane_settles(self, index: int) -> None:
        """A lane has stopped, or everything is written or, on a two-sided wire, on its way."""
        peer, writer = self.writing()[index % len(self.writing())]
        if writer.stop_asked:
            writer.may_write = False
            self.to_sender(peer, s.Stopped(writer.push))
        elif writer.draining_attempt is not None and not writer.todo:
            attempt, writer.draining_attempt, writer.may_write = writer.draining_attempt, None, False
            self.to_sender(peer, s.Drained(writer.push, attempt, len(writer.block_ids), (), writer.num_sent))

    @precondition(lambda self: self.writing())
    @rule(index=INDEX)
    def write_fails(self, index: int) -> None:
        peer, writer = self.writing()[index % len(self.writing())]
        self.to_sender(peer, s.WriteFailed(writer.push, InternalError("write failed")))

    @precondition(lambda self: self.verifying)
    @rule(index=INDEX, fails=st.integers(0, 9))
    def verify(self, index: int, fails: int) -> None:
        action = self.verifying.pop(index % len(self.verifying))
        sequence_id = f"seq{action.epoch}"
        blocks = self.leases[sequence_id][1]
        if fails == 9:
            failure = Failure("InternalError", "no digest", False)
            self.to_receiver(r.VerifyFailed(action.epoch, action.commit.attempt, failure))
            return
        damaged = tuple(
            layer
            for layer in range(NUM_LAYERS)
            if any(self.memory.get((layer, block)) != sequence_id for block in blocks)
        )
        self.to_receiver(r.Verified(action.epoch, action.commit.attempt, damaged))

    @precondition(lambda self: self.arriving)
    @rule(refuse=st.integers(0, 4))
    def take_over(self, refuse: int) -> None:
        action = self.arriving.pop(0)
        if refuse == 4:
            self.to_receiver(r.TakeOverRefused(action.epoch, Failure("NoBlocks", "full", True)))
            return
        self.end(action.sequence_id, "arrived")
        self.to_receiver(r.TakenOver(action.epoch))

    @precondition(lambda self: "arrived" in self.ended.values())
    @rule(index=INDEX)
    def sequence_ends(self, index: int) -> None:
        """The decode side is done with an arrived sequence and frees its blocks."""
        held = sorted({o for o in self.owner.values() if self.ended.get(o) == "arrived"})
        if held:
            sequence_id = held[index % len(held)]
            for block in self.leases[sequence_id][1]:
                del self.owner[block]

    # Channels.

    @precondition(lambda self: any(p.connect_asked for p in self.peers))
    @rule(peer=st.integers(0, 1), succeeds=st.sampled_from([True, True, False]))
    def connect(self, peer: int, succeeds: bool) -> None:
        at = self.peers[peer]
        if not at.connect_asked:
            return
        at.connect_asked = False
        if not succeeds:
            self.to_sender(at, s.ConnectFailed(NodeLost("connection refused")))
            return
        wire = Wire(self.number(), peer)
        self.wires[wire.number] = wire
        at.wire = wire
        self.to_receiver(r.ChannelOpened(wire.number, f"prefill-{peer}", at.one_sided))
        self.to_sender(at, s.Connected(wire.number, "decode-0", 1, at.one_sided))

    def messages(self, attribute: str) -> list[Wire]:
        return [w for w in self.wires.values() if len(getattr(w, attribute))]

    @precondition(lambda self: self.messages("up"))
    @rule(index=INDEX, order=INDEX, fate=st.sampled_from(["deliver"] * 6 + ["late", "again", "drop"]))
    def message_up(self, index: int, order: int, fate: str) -> None:
        wire = self.messages("up")[index % len(self.messages("up"))]
        message = self.pick(wire.up, order, fate)
        if message is not None and not wire.lost_at_receiver:
            self.to_receiver(r.Received(wire.number, message))

    @precondition(lambda self: self.messages("down"))
    @rule(index=INDEX, order=INDEX, fate=st.sampled_from(["deliver"] * 6 + ["late", "again", "drop"]))
    def message_down(self, index: int, order: int, fate: str) -> None:
        wire = self.messages("down")[index % len(self.messages("down"))]
        message = self.pick(wire.down, order, fate)
        peer = self.peers[wire.peer]
        if message is not None and not wire.lost_at_sender:
            self.to_sender(peer, s.Received(wire.number, message))

    def pick(self, link: Link, order: int, fate: str):  # type: ignore[no-untyped-def,type-arg]
        if fate == "again":
            return link.take_copy(order)
        message = link.take(order if fate == "late" else 0)
        return None if fate == "drop" else message

    def lose_at_receiver(self, wire: Wire) -> None:
        if not wire.lost_at_receiver:
            wire.lost_at_receiver = True
            self.to_receiver(r.ChannelLost(wire.number, "broken"))

    def lose_at_sender(self, peer: Peer) -> None:
        wire = peer.wire
        if wire is not None:
            peer.wire = None
            wire.lost_at_sender = True
            self.to_sender(peer, s.ChannelLost(wire.number, "broken"))

    @precondition(lambda self: self.wires)
    @rule(index=INDEX)
    def channel_breaks_at_receiver(self, index: int) -> None:
        self.lose_at_receiver(list(self.wires.values())[index % len(self.wires)])

    @rule(peer=st.integers(0, 1))
    def channel_breaks_at_sender(self, peer: int) -> None:
        self.lose_at_sender(self.peers[peer])

    @rule(peer=st.integers(0, 1))
    def sender_dies(self, peer: int) -> None:
        """Its lanes are gone with it; what it had handed to the kernel may still come."""
        old = self.peers[peer]
        for writer in old.writers.values():
            writer.may_write = False
        for wire in self.wires.values():
            if wire.peer == peer:
                wire.lost_at_sender = wire.let_go = True
        self.peers[peer] = Peer(peer, old.one_sided)

    @precondition(lambda self: self.wires)
    @rule(index=INDEX)
    def writer_gone(self, index: int) -> None:
        """End-of-file on the data connection: the sender let go of it after its last write of that connection."""
        wire = list(self.wires.values())[index % len(self.wires)]
        self.tell_gone(wire)

    def tell_gone(self, wire: Wire) -> None:
        peer = self.peers[wire.peer]
        is_writing = any(w.may_write and w.channel == wire.number for w in peer.writers.values())
        if wire.gone_told or is_writing or not (wire.let_go or wire.lost_at_sender):
            return
        if not peer.one_sided and any(
            self.leases[f"seq{epoch}"] and self.channel_of(epoch) == wire.number for epoch, _, _ in self.receiving
        ):
            return
        wire.gone_told = True
        self.to_receiver(r.WriterGone(wire.number))

    def channel_of(self, epoch: int) -> int | None:
        lease = self.receiver._leases.get(epoch)
        return None if lease is None or lease.channel is None else lease.channel.number

    @rule(seconds=st.sampled_from([0.1, 1.0, 4.0, 40.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.to_receiver(Tick())
        for peer in self.peers:
            self.to_sender(peer, Tick())

    @rule(steps=st.lists(STEPS, max_size=12))
    def runs_smoothly(self, steps: list[str]) -> None:
        """A stretch without trouble, so that whole transfers happen often."""
        for step in steps:
            self.step(step)

    def step(self, step: str, is_damaged: bool = False) -> None:  # noqa: C901
        cls = TransferMachine
        match step:
            case "connect":
                for peer in self.peers:
                    cls.connect(self, peer.number, True)
            case "up" | "down":
                deliver = self.deliver_up if step == "up" else self.deliver_down
                for wire in list(self.wires.values()):
                    while len(getattr(wire, step)):
                        deliver(wire)
            case "write":
                for i in range(len(self.writing()) * NUM_LAYERS):
                    cls.write_layer(self, i, is_damaged)
                while self.frames():
                    cls.frame_comes(self, 0, 0)
                while self.receiving:
                    cls.frame_ends(self, 0)
            case "lane":
                for i in range(len(self.writing())):
                    if i < len(self.writing()):
                        cls.lane_settles(self, i)
            case "quiet":
                while self.quiet:
                    cls.quiet_told(self, 0)
            case "verify":
                while self.verifying:
                    cls.verify(self, 0, 0)
            case "take over":
                while self.arriving:
                    cls.take_over(self, 0)
            case "gone":
                for wire in self.wires.values():
                    self.tell_gone(wire)

    @precondition(lambda self: NUM_BLOCKS - len(self.owner) > 0)
    @rule(
        peer=st.integers(0, 1),
        until=st.integers(0, len(PATH)),
        is_damaged=st.sampled_from([False, False, True]),
        trouble=st.sampled_from(TROUBLES),
        after=st.lists(STEPS, max_size=6),
    )
    def transfer_with_trouble(  # noqa: C901
        self, peer: int, until: int, is_damaged: bool, trouble: str, after: list[str]
    ) -> None:
        """A push that gets to some phase undisturbed, meets one trouble there, and goes on."""
        cls = TransferMachine
        cls.grant(self, 1, 100.0)
        cls.begin(self, len(self.unused) - 1, peer, 0, 1)
        at = self.peers[peer]
        writer = list(at.writers.values())[-1]
        self.to_sender(at, s.CommitAsked(writer.push, TokenChunk(writer.sequence_id, 0, (1,))))
        for step in PATH[:until]:
            self.step(step, is_damaged)
        match trouble:
            case "revoke":
                self.to_receiver(r.RevokeAsked(writer.sequence_id, "cancelled"))
            case "abort":
                self.to_sender(at, s.AbortAsked(writer.push, "cancelled"))
            case "lost":
                self.lose_at_sender(at)
            case "lost there":
                for wire in [w for w in self.wires.values() if w.peer == peer]:
                    self.lose_at_receiver(wire)
            case "dies":
                cls.sender_dies(self, peer)
            case "late":
                cls.time_passes(self, 40.0)
            case "write fails" if writer.may_write:
                self.to_sender(at, s.WriteFailed(writer.push, InternalError("write failed")))
            case "again":
                for wire in [w for w in self.wires.values() if w.peer == peer]:
                    for link in (wire.up, wire.down):
                        for i in range(len(link)):
                            link.put(link.take_copy(i))
        for step in after:
            self.step(step)

    # What must hold.

    @invariant()
    def arrived_sequences_keep_their_bytes(self) -> None:
        for block, sequence_id in getattr(self, "owner", {}).items():
            if self.ended.get(sequence_id) == "arrived":
                assert all(self.memory[layer, block] == sequence_id for layer in range(NUM_LAYERS))

    def teardown(self) -> None:
        """When the disorder ends and every peer lets go, every lease and push ends by itself."""
        if not hasattr(self, "receiver"):
            return
        for _ in range(200):
            if not self.receiver.num_leases and not self.live():
                break
            self.settle()
        assert not self.live()
        assert self.receiver.num_leases == 0
        assert set(self.ended) == set(self.leases), "every lease ends"
        assert all(p.machine.num_pushes == 0 for p in self.peers)
        for block, sequence_id in self.owner.items():
            assert self.ended[sequence_id] == "arrived", f"block {block} leaked"

    def settle(self) -> None:  # noqa: C901
        for wire in list(self.wires.values()):
            while len(wire.up):
                self.deliver_up(wire)
            while len(wire.down):
                self.deliver_down(wire)
        for _, writer in self.writing():
            self.finish_writer(writer)
        while self.receiving:
            TransferMachine.frame_ends(self, 0)
        for wire in self.wires.values():
            wire.frames.clear()
        while self.quiet:
            self.to_receiver(r.EpochQuiet(self.quiet.pop()))
        while self.verifying:
            TransferMachine.verify(self, 0, 0)
        while self.arriving:
            TransferMachine.take_over(self, 0)
        for peer in self.peers:
            if peer.connect_asked:
                peer.connect_asked = False
                self.to_sender(peer, s.ConnectFailed(NodeLost("connection refused")))
        self.now += 5.0
        self.to_receiver(Tick())
        for peer in self.peers:
            self.to_sender(peer, Tick())
        for wire in self.wires.values():
            if wire.lost_at_receiver and not wire.lost_at_sender:
                self.lose_at_sender(self.peers[wire.peer])
            if wire.lost_at_sender:
                self.lose_at_receiver(wire)
                self.tell_gone(wire)

    def deliver_up(self, wire: Wire) -> None:
        message = wire.up.take()
        if not wire.lost_at_receiver:
            self.to_receiver(r.Received(wire.number, message))

    def deliver_down(self, wire: Wire) -> None:
        message = wire.down.take()
        if not wire.lost_at_sender:
            self.to_sender(self.peers[wire.peer], s.Received(wire.number, message))

    def finish_writer(self, writer: Writer) -> None:
        peer = next(p for p, w in self.live() if w is writer)
        if writer.stop_asked:
            writer.may_write = False
            self.to_sender(peer, s.Stopped(writer.push))


TestTransfer = TransferMachine.TestCase
TestTransfer.settings = settings(
    max_examples=150,
    stateful_step_count=60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
