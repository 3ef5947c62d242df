"""Formats log-probabilities for the OpenAI API: in the style of completions or of chat, of prompts also in vLLM's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from baton.types import PositionLogprobs, TokenLogprob
from router.text.detokenizer import Part, TextStream
from router.text.tokenizer import Tokenizer

# JSON has no infinity; OpenAI writes this for tokens of probability zero.
_LOWEST_LOGPROB = -9999.0


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt whose log-probabilities come before the answer's."""

    first_token_id: int
    num_top: int
    skip_special_tokens: bool


class LogprobWriter:
    """Log-probabilities of one choice in either style. Tracks the text offset of completions."""

    def __init__(self, tokenizer: Tokenizer | None, *, is_chat: bool, as_ids: bool, echo: Echo | None = None) -> None:
        self._tokenizer = tokenizer
        self._is_chat = is_chat
        self._as_ids = as_ids or tokenizer is None
        self._offset = 0
        self.echo = echo
        self._prompt_text: TextStream | None = None

    def begin(self) -> dict[str, Any]:
        """The prompt's first token, which nothing predicts, if the prompt is repeated; else no token."""
        if self.echo is None:
            return self.write((), ())
        skip = self.echo.skip_special_tokens
        self._prompt_text = TextStream(self._tokenizer, skip_special_tokens=skip, wants_token_texts=True)
        token_id = self.echo.first_token_id
        text = self._prompt_text.push((token_id,)).token_texts[0]
        self._offset = len(text)
        name = self._shown(token_id, text)
        return {"tokens": [name], "token_logprobs": [None], "top_logprobs": [None], "text_offset": [0]}

    def part(self, part: Part) -> dict[str, Any]:
        """Of the prompt's tokens or of new ones."""
        if not part.scored:
            return self.write(part.logprobs, part.token_texts)
        if self.echo is None or self._prompt_text is None:
            return self.write((), ())
        texts = self._prompt_text.push([p.chosen.token_id for p in part.scored]).token_texts
        return self.write([_cut(p, self.echo.num_top) for p in part.scored], texts)

    def write(self, positions: Sequence[PositionLogprobs], texts: Sequence[str]) -> dict[str, Any]:
        """``texts``: the text that each position's token added; joined they are the choice's text."""
        if self._is_chat:
            entries = [self._chat_entry(p, text) for p, text in zip(positions, texts, strict=True)]
            return {"content": entries, "refusal": None}
        offsets = []
        for text in texts:
            offsets.append(self._offset)
            self._offset += len(text)
        return {
            "tokens": [self._shown(p.chosen.token_id, text) for p, text in zip(positions, texts, strict=True)],
            "token_logprobs": [_finite(p.chosen.logprob) for p in positions],
            "top_logprobs": [self._top(p, text) for p, text in zip(positions, texts, strict=True)],
            "text_offset": offsets,
        }

    def _top(self, position: PositionLogprobs, text: str) -> dict[str, float]:
        """Best first. Of tokens with equal text, the chosen one or else the most likely keeps its text as the key."""
        chosen = position.chosen
        owners = {self._shown(chosen.token_id, text) or self._name(chosen.token_id): chosen.token_id}
        for token in position.top:
            if token.token_id != chosen.token_id:
                owners.setdefault(self._name(token.token_id), token.token_id)
        keys = {token_id: key for key, token_id in owners.items()}
        return {keys.get(t.token_id, _as_id(t.token_id)): _finite(t.logprob) for t in _with_chosen(position)}

    def _chat_entry(self, position: PositionLogprobs, text: str) -> dict[str, Any]:
        chosen = position.chosen
        raw = _added_bytes(self._raw(chosen.token_id), text)
        own = self._entry(chosen, self._shown(chosen.token_id, text), raw)
        top = [
            own
            if t.token_id == chosen.token_id and text
            else self._entry(t, self._name(t.token_id), self._raw(t.token_id))
            for t in position.top
        ]
        return own | {"top_logprobs": top}

    def _entry(self, token: TokenLogprob, name: str, raw: bytes) -> dict[str, Any]:
        return {"token": name, "logprob": _finite(token.logprob), "bytes": list(raw)}

    def _raw(self, token_id: int) -> bytes:
        return b"" if self._tokenizer is None else self._tokenizer.token_bytes(token_id)

    def _shown(self, token_id: int, text: str) -> str:
        """The text that an output token added. A hidden token and the beginning of a character add none."""
        return _as_id(token_id) if self._as_ids else text

    def _name(self, token_id: int) -> str:
        """The text of an alternative token: its text after any other text."""
        if self._as_ids or self._tokenizer is None:
            return _as_id(token_id)
        return self._tokenizer.token_name(token_id)


class PromptLogprobWriter:
    """A prompt's log-probabilities in vLLM's style: a list of objects by token id, null for the first token."""

    def __init__(self, tokenizer: Tokenizer | None, num_top: int) -> None:
        self._tokenizer = tokenizer
        self._num_top = num_top
        self.items = bytearray(b"null")

    def add(self, positions: Sequence[PositionLogprobs]) -> int:
        """Returns the number of bytes added."""
        before = len(self.items)
        for position in positions:
            self.items += b"," + json.dumps(self._entry(_cut(position, self._num_top)), separators=(",", ":")).encode()
        return len(self.items) - before

    def _entry(self, position: PositionLogprobs) -> dict[str, dict[str, Any]]:
        chosen = position.chosen
        found = {str(chosen.token_id): self._token(chosen, position.rank)}
        for rank, token in enumerate(position.top, start=1):
            found.setdefault(str(token.token_id), self._token(token, rank))
        return found

    def _token(self, token: TokenLogprob, rank: int) -> dict[str, Any]:
        text = None if self._tokenizer is None else self._tokenizer.token_name(token.token_id)
        return {"logprob": _finite(token.logprob), "rank": rank, "decoded_token": text}


def _cut(position: PositionLogprobs, num_top: int) -> PositionLogprobs:
    return position if len(position.top) <= num_top else replace(position, top=position.top[:num_top])


def _with_chosen(position: PositionLogprobs) -> tuple[TokenLogprob, ...]:
    """Completions include the chosen token in the alternatives."""
    if any(t.token_id == position.chosen.token_id for t in position.top):
        return position.top
    return (*position.top, position.chosen)


def _as_id(token_id: int) -> str:
    return f"token_id:{token_id}"


def _added_bytes(raw: bytes, text: str) -> bytes:
    """The bytes that a token added: its own if it is a part of a character or completed one."""
    try:
        raw.decode()
    except UnicodeDecodeError:
        return raw
    return raw if "\ufffd" in text else text.encode()


def _finite(logprob: float) -> float:
    return logprob if logprob > _LOWEST_LOGPROB else _LOWEST_LOGPROB
