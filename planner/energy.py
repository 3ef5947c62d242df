"""What a machine draws in a step, and what energy and money a run took for each request and token. Pure.

The energy is that of the GPUs. Hosts, switches and cooling draw more: no step moves that.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from engine.step import StepShape
from planner.machines import Machine
from planner.models import Model
from planner.results import Run
from planner.roofline import needs
from planner.times import Times

_HOUR_S = 3600.0
_MILLION = 1e6
# Share of a GPU's power limit: while a step runs, and for what the step uses of the memory's bytes and of the
# operations of the data sheet. From the power of the public table, measured on A100 alone: average power of runs that
# are nearly all decoding (BLOOM 63 %, Llama2-70B 74, 60 and 43 % with TP 2, 4 and 8), highest power of prompts. Other
# GPUs are taken to draw the same shares of theirs.
_RUNNING = 0.28
_MEMORY = 0.73
_FLOPS = 1.3


class StepPower:
    """Watts of a machine's GPUs: those that share the model, and the others, which idle."""

    def __init__(self, model: Model, machine: Machine, tensor_parallel: int, times: Times) -> None:
        self._model, self._machine, self._times = model, machine, times
        self._num_gpus = tensor_parallel
        self._flops_s = tensor_parallel * machine.peak_flops
        self._bytes_s = tensor_parallel * machine.memory_bytes_s

    @property
    def idle_w(self) -> float:
        return self._machine.num_gpus * self._machine.idle_power_w

    def step_w(self, shape: StepShape) -> float:
        """On average over a step; never above the cap."""
        step_s = self._times.step_s(shape)
        if shape.is_empty or step_s <= 0:
            return self.idle_w
        flops, num_bytes = needs(self._model, shape)
        share = _RUNNING + (_MEMORY * num_bytes / self._bytes_s + _FLOPS * flops / self._flops_s) / step_s
        limit_w = self._machine.uncapped_power_w or self._machine.power_w
        drawn_w = min(self._machine.power_w, share * limit_w)
        idle_w = self._machine.idle_power_w
        return self._num_gpus * max(drawn_w, idle_w) + (self._machine.num_gpus - self._num_gpus) * idle_w


# Figures of a bill, by the names of `summary.json`.
_ENERGY = (
    "prompt_j", "decode_j", "idle_j", "joules_per_request", "joules_per_prompt_token", "joules_per_output_token",
)  # fmt: skip
_MONEY = ("dollars", "dollars_per_million_tokens", "dollars_per_million_output_tokens")


@dataclass(frozen=True, slots=True)
class Bill:
    """What a run took. A figure for each of something is 0 if there is none."""

    prompt_j: float
    decode_j: float
    idle_j: float
    dollars: float
    num_requests: int
    num_prompt_tokens: int
    num_output_tokens: int

    @property
    def total_j(self) -> float:
        return self.prompt_j + self.decode_j + self.idle_j

    @property
    def has_energy(self) -> bool:
        """The profile compat simulates none."""
        return self.total_j > 0

    @property
    def joules_per_request(self) -> float:
        """Idle energy included."""
        return _each(self.total_j, self.num_requests)

    @property
    def joules_per_prompt_token(self) -> float:
        return _each(self.prompt_j, self.num_prompt_tokens)

    @property
    def joules_per_output_token(self) -> float:
        return _each(self.decode_j, self.num_output_tokens)

    @property
    def dollars_per_million_tokens(self) -> float:
        """Of prompts and outputs together: machines are paid for while they idle."""
        return _each(self.dollars * _MILLION, self.num_prompt_tokens + self.num_output_tokens)

    @property
    def dollars_per_million_output_tokens(self) -> float:
        return _each(self.dollars * _MILLION, self.num_output_tokens)

    def as_json(self) -> dict[str, float | None]:
        energy = {name: getattr(self, name) if self.has_energy else None for name in _ENERGY}
        return energy | {name: getattr(self, name) for name in _MONEY}


def bill(run: Run) -> Bill:
    """Of requests that were served whole; energy and money of all that the machines did."""
    whole = [served for served in run.served if served.is_whole]
    return Bill(
        prompt_j=_sum(use.prompt_energy_j for use in run.machines),
        decode_j=_sum(use.decode_energy_j for use in run.machines),
        idle_j=_sum(use.idle_energy_j for use in run.machines),
        dollars=run.design.dollars_per_hour * run.ended_s / _HOUR_S,
        num_requests=len(whole),
        num_prompt_tokens=sum(served.request.num_prompt_tokens for served in whole),
        num_output_tokens=sum(served.num_tokens for served in whole),
    )


def _sum(values: Iterable[float]) -> float:
    return sum(values, 0.0)


def _each(total: float, count: int) -> float:
    return total / count if count else 0.0
