"""Drives a Runner by hand: hands out scattered blocks, poisons what is free, builds plans. No scheduler, no thread."""

from __future__ import annotations

import random
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import torch
from torch import Tensor

from baton.types import PositionLogprobs, SamplingParams, SequenceSpec, TokenChunk
from engine.runner import Runner
from engine.step import Piece, Sequence, StepPlan


def spec(
    name: str, prompt: Iterable[int], *, generated: Iterable[int] = (), max_tokens: int = 8, **sampling: object
) -> SequenceSpec:
    options = {"temperature": 0.0, "seed": 0, **sampling}
    params = SamplingParams(max_tokens=max_tokens, **options)  # type: ignore[arg-type]
    return SequenceSpec(f"{name}/0/0", tuple(prompt), params, tuple(generated))


def random_prompt(length: int, vocab_size: int, seed: int = 0) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed * 10_007 + length)
    return tuple(torch.randint(0, vocab_size, (length,), generator=generator).tolist())


@dataclass
class Run:
    """What a sequence produced: tokens, the logits each was drawn from, and the sampler's reports."""

    token_ids: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    sampled: list[tuple[tuple[int, ...], tuple[PositionLogprobs, ...]]] = field(default_factory=list)
    # Of the prompt, from its second token on.
    scored: list[PositionLogprobs] = field(default_factory=list)
    # Of the prompt.
    embedding: bytes = b""


class Driver:
    """Owns all blocks of a runner; blocks not in use, and rows not yet written, hold NaN."""

    def __init__(self, runner: Runner, seed: int = 0) -> None:
        self.runner = runner
        self._arena = [runner._cache.layer(i) for i in range(runner.layout.num_layers)]
        self._free = list(range(runner.layout.num_blocks))
        random.Random(seed).shuffle(self._free)
        self._poison(self._free)
        self.scored: dict[str, tuple[PositionLogprobs, ...]] = {}

    def _poison(self, blocks: list[int]) -> None:
        with torch.inference_mode():
            for layer in self._arena:
                layer[blocks] = float("nan")

    def add(self, sequence_spec: SequenceSpec) -> Sequence:
        sequence = Sequence(sequence_spec)
        self.grow(sequence, len(sequence.token_ids))
        return sequence

    def grow(self, sequence: Sequence, num_tokens: int) -> None:
        while len(sequence.block_ids) < self.runner.layout.blocks_for(num_tokens):
            sequence.block_ids = [*sequence.block_ids, self._free.pop()]

    def remove(self, sequence: Sequence) -> None:
        self._poison(list(sequence.block_ids))
        self._free[:0] = sequence.block_ids
        sequence.block_ids = ()
        self.runner.forget(sequence.sequence_id)

    def piece(self, sequence: Sequence, chunk: int) -> Piece:
        left = len(sequence.token_ids) - sequence.num_computed
        count = min(chunk, left)
        self.grow(sequence, sequence.num_computed + count)
        start = sequence.num_computed
        return Piece(sequence, start, count, samples=count == left, scored=sequence.scored(start, start + count))

    def step(self, pieces: Seq[Piece]) -> tuple[dict[str, TokenChunk], dict[str, Tensor]]:
        """One plan; sampled tokens are appended. Returns what was sampled and from which logits, by sequence id.

        ``scored`` then has what was scored.
        """
        plan = StepPlan(tuple(pieces))
        launched = self.runner.launch(plan)
        logits = launched.logits[: len(launched.sequences)].clone()
        rows = dict(zip([s.sequence_id for s in launched.sequences], logits, strict=True))
        result = launched.result()
        sampled, self.scored = result.sampled, result.scored
        for piece in pieces:
            if piece.sequence.pool is not None and piece.sequence.sequence_id in result.hidden:
                piece.sequence.pool.add(result.hidden[piece.sequence.sequence_id])
        for piece in pieces:
            piece.sequence.num_computed += piece.num_tokens
            if piece.samples:
                piece.sequence.token_ids += sampled[piece.sequence.sequence_id].token_ids
        return sampled, rows

    def generate(self, sequence_spec: SequenceSpec, *, chunk: int = 1 << 30, neighbours: Crowd | None = None) -> Run:
        """Run one sequence to its max_tokens, in chunks, possibly among neighbours that come and go."""
        sequence, run = self.add(sequence_spec), Run()
        limit = sequence_spec.sampling.max_tokens or 0
        while sequence.num_generated < limit:
            pieces = [self.piece(sequence, chunk)]
            if neighbours is not None:
                pieces = neighbours.around(self, pieces[0])
            sampled, logits = self.step(pieces)
            run.scored += self.scored.get(sequence.sequence_id, ())
            if sequence.sequence_id in sampled:
                drawn = sampled[sequence.sequence_id]
                run.sampled.append((drawn.token_ids, drawn.logprobs))
                run.token_ids += sampled[sequence.sequence_id].token_ids
                run.logits.append(logits[sequence.sequence_id])
        self.remove(sequence)
        run.embedding = b"" if sequence.pool is None else sequence.pool.values()
        if neighbours is not None:
            neighbours.clear(self)
        return run


class Crowd:
    """Neighbours in mixed phases: prompts in chunks of many sizes, decodes at many lengths, replaced as they end."""

    def __init__(self, size: int, vocab_size: int, seed: int = 1) -> None:
        self._size = size
        self._vocab_size = vocab_size
        self._random = random.Random(seed)
        self._members: list[Sequence] = []
        self._count = 0

    def _join(self, driver: Driver) -> Sequence:
        self._count += 1
        length = self._random.choice((1, 2, 5, 17, 63, 64, 65, 100, 130))
        options: dict[str, object] = self._random.choice(({}, {"temperature": 1.0, "repetition_penalty": 1.3}))
        seed = self._random.randrange(1 << 30)
        name = f"neighbour-{self._count}"
        return driver.add(spec(name, random_prompt(length, self._vocab_size, seed), **options))

    def around(self, driver: Driver, piece: Piece) -> list[Piece]:
        while len(self._members) < self._size:
            self._members.append(self._join(driver))
        for i, member in enumerate(self._members):
            if member.num_generated >= (member.spec.sampling.max_tokens or 0):
                driver.remove(member)
                self._members[i] = self._join(driver)
        pieces = [driver.piece(m, self._random.choice((1, 3, 8, 40, 64, 1000))) for m in self._members]
        pieces.insert(self._random.randrange(len(pieces) + 1), piece)
        return pieces

    def clear(self, driver: Driver) -> None:
        for member in self._members:
            driver.remove(member)
        self._members.clear()
