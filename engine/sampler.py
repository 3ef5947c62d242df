"""Samples tokens from logits. Each row is computed alone, and its random number is a function of (seed, position): any
node can continue any request, and batch neighbours have no effect.

Order: logit_bias, min_tokens, penalties, the sequence's token mask, temperature, min_p, top_k, top_p; the rest is
sampled in the order of ids. Log-probabilities are those of the raw logits, before any of these. A row with a NaN or an
infinity fails alone, and so does one whose changes leave no finite best. Kernels on a device do the same, bit for bit:
probabilities are integers (engine.mass), all else are single IEEE operations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from baton.errors import BadLogits, InvalidRequest
from baton.types import PositionLogprobs, SamplingParams, TokenChunk, TokenLogprob
from engine.kernels.interface import Peaks
from engine.mass import LOG2E, REPORTED_BITS, drawn_masses, quantile, reported_mass, share
from engine.step import Piece, Sequence, StepResult, banned_ids, changes_logits, drawn_chunk, has_penalty

_U32 = 0xFFFFFFFF
# Candidates looked at first for top_p; the whole vocabulary is sorted only if they do not hold enough mass.
_NUCLEUS = 512

# Fields that change what may be drawn, and what requests call them.
_CHANGES = {
    "grammar": "grammar",
    "allowed_token_ids": "allowed_token_ids",
    "bad_word_ids": "bad_words",
    "logit_bias": "logit_bias",
    "min_tokens": "min_tokens",
    "repetition_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
}
_UNCHANGED = SamplingParams()


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits: Philox4x32-10 of counter ``position`` under key ``seed``."""
    c0, c1, c2, c3 = position & _U32, (position >> 32) & _U32, 0, 0
    k0, k1 = seed & _U32, (seed >> 32) & _U32
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _U32, (p0 >> 32) ^ c3 ^ k1, p0 & _U32
        k0, k1 = (k0 + 0x9E3779B9) & _U32, (k1 + 0xBB67AE85) & _U32
    return ((c0 << 21) | (c1 >> 11)) * 2.0**-53


class _Seen:
    """Which tokens a sequence holds and how often each was generated."""

    __slots__ = ("counts", "num_tokens", "present")

    def __init__(self, vocab_size: int) -> None:
        self.present = np.zeros(vocab_size, dtype=bool)
        self.counts = np.zeros(vocab_size, dtype=np.float32)
        self.num_tokens = 0

    def update(self, sequence: Sequence) -> None:
        prompt = len(sequence.spec.prompt_token_ids)
        new = np.asarray(sequence.token_ids[self.num_tokens :], dtype=np.int64)
        self.present[new] = True
        np.add.at(self.counts, new[max(0, prompt - self.num_tokens) :], 1)
        self.num_tokens = len(sequence.token_ids)


class Sampler:
    """Keeps, per sequence that has penalties, what it has seen; ``forget`` drops it."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._seen: dict[str, _Seen] = {}

    def forget(self, sequence_id: str) -> None:
        self._seen.pop(sequence_id, None)

    def sample(
        self, logits: Tensor, sequences: Seq[Sequence], peaks: Peaks | None = None, scored: Seq[Piece] = ()
    ) -> StepResult:
        """One token, or why there is none, per sequence, and the reports of what the pieces ``scored`` score: a row of
        ``logits`` [rows, vocabulary] float32 for each of both, in this order. ``peaks`` of them, where they are known.
        """
        result = StepResult()
        if not len(logits):
            return result
        token_ids, are_finite = peaks or _peaks(logits)
        for row, sequence in enumerate(sequences):
            try:
                if not are_finite[row]:
                    raise bad_logits(len(sequence.token_ids))
                sampled = self._sample_row(logits[row], sequence, token_ids[row])
            except Exception as error:
                # Of any kind: the other rows are other sequences.
                result.failed[sequence.sequence_id] = error
            else:
                result.sampled[sequence.sequence_id] = sampled
        row = len(sequences)
        for piece in scored:
            try:
                if piece.sequence.spec.sampling.prompt_logprobs is not None:
                    result.scored[piece.sequence.sequence_id] = _score(logits[row:], piece, are_finite[row:])
            except Exception as error:
                result.failed[piece.sequence.sequence_id] = error
            row += len(piece.scored)
        return result

    def _sample_row(self, logits: Tensor, sequence: Sequence, best_id: int) -> TokenChunk:
        params, mask = sequence.spec.sampling, sequence.token_mask
        values: NDArray[np.float32] = logits.numpy()
        is_changed = changes_logits(params, sequence.num_generated)
        if is_changed:
            values = self._changed(values.copy(), sequence)
        bits = None if mask is None else np.frombuffer(mask.bits(sequence.token_ids), dtype=np.uint8)
        if params.is_greedy and not is_changed and (bits is None or _allows(bits, best_id)):
            token_id = best_id
        else:
            # What `values` are of; None is all tokens.
            kept = None
            if bits is not None:
                values, kept = _masked(values, bits)
            if (is_changed or bits is not None) and not math.isfinite(best := float(values.max(initial=-np.inf))):
                raise no_finite_best(best, params)
            if params.is_greedy:
                token_id = int(values.argmax())
            else:
                token_id = draw(values, params, uniform(params.seed or 0, len(sequence.token_ids)))
            if kept is not None:
                token_id = int(kept[token_id])
        report = None if params.logprobs is None else logprobs(logits, token_id, params.logprobs)
        return drawn_chunk(sequence, token_id, report)

    def _changed(self, values: NDArray[np.float32], sequence: Sequence) -> NDArray[np.float32]:
        params = sequence.spec.sampling
        banned = banned_ids(params, sequence.num_generated)
        for token_id, bias in params.logit_bias.items():
            if token_id < len(values):
                values[token_id] += np.float32(bias)
        values[[t for t in banned if t < len(values)]] = -np.inf
        if has_penalty(params):
            self._penalize(values, sequence)
        return values

    def _penalize(self, values: NDArray[np.float32], sequence: Sequence) -> None:
        params = sequence.spec.sampling
        seen = self._seen.get(sequence.sequence_id)
        if seen is None or seen.num_tokens > len(sequence.token_ids):
            seen = self._seen[sequence.sequence_id] = _Seen(self._vocab_size)
        seen.update(sequence)
        if params.repetition_penalty != 1:
            factor = np.float32(params.repetition_penalty)
            present = values[seen.present]
            with np.errstate(over="ignore"):
                values[seen.present] = np.where(present > 0, present / factor, present * factor)
        values -= np.float32(params.frequency_penalty) * seen.counts
        values -= np.float32(params.presence_penalty) * (seen.counts > 0)


def _allows(bits: NDArray[np.uint8], token_id: int) -> bool:
    return bool(bits[token_id // 8] >> token_id % 8 & 1)


def _masked(
    values: NDArray[np.float32], bits: NDArray[np.uint8]
) -> tuple[NDArray[np.float32], NDArray[np.int64] | None]:
    """The values that the mask allows and their ids, rising; or all with -inf for the others, and None, where that is
    less to copy. A token is drawn from both alike, for what is -inf has no mass."""
    allowed = np.unpackbits(bits, count=len(values), bitorder="little").view(bool)
    if 2 * np.count_nonzero(allowed) < len(values):
        kept = np.flatnonzero(allowed)
        return values[kept], kept
    values = values.copy()
    values[np.flatnonzero(~allowed)] = -np.inf
    return values, None


def _score(logits: Tensor, piece: Piece, are_finite: Seq[bool]) -> tuple[PositionLogprobs, ...]:
    """Of the rows that ``logits`` begins with."""
    sequence, num_top = piece.sequence, piece.sequence.spec.sampling.prompt_logprobs
    assert num_top is not None
    found = []
    for row, position in enumerate(piece.scored):
        if not are_finite[row]:
            raise bad_logits(position + 1)
        found.append(logprobs(logits[row], sequence.token_ids[position + 1], num_top))
    return tuple(found)


def _peaks(logits: Tensor) -> Peaks:
    values = logits.numpy()
    # One NaN makes both ends NaN. Beside the rest this is nothing: a twentieth of what torch takes to find the best id.
    are_finite = np.isfinite(logits.amin(-1).numpy()) & np.isfinite(logits.amax(-1).numpy())
    return Peaks(values.argmax(-1).tolist(), are_finite.tolist())


def no_finite_best(best: float, params: SamplingParams) -> InvalidRequest:
    """For a sequence whose own changes leave no token to draw. It names all of them."""
    names = [shown for name, shown in _CHANGES.items() if getattr(params, name) != getattr(_UNCHANGED, name)]
    return InvalidRequest(
        f"{' and '.join(names)} leave no token to draw: the best logit is {best}, expected a finite number; ban fewer "
        "tokens, or set the penalties closer to their neutral values",
        param=next(iter(names), None),
    )


def bad_logits(position: int) -> BadLogits:
    """For a sequence whose raw logits are not all finite for its token at ``position``."""
    return BadLogits(
        f"the model's logits for token {position} of the sequence hold NaN or infinity, expected finite "
        "numbers: a weight is not finite, or numbers outgrow the dtype; check the weights, or run the workers with "
        "--dtype float32"
    )


def draw(logits: NDArray[np.float32], params: SamplingParams, number: float) -> int:
    """The token at quantile ``number`` of the filtered distribution, in the order of ids."""
    best, scale = logits.max(), scale_of(params)
    kept = _survivors(logits, best, params)
    values = logits if kept is None else logits[kept]
    masses = drawn_masses(values, best, scale)
    if params.top_p < 1:
        nucleus = _nucleus(values, masses, params.top_p)
        kept, masses = nucleus if kept is None else kept[nucleus], masses[nucleus]
    heads = np.cumsum(masses)
    chosen = int(np.searchsorted(heads, quantile(number, int(heads[-1])), side="right"))
    return chosen if kept is None else int(kept[chosen])


def scale_of(params: SamplingParams) -> np.float32:
    """From logits to bits; 0 is greedy."""
    return np.float32(0 if params.is_greedy else LOG2E / params.temperature)


def reach_of(params: SamplingParams) -> float:
    """What min_p leaves lies at most so far below the best logit, as a number <= 0."""
    return params.temperature * math.log(params.min_p) if params.min_p > 0 else -math.inf


def _survivors(logits: NDArray[np.float32], best: np.float32, params: SamplingParams) -> NDArray[np.int64] | None:
    """Token ids that min_p and top_k leave, rising; None is all."""
    kept: NDArray[np.int64] | None = None
    if params.min_p > 0:
        kept = np.flatnonzero(logits >= np.float32(float(best) + reach_of(params)))
    if 0 < params.top_k < len(logits if kept is None else kept):
        head = np.sort(_largest(logits if kept is None else logits[kept], params.top_k))
        kept = head if kept is None else kept[head]
    return kept


def _nucleus(values: NDArray[np.float32], masses: NDArray[np.int64], top_p: float) -> NDArray[np.int64]:
    """Indices, rising, of the shortest run of most likely tokens that holds ``top_p`` of the mass."""
    wanted = share(top_p, int(masses.sum()))
    for count in (_NUCLEUS, len(values)):
        head = _largest(values, min(count, len(values)))
        heads = np.cumsum(masses[head])
        if heads[-1] >= wanted:
            break
    return np.sort(head[: int(np.searchsorted(heads, wanted)) + 1])


def _largest(values: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Indices of the ``count`` largest values, best first; of equal values the lower index comes first."""
    if count >= len(values):
        return np.argsort(-values, kind="stable")
    threshold = np.partition(values, len(values) - count)[len(values) - count]
    head = np.flatnonzero(values >= threshold)
    return head[np.argsort(-values[head], kind="stable")[:count]]


def logprobs(logits: Tensor, token_id: int, num_top: int) -> PositionLogprobs:
    """Of the raw distribution: the chosen token, its rank, and the ``num_top`` most likely (ties: lower id first)."""
    values = logits.numpy()
    best = values.max()
    value = values[token_id]
    head = _largest(values, num_top) if num_top else values[:0].astype(np.int64)
    return position_logprobs(
        reported_mass(values, best), float(best), int((values > value).sum()) + 1,
        [(token_id, float(value)), *((int(i), float(values[i])) for i in head)],
    )  # fmt: skip


def position_logprobs(mass: int, best: float, rank: int, tokens: Seq[tuple[int, float]]) -> PositionLogprobs:
    """``mass``: of all tokens, by ``reported_mass``; ``tokens``: (id, logit) of the chosen one and the most likely."""
    log_sum = best + math.log(mass) - REPORTED_BITS * math.log(2)
    chosen, *top = (TokenLogprob(token_id, value - log_sum) for token_id, value in tokens)
    return PositionLogprobs(chosen, rank, tuple(top))
