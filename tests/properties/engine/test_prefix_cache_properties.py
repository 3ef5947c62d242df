"""The laws of schedule_machine with a prefix cache, for prompts that begin alike and that continue answers.

The tokens are those of the oracle, which knows no cache; bytes that are found by hash, or that several sequences share,
never change; a follower knows exactly what is found; and a block whose bytes were damaged serves nobody.
"""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule

from baton.prefix import PrefixScheme, key_of
from baton.types import PrefixCaching
from engine.blocks import BlockState
from router.cluster.prefix_index import PrefixIndex
from tests.support.schedule_machine import BLOCK_TOKENS, LAYOUT, VOCAB, SchedulerMachine


class CachedMachine(SchedulerMachine):
    scheme = PrefixScheme("f", "fake", LAYOUT, PrefixCaching(phases_agree=True))

    def __init__(self) -> None:
        super().__init__()
        # A router's, told the same.
        self.index = PrefixIndex(max_blocks=100)

    def begin(self) -> None:
        super().begin()
        self.feed = self.pool.known.follow()
        self.told: set[int] = set()
        # By hash, the block that is found by it, with its bytes.
        self.found: dict[bytes, tuple[int, bytes]] = {}
        # Hashes of blocks that were damaged; after that they have the right bytes again.
        self.damaged: set[bytes] = set()

    def prompt(self, num_prompt: int) -> tuple[int, ...]:
        """One of two beginnings, or what a sequence has said so far and more."""
        if self.num_made % 3 == 0 and self.specs:
            name = sorted(self.specs)[num_prompt % len(self.specs)]
            turns = (*self.specs[name].prompt_token_ids, *self.tokens[name], num_prompt, num_prompt)
            return turns[:30]
        return tuple((self.num_made % 2 * 7 + i) % VOCAB for i in range(num_prompt))

    @precondition(lambda self: self.num_made % 8 == 3)
    @rule()
    def drop(self) -> None:
        num_known = len(self.pool.known)
        assert self.scheduler.prefix_cache.drop() == num_known
        assert len(self.pool.known) == 0

    @rule(most=st.integers(1, 4))
    def follow(self, most: int) -> None:
        untold = self.feed.take(self.pool.known.number, most)
        if untold is None:
            assert self.told == {key_of(value) for value in self.hashes()}
            return
        change = untold.message()
        self.index.change("n0", change)
        assert len(change.stored) + len(change.dropped) <= most
        assert not change.is_snapshot or not self.told, "once, at first"
        assert not self.told & {*change.stored}
        assert self.told >= {*change.dropped}
        self.told = self.told - {*change.dropped} | {*change.stored}
        assert self.index.num_blocks_of("n0") == len(self.told)
        assert all(bool(self.index.hits([key])) == (key in self.told) for key in {*change.stored, *change.dropped})

    # Rarely: what comes before is to be met again.
    @precondition(lambda self: self.num_made % 8 == 7)
    @rule()
    def die(self) -> None:
        """The node's process, with all its sequences and blocks; the next one begins empty, behind a new session."""
        self.begin()
        self.index.forget("n0")
        assert not self.index

    def hashes(self) -> dict[bytes, int]:
        return self.pool.known._blocks

    @invariant()
    def what_is_found_never_changes(self) -> None:
        now = {value: (block, self.bytes_of(block)) for value, block in self.hashes().items()}
        for value, was in self.found.items():
            if value in self.damaged:
                continue
            assert now.get(value, was)[0] != was[0] or now.get(value, was) == was, "a known block was written to"
        self.found = now

    @invariant()
    def counts_add_up(self) -> None:
        stats = self.scheduler.prefix_cache.stats()
        assert stats.hit_tokens <= stats.query_tokens
        assert stats.hit_tokens % BLOCK_TOKENS == 0
        assert stats.cached_blocks <= min(stats.known_blocks, stats.max_cached_blocks)
        assert stats.known_blocks <= stats.stored_blocks - stats.evicted_blocks

    def teardown(self) -> None:
        super().teardown()
        self.follow(99)
        self.follow(99)
        assert self.told == set()


class CachedOverlapMachine(CachedMachine):
    overlaps = True
    max_cached = 3


class CachedDraftingMachine(CachedOverlapMachine):
    max_drawn = 3


class PhasesApartMachine(CachedOverlapMachine):
    """Whose kernels give a generated token's KV other bits than a prompt's: its FakeRunner's are equal all the same."""

    scheme = PrefixScheme("f", "fake", LAYOUT, PrefixCaching(phases_agree=False))


class VerifiedMachine(CachedMachine):
    is_verified = True

    def begin(self) -> None:
        super().begin()
        self.num_damaged = 0

    @precondition(lambda self: self.pool.num_cached)
    @rule(data=st.data())
    def damage(self, data: st.DataObject) -> None:
        """Of a block that no sequence reads at the moment."""
        block = data.draw(st.sampled_from(sorted(self.pool._cached)))
        layer = data.draw(st.integers(0, LAYOUT.num_layers - 1))
        self.runner._cells[LAYOUT.offset(layer, block) // 4 + data.draw(st.integers(0, BLOCK_TOKENS - 1))] += 1
        self.damaged |= {value for value, known in self.hashes().items() if known == block}
        self.num_damaged += 1

    @invariant()
    def corrupt_ones_are_counted(self) -> None:
        assert self.scheduler.prefix_cache.stats().corrupt_blocks <= self.num_damaged


def test_a_damaged_block_is_dropped_and_computed_anew() -> None:
    machine = VerifiedMachine()
    spec = machine.spec(13, 4, 0, stops=False)
    machine.scheduler.add(spec, hands_off=False, now=0.0)
    machine.register(spec)
    while machine.scheduler.num_sequences:
        machine.schedule()
        machine.apply()
    second = sorted(machine.hashes().values())[1]
    machine.runner._cells[LAYOUT.offset(1, second) // 4] += 1
    machine.num_made = 0
    again = machine.spec(13, 4, 0, stops=False)
    assert again.prompt_token_ids == spec.prompt_token_ids
    machine.scheduler.add(again, hands_off=False, now=0.0)
    machine.register(again)
    machine.schedule()
    assert machine.flights[0].plan.pieces[0].start == BLOCK_TOKENS, "behind the first block"
    machine.apply()
    stats = machine.scheduler.prefix_cache.stats()
    assert (stats.corrupt_blocks, stats.hit_tokens) == (1, BLOCK_TOKENS)
    assert machine.pool.state_of(again.sequence_id) is BlockState.RUNNING
    machine.teardown()


TestCached = CachedMachine.TestCase
TestCached.settings = settings(max_examples=40, stateful_step_count=60)
TestCachedOverlap = CachedOverlapMachine.TestCase
TestCachedOverlap.settings = settings(max_examples=40, stateful_step_count=60)
TestCachedDrafting = CachedDraftingMachine.TestCase
TestCachedDrafting.settings = settings(max_examples=30, stateful_step_count=60)
TestPhasesApart = PhasesApartMachine.TestCase
TestPhasesApart.settings = settings(max_examples=20, stateful_step_count=60)
TestVerified = VerifiedMachine.TestCase
TestVerified.settings = settings(max_examples=30, stateful_step_count=60)
