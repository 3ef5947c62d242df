"""PrefillMachine with an engine, pushes and routers that do things in any order.

What holds: blocks that a push may read are released or taken back exactly once, and only after its commit ended or its
abort returned; the router hears at most one end per sequence and nothing after it, nor after it has left; it hears
every token of a sequence that decodes here, and one answer to each move; all things end.
"""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from baton.node_messages import (
    Cancel,
    FromRouter,
    HandedOff,
    LetGo,
    Migrate,
    NotMigrated,
    Run,
    Send,
    SequenceFailed,
    SessionLost,
)
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
        # queued, computing, held, ended
        self.engine = "queued"
        # none, pushing, committing, over
        self.push = "none"
        self.is_aborting = False
        self.num_releases = 0
        # It decodes here and is to move, or was.
        self.is_moving = False
        self.is_told_to_stop = False
        self.num_moves_unanswered = 0
        # Tokens that the router was sent.
        self.num_sent = 0
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
            case m.BeginMove():
                world = self.worlds[name]
                assert world.push == "none"
                assert world.engine == "computing"
                world.push, world.is_moving = "pushing", True
            case m.HoldCompute():
                assert self.worlds[name].push != "none"
                assert not self.worlds[name].is_told_to_stop, "stopped twice"
                self.worlds[name].is_told_to_stop = True
            case m.Resume():
                world = self.worlds[name]
                assert world.push == "over", "taken back while a writer reads"
                assert world.engine == ("held" if world.is_told_to_stop else "computing"), "the engine would refuse"
                world.engine, world.push, world.is_moving, world.is_told_to_stop = "computing", "none", False, False
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
        if isinstance(message, TokenChunk):
            world.num_sent += 1
        if isinstance(message, NotMigrated | HandedOff) and world.num_moves_unanswered:
            world.num_moves_unanswered -= 1
        else:
            assert not isinstance(message, NotMigrated), "no move was asked for"
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
        is_heard = not world.is_silent
        times = PrefillTimes(0.0, 0.0, 2) if world.num_tokens == 0 else None
        chunk = TokenChunk(name, world.num_tokens, (7,), finish_reason=finish)
        world.num_tokens += 1
        self.feed(Output(name, chunk, times))
        assert world.num_sent == world.num_tokens or not is_heard, "a token was lost"
        if world.has_lease and not ends:
            self.feed(Handoff(name, chunk, (4,)))

    @rule(session=SESSIONS)
    def decode_lets_go(self, session: int) -> None:
        """A sequence that came with a transfer is to move."""
        name = f"s{len(self.worlds)}"
        world = self.worlds[name] = World(session, has_lease=False)
        world.engine, world.num_tokens, world.num_sent, world.num_moves_unanswered = "computing", 1, 1, 1
        self.feed(LetGo(session, Migrate(name, Lease(name, 1, "d1", 1, "h:1", (0, 1), 9.0))))

    @precondition(lambda self: self.names(lambda w: not w.is_silent))
    @rule(data=st.data(), is_refused=st.booleans())
    def migrate(self, data: st.DataObject, is_refused: bool) -> None:
        name = data.draw(st.sampled_from(self.names(lambda w: not w.is_silent)))
        world = self.worlds[name]
        # The router asks for no move of a sequence that does not decode.
        if world.has_lease or world.engine == "queued":
            return
        world.num_moves_unanswered += 1
        began = world.push == "none"
        self.feed(FromRouter(world.session, Migrate(name, Lease(name, 1, "d1", 1, "h:1", (0, 1), 9.0))))
        if is_refused and began and world.is_moving:
            world.push, world.is_moving = "none", False
            self.feed(m.MoveRefused(name, BOOM))
            assert world.num_moves_unanswered == 0

    @precondition(lambda self: self.names(lambda w: w.is_moving and w.push == "pushing"))
    @rule(data=st.data())
    def push_catches_up(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.names(lambda w: w.is_moving and w.push == "pushing")))
        if not self.worlds[name].is_told_to_stop:
            self.feed(m.PushCaughtUp(name))

    @precondition(lambda self: self.names(lambda w: w.is_told_to_stop and w.engine == "computing"))
    @rule(data=st.data())
    def engine_holds(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.names(lambda w: w.is_told_to_stop and w.engine == "computing")))
        self.worlds[name].engine = "held"
        self.feed(Handoff(name, TokenChunk(name, 0, (7,)), (4, 5)))

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
        if self.worlds[name].push == "over" and self.worlds[name].is_aborting and not arrives:
            # Its abort has not returned: writes may be under way until then.
            self.worlds[name].push = "failed"

    @precondition(lambda self: self.names(lambda w: w.push == "failed"))
    @rule(data=st.data())
    def failure_is_told_again(self, data: st.DataObject) -> None:
        self.feed(m.PushFailed(data.draw(st.sampled_from(self.names(lambda w: w.push == "failed"))), LOST))

    @precondition(lambda self: self.names(lambda w: w.push == "pushing"))
    @rule(data=st.data())
    def push_breaks(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.names(lambda w: w.push == "pushing")))
        self.worlds[name].push = "failed"
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
            self.worlds[name].is_aborting = False
            self.feed(m.PushAborted(name))
        assert self.machine.num_sequences == 0
        for world in self.worlds.values():
            assert world.push in ("none", "over")
            assert world.engine == "ended"
            assert world.num_releases == 1 or world.push == "none"


TestPrefill = PrefillWorld.TestCase
TestPrefill.settings = settings(max_examples=100, stateful_step_count=40)
