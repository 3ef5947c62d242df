"""What a model is to the planner: bytes of its weights and of a token's KV, and operations for a token. Pure.

Two built-in ones, those of the Splitwise paper, and any that has a Hugging Face ``config.json``.
"""

from __future__ import annotations

from dataclasses import dataclass

from baton.errors import BadConfig, quoted


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """Figures of the whole model, not of one GPU."""

    name: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    # All parameters, and those that one token is multiplied with: fewer in a mixture of experts, and without the table
    # of embeddings, of which a token reads one row.
    num_parameters: float
    num_active_parameters: float
    # Of a mixture of experts: in each layer that has them, how many one token uses, parameters of all in all layers.
    num_experts: int = 0
    num_experts_per_token: int = 0
    num_expert_parameters: float = 0.0
    bytes_per_parameter: float = 2.0
    bytes_per_kv_value: float = 2.0

    @property
    def weight_bytes(self) -> float:
        return self.num_parameters * self.bytes_per_parameter

    def read_bytes(self, num_tokens: int) -> float:
        """Of weights, in a step of so many tokens: experts that none of them uses are not read. Each token is taken to
        choose its experts by chance."""
        if not self.num_experts:
            return self.num_active_parameters * self.bytes_per_parameter
        used = self.num_experts_per_token / self.num_experts
        more = (1 - (1 - used) ** num_tokens - used) * self.num_expert_parameters
        return (self.num_active_parameters + max(0.0, more)) * self.bytes_per_parameter

    @property
    def kv_bytes_per_token(self) -> float:
        """A key and a value in each layer for each KV head: with grouped queries fewer than there are heads."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.bytes_per_kv_value


BUILT_IN = {
    model.name: model
    for model in (
        # https://huggingface.co/bigscience/bloom: 176,247,271,424 parameters.
        Model(
            name="bloom-176b", num_layers=70, hidden_size=14336, num_heads=112, num_kv_heads=112, head_dim=128,
            num_parameters=176.247e9, num_active_parameters=176.247e9,
        ),
        # https://huggingface.co/meta-llama/Llama-2-70b-hf: 68,976,648,192 parameters, 8 KV heads.
        Model(
            name="llama2-70b", num_layers=80, hidden_size=8192, num_heads=64, num_kv_heads=8, head_dim=128,
            num_parameters=68.977e9, num_active_parameters=68.715e9,
        ),
    )
}  # fmt: skip


def find(name: str) -> Model:
    """Raises BadConfig."""
    if name not in BUILT_IN:
        raise BadConfig(f"the model is {quoted(name)}, expected one of {', '.join(BUILT_IN)}", param="model")
    return BUILT_IN[name]
