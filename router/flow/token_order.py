"""Puts the tokens of one sequence in order, whichever node and session they come by. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from baton.types import PositionLogprobs, TokenChunk


class DifferentTokens(Exception):
    """A token came twice with different values."""


class TokenOrder:
    """``tokens`` only grows. Chunks behind a hole wait in ``early``, by index; the caller bounds their number."""

    __slots__ = ("early", "tokens")

    def __init__(self, tokens: Sequence[int] = ()) -> None:
        self.tokens = list(tokens)
        self.early: dict[int, TokenChunk] = {}

    def take(self, chunk: TokenChunk) -> TokenChunk | None:
        """What is new in the chunk and in those that waited for it; None if it is behind a hole.

        Raises DifferentTokens.
        """
        if chunk.index > len(self.tokens):
            self.early[chunk.index] = chunk
            return None
        num_before = len(self.tokens)
        logprobs: list[PositionLogprobs] = []
        next_chunk: TokenChunk | None = chunk
        while next_chunk is not None:
            self._append(next_chunk, logprobs)
            next_chunk = self._next_early()
        return TokenChunk(chunk.sequence_id, num_before, tuple(self.tokens[num_before:]), tuple(logprobs))

    def _append(self, chunk: TokenChunk, logprobs: list[PositionLogprobs]) -> None:
        """What is new in a chunk that leaves no hole."""
        num_known = len(self.tokens) - chunk.index
        overlap = min(num_known, len(chunk.token_ids))
        if tuple(self.tokens[chunk.index : chunk.index + overlap]) != chunk.token_ids[:overlap]:
            raise DifferentTokens(f"token at {chunk.index} came twice with different values")
        self.tokens += chunk.token_ids[overlap:]
        logprobs += chunk.logprobs[num_known:]

    def _next_early(self) -> TokenChunk | None:
        if not self.early:
            return None
        index = min(self.early)
        return self.early.pop(index) if index <= len(self.tokens) else None
