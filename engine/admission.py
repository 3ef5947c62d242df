"""Refuses sequences that can never run on a replica, and tokens that do not continue one. Pure."""

from __future__ import annotations

from baton.errors import InvalidRequest, PromptTooLong
from baton.types import SequenceSpec, TokenChunk, blocks_for
from engine.scheduler_config import SchedulerConfig


def check_spec(spec: SequenceSpec, limits: SchedulerConfig, num_blocks: int) -> None:
    """Raise for a sequence that can never run on ``num_blocks``: PromptTooLong, InvalidRequest."""
    total = spec.max_total_tokens
    # An answer of one token has no KV: a prompt that is only scored may fill the context.
    num_stored = total - 1 if spec.sampling.max_tokens == 1 else total
    if num_stored > limits.max_model_tokens:
        raise PromptTooLong(
            f"{len(spec.prompt_token_ids)} prompt tokens + max_tokens {spec.sampling.max_tokens} = {total}, "
            f"expected at most {limits.max_model_tokens}, the context of the model",
            param="prompt",
        )
    if (need := blocks_for(num_stored, limits.block_tokens)) > num_blocks:
        raise PromptTooLong(
            f"{num_stored} tokens need {need} KV blocks of {limits.block_tokens} tokens, this node has {num_blocks}",
            param="prompt",
        )
    assert spec.sampling.max_tokens is not None
    if len(spec.generated_token_ids) >= spec.sampling.max_tokens:
        raise InvalidRequest(
            f"{len(spec.generated_token_ids)} tokens were generated already, expected fewer than max_tokens "
            f"{spec.sampling.max_tokens}",
            param="generated_token_ids",
        )
    _check_ids("prompt_token_ids", spec.prompt_token_ids, limits)
    _check_ids("generated_token_ids", spec.generated_token_ids, limits)
    _check_ids("stop_token_ids", spec.sampling.stop_token_ids, limits)
    _check_ids("logit_bias", tuple(spec.sampling.logit_bias), limits)


def joined_ids(spec: SequenceSpec, tokens: TokenChunk, limits: SchedulerConfig, num_blocks: int) -> tuple[int, ...]:
    """The ids of ``tokens`` behind those that ``spec`` has, which leased ``num_blocks``. Raises InvalidRequest."""
    known, max_tokens = spec.generated_token_ids, spec.sampling.max_tokens
    overlap = known[tokens.index :]
    token_ids = tokens.token_ids[len(overlap) :]
    assert max_tokens is not None
    continues = tokens.index <= len(known) and tokens.token_ids[: len(overlap)] == overlap and token_ids
    if not continues or tokens.finish_reason is not None or len(known) + len(token_ids) >= max_tokens:
        raise InvalidRequest(
            f"{spec.sequence_id} arrived with {len(tokens.token_ids)} tokens at index {tokens.index} "
            f"(finish {tokens.finish_reason}), expected unfinished tokens that continue the {len(known)} generated "
            f"ones, and less than max_tokens {max_tokens} of both"
        )
    _check_ids("token_ids", token_ids, limits)
    need = blocks_for(spec.num_known_tokens + len(token_ids) - 1, limits.block_tokens)
    if need > num_blocks:
        raise InvalidRequest(
            f"{spec.sequence_id} arrived with {len(token_ids)} new tokens, whose KV needs {need} blocks, expected "
            f"at most the {num_blocks} leased ones"
        )
    return token_ids


def _check_ids(name: str, ids: tuple[int, ...], limits: SchedulerConfig) -> None:
    """One id out of range would fail the step for every sequence in it."""
    if limits.vocab_size is None:
        return
    if ids and not 0 <= min(ids) <= max(ids) < limits.vocab_size:
        raise InvalidRequest(
            f"{name} has ids from {min(ids)} to {max(ids)}, expected 0 to {limits.vocab_size - 1}", param=name
        )
