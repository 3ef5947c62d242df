"""The scheduler with a prefix cache: what is found, shared, waited for, stored and given up."""

from dataclasses import replace

import pytest

from baton.errors import BadLogits, InternalError, NoBlocks
from baton.node_messages import CacheChanged
from baton.prefix import PrefixScheme
from baton.types import KvLayout, PrefixCaching, RopeRegimes, SamplingParams, SequenceSpec, TokenChunk
from engine.blocks import BlockPool, BlockState
from engine.events import EngineEvent, Handoff, Output, Started
from engine.schedule import Reserved, Scheduler
from engine.scheduler_config import SchedulerConfig
from engine.step import StepPlan, StepResult

SIZE = 4
LAYOUT = KvLayout(1, 64, 1, 1, SIZE, "float32")
SCHEME = PrefixScheme("f", "fake", LAYOUT, PrefixCaching(phases_agree=True))


def spec(name: str, prompt: int | tuple[int, ...], max_tokens: int = 8, **more: object) -> SequenceSpec:
    ids = tuple(range(100, 100 + prompt)) if isinstance(prompt, int) else prompt
    return SequenceSpec(name, ids, SamplingParams(temperature=0.0, seed=0, max_tokens=max_tokens), **more)  # type: ignore[arg-type]


def scheduler(
    num_blocks: int = 64,
    *,
    scheme: PrefixScheme | None = SCHEME,
    max_cached: int | None = None,
    **settings: int | float,
) -> Scheduler:
    defaults: dict[str, int | float] = {
        "block_tokens": SIZE,
        "max_batch_tokens": 16,
        "max_num_seqs": 8,
        "max_model_tokens": 256,
        "watermark": 0.0,
    }
    config = SchedulerConfig(**{**defaults, **settings})  # type: ignore[arg-type]
    return Scheduler(config, BlockPool(num_blocks, max_cached=max_cached), scheme)


def launch(s: Scheduler) -> StepPlan:
    plan, _ = s.schedule(0.0)
    assert plan is not None
    return plan


def land(s: Scheduler, plan: StepPlan, *tokens: int) -> list[EngineEvent]:
    """Every sequence that samples draws ``tokens``."""
    sampled = {
        p.sequence.sequence_id: TokenChunk(p.sequence.sequence_id, p.sequence.num_generated, tokens or (1,))
        for p in plan.pieces
        if p.samples
    }
    events = s.apply(plan, StepResult(sampled), 0.0)
    s.check()
    return events


def shape(plan: StepPlan | None) -> list[tuple[str, int, int]]:
    return [] if plan is None else [(p.sequence.sequence_id, p.start, p.num_tokens) for p in plan.pieces]


def step(s: Scheduler, *tokens: int) -> list[tuple[str, int, int]]:
    plan, _ = s.schedule(0.0)
    if plan is not None:
        land(s, plan, *tokens)
    return shape(plan)


def finish(s: Scheduler, sequence: SequenceSpec, *tokens: int) -> None:
    """Run it alone to its end; it draws ``tokens`` over and over."""
    s.add(sequence, hands_off=False, now=0.0)
    while s.num_sequences:
        step(s, *tokens)


@pytest.mark.parametrize(("num_prompt", "start"), [(3, 0), (4, 0), (5, 4), (12, 8), (13, 12)])
def test_a_prompt_begins_behind_known_blocks_but_computes_its_last_token(num_prompt: int, start: int) -> None:
    s = scheduler()
    finish(s, spec("a", 13))
    s.add(spec("b", num_prompt), hands_off=False, now=0.0)
    assert s.load().queued_prompt_tokens == num_prompt - start
    plan = launch(s)
    assert shape(plan) == [("b", start, num_prompt - start)]
    (output,) = land(s, plan)
    assert isinstance(output, Output)
    assert output.prefill is not None
    assert (output.prefill.num_cached_tokens, output.prefill.num_computed_tokens) == (start, num_prompt - start)
    stats = s.prefix_cache.stats()
    assert (stats.query_tokens, stats.hit_tokens) == (13 + num_prompt, start)


def test_without_a_scheme_nothing_is_found_or_kept() -> None:
    s = scheduler(scheme=None)
    finish(s, spec("a", 13))
    assert s.pool.num_free == 64
    s.add(spec("b", 13), hands_off=False, now=0.0)
    assert step(s) == [("b", 0, 13)]
    stats = s.prefix_cache.stats()
    assert (stats.is_on, stats.query_tokens, stats.known_blocks) == (False, 0, 0)


def test_equal_prompts_at_once_are_computed_once_and_held_once() -> None:
    s = scheduler(max_num_seqs=16, max_batch_tokens=64)
    for i in range(8):
        s.add(spec(f"c{i}", 42), hands_off=False, now=0.0)
    assert step(s) == [("c0", 0, 42)]
    # The others compute what is in no full block: two tokens each.
    assert step(s) == [("c0", 42, 1)] + [(f"c{i}", 40, 2) for i in range(1, 8)]
    assert s.pool.num_held == 10 + 8
    assert s.prefix_cache.stats().hit_tokens == 7 * 40


def test_who_waits_for_a_leader_lets_others_pass_and_goes_on_when_it_is_there() -> None:
    s = scheduler(max_batch_tokens=12)
    s.add(spec("leader", 21), hands_off=False, now=0.0)
    s.add(spec("follower", (*range(100, 117), 1, 1)), hands_off=True, now=0.0)
    s.add(spec("other", (7, 8, 9)), hands_off=False, now=0.0)
    assert step(s) == [("leader", 0, 12)]
    # The follower has 16 tokens in common with the leader, who has computed 12 of them.
    assert step(s) == [("leader", 12, 9), ("other", 0, 3)]
    plan, (started,) = s.schedule(0.0)
    assert shape(plan)[2:] == [("follower", 16, 3)]
    assert isinstance(started, Started)
    assert (started.num_cached_blocks, len(started.block_ids)) == (4, 5)


@pytest.mark.parametrize("how", ["cancel", "fail"])
def test_a_follower_takes_over_from_a_leader_that_ends(how: str) -> None:
    s = scheduler(max_batch_tokens=8)
    s.add(spec("leader", 30), hands_off=False, now=0.0)
    s.add(spec("follower", 30), hands_off=False, now=0.0)
    assert step(s) == [("leader", 0, 8)]
    plan = launch(s)
    if how == "fail":
        s.fail(plan, InternalError("boom"), 0.0)
        s.check()
    else:
        s.cancel("leader", 0.0)
        land(s, plan)
    # What the last step computed counts for nothing.
    assert step(s) == [("follower", 8, 8)]


def test_a_leader_that_is_preempted_is_not_waited_for() -> None:
    s = scheduler(num_blocks=6, max_batch_tokens=8)
    s.add(spec("old", (1, 2, 3), max_tokens=20), hands_off=False, now=0.0)
    step(s)
    s.add(spec("leader", 20, max_tokens=4), hands_off=False, now=0.0)
    s.add(spec("follower", 20, max_tokens=4), hands_off=False, now=0.0)
    told = [step(s) for _ in range(60)]
    assert s.num_preempted > 0
    assert s.num_sequences == 0
    assert sum(count for pieces in told for name, _, count in pieces if name != "old") < 2 * 20


def test_salt_and_rope_regime_keep_sequences_apart() -> None:
    rope = replace(SCHEME, caching=PrefixCaching(phases_agree=True, rope=RopeRegimes(16, is_each_its_own=True)))
    s = scheduler(scheme=rope)
    finish(s, spec("a", 13))
    for i, (sequence, start) in enumerate(
        [
            (spec("a", 13), 12),
            (spec("a", 13, cache_salt=b"x"), 0),
            (spec("a", 13, cache_salt=b"x"), 12),
            (spec("a", 16), 12),
            (spec("a", 17), 0),
            (spec("a", 18), 0),
            (spec("a", 18), 16),
        ]
    ):
        s.add(replace(sequence, sequence_id=f"s{i}"), hands_off=False, now=0.0)
        assert step(s)[0][1] == start, i
        s.cancel(f"s{i}", 0.0)


@pytest.mark.parametrize(("phases_agree", "start"), [(True, 16), (False, 8)])
def test_an_answer_is_found_by_the_next_turn_where_phases_agree(phases_agree: bool, start: int) -> None:
    s = scheduler(scheme=replace(SCHEME, caching=PrefixCaching(phases_agree=phases_agree)))
    finish(s, spec("a", 10, max_tokens=9), 7)
    # The KV of the last token was never computed.
    assert s.pool.num_cached == 4
    turn = (*range(100, 110), *[7] * 9, 50)
    s.add(spec("b", turn), hands_off=False, now=0.0)
    assert step(s)[0] == ("b", start, 20 - start)
    s.cancel("b", 0.0)
    # One that is taken up again after a failure says which of its tokens were generated.
    s.add(spec("c", 10, generated_token_ids=(7, 7, 7)), hands_off=False, now=0.0)
    assert step(s)[0] == ("c", 12, 1)


def test_reserve_shares_all_full_blocks_and_names_those_to_be_filled() -> None:
    s = scheduler()
    assert s.reserve(spec("a", 8), 0.0) == Reserved(0, (0, 1, 2), 2)
    s.check()
    assert len(s.pool.known) == 0, "what a writer may still reach is not found"
    s.join("a", TokenChunk("a", 0, (5,)), 0.0)
    assert s.reserve(spec("b", 8), 0.0) == Reserved(2, (3,), 0)
    assert s.reserve(spec("c", 7), 0.0) == Reserved(1, (4,), 1)
    assert s.pool.num_held == 5
    assert s.pool.blocks_by_state()[BlockState.LEASED] == 2
    s.quarantine("b", 0.0)
    s.check()
    s.return_lease("b")
    s.join("c", TokenChunk("c", 0, (5,)), 0.0)
    s.check()
    assert step(s, 6) == [("a", 8, 1), ("c", 7, 1)]
    for name in ("a", "c"):
        s.cancel(name, 0.0)
    assert s.pool.num_cached == 3, "the second block of c holds the first generated token"
    # Known tokens include generated ones.
    assert s.reserve(spec("d", 7, generated_token_ids=(5, 9)), 0.0).num_cached_blocks == 2


def test_leases_need_no_room_for_what_is_shared() -> None:
    s = scheduler(num_blocks=6)
    s.reserve(spec("a", 16), 0.0)
    s.join("a", TokenChunk("a", 0, (5,)), 0.0)
    assert s.reserve(spec("b", 16), 0.0) == Reserved(4, (5,), 0)
    assert s.pool.num_available == 0


def test_cached_blocks_are_room_but_not_for_the_one_that_finds_them() -> None:
    s = scheduler(num_blocks=6)
    finish(s, spec("a", 17, max_tokens=1))
    assert (s.pool.num_cached, s.pool.num_free) == (4, 2)
    s.add(spec("b", (*range(100, 108), *range(12)), max_tokens=1), hands_off=True, now=0.0)
    plan, (started,) = s.schedule(0.0)
    # Two of the cached ones are its beginning; for the rest it takes the free ones and one that was cached.
    assert shape(plan) == [("b", 8, 12)]
    assert isinstance(started, Started)
    assert started.block_ids[:2] == (0, 1)
    assert (s.pool.num_cached, s.pool.num_free, s.pool.num_evicted) == (1, 0, 1)
    s.check()


@pytest.mark.parametrize("comes_by_lease", [False, True])
def test_what_a_preempted_sequence_finds_again_is_no_hit(comes_by_lease: bool) -> None:
    """Else prompts that have nothing in common get a share of their tokens from the cache, by its figures."""
    s = scheduler(num_blocks=8, max_batch_tokens=32)
    sequences = [spec("a", (1,) * 9, max_tokens=16), spec("b", (2,) * 9, max_tokens=16)]
    for sequence in sequences:
        if comes_by_lease:
            assert s.reserve(sequence, 0.0).num_cached_blocks == 0
            s.join(sequence.sequence_id, TokenChunk(sequence.sequence_id, 0, (3,)), 0.0)
        else:
            s.add(sequence, hands_off=False, now=0.0)
    starts = []
    while s.num_sequences:
        starts += [start for _, start, num_tokens in step(s, 3) if num_tokens > 1]
    assert s.num_preempted > 0
    assert max(starts) > 0, "it begins behind blocks of its own that are still there"
    stats = s.prefix_cache.stats()
    assert (stats.query_tokens, stats.hit_tokens) == (18, 0)


def test_a_preempted_sequence_finds_its_blocks_again() -> None:
    s = scheduler(num_blocks=5)
    s.add(spec("a", 6, max_tokens=9), hands_off=False, now=0.0)
    s.add(spec("b", (1, 2, 3, 4, 5, 6, 7), max_tokens=9), hands_off=False, now=0.0)
    told: list[list[tuple[str, int, int]]] = []
    while s.num_sequences:
        told.append(step(s))
    assert s.num_preempted == 1
    restarts = [piece for pieces in told for piece in pieces if piece[0] == "b" and piece[2] > 1]
    assert restarts[0] == ("b", 0, 7)
    assert restarts[1][1] == 4, "its first block had not been needed"


def test_nothing_of_a_failed_step_is_found() -> None:
    s = scheduler()
    s.add(spec("a", 13), hands_off=True, now=0.0)
    plan = launch(s)
    s.fail(plan, InternalError("boom"), 0.0)
    assert len(s.pool.known) == 0
    s.release("a", 0.0)
    assert s.pool.num_free == 64


def test_what_led_to_bad_logits_is_not_found_whoever_holds_it() -> None:
    s = scheduler()
    finish(s, spec("a", 9, max_tokens=1))
    s.add(spec("b", 9), hands_off=False, now=0.0)
    s.add(spec("c", 9), hands_off=False, now=0.0)
    plan = launch(s)
    assert shape(plan) == [("b", 8, 1), ("c", 8, 1)]
    token = TokenChunk("c", 0, (1,))
    s.apply(plan, StepResult({"c": token}, {"b": BadLogits("NaN")}), 0.0)
    s.check()
    assert (len(s.pool.known), s.pool.num_held) == (0, 3)
    s.cancel("c", 0.0)
    assert s.pool.num_free == 64


def test_blocks_that_a_dropped_piece_may_write_to_are_not_found_yet() -> None:
    s = scheduler()
    s.add(spec("a", 6), hands_off=False, now=0.0)
    first, ahead = launch(s), launch(s)
    land(s, first, 5, 6, 7)
    # Eight tokens are computed, but the step ahead writes the seventh once more.
    assert s.prefix_cache.stats().known_blocks == 0
    land(s, ahead, 6)
    step(s)
    assert s.prefix_cache.stats().known_blocks == 2


def test_a_held_sequence_is_found_and_goes_on() -> None:
    s = scheduler()
    s.add(spec("a", 9), hands_off=True, now=0.0)
    plan = launch(s)
    _, handoff = land(s, plan)
    assert isinstance(handoff, Handoff)
    s.add(spec("b", 9), hands_off=False, now=0.0)
    assert step(s) == [("b", 8, 1)]
    s.release("a", 0.0)
    s.check()
    assert step(s) == [("b", 9, 1)]


def test_the_number_of_cached_blocks_is_bounded() -> None:
    s = scheduler(max_cached=2)
    finish(s, spec("a", 21, max_tokens=1))
    assert (s.pool.num_cached, s.pool.num_free) == (2, 62)
    s.add(spec("b", 21), hands_off=False, now=0.0)
    assert step(s) == [("b", 8, 13)], "the beginning is kept"
    assert len(s.pool.known) == 5, "what is held does not count"
    assert s.prefix_cache.stats().max_cached_blocks == 2


def test_drop_forgets_what_is_held_too() -> None:
    s = scheduler()
    finish(s, spec("a", 9, max_tokens=1))
    s.add(spec("b", (1,) * 9), hands_off=False, now=0.0)
    step(s)
    assert (s.pool.num_cached, s.prefix_cache.drop()) == (2, 4)
    s.check()
    assert s.pool.num_available == s.pool.num_free == 64 - 3
    s.add(spec("c", (1,) * 9), hands_off=False, now=0.0)
    assert step(s) == [("b", 9, 1), ("c", 0, 9)]
    s.cancel("b", 0.0)
    s.cancel("c", 0.0)
    s.check()
    assert s.pool.num_cached == 2


def test_bytes_are_checked_when_blocks_are_used_and_not_while_a_prompt_waits() -> None:
    """A digest of a long prompt's KV takes longer than a step, and the engine's lock is held meanwhile."""
    digested: list[int] = []

    def digest_of(block: int) -> bytes:
        digested.append(block)
        return b""

    config = scheduler(max_model_tokens=32).config
    s = Scheduler(config, BlockPool(8), SCHEME, digest_of)
    finish(s, spec("before", 9, max_tokens=1))
    assert digested == [0, 1], "when they became known"
    s.add(spec("long", (1, 2, 3, 4, 5), max_tokens=20), hands_off=False, now=0.0)
    step(s)
    digested.clear()
    s.add(spec("waits", 28, max_tokens=1), hands_off=False, now=0.0)
    for _ in range(2):
        assert [name for name, *_ in step(s)] == ["long"]
        with pytest.raises(NoBlocks):
            s.reserve(spec("refused", 28, max_tokens=4), 0.0)
    assert digested == []
    s.cancel("long", 0.0)
    assert step(s) == [("waits", 8, 16)]
    assert digested[:2] == [0, 1], "once, and then those that have become known"


def test_a_follower_hears_of_all_in_parts_and_then_of_the_sum_of_changes() -> None:
    s = scheduler()
    finish(s, spec("a", 21, max_tokens=1))
    feed = s.pool.known.follow()

    def take(number: int, most: int = 9) -> CacheChanged | None:
        untold = feed.take(number, most)
        return None if untold is None else untold.message()

    first, second = take(5, 3), take(5, 3)
    assert first is not None
    assert second is not None
    assert (first.is_snapshot, second.is_snapshot, len(first.stored), len(second.stored)) == (True, False, 3, 2)
    assert take(5) is None
    keys = {*first.stored, *second.stored}
    s.prefix_cache.drop()
    finish(s, spec("a", 21, max_tokens=1))
    assert take(15) is None, "in sum nothing has changed"
    s.prefix_cache.drop()
    change = take(20)
    assert change is not None
    assert ({*change.dropped}, change.stored, change.is_snapshot, change.number) == (keys, (), False, 20)
    s.pool.known.unfollow(feed)
    s.pool.known.unfollow(feed)
    finish(s, spec("a", 21, max_tokens=1))
    assert take(25) is None
    feed = scheduler().pool.known.follow()
    assert take(0) == CacheChanged(0, (), (), is_snapshot=True), "all there is, nothing"


def test_a_prompt_that_is_scored_is_computed_whole_and_waits_for_no_other() -> None:
    s = scheduler()
    finish(s, spec("a", 13))
    scored = SamplingParams(temperature=0.0, seed=0, max_tokens=2, prompt_logprobs=0)
    prompts = [replace(spec(name, 13), sampling=scored) for name in ("b", "c")]
    for sequence in prompts:
        s.add(sequence, hands_off=False, now=0.0)
    assert s.load().queued_prompt_tokens == 26
    # Rows of logits are as many as sequences: eight.
    assert shape(launch(s)) == [("b", 0, 8)]
    assert s.reserve(replace(prompts[0], sequence_id="d"), 0.0).num_cached_blocks == 3, "another node scores it"
