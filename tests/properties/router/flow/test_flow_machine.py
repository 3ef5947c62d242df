"""The request flow against nodes that grant, refuse, move, fail, die, repeat themselves, fall silent and speak too
late."""

from __future__ import annotations

from collections import Counter, deque

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, precondition, rule

from baton.node_messages import (
    Cancel,
    HandedOff,
    Joined,
    Migrate,
    NodeMessage,
    NotMigrated,
    PrefillDone,
    Refused,
    Reserve,
    Run,
    SequenceFailed,
)
from baton.types import Failure, FinishReason, Lease, SamplingParams, SequenceSpec, TokenChunk, TransferReport
from router.cluster.load import Placement
from router.cluster.rebalance import MoveReason
from router.flow import messages as f
from router.flow.config import FlowConfig
from router.flow.machine import Flow
from router.flow.move import MoveOutcome

NODES = ("p0", "p1", "d0", "d1")
STOP_ID = 99
REPORT = TransferReport("fake", False, 1, 1, 0.1, 0.1)


def oracle(position: int) -> int:
    return (position * 7 + 3) % 50


# What happens to a message.
HOWS = ["once"] * 12 + ["twice"] * 3 + ["never"]


def rarely(times: int) -> st.SearchStrategy[bool]:
    """True once in so many; integers would favour their bounds."""
    return st.sampled_from([False] * (times - 1) + [True])


class FlowMachine(RuleBasedStateMachine):
    """Messages travel in one queue per (node, session, attempt): in order within it, in any order between them."""

    queues = Bundle("queues")

    @initialize(
        max_tokens=st.sampled_from([1, 2, 3, 5, 8, 13]),
        stops_at=st.sampled_from([1, 2, 4, 7, 99, 99]),
        max_attempts=st.sampled_from([1, 2, 6, 6]),
    )
    def start(self, max_tokens: int, stops_at: int, max_attempts: int) -> None:
        self.now = 100.0
        answer = [oracle(i) for i in range(max_tokens)]
        if stops_at <= max_tokens:
            answer = [*answer[: stops_at - 1], STOP_ID]
        self.answer = answer
        self.reason = FinishReason.STOP if answer[-1] == STOP_ID else FinishReason.LENGTH
        self.flow = Flow(
            "r", 0, f.Prompt((1, 2, 3)), SamplingParams(max_tokens=max_tokens, seed=1, stop_token_ids=(STOP_ID,)),
            arrived_s=self.now, deadline_s=self.now + 60.0, config=FlowConfig(max_attempts=max_attempts),
        )  # fmt: skip
        self.delivered: list[int] = []
        self.ends: list[f.Outcome] = []
        self.wants_placement = False
        self.is_stopped_by_text = False
        self.channels: dict[tuple[str, bool, str], deque[NodeMessage]] = {}
        # With the node that each went to.
        self.reservations: list[tuple[str, Reserve]] = []
        # Attempts: sequence id -> who was told to work on it, and who was told to stop.
        self.told: dict[str, set[str]] = {}
        self.cancelled: dict[str, set[str]] = {}
        # By whom.
        self.announced: dict[str, str] = {}
        # Sources and targets of moves, by attempt; how moves ended; what the next one comes to.
        self.movers: dict[str, set[str]] = {}
        self.num_moves = 0
        self.outcomes: list[MoveOutcome] = []
        self.move_plan = ("moves", 0)
        self.refused: set[str] = set()
        self.lost: Counter[tuple[str, str]] = Counter()
        self.detached: Counter[str] = Counter()
        self.feed(f.Begin())

    # ── The driver's part ───────────────────────────────────────────────────────────────────────────────────────────

    def feed(self, event: f.Event) -> None:
        had_ended = self.flow.has_ended
        actions = self.flow.handle(event, self.now)
        assert not (had_ended and actions), "an ended flow does nothing"
        for i, action in enumerate(actions):
            if isinstance(action, f.End):
                assert i == len(actions) - 1, "End is the last action"
            self.perform(action)

    def perform(self, action: f.Action) -> None:  # noqa: C901 - one case per action
        match action:
            case f.Enqueue():
                assert not self.wants_placement
                self.wants_placement = True
            case TokenChunk():
                self.delivered += action.token_ids
            case f.ToNode(node_id, Reserve() as message):
                self.told.setdefault(message.sequence_id, set()).add(node_id)
                self.reservations.append((node_id, message))
            case f.ToNode(node_id, Run() as message):
                self.told.setdefault(message.sequence_id, set()).add(node_id)
                self.node_runs(node_id, message)
            case f.ToNode(node_id, Migrate() as message):
                self.node_moves(node_id, message)
            case f.MoveOver():
                self.outcomes.append(action.outcome)
            case f.ToNode(node_id, Cancel(sequence_id)):
                self.cancelled.setdefault(sequence_id, set()).add(node_id)
            case f.Detach():
                self.detached[action.sequence_id] += 1
            case f.End():
                self.ends.append(action.outcome)
                self.wants_placement = False
            case f.NodeFull() | f.PairFailed() | f.PairWorked():
                pass

    # ── The nodes' part ─────────────────────────────────────────────────────────────────────────────────────────────

    def say(self, node_id: str, is_decode: bool, sequence_id: str, *messages: NodeMessage) -> None:
        self.channels.setdefault((node_id, is_decode, sequence_id), deque()).extend(messages)

    def chunk(self, spec: SequenceSpec, start: int, end: int) -> TokenChunk:
        reason = self.reason if end == len(self.answer) else None
        return TokenChunk(spec.sequence_id, start, tuple(self.answer[start:end]), (), reason)

    def node_runs(self, node_id: str, message: Run) -> None:
        """Everything a healthy node would say from here on; rules deliver, drop and delay it."""
        spec = message.spec
        start = len(spec.generated_token_ids)
        assert list(spec.generated_token_ids) == self.answer[:start], "a rerun starts from the right tokens"
        assert start < len(self.answer), "a whole answer is not run again"
        sequence_id = spec.sequence_id
        first = self.chunk(spec, start, start + 1)
        self.say(node_id, False, sequence_id, PrefillDone(sequence_id, 0.0, 0.1, 3), first)
        rest = [(i, min(i + 2, len(self.answer))) for i in range(start + 1, len(self.answer), 2)]
        if message.lease is None:
            self.say(node_id, False, sequence_id, *[self.chunk(spec, a, b) for a, b in rest])
            return
        if not rest:
            return
        decode_id = message.lease.node_id
        self.say(node_id, False, sequence_id, HandedOff(sequence_id, REPORT))
        tokens = [self.chunk(spec, a, b) for a, b in rest]
        self.say(decode_id, True, sequence_id, Joined(sequence_id, 0.1), *tokens)

    def node_moves(self, source_id: str, message: Migrate) -> None:
        """What is still to come from the source is cut somewhere, and the target says the rest. Or it fails; or it
        comes about and the source does not hear of it."""
        what, cut = self.move_plan
        sequence_id, target_id = message.sequence_id, message.lease.node_id
        keys = [k for k, v in self.channels.items() if k[0] == source_id and k[2] == sequence_id and v]
        said = self.channels[keys[-1]] if keys else deque()
        stay = [m for m in said if not isinstance(m, TokenChunk)]
        chunks = [m for m in said if isinstance(m, TokenChunk)]
        # The last chunk, if there is one, is drawn by whoever ends it.
        cut = min(cut, max(0, len(chunks) - 1))
        if not chunks:
            # It has ended, or what it said was lost: there is nothing to move, and no answer.
            return
        said.clear()
        joins = [Joined(sequence_id, 0.1), *chunks[cut:]]
        if what == "moves":
            said.extend([*stay, *chunks[:cut], HandedOff(sequence_id, REPORT)])
            self.lost[(sequence_id, source_id)] += 1
            self.say(target_id, True, sequence_id, *joins)
            return
        unmoved = NotMigrated(sequence_id, Failure("NodeLost", "scripted", True))
        said.extend([*stay, *chunks[:cut], unmoved, *chunks[cut:]])
        if what == "both":
            self.say(target_id, True, sequence_id, *joins)

    # ── Rules ───────────────────────────────────────────────────────────────────────────────────────────────────────

    @precondition(lambda self: self.wants_placement)
    @rule(prefill=st.sampled_from(NODES), decode=st.sampled_from(NODES))
    def place(self, prefill: str, decode: str) -> None:
        self.wants_placement = False
        self.told.setdefault(self.flow.sequence_id, set())
        self.feed(f.Placed(Placement(prefill, decode)))

    @precondition(lambda self: self.reservations)
    @rule(data=st.data(), answer=st.sampled_from(["grant", "grant", "refuse", "silence"]))
    def answer_reserve(self, data: st.DataObject, answer: str) -> None:
        node_id, request = self.reservations.pop(data.draw(st.integers(0, len(self.reservations) - 1)))
        sequence_id = request.sequence_id
        if answer == "grant":
            lease = Lease(sequence_id, 1, node_id, 1, "a:1", (0,), request.ttl_s)
            self.say(node_id, True, sequence_id, lease)
        elif answer == "refuse":
            if node_id in self.movers.get(sequence_id, ()):
                self.lost[(sequence_id, node_id)] += 1
            else:
                self.refused.add(sequence_id)
            self.say(node_id, True, sequence_id, Refused(sequence_id, Failure("NoBlocks", "full", True)))

    @precondition(lambda self: any(self.channels.values()))
    @rule(data=st.data(), hows=st.lists(st.sampled_from(HOWS), min_size=1, max_size=6))
    def deliver(self, data: st.DataObject, hows: list[str]) -> None:
        for how in hows:
            if any(self.channels.values()):
                self.deliver_one(data, how)

    def deliver_one(self, data: st.DataObject, how: str) -> None:
        key = data.draw(st.sampled_from(sorted(k for k, v in self.channels.items() if v)))
        message = self.channels[key].popleft()
        if how == "never":
            return
        if (
            isinstance(message, TokenChunk) and message.finish_reason and message.sequence_id == self.flow.sequence_id
        ):  # fmt: skip
            self.announced.setdefault(message.sequence_id, key[0])
        if isinstance(message, HandedOff) and message.sequence_id == self.flow.sequence_id:
            # It has let go and said so.
            self.lost[(message.sequence_id, key[0])] += 1
        for _ in range(2 if how == "twice" else 1):
            self.feed(f.FromNode(key[0], message))

    @precondition(lambda self: self.flow.placement is not None)
    @rule(
        now=rarely(4),
        is_decode=st.booleans(),
        code=st.sampled_from(["TransferFailed", "NoBlocks", "InternalError", "Unavailable"]),
        blames=st.booleans(),
    )
    def sequence_fails(self, now: bool, is_decode: bool, code: str, blames: bool) -> None:
        if not now:
            return
        placement = self.flow.placement
        assert placement is not None
        node_id, other = placement.prefill_id, placement.decode_id
        if is_decode:
            node_id, other = other, node_id
        failure = Failure(code, "scripted", True, other if blames else "")
        # Who reports a failure has let go already.
        self.lost[(self.flow.sequence_id, node_id)] += 1
        self.feed(f.FromNode(node_id, SequenceFailed(self.flow.sequence_id, failure)))

    @precondition(lambda self: self.flow.can_move)
    @rule(goal=st.sampled_from(NODES), what=st.sampled_from(["moves", "moves", "fails", "both"]), cut=st.integers(0, 4))
    def move(self, goal: str, what: str, cut: int) -> None:
        assert self.flow.placement is not None
        source = self.flow.placement.decode_id
        if goal == source:
            return
        self.num_moves += 1
        self.move_plan = what, cut
        self.movers.setdefault(self.flow.sequence_id, set()).update((source, goal))
        self.feed(f.MoveTo(goal, MoveReason.BALANCE, 3))
        assert not self.flow.can_move

    @rule(node_id=st.sampled_from(NODES), now=rarely(6))
    def node_dies(self, node_id: str, now: bool) -> None:
        if not now:
            return
        for key in [k for k in self.channels if k[0] == node_id]:
            del self.channels[key]
        self.reservations = [(n, request) for n, request in self.reservations if n != node_id]
        for sequence_id in self.told:
            self.lost[(sequence_id, node_id)] += 1
        self.feed(f.NodeLost(node_id, "killed"))

    @rule(now=rarely(6))
    def make_room(self, now: bool) -> None:
        if now:
            attempts = self.flow.lifeline.attempts
            self.feed(f.MakeRoom())
            assert self.flow.lifeline.attempts == attempts

    @rule(now=rarely(20))
    def timer(self, now: bool) -> None:
        if self.flow.wake_at_s == self.flow.deadline_s and not now:
            return
        self.now = max(self.now, self.flow.wake_at_s)
        self.feed(f.Tick())

    @rule(seconds=st.floats(0, 3))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        if self.now >= self.flow.wake_at_s:
            self.feed(f.Tick())

    @precondition(lambda self: not self.flow.has_ended)
    @rule(data=st.data(), hows=st.lists(st.sampled_from(HOWS), min_size=4, max_size=24))
    def things_go_on(self, data: st.DataObject, hows: list[str]) -> None:
        """A stretch of ordinary progress in any order, with messages repeated and lost: failures strike late, too."""
        for how in hows:
            if self.wants_placement:
                self.place(data.draw(st.sampled_from(NODES)), data.draw(st.sampled_from(NODES)))
            elif self.reservations:
                self.answer_reserve(data, "grant")
            elif self.flow.can_move and how != "once":
                what = ("moves", "fails", "both")[self.num_moves % 3]
                self.move(data.draw(st.sampled_from(NODES)), what, len(hows) % 4)
            elif any(self.channels.values()):
                self.deliver_one(data, how)

    @precondition(lambda self: self.wants_placement)
    @rule(is_over=st.booleans(), now=rarely(3))
    def no_node(self, is_over: bool, now: bool) -> None:
        if not now:
            return
        self.feed(f.NodeAvailable() if is_over else f.NoNodeAvailable())

    @precondition(lambda self: self.delivered)
    @rule(now=rarely(20))
    def stop_string(self, now: bool) -> None:
        if now:
            self.is_stopped_by_text = self.is_stopped_by_text or not self.flow.has_ended
            self.feed(f.StopText())
            # The reader has told the client that it is over.
            assert self.flow.has_ended

    @rule(now=rarely(40))
    def cancel(self, now: bool) -> None:
        if now:
            self.feed(f.ClientCancelled("client left"))

    # ── What must hold ──────────────────────────────────────────────────────────────────────────────────────────────

    @invariant()
    def tokens_are_the_answer_in_order(self) -> None:
        assert self.delivered == self.answer[: len(self.delivered)]

    @invariant()
    def one_outcome_at_most(self) -> None:
        assert len(self.ends) <= 1
        assert bool(self.ends) == self.flow.has_ended

    @invariant()
    def finished_means_whole(self) -> None:
        if self.ends and self.ends[0].kind is f.OutcomeKind.FINISHED and not self.is_stopped_by_text:
            assert self.delivered == self.answer
            assert self.ends[0].finish_reason is self.reason

    @invariant()
    def every_wait_has_an_end(self) -> None:
        if not self.flow.has_ended:
            assert self.flow.wake_at_s <= self.flow.deadline_s

    def teardown(self) -> None:
        if not hasattr(self, "flow"):
            return
        self.now = max(self.now, self.flow.deadline_s)
        self.feed(f.Tick())
        assert len(self.ends) == 1, "the deadline ends everything"
        assert len(self.outcomes) == self.num_moves, "each move is over, once"
        for sequence_id, who in self.told.items():
            assert self.detached[sequence_id] == 1, f"{sequence_id} is let go exactly once"
            if sequence_id in self.announced:
                # Those of a move that did not announce it may go on.
                who = self.movers.get(sequence_id, set()) - {self.announced[sequence_id]}
            elif sequence_id in self.refused:
                continue
            for node_id in who:
                is_told = node_id in self.cancelled.get(sequence_id, set())
                assert is_told or self.lost[(sequence_id, node_id)], f"{node_id} still works on {sequence_id}"


FlowMachine.TestCase.settings = settings(max_examples=300, stateful_step_count=50)
TestFlow = FlowMachine.TestCase
