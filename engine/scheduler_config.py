"""The limits of one replica's scheduler."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from baton.errors import BadConfig
from baton.settings import check, computed, setting


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits of one replica. The first three are the model's; see ``of_model``."""

    block_tokens: int = field(default=64, metadata=computed())
    max_model_tokens: int = field(default=4096, metadata=computed())
    # Token ids are smaller. None: no model reads them, so they are not looked at.
    vocab_size: int | None = field(default=2**31, metadata=computed())
    max_batch_tokens: int = field(
        default=2048,
        metadata=setting(
            "--max-batch-tokens",
            "Prompt tokens computed in one engine step.",
            aliases=("--max-num-batched-tokens",),
            least=1,
            most=1 << 24,
        ),
    )
    max_num_seqs: int = field(
        default=256,
        metadata=setting("--max-num-seqs", "Sequences that run at once on a worker.", least=1, most=1 << 16),
    )
    tbt_target_s: float | None = field(
        default=None,
        metadata=setting(
            "--tbt-target-ms",
            "While a worker decodes, it computes only so much of prompts that a step is predicted to take so many "
            "milliseconds: the gap between two tokens of a stream. Prompts take longer then. 0: no bound.",
            unit=1e-3,
            none=0,
            most=600_000,
        ),
    )
    # Whatever --tbt-target-ms says, a step in which prompts wait has so many of their tokens (a tile of rows of the
    # kernels) or as many as take this share of its time: prompts make progress where decoding alone takes that long.
    min_chunk_tokens: int = field(default=8, metadata=setting(least=1))
    min_prompt_share: float = field(default=0.2, metadata=setting(least=0, most=0.9))
    # While nothing decodes on a worker that others hand sequences to, a step may take so many times --tbt-target-ms:
    # one that arrives waits for the step that runs. Chunks so long cost a prompt a few percent at most.
    prompt_step_targets: float = field(default=4.0, metadata=setting(least=1))
    # A prompt that came longer ago is computed before those of a better priority that did not: prompts of the worst
    # priority are delayed, but for no longer than a client waits.
    max_prompt_wait_s: float = 10.0
    # Sequences that wait for their first step; one more is refused.
    max_waiting: int = field(default=1024, metadata=setting(least=1))
    # A sequence that lost its blocks so often starts again only with blocks for its whole life.
    max_preemptions: int = field(default=3, metadata=setting(least=1))
    # Share of the blocks that admissions leave free for sequences to grow.
    watermark: float = field(default=0.01, metadata=setting(least=0))
    has_prefix_cache: bool = field(
        default=True,
        metadata=setting(
            "--prefix-cache",
            "Keep KV blocks of sequences that ended, so that prompts that begin alike are neither computed nor moved "
            "twice. Same tokens on and off.",
            choices=("on", "off"),
        ),
    )
    max_cached_share: float = field(
        default=1.0,
        metadata=setting(
            "--prefix-cache-share",
            "Share of the KV blocks that may be kept while no sequence holds them. Sequences that need the room get "
            "it anyway.",
            least=0,
            most=1.0,
        ),
    )
    verifies_cache: bool = field(
        default=False,
        metadata=setting(
            "--verify-cache",
            "Keep a digest of each block in the prefix cache and compare it when the block is found; one that differs "
            "is computed anew. Takes a millisecond per few MB.",
            choices=("on", "off"),
        ),
    )

    def __post_init__(self) -> None:
        check(self)
        if self.watermark >= 1:
            raise BadConfig(f"watermark is {self.watermark}, expected a share in [0, 1)", param="watermark")

    def of_model(self, *, block_tokens: int, max_model_tokens: int, vocab_size: int | None) -> SchedulerConfig:
        return replace(self, block_tokens=block_tokens, max_model_tokens=max_model_tokens, vocab_size=vocab_size)
