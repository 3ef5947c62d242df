"""Many plain steps at once are the same as one after the other, and sequences that decode beside a prompt at once the
same as one by one: tokens, events, blocks and cached blocks, whatever came before, between and during a step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.errors import NoBlocks, Overloaded
from baton.prefix import PrefixScheme
from baton.types import FinishReason, KvLayout, PrefixCaching, SamplingParams, SequenceSpec, TokenChunk
from engine.blocks import BlockPool
from engine.events import EngineEvent, Output
from engine.schedule import Scheduler
from engine.scheduler_config import SchedulerConfig
from engine.step import StepPlan, StepResult, StepShape

BLOCK_TOKENS, NUM_BLOCKS = 4, 24
CONFIG = SchedulerConfig(
    block_tokens=BLOCK_TOKENS, max_batch_tokens=16, max_num_seqs=6, max_model_tokens=80, max_prompt_wait_s=9.0,
    max_preemptions=2, watermark=0.05,
)  # fmt: skip
SCHEME = PrefixScheme(
    "f", "fake", KvLayout(1, NUM_BLOCKS, 1, 1, BLOCK_TOKENS, "float32"), PrefixCaching(phases_agree=True)
)  # fmt: skip
STOP_ID = 7


class Node:
    """Every sequence draws zeros up to its length, then STOP_ID. A step takes longer, the more it has to do."""

    def __init__(self, scheme: PrefixScheme | None, *, is_in_bulk: bool) -> None:
        self.scheduler = Scheduler(CONFIG, BlockPool(NUM_BLOCKS), scheme)
        self.is_in_bulk = is_in_bulk
        self.now = 0.0
        self.lengths: dict[str, int] = {}
        self.drawn: dict[str, list[int]] = {}
        self.ended: list[tuple[str, FinishReason, float]] = []
        self.num_at_once = 0
        # Steps whose decoding sequences had no pieces, and those where they had some.
        self.num_in_bulk = self.num_in_pieces = 0

    def add(self, spec: SequenceSpec, length: int, *, hands_off: bool) -> None:
        self.lengths[spec.sequence_id] = length
        try:
            self.scheduler.add(spec, hands_off=hands_off, now=self.now)
        except Overloaded:
            del self.lengths[spec.sequence_id]

    def join(self, spec: SequenceSpec, length: int) -> None:
        try:
            self.scheduler.reserve(spec, self.now)
        except (NoBlocks, Overloaded):
            return
        self.lengths[spec.sequence_id] = length
        self.scheduler.join(spec.sequence_id, TokenChunk(spec.sequence_id, 0, (0,)), self.now)

    def run(self, num_steps: int) -> None:
        while num_steps > 0:
            done = self.run_plainly(num_steps) if self.is_in_bulk else 0
            num_steps -= done or self.step()

    def step(self, meanwhile: Callable[[], None] = lambda: None) -> int:
        """``meanwhile`` happens while it runs."""
        plan, _ = self.scheduler.schedule(self.now, in_bulk=self.is_in_bulk)
        meanwhile()
        if plan is None:
            return 1
        self.scheduler.check()
        self.now += seconds(plan.shape)
        if self.is_in_bulk:
            last = {x.sequence_id for x in plan.in_bulk if x.num_generated + 1 == self.lengths[x.sequence_id]}
            self.num_in_bulk += bool(plan.in_bulk)
            self.num_in_pieces += len(plan.in_bulk) < plan.shape.num_decoding
            self.hear(self.scheduler.apply_in_bulk(plan, self.result(plan), self.now, 0, last, STOP_ID))
        else:
            self.hear(self.scheduler.apply(plan, self.result(plan), self.now))
        return 1

    def result(self, plan: StepPlan) -> StepResult:
        sampled = {}
        for piece in plan.pieces:
            if piece.samples:
                name, index = piece.sequence.sequence_id, piece.sequence.num_generated
                token_id = STOP_ID if index + 1 == self.lengths[name] else 0
                sampled[name] = TokenChunk(name, index, (token_id,))
        return StepResult(sampled)

    def run_plainly(self, most: int) -> int:
        left = {
            name: self.lengths[name] - len(self.scheduler.token_ids(name)) + prompt_tokens(name)
            for name in self.lengths
            if self.scheduler.token_ids(name)
        }
        plain = self.scheduler.plain_steps(min([most, *left.values()]), self.now)
        if plain is None:
            return 0
        began_s, ends_s = self.now, []
        shape = plain.shape
        while len(ends_s) < plain.num_steps and self.now < plain.until_s:
            self.now += seconds(shape)
            ends_s.append(self.now)
            shape = shape._replace(num_kv_tokens=shape.num_kv_tokens + shape.num_decoding)
        last = {name for name, num in left.items() if num == len(ends_s)}
        self.num_at_once = max(self.num_at_once, len(ends_s))
        self.hear(self.scheduler.decode(began_s, ends_s, 0, last, STOP_ID))
        return len(ends_s)

    def hear(self, events: list[EngineEvent]) -> None:
        for event in events:
            if isinstance(event, Output) and event.chunk.finish_reason is not None:
                assert event.chunk.index + 1 == self.lengths[event.sequence_id] or (
                    event.chunk.finish_reason is FinishReason.LENGTH
                )
                self.ended.append((event.sequence_id, event.chunk.finish_reason, self.now))

    def state(self) -> object:
        pool, names = self.scheduler.pool, sorted(self.lengths)
        return (
            self.now, self.ended, self.scheduler.load(), self.scheduler.num_preempted, pool.num_evicted,
            {name: list(pool.block_ids(name)) for name in names if name in pool},
            {name: list(self.scheduler.token_ids(name)) for name in names},
            {value: pool.known.find(value) for value in map(pool.known._hashes.get, pool.known) if value is not None},
            list(pool._cached),
        )  # fmt: skip


def seconds(shape: StepShape) -> float:
    return 1.0 + shape.num_prompt_tokens / 8 + shape.num_decoding / 16 + shape.num_kv_tokens / 256


def prompt_tokens(name: str) -> int:
    return int(name.partition("-")[2])


ADD = st.tuples(
    st.just("add"), st.integers(1, 24), st.integers(1, 30), st.integers(2, 30), st.integers(0, 2), st.booleans()
)  # fmt: skip
RUN = st.tuples(st.just("run"), st.integers(1, 40))
# hold, release, resume, cancel, lend: one of the sequences.
OTHER = st.tuples(st.sampled_from(["hold", "release", "resume", "cancel", "lend"]), st.integers(0, 9))
# A sequence whose prompt another node has computed.
JOIN = st.tuples(st.just("join"), st.integers(1, 24), st.integers(2, 30), st.integers(3, 30))
DURING = st.tuples(st.just("during"), OTHER)


@pytest.mark.parametrize("scheme", [None, SCHEME], ids=["without a cache", "with a cache"])
@settings(max_examples=150)
@given(
    ops=st.lists(st.one_of(ADD, ADD, RUN, RUN, OTHER, DURING, JOIN), min_size=2, max_size=25),
    is_looked_at=st.booleans(),
)
def test_many_at_once_are_one_after_the_other(
    scheme: PrefixScheme | None, ops: list[tuple[object, ...]], is_looked_at: bool
) -> None:
    """Whether or not anybody looks meanwhile at what was drawn."""
    nodes = [Node(scheme, is_in_bulk=is_in_bulk) for is_in_bulk in (False, True)]
    for number, op in enumerate((*ops, ("run", 60))):
        for node in nodes:
            do(node, number, op)
            if is_looked_at or number == len(ops):
                node.scheduler.check()
        if is_looked_at or number == len(ops):
            assert nodes[0].state() == nodes[1].state()
        assert nodes[0].scheduler.load() == nodes[1].scheduler.load()


def do(node: Node, number: int, op: tuple[object, ...]) -> None:
    match op:
        case ("add", int(num_prompt), int(length), int(most), int(priority), bool(hands_off)):
            sampling = SamplingParams(seed=0, max_tokens=most, stop_token_ids=(STOP_ID,))
            # Three prompts begin alike, and their answers too.
            prompt = (number % 2,) * num_prompt
            spec = SequenceSpec(f"s{number}-{num_prompt}", prompt, sampling, priority=priority)
            node.add(spec, length, hands_off=hands_off)
        case ("join", int(num_prompt), int(length), int(most)):
            sampling = SamplingParams(seed=0, max_tokens=most, stop_token_ids=(STOP_ID,))
            node.join(SequenceSpec(f"s{number}-{num_prompt}", (number % 2,) * num_prompt, sampling), length)
        case ("run", int(num_steps)):
            node.run(num_steps)
        case ("during", tuple(other)):
            node.step(lambda: do(node, number, other))
        case (str(what), int(which)):
            change(node, what, which)


def change(node: Node, what: str, which: int) -> None:
    """One of the sequences that have blocks."""
    scheduler = node.scheduler
    names = sorted(name for name in node.lengths if name in scheduler.pool)
    if not names:
        return
    name = names[which % len(names)]
    phase = scheduler._entries[name].phase.name
    if what == "lend" and scheduler._entries[name].can_lend:
        scheduler.lend(name, len(scheduler.pool.block_ids(name)) + 1)
    elif what == "resume" and (phase == "HELD" or scheduler._entries[name].is_lent):
        scheduler.resume(name, node.now)
    elif what == "hold":
        scheduler.hold(name)
    elif what == "cancel":
        scheduler.cancel(name, node.now)
    elif what == "release":
        scheduler.release(name, node.now)


def test_what_only_decodes_is_one_piece() -> None:
    """Sixty steps of three sequences, up to the first end; a prompt that finds no room waits meanwhile."""
    node = Node(None, is_in_bulk=True)
    for number in range(3):
        do(node, number, ("add", 4, 20 + number, 30, 0, False))
    node.run(2)
    do(node, 3, ("add", 24, 50, 50, 0, False))
    scheduler = node.scheduler
    assert scheduler.plain_steps(100, node.now) is None, "there is room for the fourth"
    node.run(2)
    plain = scheduler.plain_steps(100, node.now)
    assert plain is not None
    assert plain.shape.num_decoding == 4
    node.run(60)
    assert node.num_at_once >= 10
    assert len(node.ended) == 4


def test_beside_a_prompt_what_decodes_has_no_pieces() -> None:
    node = Node(None, is_in_bulk=True)
    for number in range(3):
        do(node, number, ("add", 4, 20, 30, 0, False))
    node.run(2)
    do(node, 3, ("add", 6, 20, 30, 0, False))
    plan, _ = node.scheduler.schedule(node.now, in_bulk=True)
    assert plan is not None
    assert [len(x.token_ids) for x in plan.in_bulk] == [6, 6, 6]
    assert [piece.num_tokens for piece in plan.pieces] == [6]
    assert (plan.shape.num_prompt_tokens, plan.shape.num_decoding) == (6, 3)
    before = {x.sequence_id: len(x.token_ids) for x in plan.in_bulk}
    events = node.scheduler.apply_in_bulk(plan, node.result(plan), node.now, 0, {"s1-4"}, STOP_ID)
    # Of those that go on nothing is told.
    assert [(each.sequence_id, isinstance(each, Output)) for each in events] == [("s1-4", True), ("s3-6", True)]
    assert not node.scheduler.token_ids("s1-4")
    assert [len(node.scheduler.token_ids(name)) - before[name] for name in ("s0-4", "s2-4")] == [1, 1]


def test_sequences_have_pieces_where_one_has_to_yield() -> None:
    node = Node(None, is_in_bulk=True)
    for number in range(4):
        do(node, number, ("add", 15, 30, 30, 0, False))
    for _ in range(6):
        node.step()
    assert (node.scheduler.num_preempted, node.num_in_pieces) == (0, 0)
    assert node.num_in_bulk > 0
    for _ in range(30):
        node.step()
    assert node.scheduler.num_preempted > 0
    assert node.num_in_pieces > 0


def test_what_was_drawn_is_written_when_it_is_looked_at() -> None:
    node = Node(None, is_in_bulk=True)
    for number in range(3):
        do(node, number, ("add", 4, 20, 30, 0, False))
    for _ in range(6):
        node.run(1)
    scheduler, sequence = node.scheduler, node.scheduler._entries["s0-4"].sequence
    num_written = len(scheduler.token_ids("s0-4"))
    plain = scheduler.plain_steps(5, node.now)
    assert plain is not None
    assert scheduler.decode(node.now, [node.now + i for i in (1.0, 2.0, 3.0, 4.0, 5.0)], 0) == []
    assert len(sequence.token_ids) == num_written
    assert scheduler.load().running_tokens == plain.shape.num_kv_tokens - 3 + 15
    assert len(scheduler.token_ids("s0-4")) == len(sequence.token_ids) == num_written + 5
    node.join(SequenceSpec("s9-4", (1,) * 4, SamplingParams(seed=0, max_tokens=9, stop_token_ids=(STOP_ID,))), 9)
    following = scheduler.plain_steps(1, node.now)
    assert following is not None
    assert following.shape == StepShape(0, 0, 4, plain.shape.num_kv_tokens + 15 + 5)
    scheduler.check()
