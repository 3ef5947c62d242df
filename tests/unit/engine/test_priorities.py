"""Whose turn it is on a node: by priority, then by age; none waits for ever, and the worst yields its room first."""

from baton.prefix import PrefixScheme
from baton.types import KvLayout, PrefixCaching, SamplingParams, SequenceSpec, TokenChunk
from engine.blocks import BlockPool
from engine.schedule import Scheduler
from engine.scheduler_config import SchedulerConfig
from engine.step import StepResult

SCHEME = PrefixScheme("fake", "fake", KvLayout(1, 64, 1, 1, 4, "float32"), PrefixCaching(phases_agree=True))


def scheduler(num_blocks: int = 64, *, scheme: PrefixScheme | None = None) -> Scheduler:
    config = SchedulerConfig(
        block_tokens=4, max_batch_tokens=16, max_num_seqs=8, max_model_tokens=256, watermark=0.0, max_prompt_wait_s=10.0
    )
    return Scheduler(config, BlockPool(num_blocks), scheme)


def add(s: Scheduler, name: str, num_prompt: int, priority: int = 0, *, now: float = 0.0, first: int = 100) -> None:
    sampling = SamplingParams(temperature=0.0, seed=0, max_tokens=8)
    prompt = tuple(range(first, first + num_prompt))
    s.add(SequenceSpec(name, prompt, sampling, priority=priority), hands_off=False, now=now)


def step(s: Scheduler, now: float = 0.0) -> dict[str, int]:
    """Tokens by sequence, in their order."""
    plan, _ = s.schedule(now)
    if plan is None:
        return {}
    pieces = [(p.sequence.sequence_id, p) for p in plan.pieces]
    drawn = {name: TokenChunk(name, p.sequence.num_generated, (1,)) for name, p in pieces if p.samples}
    s.apply(plan, StepResult(drawn), now)
    s.check()
    return {name: p.num_tokens for name, p in pieces}


def test_a_prompt_of_a_better_priority_goes_first_even_before_one_that_has_begun() -> None:
    s = scheduler()
    add(s, "later", 8)
    add(s, "long", 40, 1)
    add(s, "equal", 8)
    assert step(s) == {"later": 8, "equal": 8}
    assert step(s) == {"later": 1, "equal": 1, "long": 12}
    add(s, "best", 10, -1)
    assert step(s) == {"later": 1, "equal": 1, "best": 10, "long": 4}


def test_a_prompt_that_came_long_ago_goes_before_better_ones_that_did_not() -> None:
    s = scheduler()
    add(s, "old", 32, 5, now=0.0)
    for second in range(1, 10):
        add(s, f"better-{second}", 16, 0, now=float(second))
        assert step(s, float(second)) == {f"better-{second}": 16}
        s.cancel(f"better-{second}", float(second))
    add(s, "better", 16, 0, now=11.0)
    assert step(s, 11.0) == {"old": 16}
    # It stays ahead until its prompt is computed.
    assert step(s, 11.1) == {"old": 16}
    assert step(s, 11.2) == {"old": 1, "better": 12}


def test_one_that_has_begun_is_not_forgotten_either() -> None:
    s = scheduler()
    add(s, "old", 40, 5)
    assert step(s) == {"old": 16}
    for second in range(1, 10):
        add(s, f"better-{second}", 16, 0, now=float(second))
        assert step(s, float(second)) == {f"better-{second}": 16}
        s.cancel(f"better-{second}", float(second))
    add(s, "better", 16, 0, now=11.0)
    assert step(s, 11.0) == {"old": 16}


def test_one_that_waits_for_the_blocks_of_another_lends_it_its_place() -> None:
    s = scheduler(scheme=SCHEME)
    add(s, "leader", 40, 5)
    assert step(s) == {"leader": 16}
    add(s, "other", 16, 0, first=300)
    add(s, "follower", 40, -1)
    assert step(s) == {"leader": 16}
    assert step(s) == {"leader": 8, "other": 8}


def test_a_prompt_without_room_holds_up_those_that_have_not_begun_alone() -> None:
    s = scheduler(num_blocks=12)
    add(s, "begun", 30, 5)
    assert step(s) == {"begun": 16}
    add(s, "large", 40, 0)
    add(s, "small", 4, 1)
    assert step(s) == {"begun": 14}


def test_the_worst_priority_yields_its_room_first_then_the_youngest() -> None:
    s = scheduler(num_blocks=6)
    for name, priority in (("worst", 5), ("old", 0), ("young", 0)):
        add(s, name, 6, priority)
    step(s)
    step(s)
    order = []
    before = s.num_preempted
    for _ in range(6):
        told = step(s)
        if s.num_preempted > before:
            before = s.num_preempted
            order.append({"worst", "old", "young"} - set(told))
    assert order[0] == {"worst"}
    assert order[1] == {"worst", "young"}
