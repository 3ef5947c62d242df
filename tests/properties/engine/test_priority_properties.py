"""However prompts arrive: none waits longer than the bound and those that came before it, none is passed over by a
worse one, and every sequence that decodes is in every step."""

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from baton.types import SamplingParams, SequenceSpec, TokenChunk
from engine.blocks import BlockPool
from engine.schedule import Scheduler
from engine.scheduler_config import SchedulerConfig
from engine.step import StepPlan, StepResult

MAX_WAIT_S = 8.0
MAX_NUM_SEQS = 6
BUDGET = 16
CONFIG = SchedulerConfig(
    block_tokens=4, max_batch_tokens=BUDGET, max_num_seqs=MAX_NUM_SEQS, max_model_tokens=64, watermark=0.0,
    max_prompt_wait_s=MAX_WAIT_S,
)  # fmt: skip
# (steps since the one before, prompt tokens, priority)
ARRIVALS = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 30), st.integers(-2, 2)), min_size=1, max_size=40)


class Node:
    """A step takes a second; each sequence draws three tokens. There is memory for all."""

    def __init__(self) -> None:
        self.scheduler = Scheduler(CONFIG, BlockPool(1024))
        self.now = 0.0
        self.specs: dict[str, SequenceSpec] = {}
        self.came_s: dict[str, float] = {}
        self.first_s: dict[str, float] = {}
        # Their first chunk was planned.
        self.begun: set[str] = set()
        self.decoding: set[str] = set()

    def add(self, num_prompt: int, priority: int) -> None:
        sampling = SamplingParams(temperature=0.0, seed=0, max_tokens=3)
        spec = SequenceSpec(f"s{len(self.specs)}", (1,) * num_prompt, sampling, priority=priority)
        self.scheduler.add(spec, hands_off=False, now=self.now)
        self.specs[spec.sequence_id], self.came_s[spec.sequence_id] = spec, self.now

    def step(self) -> None:
        plan, _ = self.scheduler.schedule(self.now)
        planned = set() if plan is None else {p.sequence.sequence_id for p in plan.pieces}
        assert self.decoding <= planned, "one that decodes was left out"
        self.check_order(planned - self.decoding)
        self.now += 1
        if plan is not None:
            self.land(plan)
        self.scheduler.check()

    def check_order(self, planned: set[str]) -> None:
        """No prompt is computed while a better one, or one that is overdue, waits; but while all slots are taken those
        that have begun are."""
        waiting = set(self.specs) - set(self.first_s) - planned
        begun_before, self.begun = self.begun, self.begun | planned
        has_slots = len(self.begun - set(self.first_s) | self.decoding) < MAX_NUM_SEQS - 1
        for name in planned:
            for other in waiting if has_slots or name not in begun_before else waiting & begun_before:
                assert self.specs[name].priority <= self.specs[other].priority or self.is_old(name), (name, other)
                assert not self.is_overdue(other) or self.is_old(name), (name, other)

    def is_old(self, name: str) -> bool:
        return self.now - self.came_s[name] >= MAX_WAIT_S

    def is_overdue(self, name: str) -> bool:
        """For longer than it may take to be seen."""
        return self.now - self.came_s[name] >= MAX_WAIT_S * 17 / 16

    def land(self, plan: StepPlan) -> None:
        drawn = {}
        for piece in plan.pieces:
            name = piece.sequence.sequence_id
            if piece.samples:
                drawn[name] = TokenChunk(name, piece.sequence.num_generated, (1,))
                self.first_s.setdefault(name, self.now)
                self.decoding.add(name)
                if piece.sequence.num_generated == 2:
                    self.decoding.remove(name)
        self.scheduler.apply(plan, StepResult(drawn), self.now)

    def bound_s(self, name: str) -> float:
        """Overdue, then behind those that came before it, beside all that may decode. A step computes whole prompts or
        up to a block boundary."""
        before = [spec for other, spec in self.specs.items() if self.came_s[other] <= self.came_s[name]]
        least = BUDGET - MAX_NUM_SEQS - CONFIG.block_tokens
        slots = len(before) * 3
        return MAX_WAIT_S * 17 / 16 + sum(math.ceil(len(s.prompt_token_ids) / least) for s in before) + slots + 1


@settings(max_examples=150)
@given(arrivals=ARRIVALS)
def test_no_prompt_waits_for_ever_and_no_decode_is_left_out(arrivals: list[tuple[int, int, int]]) -> None:
    node = Node()
    for num_steps, num_prompt, priority in arrivals:
        for _ in range(num_steps):
            node.step()
        node.add(num_prompt, priority)
    for _ in range(400):
        if not node.scheduler.num_sequences:
            break
        node.step()
    assert set(node.first_s) == set(node.specs)
    for name, first_s in node.first_s.items():
        assert first_s - node.came_s[name] <= node.bound_s(name)


def test_the_worst_prompt_is_computed_under_a_load_of_better_ones_that_never_ends() -> None:
    node = Node()
    node.add(30, 2)
    while "s0" not in node.first_s:
        node.add(BUDGET, -1)
        node.step()
        assert node.now < 2 * MAX_WAIT_S
    assert node.now > MAX_WAIT_S
