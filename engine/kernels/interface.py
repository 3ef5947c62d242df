"""What the model asks of a set of kernels. Activations are [rows, features] in the model's dtype."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from baton.types import MAX_LOGIT_BIASES, MAX_STOP_TOKEN_IDS, KvLayout
from engine.batch import Batch, Span
from engine.config import ModelConfig
from engine.kv_cache import KvCache


class Linear(Protocol):
    """x [rows, in] -> x W^T + b, [rows, out]."""

    def __call__(self, x: Tensor) -> Tensor: ...


class Attention(Protocol):
    """One step's attention; built once per step, called once per layer."""

    def __call__(self, queries: Tensor, cache: Tensor, window: int | None) -> Tensor:
        """queries as ``rope_store`` gave them; cache: one layer, this step's keys and values in it.

        Returns [rows, num_heads * head_dim]. What lies in the cache at positions that a query does not see never
        reaches its result, NaN included.
        """
        ...


class Kernels(Protocol):
    """Law: a row of every result depends on that row's inputs alone, bit for bit.

    How a set of kernels orders the elements within one head of a KV block is its own business; blocks are exchanged
    between nodes that run the same kernels, and as a whole.
    """

    name: str
    # What becomes of the weights of products: "none" or "int8".
    quantization: str
    # Where weights, cache and activations lie.
    device: torch.device

    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        """Prepare a layer for repeated use; weight [out, in], not kept if the kernel holds its own copy."""
        ...

    def embed(self, table: Tensor, token_ids: Tensor, drawn: Tensor | None) -> Tensor:
        """Rows of ``table``. A negative id ~i stands for ``drawn[i]``; without ``drawn`` there is none.

        Where ``drawn[i]`` is negative no token was drawn: any row of the table will do.
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
        scaled as this set's attention wants them.
        """
        ...

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """[rows, 2 * features] -> silu(first half) * second half, rounded once."""
        ...

    def gated_linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        """``silu_mul`` of ``linear``, which may be one pass without the rounding between."""
        ...

    def attention(self, config: ModelConfig, layout: KvLayout, spans: tuple[Span, ...]) -> Attention: ...


class Peaks(NamedTuple):
    """Of each row of logits the best token, the lowest id where several are equal, and whether all logits are finite;
    where they are not, the token means nothing."""

    token_ids: list[int]
    are_finite: list[bool]


class Logits(NamedTuple):
    """[rows, vocabulary] float32 on the device; ``peaks`` where the kernels find them on the way."""

    values: Tensor
    peaks: Peaks | None = None


class StepInputs(NamedTuple):
    """What a step is computed from, for ``Recorder``."""

    token_ids: Tensor
    cos: Tensor
    sin: Tensor
    slots: Tensor
    attention: Attention
    on_layer: Callable[[int], None]
    # Of (residual, queries) of the last layer the rows that sample, and their attention.
    choose: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Attention]]


class Recorder(Protocol):
    """Writes the calls of a step down the first time, and then runs them with other inputs."""

    def run(
        self,
        batch: Batch,
        cos: Tensor,
        sin: Tensor,
        on_layer: Callable[[int], None] | None,
        order: Callable[[StepInputs], Tensor],
    ) -> Logits:
        """Of the rows that sample; valid until the next run.

        ``order`` calls the kernels in the order of a step and gives the logits. It is called when a step is larger than
        all before it; nothing in it may depend on values.
        """
        ...


@runtime_checkable
class RecordingKernels(Kernels, Protocol):
    """Kernels of the processor whose steps are all the same calls, whatever the number of rows."""

    def recorder(self, config: ModelConfig, cache: KvCache) -> Recorder: ...


# In ``Draws.newest``: there is none.
NO_TOKEN = -(2**40)
# Room for the most likely tokens in a report, as a power of two.
REPORT_TOP = 32
# Mass (engine.mass.reported_mass), rank, best logit and the chosen token's as the bits of float32, ids of the most
# likely tokens, -1 behind them, and the bits of their logits.
REPORT_WORDS = 4 + 2 * REPORT_TOP


class Draws(NamedTuple):
    """How the token of each row is drawn; all [rows] on the device."""

    scale: Tensor  # float32; log2(e) / temperature, 0 is greedy
    top_k: Tensor  # int32; 0 is off
    top_p: Tensor  # float64; 1 is off
    reach: Tensor  # float64; how far below the best min_p goes, a number <= 0; -inf is off
    seed: Tensor  # int64, the bits of an unsigned number
    position: Tensor  # int64
    slot: Tensor  # int32; where in ``SlotTables`` the row's changes are; -1: it has none
    is_banning: Tensor  # int32; 1: tokens that the slot lists for it are banned
    newest: Tensor  # int64; to be counted as generated before; ~i: what row i of the step before drew; or NO_TOKEN
    num_logprobs: Tensor  # int32; how many of the most likely tokens to report; -1: nothing at all
    is_masked: Tensor  # int32; 1: only tokens of the row's mask are allowed


# In the order of ``Draws``.
DRAW_DTYPES = (
    torch.float32, torch.int32, torch.float64, torch.float64, torch.int64, torch.int64,
    torch.int32, torch.int32, torch.int64, torch.int32, torch.int32,
)  # fmt: skip
# Values that ask for nothing: a greedy row.
PLAIN_DRAW = (0.0, 0, 1.0, -math.inf, 0, 0, -1, 0, NO_TOKEN, -1, 0)
# As many as a request may name.
MAX_EDITS = MAX_LOGIT_BIASES + MAX_STOP_TOKEN_IDS


class SlotTables(NamedTuple):
    """What changes the logits of sequences, on the device, a slot each; written between steps."""

    # Twice how often a token was generated, and 1 more if the prompt has it; the device adds ``Draws.newest``.
    seen: Tensor  # [slots, vocabulary] int32
    penalties: Tensor  # [slots, 3 (repetition, frequency, presence)] float32
    # Biased tokens and those that may be banned, by rising id; behind them the largest int32.
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
    """Shapes of steps that between them launch everything that any step launches."""

    # Tokens of prompts.
    prompts: tuple[int, ...]
    # Rows that decode, and positions that each of them sees, its own included.
    decodes: tuple[tuple[int, int], ...]


class DeviceSampler(Protocol):
    """Draws tokens, bit for bit those of engine.sampler, and leaves them on the device."""

    tables: SlotTables
    # [max_rows, vocabulary / 32] int32: bit i % 32 of word i / 32 allows token i. Looked at where ``Draws.is_masked``.
    masks: Tensor

    @property
    def report(self) -> Tensor:
        """[max_rows, REPORT_WORDS] int64: of rows that asked for log-probabilities, valid until the next step."""
        ...

    def draw(self, logits: Tensor, draws: Draws, drawn: Tensor) -> None:
        """A token id per row of ``logits`` [rows, vocabulary] float32 into the first of ``drawn``, int64, which holds
        what the step before drew. Negative: there is none. -1: the row holds a NaN or an infinity; -2 and -3: its
        changes make -inf and inf of the best logit.
        """
        ...


@runtime_checkable
class DeviceKernels(Kernels, Protocol):
    """Kernels whose decode step needs nothing of the host while it runs, so that it can be recorded and replayed."""

    # Each kind of launch is compiled when it is first met, which takes seconds.
    is_compiled: bool

    def launch_shapes(self, config: ModelConfig, layout: KvLayout) -> LaunchShapes:
        """Asked once all layers are there."""
        ...

    def device_decode(
        self, config: ModelConfig, layout: KvLayout, tables: Tensor, lengths: Tensor, max_length: int
    ) -> Attention:
        """Attention of one generated token per row, whose inputs stay where they are while their values change.

        tables [rows, blocks] int32; lengths [rows] int32, at most ``max_length``, 0 is padding. A row's bits are those
        of ``attention``, whatever ``max_length`` and the rows beside it.
        """
        ...

    def prefers_unrecorded(
        self, config: ModelConfig, layout: KvLayout, tables: Sequence[Sequence[int]], lengths: Sequence[int]
    ) -> bool:
        """Whether a decode of these rows (block ids, positions) is faster by ``attention`` than recorded."""
        ...

    def sampler(self, max_rows: int, vocab_size: int) -> DeviceSampler:
        """Memory for steps of up to so many rows is taken now."""
        ...
