"""Answers in the OpenAI API's format: stream chunks, the parts they share with whole answers, and errors.

A stream chunk is text around one `json.dumps` of the new text: building objects per token costs three times as much.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from baton import errors
from baton.observe import Relay
from router.api.endpoint import Asked, Endpoint
from router.api.whole import Json, WholeAnswer
from router.frontend.generation import Accepted, Ending
from router.frontend.request import Caller, GenerationRequest
from router.frontend.resume import event_id, mark_of
from router.openai.logprobs import Echo, LogprobWriter, PromptLogprobWriter
from router.openai.neutral import UnknownFields
from router.openai.request import ChatBody, CompletionBody, parse
from router.openai.tools import delta_json
from router.openai.whole import PromptJson, WholeChoice, finish_name, prompt_json
from router.text.detokenizer import Part
from router.text.tokenizer import Tokenizer
from router.turns import Turns

_OPENAI_CODES = {
    "Unauthenticated": "invalid_api_key",
    "UnknownModel": "model_not_found",
    "PromptTooLong": "context_length_exceeded",
    "RateLimited": "rate_limit_exceeded",
}
_DONE = b"data: [DONE]\n\n"
_TAIL = "]}\n\n"
_TAIL_WITH_USAGE = '],"usage":null}\n\n'


def error_body(error: errors.BatonError) -> dict[str, Any]:
    code = _OPENAI_CODES.get(error.code, _snake(error.code))
    return {"error": {"message": error.message, "type": error.openai_type, "param": error.param, "code": code}}


def endpoint(
    kind: type[CompletionBody] | type[ChatBody], tokenizer: Tokenizer | None, unknown: UnknownFields
) -> Endpoint:
    def read(content: bytes, caller: Caller) -> Asked:
        body = parse(kind, content, unknown)
        request = body.request(caller)
        return Asked(request, bool(body.stream), lambda accepted: Envelope(body, request, accepted, tokenizer))

    return read


class ChoiceWriter:
    """The chunks, or the whole text, of one choice."""

    __slots__ = ("_event_id", "_has_functions", "_has_reasoning", "_head", "_index", "_is_chat", "_logprobs",
                 "_num_prompt_tokens", "_num_tokens", "_tail", "_wants_ids", "_wants_usage", "prompt",
                 "scored")  # fmt: skip

    def __init__(
        self, *, envelope: Envelope, index: int, logprobs: LogprobWriter | None, token_ids: bool,
        num_prompt_tokens: int, running_usage: bool, has_reasoning: bool, has_functions: bool,
        scored: PromptLogprobWriter | None, event_id: str = "",
    ) -> None:  # fmt: skip
        """``event_id``: what the ids of its events begin with; empty for events without ids."""
        self._has_reasoning = has_reasoning
        self._has_functions = has_functions
        self._logprobs = logprobs
        # Of a whole answer.
        self.scored = scored
        self._wants_ids = token_ids
        self._num_prompt_tokens = num_prompt_tokens
        self._is_chat = envelope.is_chat
        self._index = index
        self._head = envelope.chunk_head + f'{{"index":{index},'
        self._tail = envelope.chunk_tail
        self._event_id = event_id
        # Every chunk reports usage.
        self._wants_usage = running_usage
        # Written.
        self._num_tokens = 0
        # The repeated prompt; dropped once it has been sent.
        self.prompt = PromptJson()

    def begin(self) -> str:
        """The first chunk: the role in chat, the prompt if echoed. Empty if there is neither."""
        prompt, self.prompt = self.prompt, PromptJson()
        scores = None if self._logprobs is None or self._logprobs.echo is None else self._logprobs.begin()
        if not self._is_chat and not prompt.echo and not self._wants_ids and scores is None:
            return ""
        ids = f',"prompt_token_ids":[{prompt.token_ids}],"token_ids":[]' if self._wants_ids else ""
        body = '"delta":{"role":"assistant","content":""}' if self._is_chat else f'"text":"{prompt.echo}"'
        head = self._id() + self._head
        return f'{head}{body},"logprobs":{json.dumps(scores)},"finish_reason":null{ids}}}{self._close()}'

    def chunk(self, part: Part) -> str:
        self._num_tokens += len(part.token_ids)
        if part.deltas:
            delta = delta_json(part.deltas, has_reasoning=self._has_reasoning, has_functions=self._has_functions)
            body = f'"delta":{delta}'
        else:
            text = json.dumps(part.text)
            body = f'"delta":{{"content":{text}}}' if self._is_chat else f'"text":{text}'
        ids = f',"token_ids":{json.dumps(part.token_ids)}' if self._wants_ids else ""
        logprobs = "null" if self._logprobs is None else json.dumps(self._logprobs.part(part))
        head = self._head if not self._event_id else self._id(mark_of(is_text_over=part.is_last)) + self._head
        return f'{head}{body},"logprobs":{logprobs},"finish_reason":null{ids}}}{self._close()}'

    def end(self, ending: Ending) -> str:
        body = '"delta":{}' if self._is_chat else '"text":""'
        ids = ',"token_ids":[]' if self._wants_ids else ""
        reason = finish_name(ending, has_functions=self._has_functions)
        head = self._id(mark_of(is_over=True)) + self._head
        return (
            f'{head}{body},"logprobs":null,"finish_reason":"{reason}",'
            f'"stop_reason":{json.dumps(ending.stop_reason)}{ids}}}{self._close()}'
        )

    def _id(self, mark: str = "") -> str:
        return f"id: {self._event_id}.{self._num_tokens}{mark}\n" if self._event_id else ""

    def _close(self) -> str:
        if not self._wants_usage:
            return self._tail
        prompt, completion = self._num_prompt_tokens, self._num_tokens
        counts = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        return f'],"usage":{json.dumps(counts)}}}\n\n'

    def whole(self) -> WholeChoice:
        """The whole choice instead of chunks."""
        return WholeChoice(
            index=self._index, is_chat=self._is_chat, logprobs=self._logprobs, wants_ids=self._wants_ids,
            prompt=self.prompt, has_reasoning=self._has_reasoning, has_functions=self._has_functions,
            scored=self.scored,
        )  # fmt: skip


class Envelope:
    """The form of one answer: the fields that its chunks share, its usage and its end."""

    __slots__ = ("_accepted", "_answer_id", "_created", "_n", "_prompt_ids", "_wants_ids", "_wants_relay",
                 "_wants_usage", "chunk_tail", "is_chat", "writers")  # fmt: skip

    def __init__(
        self, body: CompletionBody | ChatBody, request: GenerationRequest, accepted: Accepted,
        tokenizer: Tokenizer | None,
    ) -> None:  # fmt: skip
        # Not the body itself: it would be kept as long as the stream.
        self.is_chat = is_chat = request.is_chat
        self._accepted = accepted
        self._n = request.n
        self._answer_id = ("chatcmpl-" if is_chat else "cmpl-") + accepted.request_id
        resume = accepted.resume
        self._created = int(time.time()) if resume is None else resume.created_s
        self._wants_ids = bool(body.return_token_ids)
        self._wants_relay = bool(body.return_relay)
        self._wants_usage = body.wants_usage
        # A conversation's ids are repeated once for all choices.
        self._prompt_ids = ""
        # If usage is requested, OpenAI sends "usage": null in every chunk but the last.
        self.chunk_tail = _TAIL_WITH_USAGE if body.wants_usage else _TAIL
        self.writers: list[ChoiceWriter] = []
        as_ids = bool(body.return_tokens_as_token_ids)
        events = ""
        if accepted.has_event_ids:
            only = accepted.generations[0]
            events = event_id(accepted.request_id, self._created, only.seed, only.prompt_token_ids)
        for i, generation in enumerate(accepted.generations):
            logprobs, num_top = None, request.sampling.logprobs
            if num_top is not None:
                echo = None
                if request.echo:
                    echo = Echo(generation.prompt_token_ids[0], num_top, request.skip_special_tokens)
                logprobs = LogprobWriter(tokenizer, is_chat=is_chat, as_ids=as_ids, echo=echo)
            scored = None if body.prompt_logprobs is None else PromptLogprobWriter(tokenizer, body.prompt_logprobs)
            writer = ChoiceWriter(
                envelope=self, index=i, logprobs=logprobs, token_ids=self._wants_ids,
                num_prompt_tokens=len(generation.prompt_token_ids), running_usage=body.wants_running_usage,
                has_reasoning=body.wants_reasoning, has_functions=body.has_functions, scored=scored, event_id=events,
            )  # fmt: skip
            self.writers.append(writer)

    async def prepare(self, turns: Turns) -> None:
        """Write the JSON of the repeated prompts."""
        if not self._accepted.echoes and not self._wants_ids:
            return
        for first in range(0, len(self.writers), self._n):
            echo = self._accepted.echoes[first // self._n] if self._accepted.echoes else ""
            ids = self._accepted.generations[first].prompt_token_ids if self._wants_ids else ()
            prompt = await prompt_json(echo, ids, turns)
            for writer in self.writers[first : first + self._n]:
                writer.prompt = prompt
            if self.is_chat:
                self._prompt_ids = prompt.token_ids

    @property
    def _fields(self) -> dict[str, Any]:
        """Built on demand: stored, they took half a kilobyte a stream."""
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        return {"id": self._answer_id, "object": kind, "created": self._created, "model": self._accepted.model}

    @property
    def chunk_head(self) -> str:
        return f'data: {json.dumps(self._fields)[:-1]},"choices":['

    def closing(self, endings: Sequence[Ending]) -> bytes:
        """The chunk without choices, which carries usage, and the end."""
        extra = self._extras(endings)
        if self._wants_usage:
            extra += f',"usage":{_compact(self._usage(endings))}'
        return (f"{self.chunk_head}]{extra}}}\n\n".encode() if extra else b"") + _DONE

    def failed(self, error: errors.BatonError) -> bytes:
        return b"data: " + json.dumps(error_body(error)).encode() + b"\n\n"

    def whole(self, choices: Sequence[Json], endings: Sequence[Ending]) -> WholeAnswer:
        kind = "chat.completion" if self.is_chat else "text_completion"
        head = json.dumps(self._fields | {"object": kind}, separators=(",", ":"))[:-1]
        tail = f',"usage":{_compact(self._usage(endings))}{self._extras(endings)}'
        return WholeAnswer(f'{head},"choices":[', choices, f"]{tail}}}")

    def _usage(self, endings: Sequence[Ending]) -> dict[str, Any]:
        """A prompt counts once, however many choices it has."""
        num_prompt = sum(len(g.prompt_token_ids) for g in self._accepted.generations[:: self._n])
        num_completion = sum(e.num_tokens for e in endings)
        found: dict[str, Any] = {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_completion,
            "total_tokens": num_prompt + num_completion,
            "prompt_tokens_details": {"cached_tokens": sum(e.num_cached_tokens for e in endings[:: self._n])},
        }
        if self.is_chat:
            num_reasoning = sum(e.num_reasoning_tokens for e in endings)
            found["completion_tokens_details"] = {"reasoning_tokens": num_reasoning}
        return found

    def _extras(self, endings: Sequence[Ending]) -> str:
        """Further members of the answer's JSON, each with a leading comma."""
        extra = f',"prompt_token_ids":[{self._prompt_ids}]' if self._wants_ids and self.is_chat else ""
        if self.is_chat and (scored := self.writers[0].scored) is not None:
            extra += f',"prompt_logprobs":[{scored.items.decode()}]'
        if self._wants_relay:
            relays = [relay_json(e.relay) for e in endings]
            found = {"request_id": self._accepted.request_id, "relay": relays[0], "relays": relays}
            extra += f',"baton":{_compact(found)}'
        return extra


def relay_json(relay: Relay) -> dict[str, Any]:
    return asdict(relay) | {"stamps": dict(relay.stamps), "line": relay.line()}


def _compact(value: dict[str, Any]) -> str:
    return json.dumps(value, separators=(",", ":"))


def _snake(name: str) -> str:
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")
