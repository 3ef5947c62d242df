"""The interface between the model and a set of kernels. Activations are [rows, features] in the model's dtype."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from baton.types import MAX_LOGIT_BIASES, MAX_STOP_TOKEN_IDS, KvLayout
from engine.batch import Batch, PieceRows
from engine.kv_cache import KvCache
from engine.model_config import ModelConfig


class Linear(Protocol):
    """x [rows, in] -> x W^T + b, [rows, out]."""

    def __call__(self, x: Tensor) -> Tensor: ...


class Attention(Protocol):
    """One step's attention; built once per step, called once per layer."""

    def __call__(self, queries: Tensor, cache: Tensor, window: int | None) -> Tensor:
        """queries as returned by ``rope_store``; cache: one layer with this step's keys and values in it.

        Returns [rows, num_heads * head_dim]. Cache contents at positions that a query does not see, NaN included, do
        not affect its result.
        """
        ...


class Kernels(Protocol):
    """Law: a row of every result depends on that row's inputs alone, bit for bit.

    The order of elements within one head of a KV block is private to a set of kernels: blocks are exchanged as a whole,
    between nodes with the same kernels.
    """

    name: str
    # How weights of matrix products are quantized: "none" or "int8".
    quantization: str
    # The device of weights, cache and activations.
    device: torch.device
    # Whether a token's keys and values have the same bits computed in a prompt and as a generated token. Where not, KV
    # of generated tokens does not serve as a prompt's, and generated tokens are not verified as a prompt.
    phases_agree: bool

    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        """Prepare a layer for repeated use; weight [out, in] is not referenced if the kernel makes its own copy."""
        ...

    def embed(self, table: Tensor, token_ids: Tensor, drawn: Tensor | None) -> Tensor:
        """PieceRows of ``table``. A negative id ~i stands for ``drawn[i]``; without ``drawn`` no id is negative.

        If ``drawn[i]`` is negative, no token was drawn, and any row of the table may be returned.
        """
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * weight per row, in float32, rounded before and after the weight."""
        ...

    def add_rms_norm(self, x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x += delta in place, rounded; then ``rms_norm`` of it."""
        ...

    def rope_store(
        self,
        qkv: Tensor,
        norms: tuple[Tensor, Tensor] | None,
        eps: float,
        cos: Tensor,
        sin: Tensor,
        cache: Tensor,
        slot_mapping: Tensor,
    ) -> Tensor:
        """Head norms of q and k, rotary embedding, and this step's keys and values into one layer of the cache.

        qkv [rows, (num_heads + 2 * num_kv_heads) * head_dim]; cos and sin [rows, head_dim / 2] float32, for half-split
        pairs; slot_mapping [rows] int64, block * block_tokens + offset. Returns queries [rows, num_heads, head_dim],
        scaled as this set's attention expects.
        """
        ...

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """[rows, 2 * features] -> silu(first half) * second half, rounded once."""
        ...

    def gated_linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        """``silu_mul`` of ``linear``; may be one pass without the rounding in between."""
        ...

    def attention(self, config: ModelConfig, layout: KvLayout, pieces: tuple[PieceRows, ...]) -> Attention: ...


class Peaks(NamedTuple):
    """For each row of logits the best token (the lowest id of equal ones) and whether all logits are finite. If they
    are not, the token is meaningless."""

    token_ids: list[int]
    are_finite: list[bool]


class Logits(NamedTuple):
    """[rows, vocabulary] float32 on the device; ``peaks`` if the kernels compute them in the same pass; ``hidden``
    [rows, features] is what the head read of these rows."""

    values: Tensor
    peaks: Peaks | None
    hidden: Tensor


class StepInputs(NamedTuple):
    """The inputs of a step, for ``Recorder``."""

    token_ids: Tensor
    cos: Tensor
    sin: Tensor
    slots: Tensor
    attention: Attention
    on_layer: Callable[[int], None]
    # Selects the wanted rows of (residual, queries) of the last layer, and their attention.
    choose: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Attention]]


class Recorder(Protocol):
    """Records the kernel calls of a step once, and then runs them with other inputs."""

    def run(
        self,
        batch: Batch,
        cos: Tensor,
        sin: Tensor,
        on_layer: Callable[[int], None] | None,
        order: Callable[[StepInputs], tuple[Tensor, Tensor]],
    ) -> Logits:
        """Logits of the batch's ``logit_rows``; valid until the next run.

        ``order`` calls the kernels in the order of a step and returns hidden states and logits. It is called when a
        step is larger than all before it; it must not depend on values.
        """
        ...


@runtime_checkable
class RecordingKernels(Kernels, Protocol):
    """CPU kernels whose steps consist of the same calls for any number of rows."""

    def recorder(self, config: ModelConfig, cache: KvCache) -> Recorder: ...


# In ``Draws.newest``: no token.
NO_TOKEN = -(2**40)
# Capacity for the most likely tokens in a report, as a power of two.
REPORT_TOP = 32
# Words of a report: mass (engine.mass.reported_mass), rank, best logit and the chosen token's as bits of float32, ids
# of the most likely tokens followed by -1, and the bits of their logits.
REPORT_WORDS = 4 + 2 * REPORT_TOP


class Draws(NamedTuple):
    """The sampling parameters of each row; all [rows] on the device."""

    scale: Tensor  # float32; log2(e) / temperature, 0 is greedy
    top_k: Tensor  # int32; 0 is off
    top_p: Tensor  # float64; 1 is off
    reach: Tensor  # float64; the distance below the best logit that min_p allows, <= 0; -inf is off
    seed: Tensor  # int64, the bits of an unsigned seed
    position: Tensor  # int64
    slot: Tensor  # int32; the row's slot in ``SlotTables``; -1: none
    is_banning: Tensor  # int32; 1: tokens that the slot lists as banned are banned
    newest: Tensor  # int64; newest token, to be counted; ~i: that of row i of the step before; or NO_TOKEN
    num_logprobs: Tensor  # int32; number of the most likely tokens to report; -1: no report
    is_masked: Tensor  # int32; 1: only tokens of the row's mask are allowed


# In the order of ``Draws``.
DRAW_DTYPES = (
    torch.float32, torch.int32, torch.float64, torch.float64, torch.int64, torch.int64,
    torch.int32, torch.int32, torch.int64, torch.int32, torch.int32,
)  # fmt: skip
# Neutral values: a greedy row.
PLAIN_DRAW = (0.0, 0, 1.0, -math.inf, 0, 0, -1, 0, NO_TOKEN, -1, 0)
# The largest number that a request may name.
MAX_EDITS = MAX_LOGIT_BIASES + MAX_STOP_TOKEN_IDS


class SlotTables(NamedTuple):
    """Per-sequence changes of logits, on the device, a slot for each sequence; written between steps."""

    # Twice the number of times a token was generated, plus 1 if the prompt contains it; the device adds
    # ``Draws.newest``.
    seen: Tensor  # [slots, vocabulary] int32
    penalties: Tensor  # [slots, 3 (repetition, frequency, presence)] float32
    # Biased tokens and tokens that may be banned, by rising id, padded with the largest int32.
    edit_ids: Tensor  # [slots, MAX_EDITS] int32
    edit_biases: Tensor  # [slots, MAX_EDITS] float32
    edit_bans: Tensor  # [slots, MAX_EDITS] int32; 1: banned while ``Draws.is_banning``

    @classmethod
    def zeros(cls, num_slots: int, vocab_size: int, device: torch.device) -> SlotTables:
        def zeros(width: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(num_slots, width, dtype=dtype, device=device)

        return cls(
            zeros(vocab_size),
            zeros(3, torch.float32),
            zeros(MAX_EDITS),
            zeros(MAX_EDITS, torch.float32),
            zeros(MAX_EDITS),
        )


class LaunchShapes(NamedTuple):
    """Shapes of steps that together make every kind of launch that occurs."""

    # Numbers of prompt tokens.
    prompts: tuple[int, ...]
    # Numbers of decoding rows, and the positions that each of them sees, its own included.
    decodes: tuple[tuple[int, int], ...]


class DeviceSampler(Protocol):
    """Samples tokens on the device, bit for bit as engine.sampler, and leaves them there."""

    tables: SlotTables
    # [max_rows, vocabulary / 32] int32: bit i % 32 of word i / 32 allows token i. Read where ``Draws.is_masked``.
    masks: Tensor

    @property
    def report(self) -> Tensor:
        """[max_rows, REPORT_WORDS] int64: reports of the rows that asked for log-probabilities, valid until the next
        step."""
        ...

    def draw(self, logits: Tensor, draws: Draws, drawn: Tensor) -> None:
        """Writes a token id per row of ``logits`` [rows, vocabulary] float32 to the first entries of ``drawn``
        (int64), which holds the tokens of the step before. A negative id means no token: -1: the row holds a NaN or
        an infinity; -2 and -3: its changes make the best logit -inf or inf."""
        ...

    def score(self, logits: Tensor, token_ids: Tensor, num_top: Tensor) -> Tensor:
        """Reports of given tokens, [rows, REPORT_WORDS] int64, valid until the next call of any method: for each row of
        ``logits`` [rows, vocabulary] float32 its token id (int64) and the number of the most likely tokens (int32). The
        mass is -1 where the row holds a NaN or an infinity."""
        ...


@runtime_checkable
class DeviceKernels(Kernels, Protocol):
    """Kernels whose decode step needs no input from the host while it runs, so it can be recorded and replayed."""

    # Each kind of launch is compiled at its first use, which takes seconds.
    is_compiled: bool

    def launch_shapes(self, config: ModelConfig, layout: KvLayout) -> LaunchShapes:
        """Called when all layers exist."""
        ...

    def device_decode(
        self, config: ModelConfig, layout: KvLayout, tables: Tensor, lengths: Tensor, max_length: int
    ) -> Attention:
        """Attention of one generated token per row. The inputs stay at their addresses while their values change.

        tables [rows, blocks] int32; lengths [rows] int32, at most ``max_length``, 0 is padding. A row's bits are those
        of ``attention``, whatever ``max_length`` and the other rows.
        """
        ...

    def prefers_unrecorded(
        self, config: ModelConfig, layout: KvLayout, tables: Sequence[Sequence[int]], lengths: Sequence[int]
    ) -> bool:
        """Whether a decode of these rows (block ids, positions) is faster with ``attention`` than recorded."""
        ...

    def sampler(self, max_rows: int, vocab_size: int) -> DeviceSampler:
        """Allocates memory for steps of up to this many rows."""
        ...
