"""The protocol machines, one story at a time: feed events, assert actions."""

from __future__ import annotations

import pytest

from baton.errors import Incompatible, NodeLost, TransferFailed
from baton.machine import Tick
from baton.types import Failure, TokenChunk
from kvtransfer.protocol import receiver_events as r
from kvtransfer.protocol import sender_events as s
from kvtransfer.protocol.lease import LeaseState
from kvtransfer.protocol.messages import (
    Abort,
    Ack,
    Begin,
    Begun,
    Commit,
    Heartbeat,
    Nack,
    Revoke,
    Revoked,
    WrittenRange,
)
from kvtransfer.protocol.receiver import LeaseMachine, ReceiverConfig
from kvtransfer.protocol.sender import PushMachine, SenderConfig

TOKEN = TokenChunk("q", 0, (5,))
DAMAGE = Failure("TransferFailed", "digest of layers [1] differs in attempt 1", True)


def commit(attempt: int = 1, num_blocks: int = 2, num_sent_bytes: int = 0) -> Commit:
    return Commit("q", 7, attempt, num_blocks, (b"d",), TOKEN, num_sent_bytes)


class Receiving:
    """A receiver with lease 7 of "q" over blocks 4 and 5, and channel 1."""

    def __init__(self, one_sided: bool = True, ttl_s: float = 10.0) -> None:
        self.machine = LeaseMachine(ReceiverConfig())
        self.now = 0.0
        self.one_sided = one_sided
        assert self.feed(r.ChannelOpened(1, "prefill-0", one_sided)) == []
        assert self.feed(r.Granted("q", 7, (4, 5), ttl_s)) == []

    def feed(self, event: r.ReceiverEvent) -> list[r.ReceiverAction]:
        actions = self.machine.handle(event, self.now)
        self.machine.check()
        return actions

    def hears(self, message: object, channel: int = 1) -> list[r.ReceiverAction]:
        return self.feed(r.Received(channel, message))  # type: ignore[arg-type]

    def begin(self) -> None:
        begun = [r.Send(1, Begun("q", 7))] if self.one_sided else []
        assert self.hears(Begin("q", 7)) == [r.OpenEpoch(1, 7, (4, 5)), r.WriterBegan("q", 7), *begun]

    def verify(self, attempt: int = 1) -> None:
        assert self.hears(commit(attempt)) == [r.CloseEpoch(1, 7)]
        assert self.feed(r.EpochQuiet(7)) == [r.Verify(7, commit(attempt))]


def test_receiver_takes_over_what_is_verified() -> None:
    t = Receiving()
    t.begin()
    t.verify()
    assert t.feed(r.Verified(7, 1, ())) == [r.Arrived("q", 7, TOKEN)]
    assert t.feed(r.TakenOver(7)) == [r.ForgetDigests(7, None), r.Send(1, Ack("q", 7))]
    assert t.machine.num_leases == 0
    assert t.hears(commit()) == [r.Send(1, Ack("q", 7))], "a duplicate is acknowledged again"
    assert t.feed(r.RevokeAsked("q", "late")) == []


def test_receiver_asks_for_damaged_layers_again_and_takes_only_the_expected_commit() -> None:
    t = Receiving()
    t.begin()
    t.verify()
    nack = Nack("q", 7, 1, DAMAGE, (1,))
    assert t.feed(r.Verified(7, 1, (1,))) == [
        r.ForgetDigests(7, (1,)),
        r.OpenEpoch(1, 7, (4, 5)),
        r.Send(1, nack),
    ]
    assert t.hears(commit(1)) == [], "the first commit once more says nothing about the second writing"
    assert t.feed(r.EpochQuiet(7)) == [], "nor does a late quiet"
    t.verify(attempt=2)
    assert t.feed(r.Verified(7, 1, ())) == [], "a late result of the first verification"
    assert t.feed(r.Verified(7, 2, ())) == [r.Arrived("q", 7, TOKEN)]


def test_only_hints_of_the_attempt_under_way_are_digested() -> None:
    t = Receiving()
    hinted = (WrittenRange(0, 0, 2),)
    assert t.feed(r.Wrote(1, 7, 1, hinted)) == [], "not begun"
    t.begin()
    assert t.feed(r.Wrote(1, 7, 1, hinted)) == [r.Digest(7, hinted)]
    for wrong in (r.Wrote(2, 7, 1, hinted), r.Wrote(1, 8, 1, hinted), r.Wrote(1, 7, 2, hinted)):
        assert t.feed(wrong) == []
    t.verify()
    assert t.feed(r.Wrote(1, 7, 1, hinted)) == [], "being verified"
    t.feed(r.Verified(7, 1, (0,)))
    assert t.feed(r.Wrote(1, 7, 1, hinted)) == [], "late: the layer is written again"
    assert t.feed(r.Wrote(1, 7, 2, hinted)) == [r.Digest(7, hinted)]


def test_a_duplicate_begin_never_starts_a_second_writer() -> None:
    t = Receiving()
    t.begin()
    assert t.hears(Begin("q", 7)) == []
    t.feed(r.ChannelOpened(2, "prefill-1", True))
    (answer,) = t.hears(Begin("q", 7), channel=2)
    assert isinstance(answer, r.Send)
    assert isinstance(answer.message, Nack)
    assert "belongs to another channel" in answer.message.failure.message


def test_a_channel_without_data_connection_begins_nothing() -> None:
    t = Receiving()
    assert t.feed(r.WriterGone(1)) == []
    assert t.hears(Begin("q", 7)) == []
    assert t.machine.state("q") is LeaseState.GRANTED


@pytest.mark.parametrize("last_word", [Revoked("q", 7), Abort("q", 7, "x"), commit()])
def test_a_one_sided_writer_must_speak_before_blocks_are_released(last_word: object) -> None:
    t = Receiving()
    t.begin()
    assert t.feed(r.RevokeAsked("q", "cancelled")) == [
        r.Send(1, Revoke("q", 7, "cancelled")),
        r.CloseEpoch(1, 7),
        r.Quarantined("q", 7, "cancelled"),
    ]
    assert t.feed(r.EpochQuiet(7)) == []
    t.now = 3.0
    assert r.DropChannel(1, "a write into q did not stop") in t.feed(Tick())
    assert t.machine.num_leases == 1, "no time-out frees blocks that a live writer can reach"
    assert t.hears(last_word) == [r.ForgetDigests(7, None), r.Released("q", 7, "cancelled")]


@pytest.mark.parametrize("one_sided", [True, False])
@pytest.mark.parametrize("has_begun", [True, False])
def test_what_its_writer_gives_back_is_told_apart(one_sided: bool, has_begun: bool) -> None:
    t = Receiving(one_sided=one_sided)
    if has_begun:
        t.begin()
    told = [*t.hears(Abort("q", 7, "x")), *(t.feed(r.EpochQuiet(7)) if has_begun else [])]
    over = [a for a in told if isinstance(a, r.Quarantined | r.Released)]
    assert over[-1] == r.Released("q", 7, "aborted by prefill-0: x", True)
    assert all(a.is_given_back for a in over)


def test_a_lost_channel_is_not_a_gone_writer() -> None:
    t = Receiving()
    t.begin()
    lost = t.feed(r.ChannelLost(1, "reset"))
    assert [type(a) for a in lost] == [r.CloseEpoch, r.Quarantined]
    assert t.feed(r.EpochQuiet(7)) == []
    assert t.feed(r.WriterGone(1))[-1] == r.Released("q", 7, "channel to prefill-0 lost: reset")
    assert t.machine.num_channels == 0


def test_a_two_sided_lease_ends_when_this_process_is_quiet() -> None:
    t = Receiving(one_sided=False)
    t.begin()
    t.feed(r.RevokeAsked("q", "cancelled"))
    assert t.feed(r.EpochQuiet(7))[-1] == r.Released("q", 7, "cancelled")


@pytest.mark.parametrize("has_committed", [True, False])
@pytest.mark.parametrize("end", [Abort("q", 7, "x"), r.RevokeAsked("q", "cancelled"), r.Malformed(1, "q", 7, "stray")])
def test_a_peer_whose_last_frame_stays_half_sent_is_dropped(has_committed: bool, end: object) -> None:
    """It lives, its heart beats, and it has said all it had to say: its blocks must not stay quarantined for ever."""
    t = Receiving(one_sided=False)
    t.begin()
    if has_committed:
        t.hears(commit(num_sent_bytes=64))
    told = t.hears(end) if isinstance(end, Abort) else t.feed(end)  # type: ignore[arg-type]
    assert any(isinstance(action, r.Quarantined) for action in told)
    t.hears(Revoked("q", 7))
    t.now = 1.0
    while t.machine.wake_at_s is not None and t.machine.wake_at_s <= 5.0:
        t.now = t.machine.wake_at_s
        t.hears(Heartbeat())
        if r.DropChannel(1, "a write into q did not stop") in t.feed(Tick()):
            break
    assert t.now == 2.0
    t.feed(r.ChannelLost(1, "dropped"))
    assert isinstance(t.feed(r.EpochQuiet(7))[-1], r.Released)
    assert t.feed(r.WriterGone(1)) == []
    assert t.machine.wake_at_s is None


def test_a_commit_that_overtakes_its_data_waits_for_all_of_it() -> None:
    t = Receiving(one_sided=False)
    t.begin()
    assert t.hears(commit(num_sent_bytes=64)) == [r.CloseEpoch(1, 7, 64)]
    assert t.machine.state("q") is LeaseState.FILLING
    assert t.hears(commit(num_sent_bytes=64)) == [], "a duplicate"
    assert t.feed(r.EpochQuiet(7)) == [r.Verify(7, commit(num_sent_bytes=64))]
    assert t.feed(r.Verified(7, 1, (1,)))[1] == r.OpenEpoch(1, 7, (4, 5))
    assert t.hears(commit(2, num_sent_bytes=32)) == [r.CloseEpoch(1, 7, 32)], "as much as was written again"


@pytest.mark.parametrize(
    "event", [r.RevokeAsked("q", "cancelled"), r.WriterGone(1), r.Malformed(1, "q", 7, "stray"), Tick()]
)
def test_a_commit_whose_data_does_not_come_is_refused_and_its_epoch_closed_first(event: r.ReceiverEvent) -> None:
    t = Receiving(one_sided=False, ttl_s=2.0)
    t.begin()
    t.hears(commit(num_sent_bytes=64))
    t.now = 2.0
    assert t.machine.wake_at_s is not None
    assert t.machine.wake_at_s <= 2.0, "a commit is waited for no longer than the lease lives"
    actions = [a for a in t.feed(event) if a != r.Send(1, Heartbeat())]
    assert [type(a) for a in actions] == [r.Send, r.CloseEpoch, r.Quarantined]
    assert isinstance(actions[0].message, Nack)
    assert not actions[0].message.retransmit_layers
    assert actions[1] == r.CloseEpoch(1, 7, 0)
    assert t.machine.num_leases == 1, "a frame may be half written"
    assert [type(a) for a in t.feed(r.EpochQuiet(7))] == [r.ForgetDigests, r.Released]


def test_a_lost_control_channel_ends_a_filling_lease_with_its_data_connection() -> None:
    t = Receiving(one_sided=False)
    t.begin()
    t.hears(commit(num_sent_bytes=64))
    assert t.feed(r.ChannelLost(1, "reset")) == [], "what is on the data connection may be all of it"
    assert [type(a) for a in t.feed(r.WriterGone(1))] == [r.CloseEpoch, r.Quarantined]


def test_data_that_overtakes_begin_binds_its_lease() -> None:
    t = Receiving(one_sided=False)
    assert t.feed(r.DataCame(2, 7)) == [], "of no channel"
    assert t.feed(r.DataCame(1, 7)) == [r.OpenEpoch(1, 7, (4, 5)), r.WriterBegan("q", 7)]
    assert t.feed(r.DataCame(1, 7)) == [], "by the second stream"
    assert t.hears(Begin("q", 7)) == []
    t.feed(r.ChannelOpened(2, "prefill-1", False))
    assert t.feed(r.DataCame(2, 7)) == [], "bound to another channel"
    assert t.hears(commit(num_sent_bytes=64)) == [r.CloseEpoch(1, 7, 64)]


@pytest.mark.parametrize("end", [r.RevokeAsked("q", "cancelled"), r.Received(1, Abort("q", 7, "x"))])
def test_data_of_a_stale_epoch_opens_nothing(end: r.ReceiverEvent) -> None:
    t = Receiving(one_sided=False)
    assert isinstance(t.feed(end)[-1], r.Released)
    for epoch in (7, 6, 8):
        assert t.feed(r.DataCame(1, epoch)) == []
    one_sided = Receiving()
    assert one_sided.feed(r.DataCame(1, 7)) == [], "such a peer has no data connection of this kind"
    gone = Receiving(one_sided=False)
    gone.feed(r.WriterGone(1))
    assert gone.feed(r.DataCame(1, 7)) == []


def test_what_was_committed_before_the_channel_broke_still_arrives() -> None:
    t = Receiving()
    t.begin()
    t.verify()
    assert t.feed(r.ChannelLost(1, "reset")) == []
    assert t.feed(r.WriterGone(1)) == []
    t.now = 100.0
    assert t.feed(Tick()) == [], "done and late is done"
    assert t.feed(r.Verified(7, 1, ())) == [r.Arrived("q", 7, TOKEN)]
    assert t.feed(r.TakenOver(7)) == [r.ForgetDigests(7, None)]


def test_a_silent_peer_is_dropped_but_not_by_a_receiver_that_slept() -> None:
    t = Receiving(ttl_s=1e6)
    t.now = 1000.0
    assert t.feed(Tick()) == [r.Send(1, Heartbeat())], "one late tick of ours is one missed beat"
    for _ in range(5):
        t.now += 1.0
        actions = t.feed(Tick())
    assert actions == [r.DropChannel(1, "prefill-0 was silent")]


class Sending:
    """A sender with push 3 of "q" towards lease 7, waiting for its channel."""

    def __init__(self) -> None:
        self.machine = PushMachine("decode:1", SenderConfig())
        self.now = 0.0
        assert self.feed(s.PushBegun(3, "q", 7, 1, 10.0)) == [s.Connect()]

    def feed(self, event: s.SenderEvent) -> list[s.SenderAction]:
        actions = self.machine.handle(event, self.now)
        self.machine.check()
        return actions

    def hears(self, message: object) -> list[s.SenderAction]:
        return self.feed(s.Received(1, message))  # type: ignore[arg-type]

    def begin(self) -> None:
        assert self.feed(s.Connected(1, "decode-0", 1, True)) == [s.Send(1, Begin("q", 7))]
        assert self.hears(Begun("q", 7)) == [s.StartWriting(3)]

    def commit(self) -> None:
        assert self.feed(s.CommitAsked(3, TOKEN)) == [s.Drain(3, 1)]
        assert self.feed(s.Drained(3, 1, 2, (b"d",))) == [s.Send(1, commit())]


def two_sided() -> Sending:
    """Begin and the first data are in flight together."""
    t = Sending()
    assert t.feed(s.Connected(1, "decode-0", 1, False)) == [s.Send(1, Begin("q", 7)), s.StartWriting(3)]
    return t


def test_a_two_sided_push_takes_one_round_trip() -> None:
    t = Sending()
    assert t.feed(s.CommitAsked(3, TOKEN)) == []
    at_once = [s.Send(1, Begin("q", 7)), s.StartWriting(3), s.Drain(3, 1)]
    assert t.feed(s.Connected(1, "decode-0", 1, False)) == at_once
    assert t.feed(s.Drained(3, 1, 2, (b"d",), 64)) == [s.Send(1, commit(num_sent_bytes=64))]
    assert t.hears(Ack("q", 7)) == [s.Finish(3, None)]


@pytest.mark.parametrize("has_committed", [False, True])
def test_a_refused_begin_stops_a_two_sided_push_that_is_writing(has_committed: bool) -> None:
    t = two_sided()
    if has_committed:
        t.commit()
    refused = Nack("q", 7, 0, Failure("TransferFailed", "lease 7 of q is not live here", True))
    actions = t.hears(refused)
    if not has_committed:
        assert actions == [s.StopWriting(3)], "a lane may be reading the source"
        told, *actions = t.feed(s.Stopped(3))
        assert told == s.Send(1, Abort("q", 7, "refused"))
    (finish,) = actions
    assert isinstance(finish, s.Finish)
    assert isinstance(finish.error, TransferFailed)
    assert t.hears(Nack("q", 7, 1, DAMAGE, (1,))) == [], "the answer to the commit that was in flight"


def test_sender_commits_and_finishes_on_ack() -> None:
    t = Sending()
    t.begin()
    t.commit()
    assert t.hears(Begun("q", 7)) == [], "a duplicate"
    assert t.hears(Ack("q", 7)) == [s.Finish(3, None)]
    assert t.hears(Ack("q", 7)) == []
    assert t.machine.num_pushes == 0


def test_a_commit_asked_early_follows_begun() -> None:
    t = Sending()
    assert t.feed(s.CommitAsked(3, TOKEN)) == []
    assert t.feed(s.Connected(1, "decode-0", 1, True)) == [s.Send(1, Begin("q", 7))]
    assert t.hears(Begun("q", 7)) == [s.StartWriting(3), s.Drain(3, 1)]


def test_sender_writes_damaged_layers_again_once_per_nack() -> None:
    t = Sending()
    t.begin()
    t.commit()
    nack = Nack("q", 7, 1, DAMAGE, (1,))
    assert t.hears(nack) == [s.Drain(3, 2, (1,))]
    assert t.hears(nack) == [], "a duplicate while it writes"
    assert t.feed(s.Drained(3, 1, 2, (b"d",))) == [], "a late report of the first attempt"
    assert t.feed(s.Drained(3, 2, 2, (b"d",))) == [s.Send(1, commit(2))]
    assert t.hears(nack) == [], "a duplicate of an answered Nack"
    assert t.hears(Ack("q", 7)) == [s.Finish(3, None)]


@pytest.mark.parametrize("is_draining", [False, True])
def test_sender_answers_revoke_only_when_it_has_stopped(is_draining: bool) -> None:
    t = Sending()
    t.begin()
    if is_draining:
        t.feed(s.CommitAsked(3, TOKEN))
    assert t.hears(Revoke("q", 7, "cancelled")) == [s.StopWriting(3)]
    assert t.feed(s.Drained(3, 1, 2, ())) == []
    told, finish = t.feed(s.Stopped(3))
    assert told == s.Send(1, Revoked("q", 7))
    assert isinstance(finish, s.Finish)
    assert isinstance(finish.error, TransferFailed)
    assert t.hears(Revoke("q", 7, "cancelled")) == [s.Send(1, Revoked("q", 7))], "asked again"


def test_a_lost_channel_fails_pushes_after_their_writes_have_stopped() -> None:
    t = Sending()
    t.begin()
    assert t.feed(s.ChannelLost(1, "reset")) == [s.StopWriting(3)]
    (finish,) = t.feed(s.Stopped(3))
    assert isinstance(finish, s.Finish)
    assert isinstance(finish.error, NodeLost)


def test_a_write_that_does_not_stop_costs_the_connection() -> None:
    t = Sending()
    t.begin()
    t.feed(s.AbortAsked(3, "cancelled"))
    t.now = 2.0
    assert s.DropChannel(1, "a write of q did not stop") in t.feed(Tick())
    assert t.feed(s.ChannelLost(1, "dropped")) == []
    assert [type(a) for a in t.feed(s.Stopped(3))] == [s.Finish]


def test_an_aborted_wait_gives_the_lease_back_when_the_channel_comes() -> None:
    t = Sending()
    assert [type(a) for a in t.feed(s.AbortAsked(3, "cancelled"))] == [s.Finish]
    assert t.feed(s.Connected(1, "decode-0", 1, True)) == [s.Send(1, Abort("q", 7, "q: cancelled"))]


@pytest.mark.parametrize(("later_s", "incarnation", "is_repeated"), [(1.0, 1, True), (10.0, 1, False), (1.0, 2, False)])
def test_an_abort_in_a_channel_that_breaks_is_repeated_on_the_next_one(
    later_s: float, incarnation: int, is_repeated: bool
) -> None:
    """Begin and abort may both not have reached the receiver: the lease would last until it expires."""
    t = two_sided()
    abort = Abort("q", 7, "the writer died")
    assert t.feed(s.WriteFailed(3, TransferFailed("the writer died"))) == [s.StopWriting(3)]
    assert t.feed(s.Stopped(3))[0] == s.Send(1, abort)
    t.now = later_s
    if s.Connect() not in t.feed(s.ChannelLost(1, "reset")):
        t.now = t.machine.wake_at_s or 0.0
        assert t.feed(Tick()) == [s.Connect()]
    told = t.feed(s.Connected(2, "decode-0", incarnation, False))
    assert told == ([s.Send(2, abort)] if is_repeated else [])


def test_an_abort_while_its_channel_is_being_dropped_gives_the_lease_back_on_the_next_one() -> None:
    t = Sending()
    t.begin()
    t.feed(s.AbortAsked(3, "cancelled"))
    t.now = 2.0
    assert s.DropChannel(1, "a write of q did not stop") in t.feed(Tick())
    assert t.feed(s.PushBegun(4, "r", 8, 1, 10.0)) == []
    assert [type(a) for a in t.feed(s.AbortAsked(4, "cancelled"))] == [s.Finish], "nothing is waited for"
    assert t.feed(s.ChannelLost(1, "dropped")) == [s.Connect()]
    assert t.feed(s.Connected(2, "decode-0", 1, True)) == [s.Send(2, Abort("r", 8, "r: cancelled"))]


def test_a_lease_whose_begin_may_be_lost_with_its_channel_is_given_back_on_the_next_one() -> None:
    t = two_sided()
    assert t.feed(s.ChannelLost(1, "reset")) == [s.StopWriting(3)]
    assert [type(a) for a in t.feed(s.Stopped(3))] == [s.Finish, s.Connect]
    (told,) = t.feed(s.Connected(2, "decode-0", 1, False))
    assert told == s.Send(2, Abort("q", 7, "decode:1: transfer channel lost: reset"))
    (finish,) = t.feed(s.PushBegun(4, "q", 7, 1, 10.0))
    assert isinstance(finish, s.Finish), "the lease is given back: no other push begins with it"


def test_only_who_granted_a_lease_gets_it_back_and_only_if_it_can_be_reached() -> None:
    for connects in (True, False):
        t = Sending()
        t.feed(s.Connected(1, "decode-0", 1, True))
        assert [type(a) for a in t.feed(s.ChannelLost(1, "reset"))] == [s.Finish, s.Connect], "Begun was not heard"
        if not connects:
            t.feed(s.ConnectFailed(NodeLost("refused")))
            t.now = t.machine.wake_at_s or 0.0
            assert t.feed(Tick()) == [s.Connect()]
        assert t.feed(s.Connected(2, "decode-0", 2 if connects else 1, True)) == []


def test_a_receiver_that_was_away_for_long_is_dialled_all_the_same() -> None:
    t = Sending()
    for push in range(4, 1200):
        t.feed(s.ConnectFailed(NodeLost("refused")))
        t.now += 2.0
        assert t.feed(s.PushBegun(push, "q", push, 1, 10.0)) == [s.Connect()]


def test_a_lease_is_used_once_on_a_channel() -> None:
    t = Sending()
    t.begin()
    (finish,) = t.feed(s.PushBegun(4, "q", 7, 1, 10.0))
    assert isinstance(finish, s.Finish)
    assert isinstance(finish.error, TransferFailed)


def test_back_off_grows_and_ends() -> None:
    t = Sending()
    error = NodeLost("refused")
    assert t.feed(s.ConnectFailed(error)) == [s.Finish(3, error)]
    waits = []
    for push in range(4, 12):
        assert t.feed(s.PushBegun(push, "q", push, 1, 10.0)) == []
        due_s = t.machine.wake_at_s
        assert due_s is not None
        waits.append(due_s - t.now)
        t.now = due_s
        assert t.feed(Tick()) == [s.Connect()]
        t.feed(s.ConnectFailed(error))
    assert waits == pytest.approx([0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0])


def test_a_lost_connection_is_opened_again_before_a_push_asks_for_it() -> None:
    t = Sending()
    t.begin()
    t.commit()
    t.hears(Ack("q", 7))
    assert t.feed(s.ChannelLost(1, "reset")) == [], "not at once: a peer may accept and hang up again and again"
    assert t.machine.wake_at_s == 2.0
    t.now = 2.0
    assert t.feed(Tick()) == [s.Connect()]
    assert t.machine.wake_at_s is None, "a connection under way is not waited for by a timer"
    assert t.feed(s.ConnectFailed(NodeLost("refused"))) == []
    t.now = t.machine.wake_at_s or 0.0
    assert t.now == 2.05
    assert t.feed(Tick()) == [s.Connect()]
    assert t.feed(s.Connected(2, "decode-0", 2, True)) == []


def test_a_push_does_not_wait_for_the_reopening_and_a_peer_is_not_kept_warm_for_ever() -> None:
    t = Sending()
    t.begin()
    t.commit()
    t.hears(Ack("q", 7))
    t.feed(s.ChannelLost(1, "reset"))
    assert t.feed(s.PushBegun(4, "r", 8, 1, 10.0)) == [s.Connect()]
    t.feed(s.ConnectFailed(NodeLost("refused")))
    attempts = 0
    while t.machine.wake_at_s is not None:
        t.now = t.machine.wake_at_s
        attempts += t.feed(Tick()) == [s.Connect()]
        t.feed(s.ConnectFailed(NodeLost("refused")))
    assert 58.0 <= t.now <= 60.0, "keep_warm_s after the last push"
    assert attempts < 40


def test_a_receiver_that_is_incompatible_is_not_dialled_unasked() -> None:
    t = Sending()
    t.feed(s.ConnectFailed(Incompatible("dtype differs")))
    assert t.machine.wake_at_s is None


@pytest.mark.parametrize(
    ("reach", "waited_for"),
    [(0, "a channel"), (1, "Begun"), (2, "commit before the lease ended"), (3, "bytes"), (4, "the acknowledgement")],
)
def test_every_wait_has_a_deadline(reach: int, waited_for: str) -> None:
    t = Sending()
    steps = [
        s.Connected(1, "decode-0", 1, True),
        s.Received(1, Begun("q", 7)),
        s.CommitAsked(3, TOKEN),
        s.Drained(3, 1, 2, ()),
    ]
    for step in steps[:reach]:
        t.feed(step)
    finished: list[s.Finish] = []
    for _ in range(60):
        t.now += 1.0
        t.hears(Heartbeat())
        for action in t.feed(Tick()):
            if isinstance(action, s.StopWriting):
                finished += [a for a in t.feed(s.Stopped(3)) if isinstance(a, s.Finish)]
            elif isinstance(action, s.Finish):
                finished.append(action)
    assert len(finished) == 1
    assert waited_for in str(finished[0].error)


def test_a_receiver_that_was_late_itself_lets_a_commit_in_that_waited_unread() -> None:
    t = Receiving(ttl_s=10.0)
    t.begin()
    t.now = 13.0
    assert not any(isinstance(x, r.Quarantined | r.Released) for x in t.feed(Tick(late_s=3.0)))
    t.verify()
    assert t.feed(r.Verified(7, 1, ())) == [r.Arrived("q", 7, TOKEN)]


def test_a_receiver_that_was_late_expires_leases_all_the_same() -> None:
    t = Receiving(ttl_s=10.0)
    t.now = 13.0
    t.feed(Tick(late_s=3.0))
    t.now = 14.1
    assert r.Released("q", 7, "lease expired") in t.feed(Tick(late_s=0.01))


def test_a_sender_that_was_late_gives_no_push_up_for_it() -> None:
    machine = PushMachine("d:1", SenderConfig())
    machine.handle(s.PushBegun(1, "q", 7, 3, 10.0), 0.0)
    due_s = machine.wake_at_s
    assert due_s is not None
    actions = machine.handle(Tick(late_s=60.0), due_s + 60.0)
    assert not any(isinstance(x, s.Finish) for x in actions)
    actions = machine.handle(Tick(late_s=0.01), due_s + 60.0 + 60.1)
    assert any(isinstance(x, s.Finish) for x in actions)
