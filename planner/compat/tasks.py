"""Requests of the compat profile, their two tasks, and the batch that tasks are put into. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from planner.results import Ending, Served

if TYPE_CHECKING:
    from planner.compat.machine import Machine

MAX_BATCH_TASKS = 512
MAX_BATCH_TOKENS = 2048
# A task that was left out of so many batches goes before all others.
MAX_PREEMPTIONS = 4

NOT_IN_BATCH = -1


class Task:
    """One phase of a request on a machine: its whole prompt, or all its tokens but the first."""

    __slots__ = (
        "batch_place", "ends_at_step", "is_prompt", "job", "kv_bytes", "num_left", "num_left_out", "place",
        "step_tokens", "was_begun",
    )  # fmt: skip

    def __init__(self, job: Job, *, is_prompt: bool, step_tokens: int, num_left: int, kv_bytes: int) -> None:
        self.job = job
        self.is_prompt = is_prompt
        # What it counts for in a batch.
        self.step_tokens = step_tokens
        # Steps of decoding that it needs; exact only while it is in no batch.
        self.num_left = num_left
        # What it allocates when it begins; it holds that until the request leaves the machine.
        self.kv_bytes = kv_bytes
        # Batches that were made without it.
        self.num_left_out = 0
        # Behind all that came to its machine before, in the order of requests; and in the order of the batch.
        self.place = 0
        self.batch_place = NOT_IN_BATCH
        # In its machine's count of steps that decoded.
        self.ends_at_step = 0
        self.was_begun = False

    @property
    def arrival_s(self) -> float:
        return self.job.arrival_s


class Job:
    """A request and its two tasks."""

    __slots__ = ("arrival_s", "decode", "prompt", "served", "source", "target", "transfer_bytes")

    def __init__(self, served: Served, kv_bytes_per_token: int) -> None:
        request = served.request
        num_prompt, num_decode = request.num_prompt_tokens, request.num_output_tokens - 1
        self.served = served
        self.arrival_s = request.arrival_s
        self.prompt = Task(
            self, is_prompt=True, step_tokens=num_prompt, num_left=0, kv_bytes=kv_bytes_per_token * (num_prompt + 1)
        )
        self.decode = Task(
            self, is_prompt=False, step_tokens=1, num_left=num_decode, kv_bytes=kv_bytes_per_token * num_decode
        )
        self.transfer_bytes = kv_bytes_per_token * num_prompt
        # Where the prompt and where the tokens are computed; the same one: no transfer.
        self.source: Machine
        self.target: Machine

    @property
    def is_split(self) -> bool:
        return self.source is not self.target

    @property
    def kv_bytes(self) -> int:
        """All of it, prompt and output."""
        return self.prompt.kv_bytes + self.decode.kv_bytes

    @property
    def ends_with_prompt(self) -> bool:
        """The prompt's token is its only one: it has no decode."""
        return not self.decode.num_left

    def ended(self, now: float) -> None:
        self.served.ended_s = now
        self.served.ending = Ending.WHOLE
        self.served.num_tokens = self.served.request.num_output_tokens


class Draft:
    """The batch to be: the tasks that enter it, and what all of it takes."""

    def __init__(self, memory_bytes: int) -> None:
        self.tasks: dict[Task, None] = {}
        # Those of the last batch that stay.
        self.num_kept = 0
        self.num_tokens = 0
        self.memory_bytes = memory_bytes

    @property
    def size(self) -> int:
        return len(self.tasks) + self.num_kept

    def has_room(self, task: Task) -> bool:
        """The first task is taken whatever its size: a long prompt runs whole, and alone."""
        size = self.size
        return size < MAX_BATCH_TASKS and (not size or self.num_tokens + task.step_tokens <= MAX_BATCH_TOKENS)

    def take(self, task: Task, max_memory_bytes: int) -> bool:
        """False if there is no memory. A task that was begun has its memory."""
        if not task.was_begun:
            if self.memory_bytes + task.kv_bytes > max_memory_bytes:
                return False
            self.memory_bytes += task.kv_bytes
        self.tasks[task] = None
        self.num_tokens += task.step_tokens
        return True

    def take_in_order(self, tasks: Iterable[Task], max_memory_bytes: int) -> None:
        """Up to the first one that there is no room or no memory for."""
        for task in tasks:
            if task not in self.tasks and not (self.has_room(task) and self.take(task, max_memory_bytes)):
                return
