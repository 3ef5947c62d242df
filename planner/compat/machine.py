"""One machine of the compat profile: its memory, its queues, and what it computes next. Pure."""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Callable, Iterable
from operator import attrgetter

from planner.compat.events import Event, Events
from planner.compat.pool import Pool
from planner.compat.tasks import MAX_BATCH_TASKS, MAX_BATCH_TOKENS, MAX_PREEMPTIONS, NOT_IN_BATCH, Draft, Job, Task
from planner.results import MachineUse
from planner.table import TokenTimes

_by_urgency = attrgetter("num_left_out", "arrival_s")
_by_request = attrgetter("arrival_s", "place")
_by_batch_place = attrgetter("batch_place")


class Machine:
    """Steps of one batch follow each other without a pause. Steps that only decode are computed many at a time: until
    the first of the batch ends, or until the border of the step in which a task arrives."""

    def __init__(
        self,
        use: MachineUse,
        times: TokenTimes,
        events: Events,
        *,
        max_memory_bytes: int,
        weight_bytes: int,
        on_prompt_end: Callable[[Job], None],
        on_decode_end: Callable[[Job], None],
        on_idle: Callable[[Machine], None],
    ) -> None:
        self.use = use
        self.max_memory_bytes = max_memory_bytes
        self.weight_bytes = weight_bytes
        # What is allocated; and what will be by the requests placed here, which the choice of a token machine looks at.
        self.memory_bytes = weight_bytes
        self.scheduled_bytes = weight_bytes
        # Of the placed requests: tokens of prompts that are not computed, and one for each whose tokens are generated
        # here.
        self.pending_tokens = 0
        self.num_preemptions = 0
        self.num_over_memory = 0
        self.pool: Pool | None = None
        self._times = times
        self._events = events
        self._on_prompt_end = on_prompt_end
        self._on_decode_end = on_decode_end
        self._on_idle = on_idle
        # Tasks that are in no batch, with the first to be looked at for urgency first. Each was put where its urgency
        # belonged then; as urgencies rise while tasks wait, the list is not always in order.
        self.waiting: list[Task] = []
        self._waiting_prompts: dict[Task, None] = {}
        self._preempted: dict[Task, None] = {}
        # Those of the waiting that may run, in the order of requests: all but the decodes of prompts that wait or run.
        self._ready: list[Task] = []
        self._num_placed = 0
        # In the order in which tasks joined.
        self._batch: dict[Task, None] = {}
        self._num_joined = 0
        self._prompts: list[Task] = []
        self._batch_tokens = 0
        # Steps that decoded, so far; and the decodes of the batch by the step that they end at: (step, place in the
        # batch, task). An entry is stale once its task has left the batch.
        self._num_steps = 0
        self._ends: list[tuple[int, int, Task]] = []
        # The steps that are being computed.
        self._step_s = 0.0
        self._num_planned = 0
        self._end = Event()
        self._is_cut = False

    def arrived(self, task: Task) -> None:
        if task.is_prompt or task.job.is_split:
            task.place = self._num_placed = self._num_placed + 1
            insort(self._ready, task, key=_by_request)
        else:
            task.place = task.job.prompt.place
        self._wait(task)
        if not self._batch:
            self._begin_with(task)
        elif self._has_room_beside_batch(task) or self._has_room_beside_prompts(task):
            self._cut()

    def transfer_ended(self) -> None:
        """The KV of a prompt has left."""
        if not self.waiting:
            return
        if not self._batch:
            self._begin_with(self.waiting[0])
        elif len(self._batch) < MAX_BATCH_TASKS and self._batch_tokens < MAX_BATCH_TOKENS:
            self._cut()

    def allocate(self, num_bytes: int) -> None:
        self.memory_bytes += num_bytes
        self.num_over_memory += self.memory_bytes > self.max_memory_bytes

    def free(self, num_bytes: int, *, num_tokens: int = 0) -> None:
        """``num_tokens``: no longer pending."""
        self.memory_bytes -= num_bytes
        self.expect(tokens=-num_tokens, num_bytes=-num_bytes)

    def expect(self, *, tokens: int, num_bytes: int) -> None:
        """Pending and scheduled are so much more."""
        self.pending_tokens += tokens
        self.scheduled_bytes += num_bytes
        if self.pool is not None:
            self.pool.changed(self)

    def has_memory(self, num_bytes: int) -> bool:
        return self.memory_bytes + num_bytes <= self.max_memory_bytes

    def held(self) -> Iterable[Task]:
        """Of all requests that are here."""
        return (*self._batch, *self.waiting)

    # Queues.

    def _wait(self, task: Task) -> None:
        insort(self.waiting, task, key=_by_urgency)
        if task.is_prompt:
            self._waiting_prompts[task] = None

    def _join(self, task: Task) -> None:
        self.waiting.remove(task)
        self._ready.remove(task)
        self._waiting_prompts.pop(task, None)
        self._preempted.pop(task, None)
        task.batch_place = self._num_joined = self._num_joined + 1
        self._batch[task] = None
        if task.is_prompt:
            self._prompts.append(task)
        else:
            task.ends_at_step = self._num_steps + task.num_left
            heapq.heappush(self._ends, (task.ends_at_step, task.batch_place, task))

    def _preempt(self, task: Task) -> None:
        del self._batch[task]
        task.batch_place = NOT_IN_BATCH
        task.num_left = task.ends_at_step - self._num_steps
        self.num_preemptions += 1
        self._wait(task)
        self._preempted[task] = None
        insort(self._ready, task, key=_by_request)

    # Batches.

    def _has_room_beside_batch(self, task: Task) -> bool:
        return len(self._batch) < MAX_BATCH_TASKS and self._batch_tokens + task.step_tokens <= MAX_BATCH_TOKENS

    def _has_room_beside_prompts(self, task: Task) -> bool:
        """A prompt does not wait for decodes. One longer than a batch does, as it can join none."""
        num_decodes = len(self._batch) - len(self._prompts)
        return (
            task.is_prompt
            and num_decodes > 0
            and self._batch_tokens - num_decodes + task.step_tokens <= MAX_BATCH_TOKENS
        )

    def _begin_with(self, task: Task) -> None:
        """Only if there is memory for this one, whether or not others could run."""
        if self.has_memory(task.kv_bytes):
            self._begin()

    def _begin(self) -> None:
        """Makes a batch and plans its steps."""
        draft = self._draft()
        num_decodes = len(self._batch)
        if draft.num_kept < num_decodes:
            for task in list(self._batch)[draft.num_kept :]:
                self._preempt(task)
        for task in draft.tasks:
            self._join(task)
        for task in self._ready:
            task.num_left_out += 1
        self._batch_tokens = draft.num_tokens
        if not self._batch:
            if not self._ready:
                self._on_idle(self)
            return
        self._step_s = self._times.batch_s(self._num_prompt_tokens(), len(self._batch) - len(self._prompts))
        self._num_planned = 1 if self._prompts else self._num_steps_to_first_end()
        for task in draft.tasks:
            if not task.was_begun:
                self._first_run(task)
        self._end_after(self._step_s * self._num_planned)

    def _end_after(self, delay_s: float) -> None:
        """Without a delay the next batch has begun, and set its own end, when this returns."""
        if (end := self._events.after(delay_s, self._ended)) is not None:
            self._end = end

    def _draft(self) -> Draft:
        """First those that were left out often, then prompts, preempted decodes, the last batch, and all others."""
        draft, most = Draft(self.memory_bytes), self.max_memory_bytes
        for task in self.waiting:
            if task.num_left_out < MAX_PREEMPTIONS or not draft.has_room(task):
                break
            draft.take(task, most)
        draft.take_in_order(self._waiting_prompts, most)
        draft.take_in_order(self._preempted, most)
        room = min(MAX_BATCH_TASKS - draft.size, MAX_BATCH_TOKENS - draft.num_tokens)
        draft.num_kept = max(0, min(len(self._batch), room))
        draft.num_tokens += draft.num_kept
        if draft.num_kept == len(self._batch):
            draft.take_in_order(self._ready, most)
        return draft

    def _num_prompt_tokens(self) -> int:
        return sum(task.step_tokens for task in self._prompts)

    def _num_steps_to_first_end(self) -> int:
        ends = self._ends
        while ends[0][1] != ends[0][2].batch_place:
            heapq.heappop(ends)
        return ends[0][0] - self._num_steps

    def _first_run(self, task: Task) -> None:
        task.was_begun = True
        self.allocate(task.kv_bytes)
        if not task.is_prompt:
            served = task.job.served
            served.decode_start_s = self._events.now
            served.second_token_s = self._events.now + self._step_s

    def _cut(self) -> None:
        """Ends the steps at the border of the present one, so that a new task can join."""
        if self._is_cut or self._prompts:
            return
        self._is_cut = True
        planned_s = self._step_s * self._num_planned
        passed_s = self._events.now - (self._end - planned_s)
        # At the very end of the steps rounding may have it that all have passed; the public simulator then takes one
        # too many.
        self._num_planned = min(int(passed_s // self._step_s) + 1, self._num_planned)
        self._end.action = None
        self._end_after(max(0.0, self._step_s * self._num_planned - passed_s))

    def _ended(self) -> None:
        self._is_cut = False
        self._record()
        done = list(self._prompts)
        self._prompts.clear()
        if len(self._batch) > len(done):
            self._num_steps += self._num_planned
            ends = self._ends
            while ends and ends[0][0] <= self._num_steps:
                _, place, task = heapq.heappop(ends)
                if place == task.batch_place:
                    done.append(task)
        done.sort(key=_by_batch_place)
        for task in done:
            del self._batch[task]
            task.batch_place = NOT_IN_BATCH
            if task.is_prompt:
                self._prompt_ended(task)
            else:
                self._decode_ended(task)
        self._begin()

    def _prompt_ended(self, task: Task) -> None:
        job = task.job
        self.expect(tokens=-task.step_tokens, num_bytes=0)
        job.served.first_token_s = job.served.prompt_end_s = self._events.now
        if not job.is_split and not job.ends_with_prompt:
            insort(self._ready, job.decode, key=_by_request)
        self._on_prompt_end(job)

    def _decode_ended(self, task: Task) -> None:
        job = task.job
        self.free(job.kv_bytes, num_tokens=1)
        self._on_decode_end(job)

    def _record(self) -> None:
        use, seconds = self.use, self._step_s * self._num_planned
        num_decodes = len(self._batch) - len(self._prompts)
        use.num_steps += self._num_planned
        use.num_output_tokens += num_decodes * self._num_planned + len(self._prompts)
        if not self._prompts:
            use.decode_s += seconds
            return
        use.num_prompt_tokens += self._num_prompt_tokens()
        if num_decodes:
            use.mixed_s += seconds
        else:
            use.prompt_s += seconds
