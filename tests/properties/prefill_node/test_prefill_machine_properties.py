"""PrefillMachine with an engine, pushes and routers that do things in any order.

What holds: blocks that a push may read are released exactly once, and only after its commit ended or its abort
returned; the router hears at most one end per sequence and nothing after it, nor after it has left; all things end.
"""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from baton.node_messages import Cancel, FromRouter, HandedOff, Run, Send, SequenceFailed, SessionLost
from baton.types import Failure, FinishReason, Lease, SamplingParams, SequenceSpec, TokenChunk, TransferReport
from engine.events import Failed, Handoff, Output, PrefillTimes, Started
from prefill_node import machine as m

BOOM = Failure("InternalError", "boom", retryable=False)
LOST = Failure("NodeLost", "gone", retryable=True)
REPORT = TransferReport("shm", True, 1, 1, 0.0, 0.0)
SESSIONS = st.integers(1, 2)


class World:
    """One sequence as the rest of the process sees it."""

    def __init__(self, session: int, *, has_lease: bool) -> None:
        self.session = session
        self.has_lease = has_lease
        # queued, computing, ended
        self.engine = "queued"
        # none, pushing, committing, over
        self.push = "none"
        self.is_aborting = False
        self.num_releases = 0
        # The router has asked for its end, is gone, or has heard its end.
        self.is_silent = False
        self.num_tokens = 0


class PrefillWorld(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.machine = m.PrefillMachine("p0")
        self.worlds: dict[str, World] = {}

    def names(self, holds: object) -> list[str]:
        return sorted(name for name, world in self.worlds.items() if holds(world))  # type: ignore[operator]

    def feed(self, event: m.Event) -> None:
        for action in self.machine.handle(event, 0.0):
            self.perform(action)

    def perform(self, action: m.Action) -> None:
        name = action.sequence_id
        match action:
            case m.BeginPush():
                assert self.worlds[name].push == "none"
                self.worlds[name].push = "pushing"
            case m.CommitPush():
                assert self.worlds[name].push == "pushing"
                self.worlds[name].push = "committing"
            case m.AbortPush():
                assert self.worlds[name].push != "none"
                assert not self.worlds[name].is_aborting, "aborted twice"
                self.worlds[name].is_aborting = True
            case m.StopCompute():
                self.worlds[name].engine = "ended"
            case m.ReleaseBlocks():
                world = self.worlds[name]
                assert world.push in ("none", "over"), "released while a writer reads"
                world.engine = "ended"
                world.num_releases += 1
                assert world.num_releases == 1, "released twice"
            case Run():
                pass
            case _:
                self.hear(self.worlds[name], action)

    def hear(self, world: World, action: m.Action) -> None:
        assert isinstance(action, Send)
        assert action.session == world.session
        assert not world.is_silent, f"{action} after the end"
        message = action.message
        world.is_silent = isinstance(message, SequenceFailed | HandedOff) or (
            isinstance(message, TokenChunk) and message.finish_reason is not None and not world.has_lease
        )

    @rule(session=SESSIONS, has_lease=st.booleans(), is_refused=st.booleans())
    def run(self, session: int, has_lease: bool, is_refused: bool) -> None:
        name = f"s{len(self.worlds)}"
        spec = SequenceSpec(name, (1, 2), SamplingParams(seed=0, max_tokens=9))
        lease = Lease(name, 1, "d0", 1, "h:1", (0,), 9.0) if has_lease else None
        self.worlds[name] = World(session, has_lease=has_lease)
        self.feed(FromRouter(session, Run(spec, lease)))
        if is_refused:
            self.worlds[name].engine = "ended"
            self.feed(m.SubmitRefused(name, BOOM))

    @precondition(lambda self: self.names(lambda w: w.engine == "queued"))
    @rule(data=st.data(), can_push=st.booleans())
    def engine_starts(self, data: st.DataObject, can_push: bool) -> None:
        name = data.draw(st.sampled_from(self.names(lambda w: w.engine == "queued")))
        world = self.worlds[name]
        world.engine = "computing"
        if world.has_lease:
            self.feed(Started(name, (4,)))
            if world.push == "pushing" and not can_push:
                world.push = "over"
                self.feed(m.PushRefused(name, BOOM))

    @precondition(lambda self: self.names(lambda w: w.engine == "computing"))
    @rule(data=st.data(), ends=st.booleans())
    def engine_draws(self, data: st.DataObject, ends: bool) -> None:
        name = data.draw(st.sampled_from(self.names(lambda w: w.engine == "computing")))
        world = self.worlds[name]
        finish = FinishReason.STOP if ends else None
        if ends or world.has_lease:
            world.engine = "ended"
        times = PrefillTimes(0.0, 0.0, 2) if world.num_tokens == 0 else None
        chunk = TokenChunk(name, world.num_tokens, (7,), finish_reason=finish)
        world.num_tokens += 1
        self.feed(Output(name, chunk, times))
        if world.has_lease and not ends:
            self.feed(Handoff(name, chunk, (4,)))

    @precondition(lambda self: self.names(lambda w: w.engine == "computing"))
    @rule(data=st.data())
    def engine_fails(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.names(lambda w: w.engine == "computing")))
        self.worlds[name].engine = "ended"
        self.feed(Failed(name, BOOM))

    @precondition(lambda self: self.names(lambda w: w.push == "committing"))
    @rule(data=st.data(), arrives=st.booleans())
    def commit_ends(self, data: st.DataObject, arrives: bool) -> None:
        name = data.draw(st.sampled_from(self.names(lambda w: w.push == "committing")))
        self.worlds[name].push = "over"
        self.feed(m.PushCommitted(name, REPORT) if arrives else m.PushFailed(name, LOST))

    @precondition(lambda self: self.names(lambda w: w.push == "pushing"))
    @rule(data=st.data())
    def push_breaks(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.names(lambda w: w.push == "pushing")))
        self.worlds[name].push = "over"
        self.feed(m.PushFailed(name, LOST))

    @precondition(lambda self: self.names(lambda w: w.is_aborting))
    @rule(data=st.data())
    def abort_returns(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.names(lambda w: w.is_aborting)))
        world = self.worlds[name]
        world.is_aborting = False
        world.push = "over"
        self.feed(m.PushAborted(name))

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
        for name in self.names(lambda w: w.is_aborting):
            self.worlds[name].push = "over"
            self.feed(m.PushAborted(name))
        assert self.machine.num_sequences == 0
        for world in self.worlds.values():
            assert world.push in ("none", "over")
            assert world.engine == "ended"
            assert world.num_releases == 1 or world.push == "none"


TestPrefill = PrefillWorld.TestCase
TestPrefill.settings = settings(max_examples=100, stateful_step_count=40)
