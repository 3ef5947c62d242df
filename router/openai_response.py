"""Answers in the OpenAI API's format: stream chunks, the parts they share with whole answers, and errors.

A stream chunk is text around one `json.dumps` of the new text: building objects per token costs three times as much.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from baton import errors
from baton.observe import Relay
from router.frontend import Ending
from router.openai_logprobs import LogprobWriter
from router.openai_whole import Json, PromptJson, WholeAnswer, WholeChoice
from router.text import Part

_OPENAI_CODES = {
    "Unauthenticated": "invalid_api_key",
    "UnknownModel": "model_not_found",
    "PromptTooLong": "context_length_exceeded",
}
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


class ChoiceWriter:
    """The chunks, or the whole text, of one choice."""

    __slots__ = ("_head", "_index", "_is_chat", "_logprobs", "_num_prompt_tokens", "_num_tokens", "_tail", "_wants_ids")

    def __init__(
        self, *, envelope: Envelope, index: int, logprobs: LogprobWriter | None, token_ids: bool,
        num_prompt_tokens: int, running_usage: bool,
    ) -> None:  # fmt: skip
        self._logprobs = logprobs
        self._wants_ids = token_ids
        self._num_prompt_tokens = num_prompt_tokens
        self._is_chat = envelope.is_chat
        self._index = index
        self._head = envelope.chunk_head + f'{{"index":{index},'
        self._tail = envelope.chunk_tail
        # Tokens written; counted only if every chunk reports it.
        self._num_tokens: int | None = 0 if running_usage else None

    def begin(self, prompt: PromptJson) -> str:
        """The first chunk: the role in chat, the prompt if echoed. Empty if there is neither."""
        if not self._is_chat and not prompt.echo and not self._wants_ids:
            return ""
        ids = f',"prompt_token_ids":[{prompt.token_ids}],"token_ids":[]' if self._wants_ids else ""
        body = '"delta":{"role":"assistant","content":""}' if self._is_chat else f'"text":"{prompt.echo}"'
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
        prompt, completion = self._num_prompt_tokens, self._num_tokens
        counts = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        return f'],"usage":{json.dumps(counts)}}}\n\n'

    def whole(self) -> WholeChoice:
        """The whole choice instead of chunks."""
        return WholeChoice(
            index=self._index, is_chat=self._is_chat, logprobs=self._logprobs, wants_ids=self._wants_ids
        )  # fmt: skip


class Envelope:
    """The fields that all chunks of an answer share."""

    __slots__ = ("_answer_id", "_created", "_model", "chunk_tail", "is_chat")

    def __init__(self, *, answer_id: str, model: str, created: int, is_chat: bool, wants_usage: bool) -> None:
        self.is_chat = is_chat
        self._answer_id = answer_id
        self._created = created
        self._model = model
        # If usage is requested, OpenAI sends "usage": null in every chunk but the last.
        self.chunk_tail = _TAIL_WITH_USAGE if wants_usage else _TAIL

    @property
    def _fields(self) -> dict[str, Any]:
        """Built on demand: stored, they took half a kilobyte a stream."""
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        return {"id": self._answer_id, "object": kind, "created": self._created, "model": self._model}

    @property
    def chunk_head(self) -> str:
        return f'data: {json.dumps(self._fields)[:-1]},"choices":['

    def last_chunk(self, extra: str) -> str:
        """The chunk without choices, which carries usage."""
        return f"{self.chunk_head}]{extra}}}\n\n"

    def whole(self, choices: Sequence[Json], extra: str) -> WholeAnswer:
        kind = "chat.completion" if self.is_chat else "text_completion"
        head = json.dumps(self._fields | {"object": kind}, separators=(",", ":"))[:-1]
        return WholeAnswer(f'{head},"choices":[', choices, f"]{extra}}}")


def _snake(name: str) -> str:
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")
