"""Prepares the sampling parameters of sequences for kernels on a device, and converts their results.

The state that changes the logits of a sequence (biases, bans, penalties and the tokens they count) is on the device, in
a slot of its tables. The device counts the token that the previous step drew. If a slot does not hold the right tokens
(after a preemption, on another node, or when the slot was reused), it is written again from the sequence's tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from baton.types import PositionLogprobs, SamplingParams
from engine.kernels.interface import DRAW_DTYPES, NO_TOKEN, REPORT_TOP, DeviceSampler, Draws
from engine.sampler import bad_logits, no_finite_best, position_logprobs, reach_of, scale_of
from engine.staging import to_device
from engine.step import Piece, Sequence, StepResult, banned_ids, changes_logits, drawn_chunk, has_penalty

_MAX_TOP_K = 2**31 - 1
# Behind the ids that a slot lists.
_NO_ID = 2**31 - 1
# What a sampler draws instead of a token whose changes leave no finite best.
_WORST = {-2: -float("inf"), -3: float("inf")}


class Row(NamedTuple):
    """The columns of ``Draws`` for one sequence; by itself a row that draws from the logits as they are."""

    scale: float
    top_k: int
    top_p: float
    reach: float
    seed: int
    position: int
    slot: int = -1
    is_banning: int = 0
    newest: int = NO_TOKEN
    num_logprobs: int = -1
    is_masked: int = 0

    @classmethod
    def plain(cls, params: SamplingParams, position: int) -> Row:
        top_k = min(params.top_k, _MAX_TOP_K)
        return cls(float(scale_of(params)), top_k, params.top_p, reach_of(params), params.seed or 0, position)


def columns(rows: Seq[Row]) -> Draws:
    """On the host."""
    values = zip(*rows, strict=True) if rows else ((),) * len(DRAW_DTYPES)
    return Draws(*(_column(v, dtype) for v, dtype in zip(values, DRAW_DTYPES, strict=True)))


def _column(values: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    # Seeds have 64 bits and no sign.
    if dtype == torch.int64 and max(values, default=0) >= 2**63:
        return torch.from_numpy(np.array(values, dtype=np.uint64).view(np.int64))
    return torch.tensor(values, dtype=dtype, device="cpu")


class Prepared(NamedTuple):
    """``columns`` on the host, and sequences that get no token even if one is drawn for them."""

    columns: Draws
    failed: dict[str, Exception]


class _Slot:
    """Where a sequence's changes lie, and how many of its tokens are counted there; -1: something else is."""

    __slots__ = ("index", "num_counted")

    def __init__(self, index: int) -> None:
        self.index = index
        self.num_counted = -1


class DeviceDraws:
    """A device's sampler, the tokens it draws, and its slots by sequence: as many as a step has rows.

    Called when steps are launched, in their order. Its writes are queued behind the steps launched before.
    """

    def __init__(self, sampler: DeviceSampler) -> None:
        self.sampler = sampler
        # What the step launched last draws, on the device.
        self.drawn = torch.zeros(len(sampler.masks), dtype=torch.int64, device=sampler.masks.device)
        self._tables = sampler.tables
        self._free = list(range(len(self._tables.seen)))
        # The one that was used longest ago comes first.
        self._slots: dict[str, _Slot] = {}

    def forget(self, sequence_id: str) -> None:
        slot = self._slots.pop(sequence_id, None)
        if slot is not None:
            self._free.append(slot.index)

    def prepare(self, pieces: Seq[Piece], drawn_rows: Mapping[str, int]) -> Prepared:
        """A row for each piece that samples. ``drawn_rows``: which row of the step before draws a sequence's token."""
        for piece in pieces:
            # None of them may lose its slot to another of them.
            slot = self._slots.pop(piece.sequence.sequence_id, None)
            if slot is not None:
                self._slots[piece.sequence.sequence_id] = slot
        rows, failed = [], {}
        for i, piece in enumerate(pieces):
            row = Row.plain(piece.sequence.spec.sampling, piece.end)
            try:
                row = self._changed(row, i, piece, drawn_rows)
            except Exception as error:
                # A mask that cannot be made is its sequence's affair.
                failed[piece.sequence.sequence_id] = error
            rows.append(row)
        return Prepared(columns(rows), failed)

    def _changed(self, row: Row, index: int, piece: Piece, drawn_rows: Mapping[str, int]) -> Row:
        sequence, params = piece.sequence, piece.sequence.spec.sampling
        num_generated = piece.end - len(sequence.spec.prompt_token_ids)
        if params.logprobs is not None:
            row = row._replace(num_logprobs=params.logprobs)
        if sequence.token_mask is not None:
            self._send_mask(index, sequence.token_mask.bits(sequence.token_ids))
            row = row._replace(is_masked=1)
        if not changes_logits(params, num_generated):
            return row
        slot = self._slots.get(sequence.sequence_id) or self._take_slot(sequence)
        row = row._replace(slot=slot.index, is_banning=int(bool(banned_ids(params, num_generated))))
        if not has_penalty(params):
            return row
        if slot.num_counted == piece.end - 1:
            newest = (
                ~drawn_rows[sequence.sequence_id] if piece.token_is_on_device else sequence.token_ids[piece.end - 1]
            )
            row = row._replace(newest=newest)
        else:
            self._send_seen(slot.index, sequence, piece.end)
        slot.num_counted = piece.end
        return row

    def _take_slot(self, sequence: Sequence) -> _Slot:
        if not self._free:
            self.forget(next(iter(self._slots)))
        slot = self._slots[sequence.sequence_id] = _Slot(self._free.pop())
        params = sequence.spec.sampling
        ids = sorted({*params.logit_bias, *params.stop_token_ids})
        biases = [params.logit_bias.get(i, 0.0) for i in ids]
        bans = [int(i in params.stop_token_ids) for i in ids]
        width = self._tables.edit_ids.shape[1]
        self._send(self._tables.edit_ids[slot.index], _padded(ids, width, _NO_ID, np.int32))
        self._send(self._tables.edit_biases[slot.index], _padded(biases, width, 0, np.float32))
        self._send(self._tables.edit_bans[slot.index], _padded(bans, width, 0, np.int32))
        penalties = params.repetition_penalty, params.frequency_penalty, params.presence_penalty
        self._send(self._tables.penalties[slot.index], np.array(penalties, dtype=np.float32))
        return slot

    def _send_seen(self, index: int, sequence: Sequence, end: int) -> None:
        assert end <= len(sequence.token_ids), "what is counted anew is known"
        num_prompt = len(sequence.spec.prompt_token_ids)
        seen = Counter(dict.fromkeys(sequence.token_ids[:num_prompt], 1))
        for token_id in sequence.token_ids[num_prompt:end]:
            seen[token_id] += 2
        device = self._tables.seen.device
        ids, counts = np.array([*seen], dtype=np.int64), np.array([*seen.values()], dtype=np.int32)
        row = self._tables.seen[index]
        row.zero_()
        row[to_device(torch.from_numpy(ids), device)] = to_device(torch.from_numpy(counts), device)

    def _send_mask(self, row: int, bits: bytes) -> None:
        to = self.sampler.masks[row]
        if len(bits) != to.nbytes:
            raise ValueError(f"a token mask has {len(bits)} bytes, expected {to.nbytes} for this vocabulary")
        # Words of little-endian processors, as GPUs are and all hosts of them.
        self._send(to, np.frombuffer(bits, dtype="<i4").copy())

    def _send(self, to: Tensor, values: NDArray[np.generic]) -> None:
        to.copy_(to_device(torch.from_numpy(values), to.device))


def _padded(values: Seq[float], width: int, rest: float, dtype: type[np.generic]) -> NDArray[np.generic]:
    out = np.full(width, rest, dtype=dtype)
    out[: len(values)] = values
    return out


def drawn_results(
    sequences: Seq[Sequence], token_ids: Seq[int], reports: Mapping[int, NDArray[np.int64]]
) -> StepResult:
    """``token_ids``: what the device drew for each; ``reports``: by row, of those that asked for log-probabilities."""
    result = StepResult()
    for row, (sequence, token_id) in enumerate(zip(sequences, token_ids, strict=True)):
        if token_id >= 0:
            logprobs = _reported(reports[row], token_id) if row in reports else None
            result.sampled[sequence.sequence_id] = drawn_chunk(sequence, token_id, logprobs)
        elif token_id in _WORST:
            result.failed[sequence.sequence_id] = no_finite_best(_WORST[token_id], sequence.spec.sampling)
        else:
            result.failed[sequence.sequence_id] = bad_logits(len(sequence.token_ids))
    return result


def scored_tokens(pieces: Seq[Piece]) -> tuple[Tensor, Tensor]:
    """What ``DeviceSampler.score`` takes for the positions that these score, in their order; on the host."""
    token_ids = [piece.sequence.token_ids[position + 1] for piece in pieces for position in piece.scored]
    counts = [piece.sequence.spec.sampling.prompt_logprobs or 0 for piece in pieces for _ in piece.scored]
    return torch.tensor(token_ids, dtype=torch.int64), torch.tensor(counts, dtype=torch.int32)


def take_scored(pieces: Seq[Piece], reports: NDArray[np.int64], result: StepResult) -> None:
    """Adds to ``result`` what a device reports of the positions that ``pieces`` score: a row for each, in order."""
    row = 0
    for piece in pieces:
        found = reports[row : row + len(piece.scored)]
        row += len(piece.scored)
        sequence = piece.sequence
        if sequence.spec.sampling.prompt_logprobs is None:
            continue
        bad = np.flatnonzero(found[:, 0] < 0)
        if len(bad):
            result.failed[sequence.sequence_id] = bad_logits(piece.scored[int(bad[0])] + 1)
            continue
        token_ids = sequence.token_ids[piece.scored.start + 1 : piece.scored.stop + 1]
        result.scored[sequence.sequence_id] = tuple(map(_reported, found, token_ids))


def _reported(report: NDArray[np.int64], token_id: int) -> PositionLogprobs:
    mass, rank = int(report[0]), int(report[1])
    best, chosen = report[2:4].astype(np.int32).view(np.float32)
    ids = report[4 : 4 + REPORT_TOP]
    values = report[4 + REPORT_TOP :].astype(np.int32).view(np.float32)
    top = [(int(i), float(v)) for i, v in zip(ids, values, strict=True) if i >= 0]
    return position_logprobs(mass, float(best), rank, [(token_id, float(chosen)), *top])
