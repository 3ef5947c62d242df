import queue
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import pytest

from baton.clock import MonotonicClock
from baton.errors import Draining
from baton.node_messages import CacheChanged
from baton.prefix import PrefixScheme, key_of
from baton.types import FinishReason, KvLayout, PrefixCaching, Role, SamplingParams, SequenceSpec, TokenChunk
from engine.blocks import BlockPool, BlockState
from engine.events import EngineEvent, Failed, Handoff, Output, Started
from engine.fake import FakeRunner, expected_tokens
from engine.replica import Replica
from engine.schedule import Scheduler
from engine.scheduler_config import SchedulerConfig

LAYOUT = KvLayout(3, 64, 1, 1, 4, "float32")
SCHEME = PrefixScheme("fake", "fake", LAYOUT, PrefixCaching(phases_agree=True))
WAIT_S = 10.0


def spec(name: str, num_prompt: int = 9, max_tokens: int = 6) -> SequenceSpec:
    sampling = SamplingParams(temperature=0.0, seed=0, max_tokens=max_tokens)
    return SequenceSpec(name, tuple(range(1, num_prompt + 1)), sampling)


class Inbox:
    """Collects events from the engine thread; ``gate`` holds the thread in the listener."""

    def __init__(self) -> None:
        self.events: queue.Queue[EngineEvent] = queue.Queue()
        self.num_calls = 0

    def listen(self, events: list[EngineEvent]) -> None:
        self.num_calls += 1
        for event in events:
            self.events.put(event)

    def next(self) -> EngineEvent:
        return self.events.get(timeout=WAIT_S)

    def tokens(self) -> list[int]:
        found: list[int] = []
        while True:
            event = self.next()
            assert isinstance(event, Output)
            found += event.chunk.token_ids
            if event.chunk.finish_reason is not None:
                return found


class Gate:
    """A runner's pause that stands still until it is opened."""

    def __init__(self) -> None:
        self.reached = threading.Semaphore(0)
        self.opened = threading.Semaphore(0)

    def pause(self, _: float) -> None:
        self.reached.release()
        assert self.opened.acquire(timeout=WAIT_S)

    def wait(self) -> None:
        assert self.reached.acquire(timeout=WAIT_S)


class Recorder:
    def __init__(self) -> None:
        self.told: list[tuple[int, int]] = []

    def layer_ready(self, layer: int, num_blocks: int) -> None:
        self.told.append((layer, num_blocks))


@contextmanager
def replica(
    gate: Gate | None = None,
    *,
    max_batch_tokens: int = 16,
    overlaps: bool = False,
    scheme: PrefixScheme | None = None,
) -> Iterator[tuple[Replica, FakeRunner]]:
    runner = (
        FakeRunner(LAYOUT, overlaps=overlaps)
        if gate is None
        else FakeRunner(LAYOUT, step_delay_s=LAYOUT.num_layers, pause=gate.pause, overlaps=overlaps)
    )
    config = SchedulerConfig(block_tokens=4, max_batch_tokens=max_batch_tokens, max_num_seqs=8, max_model_tokens=200)
    engine = Replica(
        runner,
        Scheduler(config, BlockPool(LAYOUT.num_blocks), scheme),
        num_layers=LAYOUT.num_layers,
        clock=MonotonicClock(),
    )
    engine.start()
    try:
        yield engine, runner
        engine.check()
    finally:
        if gate is not None:
            gate.opened.release(10_000)
        assert engine.stop(WAIT_S)


def test_tokens_of_several_sequences_in_one_call_per_step() -> None:
    inbox = Inbox()
    with replica() as (engine, runner):
        specs = [spec(f"s{i}", num_prompt=5 + i) for i in range(3)]
        for s in specs:
            engine.submit(s, hands_off=False, listener=inbox.listen)
        found: dict[str, list[int]] = {s.sequence_id: [] for s in specs}
        while any(len(tokens) < 6 for tokens in found.values()):
            event = inbox.next()
            assert isinstance(event, Output)
            found[event.sequence_id] += event.chunk.token_ids
        assert found == {s.sequence_id: expected_tokens(s, LAYOUT) for s in specs}
        assert inbox.num_calls == runner.num_steps
        assert runner.entered_by == ["engine"], "a thread says once that it is the one, for the sake of its device"
        assert engine.num_sequences == 0
        assert engine.stats().num_tokens == sum(5 + i + 5 for i in range(3))
    assert sorted(runner.forgotten) == ["s0", "s1", "s2"]


@pytest.mark.parametrize("overlaps", [False, True])
def test_tokens_are_the_same_with_steps_that_overlap(overlaps: bool) -> None:
    inbox = Inbox()
    kinds: list[dict[str, object]] = [{}, {"temperature": 1.0}, {"logprobs": 1}, {"repetition_penalty": 1.2}]
    with replica(overlaps=overlaps) as (engine, runner):
        specs = []
        for kind in (*kinds[:2], *kinds[:2], *kinds):
            sampling = SamplingParams(**{"temperature": 0.0, **kind}, seed=3, max_tokens=12, stop_token_ids=range(400))  # type: ignore[arg-type]
            specs.append(SequenceSpec(f"s{len(specs)}", (*range(1, 5 + len(specs)),), sampling))
        for some in (specs[:4], specs[4:]):
            found: dict[str, list[int]] = {s.sequence_id: [] for s in some}
            for s in some:
                engine.submit(s, hands_off=False, listener=inbox.listen)
            while found != {s.sequence_id: expected_tokens(s, LAYOUT) for s in some}:
                event = inbox.next()
                assert isinstance(event, Output)
                found[event.sequence_id] += event.chunk.token_ids
        assert engine.num_sequences == 0
        assert engine.ledger()[1] == LAYOUT.num_blocks
        assert (runner.num_fed > 10) == (runner.num_overlapped > 5) == overlaps


@pytest.mark.parametrize("when", ["launch", "result"])
def test_a_step_that_fails_beside_another_leaves_nothing_behind(when: str) -> None:
    inbox, gate = Inbox(), Gate()
    with replica(gate, overlaps=True) as (engine, runner):
        engine.submit(spec("a"), hands_off=False, listener=inbox.listen)
        # The first step computes, the second one is launched behind it.
        gate.wait()
        assert runner.num_overlapped == 1
        if when == "launch":
            runner.next_error = RuntimeError("out of luck")
        else:
            runner.late_error = RuntimeError("out of luck")
        gate.opened.release(10_000)
        while isinstance(event := inbox.next(), Output):
            pass
        assert isinstance(event, Failed)
        assert "out of luck" in event.failure.message
        engine.submit(spec("b"), hands_off=False, listener=inbox.listen)
        assert inbox.tokens() == expected_tokens(spec("b"), LAYOUT)
        assert engine.stats().num_failed_steps == 1
        assert engine.ledger()[1] == 64


def test_cancel_with_two_steps_under_way_frees_after_both() -> None:
    inbox, gate = Inbox(), Gate()
    with replica(gate, overlaps=True) as (engine, runner):
        engine.submit(spec("a", 8), hands_off=False, listener=inbox.listen)
        gate.wait()
        engine.cancel("a")
        assert engine.ledger()[1] == 61
        gate.opened.release(LAYOUT.num_layers - 1)
        for _ in range(LAYOUT.num_layers - 1):
            gate.wait()
        gate.opened.release()
        # In the second step, which has its blocks.
        gate.wait()
        assert runner.num_steps == 2
        assert engine.ledger()[1] == 61
        gate.opened.release(10_000)
        engine.submit(spec("b"), hands_off=False, listener=inbox.listen)
        assert inbox.tokens() == expected_tokens(spec("b"), LAYOUT)
        assert engine.ledger()[1] == 64


def test_layers_are_told_as_they_are_done_and_all_before_the_token() -> None:
    inbox, gate, recorder = Inbox(), Gate(), Recorder()
    with replica(gate, max_batch_tokens=8) as (engine, _):
        engine.submit(spec("a", 13), hands_off=True, listener=inbox.listen)
        gate.wait()
        assert inbox.next() == Started("a", (0, 1, 2, 3))
        engine.attach("a", recorder)
        assert recorder.told == []
        for told in ([(0, 2)], [(0, 2), (1, 2)]):
            gate.opened.release()
            gate.wait()
            assert recorder.told == told
        gate.opened.release(100)
        assert isinstance(inbox.next(), Output)
        assert recorder.told == [(0, 2), (1, 2), (2, 2), (0, 4), (1, 4), (2, 4)]
        engine.release("a")
        assert engine.ledger()[1] == 64


@pytest.mark.parametrize("when", ["in the last layer", "after the step"])
def test_a_sink_that_comes_late_hears_everything_once(when: str) -> None:
    inbox, gate, recorder = Inbox(), Gate(), Recorder()
    with replica(gate) as (engine, _):
        engine.submit(spec("a", 9), hands_off=True, listener=inbox.listen)
        gate.opened.release(LAYOUT.num_layers - 1)
        for _ in range(LAYOUT.num_layers):
            gate.wait()
        assert isinstance(inbox.next(), Started)
        if when == "in the last layer":
            engine.attach("a", recorder)
        gate.opened.release(100)
        assert isinstance(inbox.next(), Output)
        if when == "after the step":
            engine.attach("a", recorder)
        assert sorted(recorder.told) == [(0, 3), (1, 3), (2, 3)]
        engine.release("a")
        engine.attach("a", recorder)
        assert len(recorder.told) == 3


def test_an_exception_in_a_step_fails_its_sequences_and_the_engine_goes_on() -> None:
    inbox = Inbox()
    with replica() as (engine, runner):
        runner.next_error = RuntimeError("out of luck")
        engine.submit(spec("a"), hands_off=False, listener=inbox.listen)
        failed = inbox.next()
        assert isinstance(failed, Failed)
        assert failed.failure.code == "InternalError"
        assert "RuntimeError: out of luck" in failed.failure.message
        engine.submit(spec("b"), hands_off=False, listener=inbox.listen)
        assert inbox.tokens() == expected_tokens(spec("b"), LAYOUT)
        assert engine.stats().num_failed_steps == 1
        assert engine.ledger()[1] == 64


def test_cancel_in_a_step_does_not_wait_for_it_and_frees_after_it() -> None:
    inbox, gate = Inbox(), Gate()
    with replica(gate) as (engine, runner):
        engine.submit(spec("a"), hands_off=False, listener=inbox.listen)
        gate.wait()
        engine.cancel("a")
        assert engine.ledger()[1] == 61
        engine.submit(spec("b"), hands_off=False, listener=inbox.listen)
        gate.opened.release(1000)
        assert inbox.tokens() == expected_tokens(spec("b"), LAYOUT)
        assert engine.ledger()[1] == 64
        assert "a" in runner.forgotten


def test_stalled_grows_while_a_step_hangs_and_is_zero_when_idle() -> None:
    inbox, gate = Inbox(), Gate()
    with replica(gate) as (engine, _):
        assert engine.stalled_s == 0.0
        engine.submit(spec("a", max_tokens=1), hands_off=False, listener=inbox.listen)
        gate.wait()
        first = engine.stalled_s
        assert threading.Event().wait(0.02) is False
        assert engine.status(Role.MIXED).stalled_s >= first + 0.02
        gate.opened.release(1000)
        assert inbox.tokens() == expected_tokens(spec("a", max_tokens=1), LAYOUT)


def test_steps_are_measured_from_token_to_token_and_told() -> None:
    with replica() as (engine, runner):
        inbox = Inbox()
        assert engine.status(Role.MIXED).step_times is None
        runner.step_delay_s = 0.02
        # The time between them is no step's.
        for name in ("a", "b"):
            engine.submit(spec(name, max_tokens=20), hands_off=False, listener=inbox.listen)
            inbox.tokens()
            time.sleep(0.2)
        told = engine.status(Role.MIXED).step_times
        assert told is not None
        # A bound above as well: the clock of a loaded machine is late, but not by ten times.
        assert 0.019 < told.step_s(0, 1, 20) < 0.19


def test_waiting_for_memory_is_not_a_stall() -> None:
    inbox = Inbox()
    with replica(max_batch_tokens=200) as (engine, _):
        for name in ("a", "b"):
            engine.submit(spec(name, 130), hands_off=True, listener=inbox.listen)
        assert [type(inbox.next()) for _ in range(3)] == [Started, Output, Handoff]
        while engine.status(Role.PREFILL).stalled_s:
            threading.Event().wait(0.001)
        assert engine.status(Role.PREFILL).num_waiting == 1
        engine.release("a")
        assert inbox.next() == Started("b", tuple(range(33)))
        assert isinstance(inbox.next(), Output)
        engine.release("b")


def test_lease_join_and_decode() -> None:
    inbox = Inbox()
    with replica() as (engine, runner):
        s = spec("a", 6)
        blocks = engine.reserve(s).block_ids
        engine.set_epoch("a", 5)
        assert engine.ledger()[2][0].epoch == 5
        for layer in range(LAYOUT.num_layers):
            for position, token in enumerate(s.prompt_token_ids):
                runner._cells[LAYOUT.offset(layer, blocks[position // 4]) // 4 + position % 4] = token + 1 + layer
        expected = expected_tokens(s, LAYOUT)
        engine.join("a", TokenChunk("a", 0, (expected[0],)), inbox.listen)
        assert inbox.tokens() == expected[1:]


@pytest.mark.parametrize("overlaps", [False, True])
def test_equal_prompts_at_once_yield_what_one_alone_does_and_are_computed_once(overlaps: bool) -> None:
    inbox, gate = Inbox(), Gate()
    with replica(gate, overlaps=overlaps, scheme=SCHEME) as (engine, _):
        specs = [spec(f"s{i}", 9, max_tokens=8) for i in range(6)]
        for s in specs:
            engine.submit(s, hands_off=False, listener=inbox.listen)
        gate.opened.release(10_000)
        found: dict[str, list[int]] = {s.sequence_id: [] for s in specs}
        while any(len(tokens) < 8 for tokens in found.values()):
            event = inbox.next()
            assert isinstance(event, Output)
            found[event.sequence_id] += event.chunk.token_ids
        assert found == {s.sequence_id: expected_tokens(s, LAYOUT) for s in specs}
        # Of the others' prompts the last token alone.
        assert engine.stats().num_tokens == 9 + 5 * 1 + 6 * 7
        assert engine.cache_stats().hit_tokens == 5 * 8
        status = engine.status(Role.MIXED)
        assert (status.free_blocks, status.cached_blocks) == (64, 4)
        assert (engine.drop_cache(), engine.status(Role.MIXED).cached_blocks) == (4, 0)


def test_blocks_that_were_there_are_told_before_the_first_step_is_over() -> None:
    inbox, gate, recorder = Inbox(), Gate(), Recorder()
    with replica(gate, scheme=SCHEME) as (engine, _):
        engine.submit(spec("a", 9, max_tokens=1), hands_off=False, listener=inbox.listen)
        gate.opened.release(LAYOUT.num_layers)
        inbox.tokens()
        for _ in range(LAYOUT.num_layers):
            gate.wait()
        engine.submit(spec("b", 11), hands_off=True, listener=inbox.listen)
        gate.wait()
        assert inbox.next() == Started("b", (0, 1, 2), 2)
        engine.attach("b", recorder)
        assert recorder.told == [(layer, 2) for layer in range(LAYOUT.num_layers)]
        gate.opened.release(10_000)
        assert [type(inbox.next()) for _ in range(2)] == [Output, Handoff]
        assert recorder.told[LAYOUT.num_layers :] == [(layer, 3) for layer in range(LAYOUT.num_layers)]
        engine.release("b")


def test_followers_of_the_cache_know_what_is_found_before_the_tokens_are_told() -> None:
    inbox = Inbox()
    with replica(scheme=SCHEME) as (engine, _):
        feed = engine.follow_cache()
        assert engine.take_cache_changes(feed, 99) == CacheChanged(0, (), (), is_snapshot=True)
        assert engine.take_cache_changes(feed, 99) is None
        s = spec("a", 9, max_tokens=1)
        taken: list[CacheChanged | None] = []

        def listen(events: list[EngineEvent]) -> None:
            taken.append(engine.take_cache_changes(feed, 99))
            inbox.listen(events)

        engine.submit(s, hands_off=False, listener=listen)
        inbox.tokens()
        keys = {key_of(value) for value in SCHEME.block_hashes(s.prompt_token_ids, 9)}
        (change,) = taken
        assert change is not None
        assert (change.number, {*change.stored}, change.dropped, change.is_snapshot) == (2, keys, (), False)
        late = engine.take_cache_changes(engine.follow_cache(), 1)
        assert late is not None
        assert (late.is_snapshot, len(late.stored)) == (True, 1)
        engine.drop_cache()
        dropped = engine.take_cache_changes(feed, 99)
        assert dropped is not None
        assert ({*dropped.dropped}, dropped.number) == (keys, 4)
        engine.unfollow_cache(feed)


class CountedPool(BlockPool):
    """Notes how many blocks are forgotten at once."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__(num_blocks)
        self.forgotten: list[int] = []

    def forget(self, blocks: Iterable[int]) -> int:
        self.forgotten.append(super().forget(blocks))
        return self.forgotten[-1]


def test_a_large_cache_is_dropped_in_parts_between_which_steps_go_on() -> None:
    pool, num_blocks = CountedPool(5000), 5000
    pool.allocate("s", num_blocks, BlockState.PROMPT, 0.0)
    for index in range(num_blocks):
        pool.cache("s", index, index.to_bytes(16, "little"))
    pool.free("s")
    scheduler = Scheduler(SchedulerConfig(block_tokens=4, max_model_tokens=200), pool, SCHEME)
    engine = Replica(FakeRunner(LAYOUT), scheduler, num_layers=LAYOUT.num_layers, clock=MonotonicClock())
    assert engine.drop_cache() == num_blocks
    assert pool.num_free == num_blocks
    assert sum(pool.forgotten) == num_blocks
    assert max(pool.forgotten) <= 2048, "the engine's lock is held for milliseconds"


@pytest.mark.parametrize("overlaps", [False, True])
def test_hold_then_attach_then_resume(overlaps: bool) -> None:
    inbox, recorder, one = Inbox(), Recorder(), spec("a", 9, max_tokens=150)
    with replica(overlaps=overlaps) as (engine, _):
        engine.submit(one, hands_off=False, listener=inbox.listen)
        found: list[int] = []
        for _ in range(3):
            event = inbox.next()
            assert isinstance(event, Output)
            found += event.chunk.token_ids
        engine.hold("a")
        while isinstance(event := inbox.next(), Output):
            found += event.chunk.token_ids
        assert isinstance(event, Handoff)
        assert event.tokens.token_ids == tuple(found)
        assert len(event.block_ids) == LAYOUT.blocks_for(9 + len(found) - 1)
        engine.attach("a", recorder)
        assert recorder.told == [(layer, len(event.block_ids)) for layer in range(LAYOUT.num_layers)]
        engine.resume("a")
        assert found + inbox.tokens() == expected_tokens(one, LAYOUT)
        engine.attach("a", recorder)
        assert len(recorder.told) == LAYOUT.num_layers
        assert engine.ledger()[1] == 64


def test_hold_of_one_that_nothing_is_computed_for_is_told_at_once() -> None:
    """The engine thread sleeps; it wakes up to tell."""
    inbox = Inbox()
    with replica() as (engine, _):
        engine.submit(spec("a", max_tokens=9), hands_off=True, listener=inbox.listen)
        assert [type(inbox.next()) for _ in range(3)] == [Started, Output, Handoff]
        engine.resume("a")
        engine.hold("a")
        while isinstance(event := inbox.next(), Output):
            assert event.chunk.finish_reason is None
        assert isinstance(event, Handoff)
        engine.release("a")
        assert engine.ledger()[1] == 64


def test_draining_refuses_new_work_and_finishes_the_old() -> None:
    inbox, gate = Inbox(), Gate()
    with replica(gate) as (engine, _):
        engine.submit(spec("a"), hands_off=False, listener=inbox.listen)
        engine.drain()
        with pytest.raises(Draining, match="about to leave"):
            engine.submit(spec("b"), hands_off=False, listener=inbox.listen)
        with pytest.raises(Draining, match="about to leave"):
            engine.reserve(spec("b"))
        assert engine.status(Role.MIXED).draining
        gate.opened.release(1000)
        assert inbox.tokens() == expected_tokens(spec("a"), LAYOUT)


def test_a_dead_engine_thread_is_reported() -> None:
    died = threading.Event()
    scheduler = Scheduler(SchedulerConfig(block_tokens=4, max_model_tokens=200), BlockPool(64))
    runner = FakeRunner(LAYOUT)
    engine = Replica(runner, scheduler, num_layers=3, clock=MonotonicClock(), on_fatal=lambda _: died.set())
    engine.start()

    def broken(_: list[EngineEvent]) -> None:
        raise ValueError("a listener of ours is broken")

    engine.submit(spec("a", max_tokens=1), hands_off=False, listener=broken)
    assert died.wait(WAIT_S)
    assert engine.stop(WAIT_S)


def test_finish_reason_reaches_the_listener() -> None:
    inbox = Inbox()
    with replica() as (engine, _):
        engine.submit(spec("a", max_tokens=1), hands_off=False, listener=inbox.listen)
        event = inbox.next()
        assert isinstance(event, Output)
        assert event.chunk.finish_reason is FinishReason.LENGTH
        assert event.prefill is not None
        assert event.prefill.compute_s >= 0
