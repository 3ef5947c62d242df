"""Times of steps from a machine's data sheet and what a model needs: bytes and operations. Pure.

A step takes as long as the slower of both, each at the share of the data sheet that was measured, and a time for each
layer that no data sheet has: kernel launches and the exchange between GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from baton.errors import BadConfig
from engine.step import StepShape
from planner.machines import Machine
from planner.models import Model


@dataclass(frozen=True, slots=True)
class Efficiency:
    """What is reached of a data sheet."""

    flops_share: float
    memory_share: float
    layer_s: float

    def __post_init__(self) -> None:
        if not (0 < self.flops_share <= 1 and 0 < self.memory_share <= 1 and 0 <= self.layer_s < 1):
            raise BadConfig(
                f"an efficiency of {self.flops_share:g} of the operations, {self.memory_share:g} of the memory and "
                f"{self.layer_s:g} s a layer; expected shares above 0 and up to 1, and 0 to 1 s",
                param="efficiency",
            )


DATA_SHEET = Efficiency(1.0, 1.0, 0.0)
# Least mean error of the logarithm over the public table's rows, of both models and all degrees. So they are of the
# software that it was measured with, in 2023; of others measure a profile.
MEASURED = {
    "a100-80gb": Efficiency(0.50, 1.0, 0.40e-3),
    "h100-80gb": Efficiency(0.42, 1.0, 0.32e-3),
}
# Of machines that the table does not have.
OTHERS = MEASURED["h100-80gb"]
# A GPU capped to half of its power takes 1.3 times as long for a prompt (Splitwise's simulator): 0.5 ** 0.38 = 1/1.3.
_CAP_EXPONENT = 0.38


class Needs(NamedTuple):
    """Of a step, of the whole model."""

    flops: float
    num_bytes: float


def needs(model: Model, shape: StepShape) -> Needs:
    """Weights are read once and each decoding sequence's KV; that of a prompt is written, and stays near."""
    num_tokens = shape.num_prompt_tokens + shape.num_decoding
    num_pairs = shape.num_prompt_pairs + shape.num_kv_tokens
    # A query and a key: their product, and the value's part in the sum.
    pair_flops = 4.0 * model.num_heads * model.head_dim * model.num_layers
    return Needs(
        flops=2.0 * model.num_active_parameters * num_tokens + pair_flops * num_pairs,
        num_bytes=model.read_bytes(num_tokens) + model.kv_bytes_per_token * (shape.num_kv_tokens + num_tokens),
    )


class Roofline:
    """Times of ``tensor_parallel`` GPUs that share the model. Raises BadConfig if it cannot be on them."""

    def __init__(
        self, model: Model, machine: Machine, tensor_parallel: int, efficiency: Efficiency | None = None
    ) -> None:
        if not 1 <= tensor_parallel <= machine.num_gpus:
            raise BadConfig(
                f"{tensor_parallel} GPUs for a model on {machine.name}, expected 1 to {machine.num_gpus}", param="tp"
            )
        if model.weight_bytes >= tensor_parallel * machine.memory_bytes:
            raise BadConfig(
                f"{model.name} has {model.weight_bytes / 1e9:.0f} GB of weights, {tensor_parallel} GPUs of "
                f"{machine.name} hold {tensor_parallel * machine.memory_bytes / 1e9:.0f} GB; expected more GPUs or a "
                "smaller model",
                param="tp",
            )
        self.efficiency = efficiency or MEASURED.get(machine.measured_as or machine.name, OTHERS)
        self._model, self._machine, self._tensor_parallel = model, machine, tensor_parallel
        # A cap slows computation, hardly the memory (Splitwise, section IV).
        self._flops_s = tensor_parallel * machine.peak_flops * self.efficiency.flops_share
        self._flops_s *= machine.cap_share**_CAP_EXPONENT
        self._bytes_s = tensor_parallel * machine.memory_bytes_s * self.efficiency.memory_share
        self._layers_s = model.num_layers * self.efficiency.layer_s

    @property
    def source(self) -> str:
        share = self.efficiency
        return (
            f"roofline of {self._model.name} on {self._machine.name} with TP {self._tensor_parallel}: "
            f"{share.flops_share:.0%} of the operations, {share.memory_share:.0%} of the memory's bytes, "
            f"{share.layer_s * 1e6:.0f} us a layer"
        )

    def step_s(self, shape: StepShape) -> float:
        if shape.is_empty:
            return 0.0
        flops, num_bytes = needs(self._model, shape)
        return self._layers_s + max(flops / self._flops_s, num_bytes / self._bytes_s)

    @property
    def warnings(self) -> tuple[str, ...]:
        known = self._machine.measured_as or self._machine.name
        if known in MEASURED or self.efficiency is not OTHERS:
            return ()
        return (f"no efficiency of {self._machine.name} was measured: that of the H100 is taken",)
