"""The steps that a runner takes before it serves, so that no kernel is compiled while a request waits.

Knows the possible shapes of steps; the kernels list the launches for each.
"""

from __future__ import annotations

from collections.abc import Iterator

from baton.types import KvLayout, SamplingParams, SequenceSpec
from engine.kernels.interface import LaunchShapes
from engine.step import Piece, Sequence, StepPlan

# What kernels of the processor need: a prompt and a generated token.
MINIMAL = LaunchShapes(prompts=(1,), decodes=((1, 2),))


def warm_up_plans(
    shapes: LaunchShapes, layout: KvLayout, *, max_batch_tokens: int, max_num_seqs: int, max_model_tokens: int
) -> Iterator[StepPlan]:
    """Prompts and decodes of every kind that the limits allow. All of it lies in block 0, on top of each other."""
    for num_tokens in shapes.prompts:
        if num_tokens <= max_batch_tokens:
            yield StepPlan(tuple(_prompts(num_tokens, layout, max_model_tokens)))
    for rows, length in shapes.decodes:
        if rows <= min(max_num_seqs, max_batch_tokens) and length <= max_model_tokens:
            yield StepPlan(tuple(_decode(i, length, layout) for i in range(rows)))


def largest_step(layout: KvLayout, *, max_batch_tokens: int, max_num_seqs: int, max_model_tokens: int) -> StepPlan:
    """The step that takes the most memory of those that the limits allow: every token and every sequence that it may
    have, as many of these as can be decode, and one of them is as long as the model allows, which sizes what attention
    keeps of all of them. The others are short: what they read does not matter."""
    num_seqs = min(max_num_seqs, max_batch_tokens)
    # So few that they hold all tokens but one for each of the others; a sequence of one token cannot decode.
    num_prompts = num_seqs
    if max_model_tokens > 1:
        num_prompts = min(num_seqs, max(1, -(-(max_batch_tokens - num_seqs) // (max_model_tokens - 1))))
    lengths = [max_model_tokens, *[2] * num_seqs][: num_seqs - num_prompts]
    decodes = [_decode(i, length, layout) for i, length in enumerate(lengths)]
    num_tokens = min(max_batch_tokens - len(decodes), num_prompts * max_model_tokens)
    return StepPlan((*decodes, *_prompts(num_tokens, layout, max_model_tokens, first=len(decodes))))


def _prompts(num_tokens: int, layout: KvLayout, longest: int, *, first: int = 0) -> Iterator[Piece]:
    for i, at in enumerate(range(0, num_tokens, longest), first):
        count = min(longest, num_tokens - at)
        yield Piece(_sequence(i, count, 0, layout), 0, count, samples=True)


def _decode(index: int, length: int, layout: KvLayout) -> Piece:
    """The newest of ``length`` tokens, of which all but one were generated."""
    return Piece(_sequence(index, 1, length - 1, layout), length - 1, 1, samples=True)


def _sequence(index: int, num_prompt: int, num_generated: int, layout: KvLayout) -> Sequence:
    params = SamplingParams(temperature=0.0, max_tokens=num_generated + 1, seed=0)
    sequence = Sequence(SequenceSpec(f"warm-up/{index}", (0,) * num_prompt, params, (0,) * num_generated))
    sequence.block_ids = [0] * layout.blocks_for(num_prompt + num_generated)
    return sequence
