"""The engine thread: schedule -> launch -> result -> apply, in a loop. Owns the scheduler, its mutex and the runner's
thread. If the runner overlaps, a step is scheduled and launched while the one before it runs.

Everything public may be called from the event loop and returns in microseconds, or in 0.03 ms per 1,000 tokens where a
prompt's blocks are hashed: the mutex is held to schedule and to apply, never while the model runs. Events go out in one
call per step and listener, from the engine thread. What to compute and when is the scheduler's decision.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from baton.clock import Clock
from baton.defects import Defects
from baton.errors import BatonError, Draining, InternalError, described
from baton.node_messages import CacheChanged
from baton.timeline import Timeline
from baton.types import NodeStatus, Role, SequenceSpec, TokenChunk
from engine.blocks import BlockState, OwnerEntry
from engine.events import EngineEvent, Handoff, Started
from engine.known import CacheFeed
from engine.meter import EngineMeter, StepBook, TakenStep
from engine.prefix_cache import CacheStats
from engine.progress import Final, LayerProgress, LayerSink
from engine.schedule import Reserved, Scheduler, final_blocks
from engine.scheduler_config import SchedulerConfig
from engine.step import StepPlan, StepResult

# Upper bound on an idle wait.
_MAX_IDLE_S = 1.0
# Blocks that are dropped from the prefix cache at once: a few milliseconds.
_MAX_DROPPED = 2048

# Called in the engine thread with the events of one step; hands them on and returns.
Listener = Callable[[list[EngineEvent]], None]


class StepUnderway(Protocol):
    """A step that was launched."""

    def result(self) -> StepResult:
        """Waits until it is computed; called once."""
        ...


class RunnerLike(Protocol):
    """What the engine thread needs of a model runner; all calls come from that one thread.

    Results are taken in the order of the launches. Between a launch and its result at most one other step is launched,
    and that only if ``overlaps``: a token that a step draws then reaches the next one without the host
    (``Piece.token_is_on_device``). A sequence's state is read in both calls and belongs to the scheduler between them.
    """

    @property
    def overlaps(self) -> bool: ...

    def enter_thread(self) -> None:
        """The first call, in the thread that all others come from."""

    def launch(self, plan: StepPlan, on_layer: Callable[[int], None] | None = None) -> StepUnderway: ...

    def forget(self, sequence_id: str) -> None: ...


@dataclass(frozen=True, slots=True)
class _Flight:
    """A plan on its way through the runner; ``underway`` is None if launching it failed."""

    plan: StepPlan
    # Of watched prompts, after this step.
    finals: list[Final]
    launched_s: float
    underway: StepUnderway | None
    failure: BatonError | None = None


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters since the start."""

    num_steps: int
    num_failed_steps: int
    num_tokens: int
    num_preempted: int


class Replica:
    """One model replica: a runner, a scheduler and the thread that joins them."""

    def __init__(
        self,
        runner: RunnerLike,
        scheduler: Scheduler,
        *,
        num_layers: int,
        clock: Clock,
        on_fatal: Callable[[BaseException], None] | None = None,
        timeline: Timeline | None = None,
        meter: EngineMeter | None = None,
        prepare: Callable[[StepPlan], None] | None = None,
        defects: Defects | None = None,
    ) -> None:
        """``prepare``: called in the engine thread before each step is launched."""
        # The engine thread's own.
        self._defects = defects or Defects(logging.getLogger(__name__), clock)
        self._runner = runner
        self._scheduler = scheduler
        self._clock = clock
        self._on_fatal = on_fatal
        self._timeline = timeline or Timeline()
        self._meter = meter
        self._prepare = prepare
        self._book = StepBook(self._timeline, meter)
        self._progress = LayerProgress(
            num_layers,
            lambda sequence_id, error: self._defects.caught("engine", error, f"telling of blocks of {sequence_id}"),
        )
        self._changed = threading.Condition(threading.Lock())
        # All below is guarded by the condition's lock.
        self._listeners: dict[str, Listener] = {}
        self._to_forget: list[str] = []
        self._is_stopping = False
        self._is_draining = False
        # When the engine last made progress, None while it has nothing to do.
        self._busy_since_s: float | None = None
        self._num_steps = 0
        self._num_failed_steps = 0
        self._num_tokens = 0
        # The engine thread's own: steps that were launched, oldest first, and when the last one was over.
        self._flights: deque[_Flight] = deque()
        self._landed_s = 0.0
        # And when it last had nothing to do.
        self._idle_s = 0.0
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)

    # -- life

    def start(self) -> None:
        self._thread.start()

    def drain(self) -> None:
        """Accept nothing new from now on; what is here goes on."""
        with self._changed:
            self._is_draining = True

    def stop(self, timeout_s: float) -> bool:
        """End the thread after the running steps; False if that took longer. Blocks: call it off the event loop."""
        with self._changed:
            self._is_draining = True
            self._is_stopping = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # -- prompts

    def submit(self, spec: SequenceSpec, *, hands_off: bool, listener: Listener) -> None:
        """Queue a prompt; ``hands_off``: and ``hold`` it. Raises as Scheduler.add, and Draining."""
        with self._changed:
            self._refuse_draining()
            self._scheduler.add(spec, hands_off=hands_off, now=self._clock.now())
            self._listeners[spec.sequence_id] = listener
            if hands_off:
                self._progress.watch(spec.sequence_id)
            self._woken()

    def lend(self, sequence_id: str, num_blocks: int) -> tuple[int, ...]:
        """The blocks of a sequence that decodes, to be read while it goes on; ``attach`` tells of those that become
        full. As Scheduler.lend."""
        with self._changed:
            block_ids = self._scheduler.lend(sequence_id, num_blocks)
            self._progress.watch(sequence_id, self._scheduler.full_blocks(sequence_id))
            return block_ids

    def hold(self, sequence_id: str) -> None:
        """Stop the sequence between two tokens and keep its blocks: Handoff follows. As Scheduler.hold."""
        with self._changed:
            self._scheduler.hold(sequence_id)
            if sequence_id in self._listeners and not self._progress.is_watched(sequence_id):
                self._progress.watch(sequence_id)
            self._woken()

    def resume(self, sequence_id: str) -> None:
        """After Handoff, or ``lend``: go on here. As Scheduler.resume."""
        with self._changed:
            self._scheduler.resume(sequence_id, self._clock.now())
            self._progress.forget(sequence_id)
            self._woken()

    def attach(self, sequence_id: str, sink: LayerSink) -> None:
        """Tell ``sink`` about the final blocks of a sequence that is lent or is to be held; those there are at once."""
        self._progress.attach(sequence_id, sink)

    def release(self, sequence_id: str) -> None:
        """The blocks of a held (or failed, or cancelled) sequence have no reader any more. Idempotent."""
        with self._changed:
            self._scheduler.release(sequence_id, self._clock.now())
            self._woken()

    def wake(self) -> None:
        """A sequence's token mask has become ready."""
        with self._changed:
            self._changed.notify()

    def cancel(self, sequence_id: str) -> None:
        """Compute no further; takes effect when the running steps end. Unknown ids are ignored."""
        with self._changed:
            self._scheduler.cancel(sequence_id, self._clock.now())
            self._woken()

    # -- leases

    def reserve(self, spec: SequenceSpec, num_headroom_tokens: int = 0) -> Reserved:
        """Blocks for a sequence that another node computes. Raises as Scheduler.reserve, and Draining."""
        with self._changed:
            self._refuse_draining()
            return self._scheduler.reserve(spec, self._clock.now(), num_headroom_tokens)

    def set_epoch(self, sequence_id: str, epoch: int) -> None:
        """Note a lease's epoch in the ledger."""
        with self._changed:
            self._scheduler.pool.set_epoch(sequence_id, epoch)

    def expect(self, sequence_id: str) -> None:
        """As Scheduler.expect."""
        with self._changed:
            self._scheduler.expect(sequence_id)

    def quarantine(self, sequence_id: str) -> None:
        with self._changed:
            self._scheduler.quarantine(sequence_id, self._clock.now())

    def return_lease(self, sequence_id: str) -> None:
        with self._changed:
            self._scheduler.return_lease(sequence_id)
            self._woken()

    def join(self, sequence_id: str, tokens: TokenChunk, listener: Listener) -> None:
        """The leased blocks are filled: decode on behind ``tokens``. As Scheduler.join."""
        with self._changed:
            now = self._clock.now()
            self._scheduler.join(sequence_id, tokens, now)
            self._timeline.joined(sequence_id, now)
            self._listeners[sequence_id] = listener
            self._woken()

    # -- the prefix cache

    def follow_cache(self) -> CacheFeed:
        """What ``take_cache_changes`` takes from, until ``unfollow_cache``."""
        with self._changed:
            return self._scheduler.pool.known.follow()

    def unfollow_cache(self, feed: CacheFeed) -> None:
        with self._changed:
            self._scheduler.pool.known.unfollow(feed)

    def take_cache_changes(self, feed: CacheFeed, most: int) -> CacheChanged | None:
        """Up to ``most`` keys that this follower was not told of, first of all that is found; None if there are none.
        What a step stored can be taken before its events arrive."""
        with self._changed:
            untold = feed.take(self._scheduler.pool.known.number, most)
        return None if untold is None else untold.message()

    def drop_cache(self) -> int:
        """Find no block any more that is there now; returns how many were found. Sequences keep those they hold.

        In parts, between which steps go on: 100,000 blocks take a quarter of a second. Call it off the event loop.
        """
        with self._changed:
            known = list(self._scheduler.pool.known)
        num_dropped = 0
        for first in range(0, len(known), _MAX_DROPPED):
            with self._changed:
                num_dropped += self._scheduler.prefix_cache.drop(known[first : first + _MAX_DROPPED])
        return num_dropped

    def cache_stats(self) -> CacheStats:
        with self._changed:
            return self._scheduler.prefix_cache.stats()

    # -- questions

    @property
    def limits(self) -> SchedulerConfig:
        return self._scheduler.config

    @property
    def num_sequences(self) -> int:
        with self._changed:
            return self._scheduler.num_sequences

    @property
    def stalled_s(self) -> float:
        """Seconds since the engine last made progress while it had something to compute; 0 when it has nothing."""
        since_s = self._busy_since_s
        return 0.0 if since_s is None else max(0.0, self._clock.now() - since_s)

    def status(self, role: Role) -> NodeStatus:
        with self._changed:
            load, pool, draining = self._scheduler.load(), self._scheduler.pool, self._is_draining
            owned = pool.blocks_by_state()
            return NodeStatus(
                role=role,
                draining=draining,
                total_blocks=pool.num_blocks,
                free_blocks=pool.num_available,
                queued_prompt_tokens=load.queued_prompt_tokens,
                num_waiting=load.num_waiting,
                num_running=load.num_running,
                running_tokens=load.running_tokens,
                stalled_s=self.stalled_s,
                prompt_blocks=owned[BlockState.PROMPT],
                sending_blocks=owned[BlockState.SENDING],
                leased_blocks=owned[BlockState.LEASED],
                running_blocks=owned[BlockState.RUNNING],
                quarantined_blocks=owned[BlockState.QUARANTINED],
                cached_blocks=owned[BlockState.CACHED],
                step_times=self._scheduler.measured.told,
            )

    def leased_tokens(self) -> int:
        """Known tokens of sequences that are computed elsewhere and have not arrived."""
        with self._changed:
            return self._scheduler.leased_tokens

    def ledger(self) -> tuple[int, int, list[OwnerEntry]]:
        """Total blocks, free blocks and every owner."""
        with self._changed:
            pool = self._scheduler.pool
            return pool.num_blocks, pool.num_free, pool.ledger(self._clock.now())

    def stats(self) -> EngineStats:
        with self._changed:
            return EngineStats(self._num_steps, self._num_failed_steps, self._num_tokens, self._scheduler.num_preempted)

    def check(self) -> None:
        """Assert the invariants of scheduler and pool."""
        with self._changed:
            self._scheduler.check()

    # -- the engine thread

    def _main(self) -> None:
        try:
            self._runner.enter_thread()
            self._idle_s = self._clock.now()
            while self._turn():
                pass
        except BaseException as error:
            # A defect of ours: the replica is dead, the process should follow (a node that died is a known event).
            logging.getLogger(__name__).critical("engine thread died", exc_info=error)
            if self._on_fatal is not None:
                self._on_fatal(error)

    def _turn(self) -> bool:
        """One step launched or landed, or one wait for work. False when it is time to stop."""
        with self._changed:
            if self._is_stopping and not self._flights:
                self._book.settle()
                return False
            plan, events = (None, []) if self._is_stopping else self._scheduler.schedule(self._clock.now())
            forgotten, self._to_forget = self._to_forget, []
            deliveries = self._address(events)
            if not self._flights:
                if plan is None and not forgotten and not deliveries:
                    self._busy_since_s = None
                    self._book.settle()
                    self._changed.wait(_MAX_IDLE_S)
                    self._idle_s = self._clock.now()
                    return True
                self._busy_since_s = self._clock.now()
        _deliver(deliveries)
        for sequence_id in forgotten:
            with self._defects.contained("engine", f"forgetting {sequence_id}"):
                self._runner.forget(sequence_id)
        num_landing = min(1, len(self._flights))
        if plan is not None:
            self._flights.append(flight := self._launch(plan))
            # After a launch that failed nothing is scheduled before all that was launched is over.
            may_stay_up = self._runner.overlaps and flight.underway is not None
            num_landing = len(self._flights) - may_stay_up
        for _ in range(num_landing):
            self._land(self._flights.popleft())
        return True

    def _launch(self, plan: StepPlan) -> _Flight:
        block_tokens = self._scheduler.config.block_tokens
        finals = [
            (p.sequence.sequence_id, final_blocks(p.sequence, p.end, block_tokens))
            for p in plan.pieces
            if p.start < p.sequence.spec.num_known_tokens and self._progress.is_watched(p.sequence.sequence_id)
        ]

        def on_layer(layer: int) -> None:
            self._progress.layer_queued(layer, finals)

        began_s = self._clock.now()
        try:
            if self._prepare is not None:
                self._prepare(plan)
            return _Flight(plan, finals, began_s, self._runner.launch(plan, on_layer if finals else None))
        except Exception as error:
            return _Flight(plan, finals, began_s, None, _failure_of(error, plan))

    def _land(self, flight: _Flight) -> None:
        """Wait for the oldest step and take it in."""
        plan = flight.plan
        result, failure = None, flight.failure
        try:
            result = None if flight.underway is None else flight.underway.result()
        except Exception as error:
            failure = _failure_of(error, plan)
        # A step that was launched early began when the one before it was over.
        began_s, ended_s = max(flight.launched_s, self._landed_s), self._clock.now()
        # What a stream waits from token to token: scheduling and delivery included.
        turn_s = ended_s - max(self._landed_s, self._idle_s)
        self._landed_s = ended_s
        with self._changed:
            if result is None:
                assert failure is not None
                self._num_failed_steps += 1
                events = self._scheduler.fail(plan, failure, self._clock.now())
            else:
                self._progress.step_done(flight.finals)
                events = self._scheduler.apply(plan, result, self._clock.now())
                with self._defects.contained("engine", "measuring a step"):
                    self._scheduler.measured.add(plan.shape, turn_s)
                self._progress.step_done(self._full_blocks(plan))
            self._num_steps += 1
            self._num_tokens += plan.num_tokens
            self._busy_since_s = self._clock.now()
            raised = self._scheduler.take_raised()
            deliveries = self._address(events)
            self._collect_gone()
        for sequence_id, cause in raised:
            self._defects.caught("engine", cause, f"a token of {sequence_id}")
        _deliver(deliveries)
        with self._defects.contained("engine", "counting"):
            if self._meter is not None:
                self._meter.outcome(events)
            self._book.add(TakenStep(plan, result is None, began_s, ended_s, turn_s))

    # -- inside, with the lock held

    def _refuse_draining(self) -> None:
        if self._is_draining:
            raise Draining("this node is about to leave and accepts nothing new; try another node")

    def _woken(self) -> None:
        self._collect_gone()
        self._changed.notify()

    def _full_blocks(self, plan: StepPlan) -> list[Final]:
        if not self._progress.is_watching:
            return []
        names = [p.sequence.sequence_id for p in plan.pieces]
        return [(name, self._scheduler.full_blocks(name)) for name in names if self._progress.is_watched(name)]

    def _collect_gone(self) -> None:
        for sequence_id in self._scheduler.take_gone():
            self._listeners.pop(sequence_id, None)
            self._progress.forget(sequence_id)
            self._to_forget.append(sequence_id)

    def _address(self, events: list[EngineEvent]) -> list[tuple[Listener, list[EngineEvent]]]:
        """The events of a step by listener; sinks are told first of all blocks of sequences that were handed over, and
        of those that were there when one started."""
        self._progress.step_done((e.sequence_id, len(e.block_ids)) for e in events if isinstance(e, Handoff))
        self._progress.step_done((e.sequence_id, e.num_cached_blocks) for e in events if isinstance(e, Started))
        mail: dict[Listener, list[EngineEvent]] = {}
        for event in events:
            listener = self._listeners.get(event.sequence_id)
            if listener is not None:
                mail.setdefault(listener, []).append(event)
        return list(mail.items())


def _deliver(deliveries: list[tuple[Listener, list[EngineEvent]]]) -> None:
    for listener, events in deliveries:
        listener(events)


def _failure_of(error: Exception, plan: StepPlan) -> BatonError:
    if isinstance(error, BatonError):
        return error
    logging.getLogger(__name__).error("engine step of %d sequences failed", len(plan.pieces), exc_info=error)
    return InternalError(f"engine step failed: {described(error)}")
