"""Answers and errors in the form of the Messages API: events of blocks, or one message."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from pydantic_core import from_json

from baton.errors import BatonError
from baton.types import FinishReason
from router.api.endpoint import Asked, Computation, Endpoint
from router.api.items import Item, ItemKind, Items
from router.api.whole import Json, WholeAnswer
from router.frontend.frontend import Frontend
from router.frontend.generation import Accepted, Ending
from router.frontend.request import Caller
from router.messages.errors import error_body
from router.messages.request import MessagesBody
from router.openai.neutral import UnknownFields
from router.openai.request import parse
from router.text.detokenizer import Part
from router.turns import Turns

_PING = 'event: ping\ndata: {"type":"ping"}\n\n'
_MESSAGE_STOP = 'event: message_stop\ndata: {"type":"message_stop"}\n\n'
# The beginning of a delta's event, up to the text.
_DELTAS = {
    ItemKind.TEXT: '"text_delta","text"',
    ItemKind.REASONING: '"thinking_delta","thinking"',
    ItemKind.CALL: '"input_json_delta","partial_json"',
}


def endpoint(frontend: Frontend, unknown: UnknownFields) -> Endpoint:
    def read(content: bytes, caller: Caller) -> Asked:
        body = parse(MessagesBody, content, unknown)

        def form(accepted: Accepted) -> MessageForm:
            num_prompt_tokens = len(accepted.generations[0].prompt_token_ids)
            return MessageForm(f"msg_{frontend.new_id()}", accepted.model, num_prompt_tokens)

        return Asked(body.request(caller), bool(body.stream), form)

    return read


def count(frontend: Frontend, unknown: UnknownFields) -> Computation:
    """Of `/v1/messages/count_tokens`."""

    def read(content: bytes, caller: Caller) -> Callable[[], Awaitable[bytes]]:
        request = parse(MessagesBody, content, unknown).request(caller, needs_max_tokens=False)

        async def counted() -> bytes:
            (token_ids,) = await frontend.token_ids(request, frontend.model.max_tokens)
            return _dumped({"input_tokens": len(token_ids)}).encode()

        return counted

    return read


class MessageForm:
    """One message; there are no choices."""

    __slots__ = ("_head", "_num_prompt_tokens", "writers")

    def __init__(self, message_id: str, model: str, num_prompt_tokens: int) -> None:
        self._head = {"id": message_id, "type": "message", "role": "assistant", "model": model}
        self._num_prompt_tokens = num_prompt_tokens
        self.writers = (MessageWriter(self._head, num_prompt_tokens),)

    async def prepare(self, turns: Turns) -> None:
        pass

    def closing(self, endings: Sequence[Ending]) -> bytes:
        return b""

    def failed(self, error: BatonError) -> bytes:
        return _event(error_body(error.http_status, error.message)).encode()

    def whole(self, choices: Sequence[Json], endings: Sequence[Ending]) -> WholeAnswer:
        end = _end(endings[0]) | {"usage": _usage(self._num_prompt_tokens, endings[0])}
        return WholeAnswer(f'{_dumped(self._head)[:-1]},"content":[', choices, f"],{_dumped(end)[1:]}")


class MessageWriter:
    __slots__ = ("_head", "_items", "_num_prompt_tokens")

    def __init__(self, head: dict[str, str], num_prompt_tokens: int) -> None:
        self._head = head
        self._num_prompt_tokens = num_prompt_tokens
        self._items = Items()

    def begin(self) -> str:
        # How much of the prompt was cached is known at the end; those counts replace these.
        usage = {"input_tokens": self._num_prompt_tokens, "output_tokens": 0}
        message: dict[str, Any] = {
            **self._head,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage,
        }
        return _event({"type": "message_start", "message": message}) + _PING

    def chunk(self, part: Part) -> str:
        events = ""
        for item, more, is_new in self._items.take(part):
            if is_new:
                events += self._closed(item.index - 1) + _opened(item)
            if more:
                events += (
                    f'event: content_block_delta\ndata: {{"type":"content_block_delta","index":{item.index},'
                    f'"delta":{{"type":{_DELTAS[item.kind]}:{json.dumps(more)}}}}}\n\n'
                )
        return events

    def end(self, ending: Ending) -> str:
        usage = _usage(self._num_prompt_tokens, ending)
        last = _event({"type": "message_delta", "delta": _end(ending), "usage": usage})
        return self._closed(len(self._items.all) - 1) + last + _MESSAGE_STOP

    def _closed(self, index: int) -> str:
        if index < 0:
            return ""
        signature = ""
        if self._items.all[index].kind is ItemKind.REASONING:
            # Clients send a block back only if it is signed. The server does not check it.
            delta = {"type": "signature_delta", "signature": self._head["id"]}
            signature = _event({"type": "content_block_delta", "index": index, "delta": delta})
        return signature + _event({"type": "content_block_stop", "index": index})

    def whole(self) -> MessageWriter:
        return self

    def add(self, part: Part) -> int:
        return sum(len(more) for _, more, _ in self._items.take(part))

    def json(self, ending: Ending) -> Json:
        blocks: Json = []
        for item in self._items.all:
            blocks += [","] * bool(blocks)
            blocks.append(_dumped(_block(item, item.text, self._head["id"])))
        return blocks


def _opened(item: Item) -> str:
    return _event({"type": "content_block_start", "index": item.index, "content_block": _block(item, "", "")})


def _block(item: Item, text: str, signature: str) -> dict[str, Any]:
    match item.kind:
        case ItemKind.TEXT:
            return {"type": "text", "text": text}
        case ItemKind.REASONING:
            return {"type": "thinking", "thinking": text, "signature": signature}
        case ItemKind.CALL:
            return {"type": "tool_use", "id": item.call_id, "name": item.name, "input": _input(text)}


def _input(arguments: str) -> dict[str, Any]:
    """Arguments that max_tokens cut off are read as far as they go, as the API's clients read a stream."""
    try:
        found = from_json(arguments or "{}", allow_partial=True)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _end(ending: Ending) -> dict[str, Any]:
    sequence = ending.stop_reason if isinstance(ending.stop_reason, str) else None
    if ending.finish_reason is FinishReason.LENGTH:
        reason = "max_tokens"
    elif ending.has_tool_calls:
        reason = "tool_use"
    else:
        reason = "end_turn" if sequence is None else "stop_sequence"
    return {"stop_reason": reason, "stop_sequence": sequence}


def _usage(num_prompt_tokens: int, ending: Ending) -> dict[str, int]:
    """The API counts cached tokens apart from the rest of the prompt."""
    return {
        "input_tokens": num_prompt_tokens - ending.num_cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": ending.num_cached_tokens,
        "output_tokens": ending.num_tokens,
    }


def _event(data: dict[str, Any]) -> str:
    return f"event: {data['type']}\ndata: {_dumped(data)}\n\n"


def _dumped(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))
