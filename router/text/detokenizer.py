"""Converts streamed tokens to text without incomplete characters, and finds stop strings.

There is one `TextStream` per choice. It gets tokens in order and returns the text that can no longer change. The caller
acts on a stop string that it finds.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from baton.types import PositionLogprobs
from router.text.deltas import Delta
from router.text.tokenizer import CONTEXT, PieceReader, Tokenizer, Utf8

_MAX_CHARACTER_BYTES = 4
# Text that is still incomplete after this many pieces is invalid and is returned as it is.
_MAX_HELD_PIECES = 32


class Detokenizer(Protocol):
    def push(self, token_ids: Sequence[int]) -> str:
        """The text that is certain after these tokens."""

    def flush(self) -> str:
        """The rest at the end, incomplete characters as U+FFFD."""


class ByteDetokenizer:
    """Byte-level tokenizers: text is the UTF-8 decoding of the concatenated bytes."""

    __slots__ = ("_skip", "_table", "_utf8")

    def __init__(self, table: Sequence[bytes], skip: Collection[int], prompt_token_ids: Sequence[int]) -> None:
        self._table = table
        self._skip = skip
        self._utf8 = Utf8()
        tail = b""
        for token_id in reversed(prompt_token_ids):
            tail = self._bytes((token_id,)) + tail
            if len(tail) >= _MAX_CHARACTER_BYTES:
                break
        self._utf8.decode(tail[-_MAX_CHARACTER_BYTES:])
        self._utf8.begin_output()

    def push(self, token_ids: Sequence[int]) -> str:
        return self._utf8.decode(self._bytes(token_ids))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)

    def _bytes(self, token_ids: Sequence[int]) -> bytes:
        table, skip = self._table, self._skip
        return b"".join([table[i] for i in token_ids if i < len(table) and i not in skip])


class WindowDetokenizer:
    """For any tokenizer: new text is the decoded text of a window of vocabulary entries, less that of the window's
    head.

    The head is the piece before, whose text was returned, and CONTEXT if there was more: a piece's text may depend on
    whether it is the first one (a space is stripped), and that of the piece before on whether it is the last one (BPE's
    end-of-word suffix).
    """

    __slots__ = ("_head", "_held", "_holds", "_reader", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, skip: Collection[int], prompt_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._reader = PieceReader(tokenizer, skip)
        self._head = _trimmed(self._reader.push(_visible_tail(tokenizer, skip, prompt_token_ids)))
        self._reader.begin_output()
        self._holds = tokenizer.has_partial_pieces
        # Pieces whose text was not returned yet, since they may be parts of a character.
        self._held: list[str] = []

    def push(self, token_ids: Sequence[int]) -> str:
        return self._advance(self._reader.push(token_ids), is_last=False)

    def flush(self) -> str:
        return self._advance(self._reader.flush(), is_last=True)

    def _advance(self, pieces: list[str], *, is_last: bool) -> str:
        self._held += pieces
        if not self._held:
            return ""
        window = self._head + self._held
        text = self._tokenizer.join(window)[len(self._tokenizer.join(self._head)) :]
        is_stuck = len(self._held) > _MAX_HELD_PIECES
        if self._holds and text.endswith("\ufffd") and not (is_last or is_stuck):
            return ""
        self._head, self._held = _trimmed(window), []
        return text


def _trimmed(pieces: list[str]) -> list[str]:
    return pieces if len(pieces) <= 2 else [CONTEXT, pieces[-1]]


def _visible_tail(tokenizer: Tokenizer, skip: Collection[int], token_ids: Sequence[int]) -> list[int]:
    """The last tokens with text: enough for a whole character and to tell whether there is more before them."""
    tail: list[int] = []
    for token_id in reversed(token_ids):
        if token_id not in skip and tokenizer.piece(token_id) is not None:
            tail.append(token_id)
            if len(tail) > _MAX_CHARACTER_BYTES + 2:
                break
    return tail[::-1]


class StopFinder:
    """Searches for the first of several strings in text that comes in pieces."""

    __slots__ = ("_held", "_include", "_num_exempt", "_stops")

    def __init__(self, stops: Sequence[str], include: bool) -> None:
        self._stops = tuple(stops)
        self._include = include
        # The end of the text so far, if it is the beginning of a stop string.
        self._held = ""
        # Number of its characters that belong to text in which no stop string may end.
        self._num_exempt = 0

    def push(self, text: str, *, is_exempt: bool = False) -> tuple[str, str | None]:
        """The text that is certain, and the stop string if one is complete; then the text ends before (or with) it.

        A stop string may begin in exempt text but not end in it.
        """
        text = self._held + text
        first_end = len(text) + 1 if is_exempt else self._num_exempt + 1
        found = [(at, stop) for stop in self._stops if (at := text.find(stop, max(0, first_end - len(stop)))) >= 0]
        if found:
            # The stop string that starts first; of two at the same place, the shorter was complete first.
            at, stop = min(found, key=lambda f: (f[0], len(f[1])))
            self._held = ""
            return text[: at + len(stop)] if self._include else text[:at], stop
        num_held = max((_overlap(text, stop) for stop in self._stops), default=0)
        certain = len(text) - num_held
        self._held = text[certain:]
        self._num_exempt = num_held if is_exempt else max(0, self._num_exempt - certain)
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


@dataclass(frozen=True, slots=True)
class Part:
    """New output of one choice. Text lags behind token ids where it may still change."""

    # Of the answer: without reasoning and calls, if the request has tools or the model reasons.
    text: str
    # Without those behind the one that completed a stop string.
    token_ids: Sequence[int] = ()
    logprobs: Sequence[PositionLogprobs] = ()
    # If requested: the text that each token added, before text was held back or cut at stop strings.
    token_texts: Sequence[str] = ()
    # The stop string that ended the output.
    stop: str | None = None
    # Of the next tokens of the prompt, from the second on; before any output.
    scored: Sequence[PositionLogprobs] = ()
    # What the output says, if the request has tools or the model reasons: the text as content, reasoning, calls.
    deltas: Sequence[Delta] = ()
    # No text follows.
    is_last: bool = False
    # The client has it from an answer that was lost.
    is_known: bool = False


class TextStream:
    """Text of one choice, which continues the prompt's text. Stop tokens are output ids but not text, unless
    requested. No stop string ends before ``min_tokens`` tokens."""

    __slots__ = ("_detokenizer", "_finder", "_hidden", "_num_exempt_tokens", "_wants_token_texts")

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        *,
        prompt_token_ids: Sequence[int] = (),
        stops: Sequence[str] = (),
        include_stop: bool = False,
        stop_token_ids: Collection[int] = (),
        skip_special_tokens: bool = True,
        shown_ids: Collection[int] = (),
        min_tokens: int = 0,
        wants_token_texts: bool = False,
    ) -> None:
        """``shown_ids``: special tokens that are text in any case."""
        self._detokenizer = None
        if tokenizer is not None:
            skip = tokenizer.special_ids if skip_special_tokens else frozenset()
            skip = skip.difference(shown_ids) if shown_ids else skip
            self._detokenizer = _detokenizer(tokenizer, skip, prompt_token_ids)
        self._finder = StopFinder(stops, include_stop) if stops else None
        self._hidden = frozenset() if include_stop else frozenset(stop_token_ids)
        # Number of tokens before stop strings count.
        self._num_exempt_tokens = min_tokens
        self._wants_token_texts = wants_token_texts

    def push(self, token_ids: Sequence[int], logprobs: Sequence[PositionLogprobs] = ()) -> Part:
        if self._detokenizer is None:
            return Part("", token_ids, logprobs, [""] * len(token_ids) if self._wants_token_texts else ())
        if self._finder is None and not self._wants_token_texts:
            return Part(self._decode(self._detokenizer, token_ids), token_ids, logprobs)
        # Token by token, to find the text of each and the one that completed the stop string.
        out, token_texts = [], []
        stop: str | None = None
        for token_id in token_ids:
            text = self._decode(self._detokenizer, (token_id,))
            token_texts.append(text)
            if self._finder is not None:
                text, stop = self._finder.push(text, is_exempt=self._num_exempt_tokens > 0)
                self._num_exempt_tokens -= 1
            out.append(text)
            if stop is not None:
                break
        count = len(token_texts)
        texts = token_texts if self._wants_token_texts else ()
        return Part("".join(out), token_ids[:count], logprobs[:count], texts, stop)

    def flush(self) -> Part:
        """At the end incomplete characters and held text are returned; they may even complete a stop string."""
        if self._detokenizer is None:
            return Part("")
        rest = self._detokenizer.flush()
        token_texts = [rest] if self._wants_token_texts and rest else ()
        if self._finder is None:
            return Part(rest, token_texts=token_texts)
        text, stop = self._finder.push(rest, is_exempt=self._num_exempt_tokens >= 0)
        return Part(text if stop is not None else text + self._finder.flush(), token_texts=token_texts, stop=stop)

    def _decode(self, detokenizer: Detokenizer, token_ids: Sequence[int]) -> str:
        if self._hidden and not self._hidden.isdisjoint(token_ids):
            token_ids = [i for i in token_ids if i not in self._hidden]
        return detokenizer.push(token_ids)


def _detokenizer(tokenizer: Tokenizer, skip: Collection[int], prompt_token_ids: Sequence[int]) -> Detokenizer:
    table = tokenizer.byte_table
    if table is not None:
        return ByteDetokenizer(table, skip, prompt_token_ids)
    return WindowDetokenizer(tokenizer, skip, prompt_token_ids)
