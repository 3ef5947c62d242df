"""DecodeMachine with an engine, a receiver and routers that do things in any order.

What holds: leased blocks are returned exactly once, and only when the receiver says that no writer is left; running
sequences are stopped, end by themselves or go to the prefill machine, which is then the only one that knows them; the
router hears at most one end per sequence and nothing after it.
"""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from baton.node_messages import Cancel, FromRouter, LetGo, Migrate, Refused, Reserve, Send, SequenceFailed, SessionLost
from baton.types import Failure, FinishReason, Lease, SamplingParams, SequenceSpec, TokenChunk
from decode_node import machine as m
from engine.events import Failed, Output
from kvtransfer.protocol.receiver_events import Arrived, Quarantined, Released

BOOM = Failure("InternalError", "boom", retryable=False)
FULL = Failure("NoBlocks", "full", retryable=True)
SESSIONS = st.integers(1, 2)


class World:
    def __init__(self, session: int) -> None:
        self.session = session
        # none, leased, fenced (quarantined), running, over
        self.blocks = "none"
        self.is_revoked = False
        self.is_silent = False
        self.num_tokens = 0


class DecodeWorld(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.machine = m.DecodeMachine("d0")
        self.worlds: dict[str, World] = {}
        self.now = 0.0
        # What the engine answers next to Reserve and Join.
        self.grants = True
        self.joins = True
        self.was_rejected = False

    def names(self, *states: str) -> list[str]:
        return sorted(name for name, world in self.worlds.items() if world.blocks in states)

    def feed(self, event: m.Event) -> None:
        self.now += 0.1
        for action in self.machine.handle(event, self.now):
            if not self.perform(action):
                break

    def perform(self, action: m.Action) -> bool:  # noqa: C901 - one case per action
        """False if the driver would have raised."""
        match action:
            case Reserve(spec):
                name = spec.sequence_id
                if self.grants:
                    self.worlds[name].blocks = "leased"
                    self.feed(Lease(name, 1, "d0", 1, "h:1", (0,), 9.0))
                else:
                    self.feed(m.GrantRefused(name, FULL))
            case m.Join(name):
                assert self.worlds[name].blocks == "leased"
                if not self.joins:
                    self.was_rejected = True
                    self.feed(m.JoinRefused(name, BOOM))
                    return False
                self.worlds[name].blocks = "running"
            case m.RejectArrival():
                self.was_rejected = True
                return False
            case m.RevokeLease(name):
                assert not self.worlds[name].is_revoked
                self.worlds[name].is_revoked = True
            case m.Quarantine(name):
                assert self.worlds[name].blocks == "fenced"
            case m.ReturnBlocks(name):
                assert self.worlds[name].blocks == "free to return"
                self.worlds[name].blocks = "over"
            case LetGo(session):
                world = self.worlds[action.sequence_id]
                assert world.blocks == "running"
                assert world.session == session
                # The other machine's: from here nothing more is heard of it, and it is left alone.
                world.blocks, world.is_silent = "over", True
            case m.StopCompute(name):
                assert self.worlds[name].blocks == "running"
                self.worlds[name].blocks = "over"
            case _:
                self.hear(action)
        return True

    def hear(self, action: m.Action) -> None:
        assert isinstance(action, Send)
        world = self.worlds[action.sequence_id]
        assert action.session == world.session
        assert not world.is_silent, f"{action} after the end"
        message = action.message
        is_last = isinstance(message, TokenChunk) and message.finish_reason is not None
        world.is_silent = is_last or isinstance(message, SequenceFailed | Refused)

    @rule(session=SESSIONS, grants=st.booleans())
    def reserve(self, session: int, grants: bool) -> None:
        name = f"s{len(self.worlds)}"
        self.worlds[name] = World(session)
        self.grants = grants
        spec = SequenceSpec(name, (1, 2), SamplingParams(seed=0, max_tokens=9))
        self.feed(FromRouter(session, Reserve(spec, 9.0, "p0")))

    @precondition(lambda self: self.names("leased"))
    @rule(data=st.data(), joins=st.booleans())
    def kv_arrives(self, data: st.DataObject, joins: bool) -> None:
        name = data.draw(st.sampled_from(self.names("leased")))
        world = self.worlds[name]
        self.joins, self.was_rejected = joins, False
        expected = joins and not world.is_revoked
        self.feed(Arrived(name, 1, TokenChunk(name, 0, (1,))))
        assert self.was_rejected == (not expected)
        world.num_tokens = 1
        # What was refused does not come again: the receiver ends the lease.
        world.is_revoked = True

    @precondition(lambda self: self.names("leased"))
    @rule(data=st.data())
    def lease_is_fenced(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.names("leased")))
        self.worlds[name].blocks = "fenced"
        self.feed(Quarantined(name, 1, "over"))

    @precondition(lambda self: self.names("leased", "fenced"))
    @rule(data=st.data())
    def lease_is_released(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.names("leased", "fenced")))
        self.worlds[name].blocks = "free to return"
        self.feed(Released(name, 1, "over"))
        assert self.worlds[name].blocks == "over", "leaked"

    @precondition(lambda self: self.names("running"))
    @rule(data=st.data(), ends=st.booleans())
    def engine_draws(self, data: st.DataObject, ends: bool) -> None:
        name = data.draw(st.sampled_from(self.names("running")))
        world = self.worlds[name]
        chunk = TokenChunk(name, world.num_tokens, (7,), finish_reason=FinishReason.LENGTH if ends else None)
        world.num_tokens += 1
        if ends:
            world.blocks = "over"
        self.feed(Output(name, chunk))

    @precondition(lambda self: self.names("running"))
    @rule(data=st.data())
    def engine_fails(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.names("running")))
        self.worlds[name].blocks = "over"
        self.feed(Failed(name, BOOM))

    @precondition(lambda self: self.worlds)
    @rule(data=st.data(), session=SESSIONS)
    def migrate(self, data: st.DataObject, session: int) -> None:
        name = data.draw(st.sampled_from(sorted(self.worlds)))
        world = self.worlds[name]
        is_let_go = world.blocks == "running" and world.session == session
        self.feed(FromRouter(session, Migrate(name, Lease(name, 2, "d1", 1, "h:2", (0,), 9.0))))
        assert (self.machine.phase_of(name) is None) or not is_let_go

    @precondition(lambda self: self.worlds)
    @rule(data=st.data(), session=SESSIONS)
    def cancel(self, data: st.DataObject, session: int) -> None:
        name = data.draw(st.sampled_from(sorted(self.worlds)))
        if self.worlds[name].session == session:
            self.worlds[name].is_silent = True
        self.feed(FromRouter(session, Cancel(name, "left")))

    @rule(session=SESSIONS)
    def lose_session(self, session: int) -> None:
        for world in self.worlds.values():
            world.is_silent = world.is_silent or world.session == session
        self.feed(SessionLost(session))

    def teardown(self) -> None:
        for session in (1, 2):
            self.lose_session(session)
        assert not self.names("running")
        for name in self.names("leased", "fenced"):
            assert self.worlds[name].is_revoked or self.worlds[name].blocks == "fenced" or self.worlds[name].is_silent
            self.worlds[name].blocks = "free to return"
            self.feed(Released(name, 1, "over"))
        assert self.machine.num_sequences == 0
        assert not self.names("leased", "fenced", "running", "free to return")


TestDecode = DecodeWorld.TestCase
TestDecode.settings = settings(max_examples=100, stateful_step_count=40)
