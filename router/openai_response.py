"""Answers in the OpenAI API's shapes: whole bodies, stream chunks, errors. Builds JSON and knows no HTTP.

Stream chunks are written as text around one `json.dumps` of the new text: building objects per token cost three times
as much.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from baton import errors
from baton.observe import Relay
from baton.types import PositionLogprobs, TokenLogprob
from router.frontend import Ending, Part
from router.tokenizer import Tokenizer

_OPENAI_CODES = {
    "Unauthenticated": "invalid_api_key",
    "UnknownModel": "model_not_found",
    "PromptTooLong": "context_length_exceeded",
}
# JSON has no infinities; OpenAI writes this for tokens of probability zero.
_LOWEST_LOGPROB = -9999.0

DONE = b"data: [DONE]\n\n"
_TAIL = "]}\n\n"
_TAIL_WITH_USAGE = '],"usage":null}\n\n'


def error_body(error: errors.BatonError) -> dict[str, Any]:
    code = _OPENAI_CODES.get(error.code, _snake(error.code))
    return {"error": {"message": error.message, "type": error.openai_type, "param": error.param, "code": code}}


def error_event(error: errors.BatonError) -> bytes:
    return b"data: " + json.dumps(error_body(error)).encode() + b"\n\n"


def usage(num_prompt_tokens: int, endings: Sequence[Ending], num_cached_tokens: int) -> dict[str, Any]:
    completion = sum(e.num_tokens for e in endings)
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": num_prompt_tokens + completion,
        "prompt_tokens_details": {"cached_tokens": num_cached_tokens},
    }


def relay_json(relay: Relay) -> dict[str, Any]:
    return asdict(relay) | {"stamps": dict(relay.stamps), "line": relay.line()}


class LogprobWriter:
    """Log-probabilities of one choice, in the style of either endpoint. Keeps the text offset of completions."""

    def __init__(self, tokenizer: Tokenizer | None, *, is_chat: bool, as_ids: bool, start_offset: int) -> None:
        self._tokenizer = tokenizer
        self._is_chat = is_chat
        self._as_ids = as_ids or tokenizer is None
        self._offset = start_offset

    def write(self, positions: Sequence[PositionLogprobs], texts: Sequence[str]) -> dict[str, Any]:
        """``texts`` is what each position's token added to the choice's text; joined they are the text."""
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
        """Best first. Of tokens that read the same, the chosen one or else the likeliest keeps its text as the key."""
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
        """A token of the output: what it added. A hidden one and the beginning of a character add nothing."""
        return _as_id(token_id) if self._as_ids else text

    def _name(self, token_id: int) -> str:
        """A token that might have been: its text after any other text."""
        if self._as_ids or self._tokenizer is None:
            return _as_id(token_id)
        return self._tokenizer.token_name(token_id)


class ChoiceWriter:
    """Chunks and the whole of one choice."""

    __slots__ = ("_head", "_index", "_is_chat", "_logprobs", "_num_tokens", "_prompt_token_ids", "_tail", "_wants_ids")

    def __init__(
        self, *, envelope: Envelope, index: int, logprobs: LogprobWriter | None, token_ids: bool,
        prompt_token_ids: tuple[int, ...], running_usage: bool,
    ) -> None:  # fmt: skip
        self._logprobs = logprobs
        self._wants_ids = token_ids
        self._prompt_token_ids = prompt_token_ids
        self._is_chat = envelope.is_chat
        self._index = index
        self._head = envelope.chunk_head + f'{{"index":{index},'
        self._tail = envelope.chunk_tail
        # Tokens written; counted only where every chunk says it.
        self._num_tokens: int | None = 0 if running_usage else None

    def begin(self, echo: str = "") -> str:
        """The first chunk: the role in chat, the prompt where it is echoed. Empty if there is nothing to say."""
        if not self._is_chat and not echo and not self._wants_ids:
            return ""
        ids = f',"prompt_token_ids":{json.dumps(self._prompt_token_ids)},"token_ids":[]' if self._wants_ids else ""
        body = '"delta":{"role":"assistant","content":""}' if self._is_chat else f'"text":{json.dumps(echo)}'
        return f'{self._head}{body},"logprobs":null,"finish_reason":null{ids}}}{self._close()}'

    def chunk(self, part: Part) -> str:
        if self._num_tokens is not None:
            self._num_tokens += len(part.token_ids)
        text = json.dumps(part.text)
        body = f'"delta":{{"content":{text}}}' if self._is_chat else f'"text":{text}'
        ids = f',"token_ids":{json.dumps(part.token_ids)}' if self._wants_ids else ""
        logprobs = (
            "null" if self._logprobs is None else json.dumps(self._logprobs.write(part.logprobs, part.token_texts))
        )
        return f'{self._head}{body},"logprobs":{logprobs},"finish_reason":null{ids}}}{self._close()}'

    def end(self, ending: Ending) -> str:
        body = '"delta":{}' if self._is_chat else '"text":""'
        ids = ',"token_ids":[]' if self._wants_ids else ""
        return (
            f'{self._head}{body},"logprobs":null,"finish_reason":"{ending.finish_reason.value}",'
            f'"stop_reason":{json.dumps(ending.stop_reason)}{ids}}}{self._close()}'
        )

    def _close(self) -> str:
        if self._num_tokens is None:
            return self._tail
        prompt, completion = len(self._prompt_token_ids), self._num_tokens
        counts = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        return f'],"usage":{json.dumps(counts)}}}\n\n'

    def whole(self, parts: Sequence[Part], ending: Ending, echo: str) -> dict[str, Any]:
        text = "".join(p.text for p in parts)
        choice: dict[str, Any] = {"index": self._index}
        if self._is_chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = echo + text
        positions = [x for p in parts for x in p.logprobs]
        texts = [x for p in parts for x in p.token_texts]
        choice["logprobs"] = None if self._logprobs is None else self._logprobs.write(positions, texts)
        choice["finish_reason"] = ending.finish_reason.value
        choice["stop_reason"] = ending.stop_reason
        if self._wants_ids:
            choice["prompt_token_ids"] = self._prompt_token_ids
            choice["token_ids"] = [i for p in parts for i in p.token_ids]
        return choice


class Envelope:
    """What all chunks of an answer share."""

    __slots__ = ("_answer_id", "_created", "_model", "chunk_tail", "is_chat")

    def __init__(self, *, answer_id: str, model: str, created: int, is_chat: bool, wants_usage: bool) -> None:
        self.is_chat = is_chat
        self._answer_id = answer_id
        self._created = created
        self._model = model
        # With usage asked for, OpenAI sends "usage": null on every chunk but the last.
        self.chunk_tail = _TAIL_WITH_USAGE if wants_usage else _TAIL

    @property
    def _fields(self) -> dict[str, Any]:
        """Built when needed: kept, they were half a kilobyte a stream."""
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        return {"id": self._answer_id, "object": kind, "created": self._created, "model": self._model}

    @property
    def chunk_head(self) -> str:
        return f'data: {json.dumps(self._fields)[:-1]},"choices":['

    def last_chunk(self, extra: dict[str, Any]) -> str:
        """The chunk without choices that carries usage."""
        return f"data: {json.dumps(self._fields | {'choices': []} | extra)}\n\n"

    def whole(self, choices: Sequence[dict[str, Any]], extra: dict[str, Any]) -> dict[str, Any]:
        kind = "chat.completion" if self.is_chat else "text_completion"
        return self._fields | {"object": kind, "choices": choices} | extra


def _with_chosen(position: PositionLogprobs) -> tuple[TokenLogprob, ...]:
    """Completions list the chosen token among the alternatives."""
    if any(t.token_id == position.chosen.token_id for t in position.top):
        return position.top
    return (*position.top, position.chosen)


def _as_id(token_id: int) -> str:
    return f"token_id:{token_id}"


def _added_bytes(raw: bytes, text: str) -> bytes:
    """The bytes of what a token added to the text: its own where it is a part of a character or ended a cut one."""
    try:
        raw.decode()
    except UnicodeDecodeError:
        return raw
    return raw if "\ufffd" in text else text.encode()


def _finite(logprob: float) -> float:
    return logprob if logprob > _LOWEST_LOGPROB else _LOWEST_LOGPROB


def _snake(name: str) -> str:
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")
