"""A machine of hypothesis: scheduler and FakeRunner under random arrivals, leases, holds, cancels, failures and memory
pressure.

What holds whatever the order: blocks are conserved; every sequence that is not cancelled or failed yields exactly the
tokens of the oracle, once each and in order, also when it is held at any moment and then resumed or handed over; blocks
that are lent stay, and those of them that are said to be full hold what they should; a plan keeps to its limits; no
block of a running step is handed out; and when arrivals stop, everything comes to an end with all blocks free. All of
it one step at a time, or with a second step planned and launched while one runs on a device that computes as late as it
may (``overlaps``); with one token per sample, or with several (``max_drawn``).
"""

from collections.abc import Sequence
from typing import NamedTuple

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from baton.errors import InternalError, Overloaded
from baton.prefix import PrefixScheme
from baton.types import (
    Embedding,
    KvLayout,
    PositionLogprobs,
    PromptLogprobs,
    SamplingParams,
    SequenceSpec,
    TokenChunk,
    blocks_for,
)
from engine.blocks import BlockPool, BlockState
from engine.events import EngineEvent, Failed, Handoff, Output, Started
from engine.fake import FakeRunner, expected_embedding, expected_scores, expected_tokens
from engine.replica import StepUnderway
from engine.schedule import Scheduler
from engine.scheduler_config import SchedulerConfig
from engine.step import StepPlan

BLOCK_TOKENS = 4
NUM_BLOCKS = 14
CONFIG = SchedulerConfig(
    block_tokens=BLOCK_TOKENS,
    max_model_tokens=48,
    max_batch_tokens=12,
    max_num_seqs=5,
    max_waiting=4,
    max_preemptions=2,
    watermark=0.1,
)
LAYOUT = KvLayout(2, NUM_BLOCKS, 1, 1, BLOCK_TOKENS, "float32")
VOCAB = 50


# What changes or reports logits.
KINDS: tuple[dict[str, object], ...] = (
    {"logprobs": 1}, {"repetition_penalty": 1.5}, {"min_tokens": 1}, {"prompt_logprobs": 1}, {"pooling": "mean"},
    {"pooling": "last"},
)  # fmt: skip


class Flight(NamedTuple):
    plan: StepPlan
    underway: StepUnderway
    # At the launch, by sequence id.
    blocks: dict[str, list[int]]


class SchedulerMachine(RuleBasedStateMachine):
    overlaps = False
    max_drawn = 1
    # With one, there is a prefix cache.
    scheme: PrefixScheme | None = None
    max_cached: int | None = None
    is_verified = False
    config = CONFIG

    def __init__(self) -> None:
        super().__init__()
        self.num_made = 0
        self.begin()

    def begin(self) -> None:
        """A node without sequences."""
        self.pool = BlockPool(NUM_BLOCKS, max_cached=self.max_cached)
        digest_of = self.bytes_of if self.is_verified else None
        self.scheduler = Scheduler(self.config, self.pool, self.scheme, digest_of)
        self.runner = FakeRunner(LAYOUT, vocab_size=VOCAB, overlaps=self.overlaps, max_drawn=self.max_drawn)
        self.specs: dict[str, SequenceSpec] = {}
        self.tokens: dict[str, list[int]] = {}
        self.embedded: set[str] = set()
        # Of their prompts.
        self.scores: dict[str, list[PositionLogprobs]] = {}
        # They will be heard of again.
        self.open: set[str] = set()
        # Told to stop: their blocks stay until they are released.
        self.hands_off: set[str] = set()
        # Of them, those that stopped: to be released, resumed or handed over.
        self.held: set[str] = set()
        # Blocks that are read while their sequence goes on, or is held after that.
        self.lent: dict[str, tuple[int, ...]] = {}
        # Room for so many tokens was lent.
        self.lent_tokens: dict[str, int] = {}
        self.leased: set[str] = set()
        # Of them, leading blocks that were there.
        self.num_cached: dict[str, int] = {}
        self.flights: list[Flight] = []
        self.now = 0.0

    def prompt(self, num_prompt: int) -> tuple[int, ...]:
        return tuple((self.num_made * 7 + i) % VOCAB for i in range(num_prompt))

    def bytes_of(self, block: int) -> bytes:
        size = LAYOUT.block_bytes // 4
        starts = [LAYOUT.offset(layer, block) // 4 for layer in range(LAYOUT.num_layers)]
        return b"".join(bytes(self.runner._cells[start : start + size]) for start in starts)

    def spec(self, num_prompt: int, max_tokens: int, num_generated: int, stops: bool, kind: int = 0) -> SequenceSpec:
        self.num_made += 1
        prompt = self.prompt(num_prompt)
        options = KINDS[kind] if kind < len(KINDS) else {"temperature": float(kind % 2)}
        sampling = SamplingParams(
            **{"temperature": 0.0, **options},  # type: ignore[arg-type]
            seed=kind,
            max_tokens=max_tokens,
            stop_token_ids=tuple(range(1, 9)) if stops else (),
        )
        fresh = SequenceSpec(f"s{self.num_made}", prompt, sampling)
        resumed = expected_tokens(fresh, LAYOUT, VOCAB)[:-1][:num_generated]
        return SequenceSpec(fresh.sequence_id, prompt, sampling, tuple(resumed), priority=self.priority())

    def priority(self) -> int:
        """Of the sequence that is made."""
        return 0

    @rule(
        num_prompt=st.integers(1, 30),
        max_tokens=st.integers(1, 18),
        num_generated=st.integers(0, 3),
        hands_off=st.booleans(),
        stops=st.booleans(),
        kind=st.integers(0, 12),
    )
    def add(
        self, num_prompt: int, max_tokens: int, num_generated: int, hands_off: bool, stops: bool, kind: int
    ) -> None:
        self.submit(self.spec(num_prompt, max_tokens, num_generated, stops, kind), hands_off)

    @rule(num_prompt=st.integers(1, 9))
    def add_some_that_grow(self, num_prompt: int) -> None:
        """More than there is room for in the end."""
        for more in range(3):
            self.submit(self.spec(num_prompt + more, 18, 0, stops=False), hands_off=False)

    def submit(self, spec: SequenceSpec, hands_off: bool) -> None:
        try:
            self.scheduler.add(spec, hands_off=hands_off, now=self.now)
        except Overloaded:
            return
        self.register(spec)
        if hands_off:
            self.hands_off.add(spec.sequence_id)

    @rule(num_prompt=st.integers(1, 30), max_tokens=st.integers(2, 18), num_headroom=st.integers(0, 9))
    def reserve(self, num_prompt: int, max_tokens: int, num_headroom: int) -> None:
        spec = self.spec(num_prompt, max_tokens, 0, stops=False)
        self.lease(spec, num_headroom)

    def lease(self, spec: SequenceSpec, num_headroom: int) -> bool:
        """Whether blocks were reserved for it."""
        try:
            reserved = self.scheduler.reserve(spec, self.now, num_headroom)
        except Overloaded:
            return False
        count = blocks_for(min(spec.num_known_tokens + 1 + num_headroom, spec.max_total_tokens), BLOCK_TOKENS)
        assert reserved.num_cached_blocks + len(reserved.block_ids) == count
        assert reserved.num_cached_blocks <= spec.num_known_tokens // BLOCK_TOKENS
        assert not set(reserved.block_ids) & self.blocks_in_flight()
        self.num_cached[spec.sequence_id] = reserved.num_cached_blocks
        self.register(spec)
        self.leased.add(spec.sequence_id)
        return True

    def register(self, spec: SequenceSpec) -> None:
        self.specs[spec.sequence_id] = spec
        self.tokens[spec.sequence_id] = list(spec.generated_token_ids)
        self.scores[spec.sequence_id] = []
        self.open.add(spec.sequence_id)

    @precondition(lambda self: self.leased)
    @rule(data=st.data())
    def arrive(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.leased)))
        self.leased.remove(name)
        expected = expected_tokens(self.specs[name], LAYOUT, VOCAB)
        known = len(self.specs[name].generated_token_ids)
        # The KV of one token more than the known ones has room.
        count = data.draw(st.integers(1, max(1, min(2, len(expected) - 1 - known))))
        first = data.draw(st.integers(0, known))
        self.tokens[name] = expected[: known + count]
        self.fill(name)
        self.scheduler.join(name, TokenChunk(name, first, tuple(expected[first : known + count])), self.now)

    def cells(self, name: str, blocks: Sequence[int]) -> list[tuple[int, int]]:
        """(cell of the arena, what it holds) for the KV of all tokens but the newest."""
        known = [*self.specs[name].prompt_token_ids, *self.tokens[name]][:-1]
        return [
            (LAYOUT.offset(layer, blocks[at // BLOCK_TOKENS]) // 4 + at % BLOCK_TOKENS, token + 1 + layer)
            for layer in range(LAYOUT.num_layers)
            for at, token in enumerate(known)
        ]

    def fill(self, name: str) -> None:
        """Write the KV as the other node would have, behind the blocks that are there."""
        first = self.num_cached[name] * BLOCK_TOKENS
        num_written = len(self.specs[name].prompt_token_ids) + len(self.tokens[name]) - 1
        for i, (cell, value) in enumerate(self.cells(name, self.pool.block_ids(name))):
            if i % num_written >= first:
                self.runner._cells[cell] = value
            assert self.runner._cells[cell] == value, "what is said to be there is not"

    @precondition(lambda self: self.leased)
    @rule(data=st.data(), fenced=st.booleans())
    def lose_lease(self, data: st.DataObject, fenced: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.leased)))
        self.leased.remove(name)
        self.open.remove(name)
        if fenced:
            self.scheduler.quarantine(name, self.now)
            assert self.pool.state_of(name) is BlockState.QUARANTINED
        self.scheduler.return_lease(name)

    @precondition(lambda self: self.open - self.leased)
    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.open - self.leased)))
        self.scheduler.hold(name)
        self.hands_off.add(name)

    @precondition(lambda self: self.open - self.leased)
    @rule(data=st.data(), num_blocks=st.integers(0, 9))
    def lend(self, data: st.DataObject, num_blocks: int) -> None:
        name = data.draw(st.sampled_from(sorted(self.open - self.leased)))
        before = len(self.pool.block_ids(name)) if name in self.pool else 0
        try:
            blocks = self.scheduler.lend(name, num_blocks)
        except Overloaded:
            return
        assert before <= len(blocks) <= max(before, num_blocks)
        self.lent_tokens[name] = min(len(blocks), num_blocks) * BLOCK_TOKENS
        self.lent[name] = blocks
        self.hands_off.add(name)

    @precondition(lambda self: self.open & self.lent.keys())
    @rule(data=st.data())
    def take_back(self, data: st.DataObject) -> None:
        """It goes on here, and was not told to stop."""
        name = data.draw(st.sampled_from(sorted(self.open & self.lent.keys())))
        if not self.scheduler._entries[name].hands_off:
            self.scheduler.resume(name, self.now)
            self.hands_off.remove(name)
            del self.lent[name]

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def resume(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.held)))
        self.scheduler.resume(name, self.now)
        self.held.remove(name)
        self.hands_off.remove(name)
        self.lent.pop(name, None)
        self.open.add(name)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), num_unknown=st.integers(1, 9), num_headroom=st.integers(0, 9))
    def hand_over(self, data: st.DataObject, num_unknown: int, num_headroom: int) -> None:
        """Another node goes on; here the other node is this one. All but ``num_unknown`` tokens it knows already."""
        name = data.draw(st.sampled_from(sorted(self.held)))
        spec, tokens = self.specs[name], self.tokens[name]
        self.num_made += 1
        known = tuple(tokens[: max(0, len(tokens) - num_unknown)])
        other = SequenceSpec(f"s{self.num_made}", spec.prompt_token_ids, spec.sampling, known)
        if not self.lease(other, num_headroom):
            return
        blocks = self.pool.block_ids(other.sequence_id)
        if len(blocks) * BLOCK_TOKENS < len(spec.prompt_token_ids) + len(tokens) - 1:
            return
        self.leased.remove(other.sequence_id)
        self.tokens[other.sequence_id] = list(tokens)
        self.fill(other.sequence_id)
        chunk = TokenChunk(other.sequence_id, len(known), tuple(tokens[len(known) :]))
        self.scheduler.join(other.sequence_id, chunk, self.now)

    @precondition(lambda self: self.open - self.leased)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.open - self.leased)))
        self.open.remove(name)
        self.scheduler.cancel(name, self.now)
        if name in self.hands_off and name in self.pool and data.draw(st.booleans()):
            self.hands_off.remove(name)
            self.lent.pop(name, None)
            self.scheduler.release(name, self.now)

    @precondition(lambda self: any(name in self.pool and name not in self.open for name in self.hands_off))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        held = sorted(name for name in self.hands_off if name in self.pool and name not in self.open)
        self.hands_off.remove(name := data.draw(st.sampled_from(held)))
        self.held.discard(name)
        self.lent.pop(name, None)
        if data.draw(st.booleans()):
            self.scheduler.cancel(name, self.now)
        self.scheduler.release(name, self.now)

    @precondition(lambda self: len(self.flights) <= self.overlaps)
    @rule()
    def schedule(self) -> None:
        self.now += 1
        before = self.scheduler.num_preempted
        plan, events = self.scheduler.schedule(self.now)
        assert not self.flights or self.scheduler.num_preempted == before, "blocks of a running step were taken"
        if plan is not None:
            assert plan.num_tokens <= CONFIG.max_batch_tokens
            assert sum(max(1, len(p.scored) + p.samples) for p in plan.pieces) <= CONFIG.max_num_seqs
            assert min(p.num_tokens for p in plan.pieces) > 0
            assert len({p.sequence.sequence_id for p in plan.pieces}) == len(plan.pieces)
            blocks = {p.sequence.sequence_id: list(p.sequence.block_ids) for p in plan.pieces}
            self.flights.append(Flight(plan, self.runner.launch(plan), blocks))
        self.absorb([event for event in events if not isinstance(event, Started)])
        for event in events:
            if isinstance(event, Started):
                assert event.sequence_id in self.hands_off
                assert event.block_ids == tuple(self.pool.block_ids(event.sequence_id))

    @precondition(lambda self: self.flights)
    @rule()
    def apply(self) -> None:
        flight = self.flights.pop(0)
        self.absorb(self.scheduler.apply(flight.plan, flight.underway.result(), self.now))
        self.scheduler.measured.add(flight.plan.shape, self.seconds(flight.plan))

    def seconds(self, plan: StepPlan) -> float:
        """How long a step takes."""
        return 1.0 + plan.num_tokens

    @rule(count=st.integers(2, 12))
    def run(self, count: int) -> None:
        """Several steps."""
        for _ in range(count):
            if len(self.flights) <= self.overlaps:
                self.schedule()
            if self.flights:
                self.apply()

    @precondition(lambda self: self.flights)
    @rule()
    def fail(self) -> None:
        flight = self.flights.pop(0)
        if self.overlaps:
            self.runner.late_error = InternalError("boom")
            with pytest.raises(InternalError, match="boom"):
                flight.underway.result()
        self.absorb(self.scheduler.fail(flight.plan, InternalError("boom"), self.now))

    def absorb(self, events: list[EngineEvent]) -> None:
        for event in events:
            assert event.sequence_id in self.open, "nothing is heard of a sequence that was cancelled or has ended"
            if isinstance(event, PromptLogprobs):
                scores = self.scores[event.sequence_id]
                assert event.index == len(scores) + 1
                scores += event.logprobs
            elif isinstance(event, Embedding):
                spec = self.specs[event.sequence_id]
                assert spec.sampling.pooling
                assert not self.tokens[event.sequence_id]
                assert event.sequence_id not in self.embedded, "one is told"
                self.embedded.add(event.sequence_id)
                assert event.values == expected_embedding(spec, LAYOUT)
            elif isinstance(event, Output):
                self.scored(event.sequence_id)
                tokens = self.tokens[event.sequence_id]
                assert event.chunk.index == len(tokens)
                tokens += event.chunk.token_ids
                expected = expected_tokens(self.specs[event.sequence_id], LAYOUT, VOCAB)
                assert tokens == expected[: len(tokens)]
                assert (event.chunk.finish_reason is not None) == (len(tokens) == len(expected))
                if event.chunk.finish_reason is not None:
                    self.open.remove(event.sequence_id)
            elif isinstance(event, Handoff):
                self.stopped(event)
            else:
                assert isinstance(event, Failed)
                self.open.remove(event.sequence_id)

    def scored(self, name: str) -> None:
        """It has a token: all that was asked of its prompt is told, by the node that computed it."""
        spec = self.specs[name]
        if spec.sampling.pooling and not self.tokens[name]:
            assert name in self.embedded
        if spec.sampling.prompt_logprobs is not None and not self.tokens[name]:
            assert self.scores[name] == expected_scores(spec, LAYOUT, VOCAB)

    def stopped(self, event: Handoff) -> None:
        name = event.sequence_id
        assert name in self.hands_off
        assert name not in {owner for flight in self.flights for owner in flight.blocks}, "a step may still write"
        known = len(self.specs[name].generated_token_ids)
        assert event.tokens == TokenChunk(name, known, tuple(self.tokens[name][known:]))
        assert all(self.runner._cells[cell] == value for cell, value in self.cells(name, event.block_ids))
        self.open.remove(name)
        self.held.add(name)

    def read(self, name: str, blocks: tuple[int, ...]) -> None:
        """As the reader outside does, while it goes on."""
        assert tuple(self.pool.block_ids(name)[: len(blocks)]) == blocks, "a block was taken from its reader"
        if self.max_drawn == 1:
            computed = self.scheduler._entries[name].sequence.num_computed
            assert computed <= self.lent_tokens[name], "it has KV where its reader does not look"
        if name in self.open:
            known = [*self.specs[name].prompt_token_ids, *self.tokens[name]]
            for i in range(min(len(blocks), self.scheduler.full_blocks(name))):
                for layer in range(LAYOUT.num_layers):
                    cell = LAYOUT.offset(layer, blocks[i]) // 4
                    tokens = known[i * BLOCK_TOKENS : (i + 1) * BLOCK_TOKENS]
                    assert list(self.runner._cells[cell : cell + BLOCK_TOKENS]) == [t + 1 + layer for t in tokens]

    def blocks_in_flight(self) -> set[int]:
        return {b for flight in self.flights for blocks in flight.blocks.values() for b in blocks}

    @invariant()
    def consistent(self) -> None:
        self.scheduler.check()
        for name, blocks in self.lent.items():
            self.read(name, blocks)
        for flight in self.flights:
            for owner, blocks in flight.blocks.items():
                assert set(blocks) <= set(self.pool.block_ids(owner)), "a block of a running step was given back"

    def teardown(self) -> None:
        """Everything comes to an end once nothing new arrives."""
        for name in sorted(self.leased):
            self.open.remove(name)
            self.scheduler.return_lease(name)
        for name in sorted(self.open & self.lent.keys()):
            # Else it waits for its reader.
            if not self.scheduler._entries[name].hands_off:
                self.scheduler.resume(name, self.now)
                self.hands_off.remove(name)
                del self.lent[name]
        for _ in range(1000):
            for name in sorted(self.hands_off - self.open):
                self.scheduler.release(name, self.now)
                self.lent.pop(name, None)
            self.held.clear()
            if len(self.flights) <= self.overlaps:
                self.schedule()
            if self.flights:
                self.apply()
            if not self.scheduler.num_sequences:
                break
        assert not self.open, "a sequence never ended"
        assert self.scheduler.num_sequences == 0
        self.scheduler.prefix_cache.drop()
        assert self.pool.num_free == NUM_BLOCKS
