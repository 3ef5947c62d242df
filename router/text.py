"""Tokens to text as it streams: no half characters, nothing that may still become a stop string.

One `TextStream` per choice; it is fed tokens in order and says what text became certain. It decides nothing about the
request; a stop string that it finds is the caller's to act on.
"""

from __future__ import annotations

import codecs
from collections.abc import Collection, Sequence
from typing import NamedTuple, Protocol

from router.tokenizer import Tokenizer

# A piece of text that does not resolve within this many tokens (a character has at most 4 bytes) is invalid and goes
# out as it is.
_MAX_WINDOW_TOKENS = 32


class Detokenizer(Protocol):
    def push(self, token_ids: Sequence[int]) -> str:
        """Text that is certain after these tokens."""

    def flush(self) -> str:
        """What is left at the end, incomplete characters as U+FFFD."""


class ByteDetokenizer:
    """Byte-level tokenizers: text is the UTF-8 decoding of the concatenated bytes."""

    __slots__ = ("_decoder", "_skip", "_table")

    def __init__(self, table: Sequence[bytes], skip: Collection[int]) -> None:
        self._table = table
        self._skip = skip
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_ids: Sequence[int]) -> str:
        table, skip = self._table, self._skip
        return self._decoder.decode(b"".join([table[i] for i in token_ids if i < len(table) and i not in skip]))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """Any tokenizer: text is what a growing window of tokens decodes to beyond what its head decoded to.

    The head stays in the window, because a token's text may depend on its left neighbour (leading spaces).
    """

    __slots__ = ("_ids", "_num_head", "_skip_special", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special_tokens
        self._ids: list[int] = []
        # The first tokens of the window, whose text is out.
        self._num_head = 0

    def push(self, token_ids: Sequence[int]) -> str:
        out = []
        for token_id in token_ids:
            self._ids.append(token_id)
            out.append(self._advance(is_last=False))
        return "".join(out)

    def flush(self) -> str:
        return self._advance(is_last=True)

    def _advance(self, *, is_last: bool) -> str:
        if self._num_head == len(self._ids):
            return ""
        head = self._decode(self._ids[: self._num_head])
        whole = self._decode(self._ids)
        is_stuck = len(self._ids) - self._num_head > _MAX_WINDOW_TOKENS
        if not is_last and not is_stuck and (whole.endswith("\ufffd") or len(whole) <= len(head)):
            return ""
        self._ids = self._ids[self._num_head :]
        self._num_head = len(self._ids)
        return whole[len(head) :]

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip_special)


class StopFinder:
    """Looks for the first of several strings in text that comes in pieces."""

    __slots__ = ("_held", "_include", "_stops")

    def __init__(self, stops: Sequence[str], include: bool) -> None:
        self._stops = tuple(stops)
        self._include = include
        # The end of the text so far that is the beginning of a stop string.
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """Text that is certain, and the stop string if one is complete; then the text ends before (or with) it."""
        text = self._held + text
        found = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            # The one that starts first; of two at the same place, the shorter was complete first.
            at, stop = min(found, key=lambda f: (f[0], len(f[1])))
            self._held = ""
            return text[: at + len(stop)] if self._include else text[:at], stop
        num_held = max((_overlap(text, stop) for stop in self._stops), default=0)
        certain = len(text) - num_held
        self._held = text[certain:]
        return text[:certain], None

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a proper beginning of ``stop``."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


class TextDelta(NamedTuple):
    text: str
    # How many of the pushed tokens belong to the output (all, unless a stop string ended it).
    num_tokens: int
    stop: str | None


class TextStream:
    """Text of one choice. Stop tokens are ids of the output but not text, unless asked for."""

    __slots__ = ("_detokenizer", "_finder", "_hidden")

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        *,
        stops: Sequence[str] = (),
        include_stop: bool = False,
        stop_token_ids: Collection[int] = (),
        skip_special_tokens: bool = True,
    ) -> None:
        self._detokenizer = None if tokenizer is None else _detokenizer(tokenizer, skip_special_tokens)
        self._finder = StopFinder(stops, include_stop) if stops else None
        self._hidden = frozenset() if include_stop else frozenset(stop_token_ids)

    def push(self, token_ids: Sequence[int]) -> TextDelta:
        if self._detokenizer is None:
            return TextDelta("", len(token_ids), None)
        if self._finder is None:
            return TextDelta(self._decode(self._detokenizer, token_ids), len(token_ids), None)
        # Token by token, to know which token completed the stop string.
        out = []
        for count, token_id in enumerate(token_ids, 1):
            text, stop = self._finder.push(self._decode(self._detokenizer, (token_id,)))
            out.append(text)
            if stop is not None:
                return TextDelta("".join(out), count, stop)
        return TextDelta("".join(out), len(token_ids), None)

    def flush(self) -> TextDelta:
        """The end: incomplete characters and held text come out; they may even complete a stop string."""
        if self._detokenizer is None:
            return TextDelta("", 0, None)
        rest = self._detokenizer.flush()
        if self._finder is None:
            return TextDelta(rest, 0, None)
        text, stop = self._finder.push(rest)
        return TextDelta(text if stop is not None else text + self._finder.flush(), 0, stop)

    def _decode(self, detokenizer: Detokenizer, token_ids: Sequence[int]) -> str:
        if self._hidden and not self._hidden.isdisjoint(token_ids):
            token_ids = [i for i in token_ids if i not in self._hidden]
        return detokenizer.push(token_ids)


def _detokenizer(tokenizer: Tokenizer, skip_special_tokens: bool) -> Detokenizer:
    table = tokenizer.byte_table
    if table is not None:
        return ByteDetokenizer(table, tokenizer.special_ids if skip_special_tokens else frozenset())
    return WindowDetokenizer(tokenizer, skip_special_tokens)
