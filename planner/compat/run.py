"""Runs a workload on a design by the public simulator's rules."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from baton.errors import BadConfig, InternalError
from baton.types import Role
from planner.compat.events import Events
from planner.compat.machine import Machine
from planner.compat.placement import OnePool, TwoPools
from planner.compat.tasks import Job
from planner.design import Design
from planner.machines import Machine as MachineType
from planner.models import Model
from planner.results import Ending, MachineUse, Profile, Run, Served, Told, tell_nobody
from planner.table import TokenTimes
from planner.workload import Workload

# Of a transfer, which has a link of its own; and how long one waits before it looks for memory again.
_LINK_BYTES_S = 200 * 1024**3
_RETRY_S = 1.0
# The public simulator's figures, where they are not those of the model.
_WEIGHT_BYTES = {"bloom-176b": 329_000_000_000, "llama2-70b": 135_000_000_000}


def simulate(
    workload: Workload, design: Design, model: Model, tensor_parallel: int = 8, told: Told = tell_nobody
) -> Run:
    """Raises BadConfig: a design or a model that the rules or the table do not have."""
    return _Simulation(workload, design, model, tensor_parallel, told).run()


def _instances(design: Design, tensor_parallel: int) -> Iterator[tuple[str, Role, MachineType, int]]:
    """Name, role, machine and number of GPUs of each instance.

    A prompt or token machine has one instance for each group of ``tensor_parallel`` GPUs. A mixed machine has one, with
    the memory of all its GPUs. Names count as the public simulator's do: by kind of machine, prompt machines first.
    """
    num_mixed = design.count(Role.MIXED)
    if num_mixed and num_mixed < design.num_machines:
        raise BadConfig(
            f"the design {design.name} has mixed machines beside others, and the profile compat has rules for either "
            "alone; expected --mixed, or --prompt and --token, or the profile honest",
            param="design",
        )
    order = (Role.PREFILL, Role.DECODE, Role.MIXED)
    number = 0
    for group in sorted(design, key=lambda group: (group.machine.power_units, order.index(group.role))):
        num_gpus = group.machine.num_gpus if group.role is Role.MIXED else tensor_parallel
        if not 1 <= tensor_parallel <= group.machine.num_gpus:
            raise BadConfig(
                f"tensor parallelism is {tensor_parallel}, and {group.machine.name} has {group.machine.num_gpus} GPUs; "
                "expected at most as many",
                param="tensor_parallel",
            )
        for _ in range(group.count * (group.machine.num_gpus // num_gpus)):
            yield f"{group.machine.name}_{number}", group.role, group.machine, num_gpus
            number += 1


class _Simulation:
    def __init__(self, workload: Workload, design: Design, model: Model, tensor_parallel: int, told: Told) -> None:
        self._workload = workload
        self._design = design
        self._model = model
        self._told = told
        self._events = Events()
        self._times: dict[str, TokenTimes] = {}
        self._machines = [self._machine(*each, tensor_parallel) for each in _instances(design, tensor_parallel)]
        self._placement = OnePool(self._machines) if design.count(Role.MIXED) else TwoPools(self._machines)
        # Prompts that were computed, and whose token machine has no memory for them.
        self._without_memory: set[Job] = set()
        self._counters = {"kv_transfers": 0, "transferred_bytes": 0, "transfer_retries": 0}
        # Every head and every layer has keys and values of its own here, also in models whose heads share them.
        kv_bytes_per_token = int(2 * model.num_layers * model.hidden_size * model.bytes_per_kv_value)
        self._jobs = [Job(Served(request), kv_bytes_per_token) for request in workload.requests]

    def _machine(self, name: str, role: Role, kind: MachineType, num_gpus: int, tensor_parallel: int) -> Machine:
        if kind.name not in self._times:
            self._times[kind.name] = TokenTimes(self._model.name, kind, tensor_parallel)
        max_memory_bytes = int(kind.memory_bytes) * num_gpus
        weight_bytes = _WEIGHT_BYTES.get(self._model.name, int(self._model.weight_bytes))
        if weight_bytes >= max_memory_bytes:
            raise BadConfig(
                f"{num_gpus} GPUs of {kind.name} have {max_memory_bytes / 1e9:.0f} GB of memory, and the weights of "
                f"{self._model.name} take {weight_bytes / 1e9:.0f} GB; expected more GPUs (--tp) or another machine",
                param="tensor_parallel",
            )
        return Machine(
            MachineUse(name, role, kind.name), self._times[kind.name], self._events,
            max_memory_bytes=max_memory_bytes, weight_bytes=weight_bytes,
            on_prompt_end=self._prompt_ended, on_decode_end=self._ended, on_idle=self._idle,
        )  # fmt: skip

    def run(self) -> Run:
        for job in self._jobs:
            self._events.after(job.arrival_s, partial(self._arrived, job))
        self._events.run()
        for job in self._jobs:
            job.served.ending = job.served.ending or Ending.FAILED
        self._check()
        return Run(
            Profile.COMPAT, self._workload, self._design, tuple(job.served for job in self._jobs),
            tuple(machine.use for machine in self._machines), self._events.now, self._all_counters(), self._warnings(),
        )  # fmt: skip

    def _arrived(self, job: Job) -> None:
        self._placement.place(job)
        job.served.prompt_machine, job.served.token_machine = job.source.use.name, job.target.use.name
        job.source.arrived(job.prompt)
        if not job.is_split and not job.ends_with_prompt:
            job.target.arrived(job.decode)

    def _idle(self, machine: Machine) -> None:
        self._placement.idle(machine)

    def _prompt_ended(self, job: Job) -> None:
        self._told(job.served)
        if job.ends_with_prompt:
            self._ended_with_prompt(job)
        elif job.is_split and job.target.has_memory(job.prompt.kv_bytes):
            self._begin_transfer(job)
        elif job.is_split:
            self._retry_later(job)

    def _ended_with_prompt(self, job: Job) -> None:
        """The public simulator has no rule for it: there such a request never ends, or stops the program."""
        job.source.free(job.prompt.kv_bytes)
        job.target.expect(tokens=-1, num_bytes=-job.kv_bytes if job.is_split else 0)
        self._ended(job)

    def _ended(self, job: Job) -> None:
        job.ended(self._events.now)
        self._told(job.served)

    def _retry_later(self, job: Job) -> None:
        self._without_memory.add(job)
        self._events.after(_RETRY_S, partial(self._retry, job))

    def _retry(self, job: Job) -> None:
        self._counters["transfer_retries"] += 1
        if job.target.has_memory(job.prompt.kv_bytes):
            self._without_memory.remove(job)
            self._begin_transfer(job)
        elif len(self._events) >= len(self._without_memory):
            self._retry_later(job)
        # Else nothing but transfers without memory is left, and none would ever find any.

    def _begin_transfer(self, job: Job) -> None:
        job.target.allocate(job.prompt.kv_bytes)
        self._counters["kv_transfers"] += 1
        self._counters["transferred_bytes"] += job.transfer_bytes
        self._events.after(job.transfer_bytes / _LINK_BYTES_S, partial(self._transferred, job))

    def _transferred(self, job: Job) -> None:
        job.source.free(job.prompt.kv_bytes)
        job.target.arrived(job.decode)
        job.source.transfer_ended()

    def _all_counters(self) -> dict[str, float]:
        return {
            **self._counters,
            "role_changes": self._placement.num_role_changes,
            "preemptions": sum(machine.num_preemptions for machine in self._machines),
            "oom_events": sum(machine.num_over_memory for machine in self._machines),
        }

    def _warnings(self) -> tuple[str, ...]:
        found = [warning for times in self._times.values() for warning in times.warnings]
        if num_failed := sum(not job.served.is_whole for job in self._jobs):
            found.append(
                f"{num_failed} requests did not end: memory that they wait for is never free, or a day is over"
            )
        if any(each.cancelled_after_s is not None or each.prefix for each in self._workload.requests):
            found.append("cancellations and common prefixes of the workload have no effect in this profile")
        return tuple(found)

    def _check(self) -> None:
        """Conservation: no request, token or byte is lost, and none is left over."""
        is_over = not len(self._events)
        left = {job for job in self._jobs if not job.served.is_whole}
        found = {task.job for machine in self._machines for task in machine.held()} | self._without_memory
        if is_over and found != left:
            raise InternalError(f"{len(left)} requests did not end, and {len(found)} are on a machine or between two")
        num_prompt = sum(
            job.served.request.num_prompt_tokens for job in self._jobs if job.served.first_token_s is not None
        )
        if num_prompt != sum(machine.use.num_prompt_tokens for machine in self._machines):
            raise InternalError(f"the machines did not compute the {num_prompt} prompt tokens of the requests")
        if left:
            return
        num_output = sum(job.served.num_tokens for job in self._jobs)
        if num_output != sum(machine.use.num_output_tokens for machine in self._machines):
            raise InternalError(f"the machines did not generate the {num_output} tokens of the requests")
        for machine in self._machines:
            found_there = (machine.memory_bytes, machine.scheduled_bytes, machine.pending_tokens)
            if found_there != (machine.weight_bytes, machine.weight_bytes, 0):
                raise InternalError(
                    f"{machine.use.name} is idle with {machine.memory_bytes - machine.weight_bytes} bytes of KV, "
                    f"{machine.scheduled_bytes - machine.weight_bytes} scheduled ones and {machine.pending_tokens} "
                    "pending tokens"
                )
