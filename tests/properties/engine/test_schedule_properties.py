"""The laws of schedule_machine without a prefix cache."""

from dataclasses import replace

from hypothesis import settings

from baton.errors import PromptTooLong
from baton.types import SamplingParams, SequenceSpec
from engine.blocks import BlockPool
from engine.schedule import Scheduler
from tests.support.schedule_machine import CONFIG, SchedulerMachine


class OverlapMachine(SchedulerMachine):
    overlaps = True


class DraftingMachine(SchedulerMachine):
    max_drawn = 3


class DraftingOverlapMachine(OverlapMachine):
    max_drawn = 3


class TargetMachine(OverlapMachine):
    """Steps that decode are to be about four prompt tokens long."""

    config = replace(CONFIG, tbt_target_s=9.0, min_chunk_tokens=1)


class PriorityMachine(OverlapMachine):
    """Under memory pressure, and in a time in which prompts become overdue."""

    config = replace(CONFIG, max_prompt_wait_s=6.0)

    def priority(self) -> int:
        return self.num_made * 7 % 5 - 2


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=80, stateful_step_count=60)
TestOverlap = OverlapMachine.TestCase
TestOverlap.settings = settings(max_examples=80, stateful_step_count=60)
TestDrafting = DraftingMachine.TestCase
TestDrafting.settings = settings(max_examples=40, stateful_step_count=60)
TestDraftingOverlap = DraftingOverlapMachine.TestCase
TestDraftingOverlap.settings = settings(max_examples=40, stateful_step_count=60)
TestTarget = TargetMachine.TestCase
TestTarget.settings = settings(max_examples=80, stateful_step_count=60)
TestPriority = PriorityMachine.TestCase
TestPriority.settings = settings(max_examples=80, stateful_step_count=60)


def test_what_never_fits_is_refused_at_once() -> None:
    scheduler = Scheduler(CONFIG, BlockPool(4))
    sampling = SamplingParams(seed=0, max_tokens=10)
    for call in (
        lambda spec: scheduler.add(spec, hands_off=True, now=0.0),
        lambda spec: scheduler.add(spec, hands_off=False, now=0.0),
        lambda spec: scheduler.reserve(spec, 0.0),
    ):
        try:
            call(SequenceSpec("a", (1,) * 7, sampling))
        except PromptTooLong:
            continue
        raise AssertionError("17 tokens do not fit 4 blocks of 4")
