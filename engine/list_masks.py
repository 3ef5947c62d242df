"""Masks of what a request allows or forbids by lists of token ids: `allowed_token_ids` and `bad_word_ids`."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq

from baton.types import SequenceSpec
from engine.step import TokenMask


class ListMask:
    """`TokenMask` of one sequence with such lists; ``inner`` is that of its grammar, which this narrows."""

    __slots__ = ("_allowed", "_bad_words", "_num_bytes", "_num_prompt", "inner")

    def __init__(self, spec: SequenceSpec, vocab_size: int, inner: TokenMask | None) -> None:
        sampling = spec.sampling
        self.inner = inner
        self._num_prompt = len(spec.prompt_token_ids)
        self._num_bytes = -(-vocab_size // 32) * 4
        every = (1 << vocab_size) - 1
        # Bit i allows token i.
        self._allowed = every & _bits(sampling.allowed_token_ids) if sampling.allowed_token_ids else every
        self._bad_words = sampling.bad_word_ids

    @property
    def is_ready(self) -> bool:
        return self.inner is None or self.inner.is_ready

    @property
    def follows_tokens(self) -> bool:
        return self.inner is not None or any(len(word) > 1 for word in self._bad_words)

    def is_over(self, token_ids: Seq[int]) -> bool:
        return self.inner is not None and self.inner.is_over(token_ids)

    def bits(self, token_ids: Seq[int]) -> bytes:
        allowed = self._allowed
        if self.inner is not None:
            allowed &= int.from_bytes(self.inner.bits(token_ids), "little")
        num_generated = len(token_ids) - self._num_prompt
        for *begin, last in self._bad_words:
            # What the prompt has of a word does not count.
            count = len(begin)
            if count <= num_generated and list(token_ids[len(token_ids) - count :]) == begin:
                allowed &= ~(1 << last)
        return allowed.to_bytes(self._num_bytes, "little")


def _bits(token_ids: Iterable[int]) -> int:
    size = max(token_ids, default=-1) + 1
    flags = bytearray(size // 8 + 1)
    for token_id in token_ids:
        flags[token_id // 8] |= 1 << token_id % 8
    return int.from_bytes(flags, "little")
