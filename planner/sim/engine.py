"""The engine of a simulated node: the scheduler's own steps, each as long as the performance model says.

Steps that only decode advance together, up to the next end of a sequence; what arrives meanwhile cuts them at the end
of the step under way, whose tokens are then known a step early. Beside prompts, what decodes advances without a piece
for each sequence.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Callable
from typing import Protocol

from baton.types import TokenChunk
from engine.events import EngineEvent, Handoff, Output
from engine.schedule import Scheduler
from engine.step import Sequence, StepPlan, StepResult, StepShape
from planner.fitted import NO_WAKE, Wake
from planner.results import MachineUse, Served
from planner.sim.events import Events
from planner.sim.gaps import Gaps
from planner.sim.host import Host, Loop
from planner.sim.requests import STOP_ID, TOKEN_ID, SimulatedRequest
from planner.sim.under_way import Bulk, Running
from planner.times import Times


class Power(Protocol):
    """Of one machine with one model."""

    @property
    def idle_w(self) -> float: ...

    def step_w(self, shape: StepShape) -> float:
        """While it computes such a step."""


class Engine:
    """``hear`` takes its events; ``on_plan`` is told of each step with prompts when it begins."""

    def __init__(
        self,
        events: Events,
        scheduler: Scheduler,
        times: Times,
        power: Power,
        use: MachineUse,
        hear: Callable[[list[EngineEvent]], None],
        on_plan: Callable[[StepPlan], None],
        steps_at_once: int,
        gaps: Gaps,
        host: Host | None = None,
        wake: Wake = NO_WAKE,
        loop: Loop | None = None,
    ) -> None:
        self.scheduler = scheduler
        self._events = events
        self._times = times
        self._power = power
        self._use = use
        self._hear = hear
        self._on_plan = on_plan
        self._steps_at_once = steps_at_once
        self._gaps = gaps
        # That other engines compute on as well.
        self._host = host
        self._wake = wake
        # That its tokens pass, and what load they are.
        self._loop = loop
        self._load = 0.0
        # Nothing ran before the step that begins.
        self._is_woken = False
        # The step with prompts that runs on it.
        self._running: Running | None = None
        # By sequence id, what is here.
        self._requests: dict[str, SimulatedRequest] = {}
        # Tokens that the router knows.
        self._told: dict[str, int] = {}
        self._bulk: Bulk | None = None
        self._is_busy = False
        # Plain steps were cut, and what they led to is still to be told.
        self._is_landing = False
        # What was begun before is void: the machine died.
        self._is_dead = False
        # Steps that decoded, and by their number when sequences that decode end at the earliest.
        self._num_steps = 0
        self._ends: list[tuple[int, str]] = []
        # Joined, and in no step yet; and those whose first step runs.
        self._joined: list[SimulatedRequest] = []
        self._fresh: list[SimulatedRequest] = []
        # Steps longer than all that came after them, by number: so the longest of a sequence's steps is found.
        self._long_numbers: list[int] = []
        self._long_s: list[float] = []
        # By sequence id, the number of the first step that it decoded in, and what it comes to.
        self._since: dict[str, int] = {}
        self._served: dict[str, Served] = {}
        # Those that are to decode and were in no step that does, and those whose first such step runs.
        self._starting: dict[str, SimulatedRequest] = {}
        self._started: list[SimulatedRequest] = []
        self.version = 0

    # ── What is here ────────────────────────────────────────────────────────────────────────────────────────────────

    def enter(self, sequence_id: str, request: SimulatedRequest) -> None:
        """Its events are about this request."""
        self._requests[sequence_id] = request

    def refused(self, sequence_id: str) -> None:
        """The scheduler did not take it."""
        self._requests.pop(sequence_id, None)

    def joined(self, sequence_id: str, num_told: int) -> None:
        """It decodes here from the next step on."""
        request = self._requests[sequence_id]
        self._told[sequence_id] = num_told
        self._decodes(sequence_id, request, num_told)
        self._joined.append(request)

    def _decodes(self, sequence_id: str, request: SimulatedRequest, num_generated: int) -> None:
        self._since[sequence_id] = self._num_steps
        self._served[sequence_id] = request.served
        if request.served.decode_start_s is None or request.served.second_token_s is None:
            self._starting[sequence_id] = request
        heapq.heappush(self._ends, (self._num_steps + request.num_output_tokens - num_generated, sequence_id))

    def num_untold(self, sequence_id: str) -> int:
        """Tokens that it has drawn by now and the router has not been told."""
        token_ids, request = self.scheduler.token_ids(sequence_id), self._requests.get(sequence_id)
        told = self._told.get(sequence_id)
        if not token_ids or request is None or told is None:
            return 0
        count = len(token_ids) - request.num_prompt_tokens - told
        if self._bulk is not None and sequence_id in self._since:
            count += self._bulk.num_over(self._events.now_s)
        return max(0, count)

    def untold(self, sequence_id: str) -> TokenChunk | None:
        """These; the router is told by this."""
        count = self.num_untold(sequence_id)
        if not count:
            return None
        told = self._told[sequence_id]
        self._told[sequence_id] = told + count
        return TokenChunk(sequence_id, told, (TOKEN_ID,) * count)

    def leave_all(self) -> list[TokenChunk]:
        """The machine dies: what it has told by then."""
        chunks = [self.untold(sequence_id) for sequence_id in list(self._told)]
        self.cut()
        self._is_dead = True
        self._streams(0, 1.0)
        if self._host is not None:
            self._host.changed(self, is_busy=False)
        for sequence_id in list(self._requests):
            self._left(sequence_id)
        return [chunk for chunk in chunks if chunk is not None]

    def _left(self, sequence_id: str) -> None:
        request = self._requests.pop(sequence_id, None)
        self._told.pop(sequence_id, None)
        self._starting.pop(sequence_id, None)
        self._served.pop(sequence_id, None)
        since = self._since.pop(sequence_id, None)
        if request is not None and since is not None and since < self._num_steps:
            longest_s = self._long_s[bisect_left(self._long_numbers, since)]
            request.served.max_gap_s = max(request.served.max_gap_s, longest_s)

    # ── Steps ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def cut(self) -> None:
        """Something is to change: plain steps end with the one under way."""
        bulk, now = self._bulk, self._events.now_s
        if bulk is None:
            return
        num_steps = min(bulk.num_steps, bulk.num_over(now) + 1)
        self._bulk, self._is_landing = None, True
        self.version += 1
        events = self._decode(bulk, num_steps)
        self._events.at(max(now, bulk.end_s(num_steps)), self._landed, self.version, events)

    def wake(self) -> None:
        """Something has changed: begin the next step, if none is under way."""
        if not self._is_busy and not self._is_dead:
            self._is_woken = True
            self._go_on()

    def disturbed(self) -> None:
        """Another engine of the host has begun or ended: what is left of a step takes another time."""
        running, now = self._running, self._events.now_s
        if running is None:
            self.cut()
            return
        factor = self._factor(running.plan.shape)
        if factor != running.factor:
            end_s = now + (running.end_s - now) * factor / running.factor
            self._run(running._replace(end_s=end_s, factor=factor))

    @property
    def num_margin_blocks(self) -> int:
        """Blocks that the plain steps under way may still take."""
        bulk = self._bulk
        if bulk is None:
            return 0
        return bulk.shape.num_decoding * (bulk.num_steps // self.scheduler.config.block_tokens + 1)

    @property
    def num_pending_tokens(self) -> int:
        """Drawn by plain steps under way that have ended."""
        bulk = self._bulk
        return 0 if bulk is None else bulk.num_over(self._events.now_s) * bulk.shape.num_decoding

    def _streams(self, num_tokens: int, step_s: float) -> None:
        """So many in each step from now on."""
        if self._loop is not None:
            load = self._loop.load(num_tokens, step_s)
            self._loop.streams(load - self._load)
            self._load = load

    def _go_on(self) -> None:
        self._begin()
        if not self._is_busy:
            self._streams(0, 1.0)
        if self._host is not None:
            self._host.changed(self, is_busy=self._is_busy)

    def _factor(self, shape: StepShape) -> float:
        return 1.0 if self._host is None else self._host.factor(self, shape)

    def _run(self, running: Running) -> None:
        self._running = running
        self.version += 1
        self._events.at(running.end_s, self._applied, self.version, running.plan, running.end_s - running.began_s)

    def _begin(self) -> None:
        now = self._events.now_s
        while True:
            if self._begin_bulk(now):
                return
            plan, events = self.scheduler.schedule(now, in_bulk=True)
            if plan is not None:
                self._is_busy = True
                self._tell(events)
                self._on_plan(plan)
                if plan.shape.num_decoding:
                    self._note_starts(now)
                seconds = self._times.step_s(plan.shape)
                if self._is_woken:
                    self._is_woken = False
                    seconds += self._wake.of(plan.shape)
                self._streams(plan.shape.num_decoding, seconds)
                if self._host is not None:
                    factor = self._factor(plan.shape)
                    self._run(Running(plan, now, now + seconds * factor, factor))
                    return
                self.version += 1
                self._events.at(now + seconds, self._applied, self.version, plan, seconds)
                return
            if not events:
                return
            # Of sequences that stopped: what follows may be a step.
            self._is_busy = True
            self._tell(events)
            self._is_busy = False

    def _begin_bulk(self, now: float) -> bool:
        most = min(self._steps_at_once, self._steps_to_end())
        more_s = 0.0
        if self._is_woken and most > 0 and self._wake.decode_s:
            most, more_s = 1, self._wake.decode_s
        plain = self.scheduler.plain_steps(most, now) if most > 0 else None
        if plain is None:
            return False
        shape, num_steps = plain.shape, plain.num_steps
        factor = self._factor(shape)
        first_s, growth_s = (self._times.step_s(shape) + more_s) * factor, 0.0
        self._is_woken = False
        if num_steps > 1:
            grown = shape._replace(num_kv_tokens=shape.num_kv_tokens + (num_steps - 1) * shape.num_decoding)
            growth_s = (self._times.step_s(grown) * factor - first_s) / (num_steps - 1)
        bulk = Bulk(now, first_s, growth_s, num_steps, shape)
        while bulk.num_steps > 1 and bulk.end_s(bulk.num_steps - 1) >= plain.until_s:
            bulk = bulk._replace(num_steps=bulk.num_steps - 1)
        self._bulk, self._is_busy = bulk, True
        self._note_starts(now)
        self._streams(shape.num_decoding, first_s)
        self.version += 1
        self._events.at(bulk.end_s(bulk.num_steps), self._bulk_over, self.version)
        return True

    def _steps_to_end(self) -> int:
        """At least so many until a sequence ends; 0 if none decodes."""
        ends = self._ends
        while ends:
            number, sequence_id = ends[0]
            left = self._num_left(sequence_id)
            if left is None:
                heapq.heappop(ends)
            elif number != self._num_steps + left:
                # It was not in every step: it waited, or was computed again.
                heapq.heapreplace(ends, (self._num_steps + left, sequence_id))
            else:
                return left
        return 0

    def _num_left(self, sequence_id: str) -> int | None:
        request, token_ids = self._requests.get(sequence_id), self.scheduler.token_ids(sequence_id)
        if request is None or not token_ids or sequence_id not in self._since:
            return None
        return request.num_output_tokens - len(token_ids) + request.num_prompt_tokens

    def _bulk_over(self, version: int) -> None:
        bulk = self._bulk
        if version == self.version and bulk is not None:
            self._bulk = None
            self._landed(version, self._decode(bulk, bulk.num_steps))

    def _decode(self, bulk: Bulk, num_steps: int) -> list[EngineEvent]:
        """So many of the plain steps."""
        scheduler, end_s = self.scheduler, bulk.end_s(num_steps)
        self._account_decode(bulk, num_steps, end_s)
        last = self._last_after(num_steps)
        self._num_steps += num_steps
        self._note_gaps(bulk.end_s(1), bulk.first_s, bulk.shape.num_decoding)
        if num_steps > 1:
            mean_s = (end_s - bulk.end_s(1)) / (num_steps - 1)
            self._gaps.add(mean_s, (num_steps - 1) * bulk.shape.num_decoding)
        ends_s = [bulk.end_s(count) for count in range(1, num_steps + 1)]
        return scheduler.decode(bulk.began_s, ends_s, TOKEN_ID, last, STOP_ID)

    def _last_after(self, num_steps: int, plan: StepPlan | None = None) -> set[str]:
        """Those that end with the last of so many steps, of what ``plan`` decodes, or else of all that decode now."""
        due: list[str] = []
        ends, number = self._ends, self._num_steps + num_steps
        while ends and ends[0][0] <= number:
            _, sequence_id = heapq.heappop(ends)
            left = self._num_left(sequence_id)
            if left == num_steps:
                due.append(sequence_id)
            elif left is not None:
                heapq.heappush(ends, (max(self._num_steps + left, number + 1), sequence_id))
        if not due:
            return set()
        if plan is None:
            last = set(filter(self.scheduler.is_active, due))
        else:
            last = {sequence.sequence_id for sequence in plan.in_bulk}.intersection(due)
        for sequence_id in due:
            if sequence_id not in last:
                # It waits, or came meanwhile: it has as many to go.
                heapq.heappush(ends, (number + 1, sequence_id))
        return last

    def _note_starts(self, now: float) -> None:
        """A step that decodes begins."""
        if self._joined:
            self._fresh, self._joined = self._joined, []
        if not self._starting:
            return
        for sequence_id, request in list(self._starting.items()):
            # Else it was handed over, or had to yield.
            if self.scheduler.is_active(sequence_id):
                if request.served.decode_start_s is None:
                    request.served.decode_start_s = now
                self._started.append(request)
                del self._starting[sequence_id]

    def _note_gaps(self, now: float, seconds: float, num_decoding: int) -> None:
        """Of a step: those that have just joined have waited for longer."""
        for request in self._started:
            if request.served.second_token_s is None:
                request.served.second_token_s = now
        self._started.clear()
        for request in self._fresh:
            self._gaps.add(request.went_on(now), 1)
        self._gaps.add(seconds, max(0, num_decoding - len(self._fresh)))
        self._fresh.clear()

    def _account_decode(self, bulk: Bulk, num_steps: int, end_s: float) -> None:
        use, seconds = self._use, end_s - bulk.began_s
        use.num_steps += num_steps
        use.num_output_tokens += num_steps * bulk.shape.num_decoding
        use.decode_s += seconds
        use.max_kv_tokens = max(use.max_kv_tokens, bulk.shape.num_kv_tokens)
        energy_j = seconds * self._power.step_w(bulk.shape)
        use.decode_energy_j += energy_j
        self._share(energy_j, bulk.shape.num_decoding)
        last_s = bulk.first_s + bulk.growth_s * (num_steps - 1)
        self._note_step(self._num_steps + num_steps - 1, max(bulk.first_s, last_s))
        self.scheduler.measured.add(bulk.shape, bulk.first_s)

    def _share(self, energy_j: float, num_decoding: int) -> None:
        """Among all that decode now."""
        each_j, served = energy_j / num_decoding, self._served
        if len(served) == num_decoding:
            for each in served.values():
                each.energy_j += each_j
            return
        # Others wait, or were handed over.
        for sequence_id in self.scheduler.active_ids:
            served[sequence_id].energy_j += each_j

    def _note_step(self, number: int, seconds: float) -> None:
        numbers, long_s = self._long_numbers, self._long_s
        while long_s and long_s[-1] <= seconds:
            long_s.pop()
            numbers.pop()
        long_s.append(seconds)
        numbers.append(number)

    def _landed(self, version: int, events: list[EngineEvent]) -> None:
        if version == self.version and not self._is_dead:
            self._is_landing = False
            self._tell(events)
            self._is_busy = False
            self._go_on()

    def _applied(self, version: int, plan: StepPlan, seconds: float) -> None:
        if version != self.version or self._is_dead:
            return
        self._running = None
        self._account_plan(plan, seconds)
        sampled = {piece.sequence.sequence_id: self._drawn(piece.sequence) for piece in plan.pieces if piece.samples}
        now = self._events.now_s
        last: set[str] = set()
        if plan.in_bulk:
            last = self._last_after(1, plan)
        if plan.shape.num_decoding:
            self._num_steps += 1
            self._note_gaps(now, seconds, plan.shape.num_decoding)
        self._tell(self.scheduler.apply_in_bulk(plan, StepResult(sampled), now, TOKEN_ID, last, STOP_ID))
        self._is_busy = False
        self._go_on()

    def _drawn(self, sequence: Sequence) -> TokenChunk:
        index = sequence.num_generated
        is_last = index + 1 >= self._requests[sequence.sequence_id].num_output_tokens
        return TokenChunk(sequence.sequence_id, index, (STOP_ID if is_last else TOKEN_ID,))

    def _account_plan(self, plan: StepPlan, seconds: float) -> None:
        use, shape = self._use, plan.shape
        use.num_steps += 1
        use.num_prompt_tokens += shape.num_prompt_tokens
        use.num_output_tokens += shape.num_decoding
        energy_j = seconds * self._power.step_w(shape)
        decode_j = 0.0
        if shape.num_decoding:
            alone = StepShape(0, 0, shape.num_decoding, shape.num_kv_tokens)
            decode_j = energy_j
            if shape.num_prompt_tokens:
                decode_j = min(energy_j, self._times.step_s(alone) * self._power.step_w(alone))
            self._note_step(self._num_steps, seconds)
        if not shape.num_prompt_tokens:
            use.decode_s += seconds
        elif shape.num_decoding:
            use.mixed_s += seconds
        else:
            use.prompt_s += seconds
        use.prompt_energy_j += energy_j - decode_j
        use.decode_energy_j += decode_j
        self._share_plan(plan, energy_j - decode_j, decode_j)
        self.scheduler.measured.add(shape, seconds)

    def _share_plan(self, plan: StepPlan, prompt_j: float, decode_j: float) -> None:
        """Decoding sequences equally, prompts by their tokens."""
        shape = plan.shape
        each_j = decode_j / max(1, shape.num_decoding)
        token_j = prompt_j / max(1, shape.num_prompt_tokens)
        requests, num_pieces = self._requests, shape.num_decoding - len(plan.in_bulk)
        for sequence in plan.in_bulk:
            requests[sequence.spec.sequence_id].served.energy_j += each_j
        for place, piece in enumerate(plan.pieces):
            request = requests[piece.sequence.sequence_id]
            request.served.energy_j += each_j if place < num_pieces else token_j * piece.num_tokens

    # ── Events ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _tell(self, events: list[EngineEvent]) -> None:
        """Those that the node has to know: of tokens between the first and the last it is told with the next that
        matters."""
        told: list[EngineEvent] = []
        for event in events:
            match event:
                case Output():
                    if (output := self._output(event)) is not None:
                        told.append(output)
                case Handoff(sequence_id):
                    if (chunk := self.untold(sequence_id)) is not None:
                        told.append(Output(sequence_id, chunk))
                    self._requests[sequence_id].last_token_s = self._events.now_s
                    told.append(event)
                case _:
                    told.append(event)
        self._hear(told)

    def settle(self) -> None:
        """Forget what has left, unless its last token is still to be told."""
        if not self._is_landing:
            for sequence_id in self.scheduler.take_gone():
                self._left(sequence_id)

    def _output(self, event: Output) -> Output | None:
        sequence_id, chunk = event.sequence_id, event.chunk
        request, now = self._requests[sequence_id], self._events.now_s
        if event.prefill is not None:
            self._told[sequence_id] = chunk.index
            if chunk.index:
                self._gaps.add(request.went_on(now), 1)
            request.last_token_s = now
            if request.served.prompt_end_s is None:
                request.served.prompt_end_s = now
            self._decodes(sequence_id, request, chunk.index + 1)
            self._use.num_output_tokens += 1
        elif chunk.index == 1 and request.served.second_token_s is None:
            request.served.second_token_s = now
        if event.prefill is None and chunk.finish_reason is None:
            return None
        first = self._told[sequence_id]
        self._told[sequence_id] = chunk.index + 1
        if first < chunk.index:
            token_ids = (TOKEN_ID,) * (chunk.index - first) + chunk.token_ids
            chunk = TokenChunk(sequence_id, first, token_ids, finish_reason=chunk.finish_reason)
            event = Output(sequence_id, chunk, event.prefill)
        return event
