"""Answers in the form of the Responses API: events of items, or one response."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from baton.errors import BatonError, InvalidRequest, Overloaded
from baton.types import FinishReason
from router.api.items import Item, ItemKind, Items
from router.api.whole import Json, WholeAnswer
from router.frontend.generation import Ending
from router.responses.store import item_id
from router.text.detokenizer import Part
from router.turns import Turns

_ID_PREFIXES = {ItemKind.TEXT: "msg", ItemKind.REASONING: "rs", ItemKind.CALL: "fc"}
_DELTAS = {
    ItemKind.TEXT: "response.output_text.delta",
    ItemKind.REASONING: "response.reasoning_text.delta",
    ItemKind.CALL: "response.function_call_arguments.delta",
}

# Called with the JSON of a response that has ended, and its items.
Keep = Callable[[str, Sequence[Item]], None]


@dataclass(frozen=True, slots=True)
class Heading:
    """What is known of a response before its output."""

    # Without its prefix, which differs between a response and its items.
    new_id: str
    created_s: int
    model: str
    num_prompt_tokens: int
    temperature: float
    top_p: float
    # Members that repeat the request: JSON, with a leading comma.
    echo: str

    @property
    def response_id(self) -> str:
        return f"resp_{self.new_id}"

    def json(
        self, status: str, output: str = "", *, ending: Ending | None = None, error: dict[str, str] | None = None
    ) -> str:
        """The response; ``output``: the JSON of its items, with commas."""
        is_cut = ending is not None and ending.finish_reason is FinishReason.LENGTH
        first = {
            "id": self.response_id,
            "object": "response",
            "created_at": self.created_s,
            "status": status,
            "error": error,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "model": self.model,
            "temperature": self.temperature,
            "top_p": self.top_p,
        }
        usage = None if ending is None else self._usage(ending)
        return f'{_dumped(first)[:-1]}{self.echo},"output":[{output}],"usage":{_dumped(usage)}}}'

    def _usage(self, ending: Ending) -> dict[str, Any]:
        return {
            "input_tokens": self.num_prompt_tokens,
            "input_tokens_details": {"cached_tokens": ending.num_cached_tokens, "cache_write_tokens": 0},
            "output_tokens": ending.num_tokens,
            "output_tokens_details": {"reasoning_tokens": ending.num_reasoning_tokens},
            "total_tokens": self.num_prompt_tokens + ending.num_tokens,
        }


class ResponseForm:
    """One response; there are no choices."""

    __slots__ = ("writers",)

    def __init__(self, heading: Heading, keep: Keep | None) -> None:
        self.writers = (ResponseWriter(heading, keep),)

    async def prepare(self, turns: Turns) -> None:
        pass

    def closing(self, endings: Sequence[Ending]) -> bytes:
        return b""

    def failed(self, error: BatonError) -> bytes:
        return self.writers[0].failed(error).encode()

    def whole(self, choices: Sequence[Json], endings: Sequence[Ending]) -> WholeAnswer:
        return WholeAnswer("", choices, "")


class ResponseWriter:
    __slots__ = ("_heading", "_items", "_keep", "_number")

    def __init__(self, heading: Heading, keep: Keep | None) -> None:
        self._heading = heading
        self._keep = keep
        self._items = Items()
        # Of the next event.
        self._number = 0

    def begin(self) -> str:
        response = self._heading.json("in_progress")
        return self._event("response.created", f'"response":{response}') + self._event(
            "response.in_progress", f'"response":{response}'
        )

    def chunk(self, part: Part) -> str:
        events = ""
        for item, more, is_new in self._items.take(part):
            if is_new:
                if item.index:
                    events += self._closed(self._items.all[item.index - 1], "completed")
                events += self._opened(item)
            if more:
                tail = ',"logprobs":[]' if item.kind is ItemKind.TEXT else ""
                events += self._event(_DELTAS[item.kind], f'{self._place(item)},"delta":{json.dumps(more)}{tail}')
        return events

    def end(self, ending: Ending) -> str:
        events = self._opened(self._without_output()) if not self._items.all else ""
        events += self._closed(self._items.all[-1], _last_status(ending))
        kind = "response.incomplete" if ending.finish_reason is FinishReason.LENGTH else "response.completed"
        return events + self._event(kind, f'"response":{self._ended(ending)}')

    def failed(self, error: BatonError) -> str:
        code = "server_error"
        if isinstance(error, InvalidRequest | Overloaded):
            code = "invalid_prompt" if isinstance(error, InvalidRequest) else "rate_limit_exceeded"
        said = {"code": code, "message": error.message}
        response = self._heading.json("failed", self._output("incomplete"), error=said)
        return self._event("response.failed", f'"response":{response}')

    def whole(self) -> ResponseWriter:
        return self

    def add(self, part: Part) -> int:
        return sum(len(more) for _, more, _ in self._items.take(part))

    def json(self, ending: Ending) -> Json:
        if not self._items.all:
            self._without_output()
        return [self._ended(ending)]

    def _without_output(self) -> Item:
        """An answer without any output is an empty text."""
        self._items.all.append(Item(0, ItemKind.TEXT))
        return self._items.all[0]

    def _ended(self, ending: Ending) -> str:
        status = _last_status(ending)
        response = self._heading.json(status, self._output(status), ending=ending)
        if self._keep is not None:
            self._keep(response, self._items.all)
        return response

    def _output(self, last_status: str) -> str:
        statuses = ["completed"] * (len(self._items.all) - 1) + [last_status]
        return ",".join(
            self._item(item, item.text, status) for item, status in zip(self._items.all, statuses, strict=False)
        )

    # ── Events ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _opened(self, item: Item) -> str:
        added = f'"output_index":{item.index},"item":{self._item(item, "", "in_progress")}'
        events = self._event("response.output_item.added", added)
        if item.kind is not ItemKind.CALL:
            events += self._event("response.content_part.added", f'{self._place(item)},"part":{_part(item.kind, "")}')
        return events

    def _closed(self, item: Item, status: str) -> str:
        text, place = item.text, self._place(item)
        if item.kind is ItemKind.CALL:
            events = self._event("response.function_call_arguments.done", f'{place},"arguments":{json.dumps(text)}')
        else:
            tail = ',"logprobs":[]' if item.kind is ItemKind.TEXT else ""
            name = _DELTAS[item.kind].removesuffix("delta") + "done"
            events = self._event(name, f'{place},"text":{json.dumps(text)}{tail}')
            events += self._event("response.content_part.done", f'{place},"part":{_part(item.kind, text)}')
        done = f'"output_index":{item.index},"item":{self._item(item, text, status)}'
        return events + self._event("response.output_item.done", done)

    def _event(self, kind: str, members: str) -> str:
        number, self._number = self._number, self._number + 1
        return f'event: {kind}\ndata: {{"type":"{kind}","sequence_number":{number},{members}}}\n\n'

    def _place(self, item: Item) -> str:
        place = f'"item_id":"{self._item_id(item)}","output_index":{item.index}'
        return place if item.kind is ItemKind.CALL else f'{place},"content_index":0'

    def _item_id(self, item: Item) -> str:
        return item_id(_ID_PREFIXES[item.kind], self._heading.new_id, item.index)

    def _item(self, item: Item, text: str, status: str) -> str:
        members: dict[str, Any] = {"id": self._item_id(item)}
        # An item that begins has no part yet.
        content = "" if status == "in_progress" else _part(item.kind, text)
        match item.kind:
            case ItemKind.CALL:
                members |= {"type": "function_call", "status": status, "call_id": item.call_id, "name": item.name}
                return _dumped(members | {"arguments": text})
            case ItemKind.REASONING:
                members |= {"type": "reasoning", "status": status, "summary": []}
            case ItemKind.TEXT:
                members |= {"type": "message", "status": status, "role": "assistant"}
        return f'{_dumped(members)[:-1]},"content":[{content}]}}'


def _last_status(ending: Ending) -> str:
    """Of a response and of its last item."""
    return "incomplete" if ending.finish_reason is FinishReason.LENGTH else "completed"


def _part(kind: ItemKind, text: str) -> str:
    if kind is ItemKind.REASONING:
        return _dumped({"type": "reasoning_text", "text": text})
    return _dumped({"type": "output_text", "text": text, "annotations": [], "logprobs": []})


def _dumped(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))
