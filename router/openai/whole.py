"""Builds a choice of an answer that is not streamed: JSON that grows with the tokens.

`json.dumps` of a whole answer with many choices and log-probabilities holds the interpreter lock, and so delays every
stream, for a second. So each part is written when it comes, by one `json.dumps` of the new part.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from baton.types import FinishReason
from router.api.whole import Json
from router.frontend.generation import Ending
from router.openai.logprobs import LogprobWriter, PromptLogprobWriter
from router.openai.tools import WholeReply
from router.text.detokenizer import Part
from router.turns import Turns

# Part of a prompt that is written at once: about a millisecond.
_IDS_AT_ONCE = 8192


@dataclass(frozen=True, slots=True)
class PromptJson:
    """The JSON of a prompt that an answer repeats, shared by all choices: an escaped text, and ids with commas."""

    echo: str = ""
    token_ids: str = ""


async def prompt_json(echo: str, token_ids: Sequence[int], turns: Turns) -> PromptJson:
    ids: list[str] = []
    for at in range(0, len(token_ids), _IDS_AT_ONCE):
        await turns.wait()
        ids.append(json.dumps(token_ids[at : at + _IDS_AT_ONCE], separators=(",", ":"))[1:-1])
    return PromptJson(json.dumps(echo)[1:-1], ",".join(ids))


def finish_name(ending: Ending, *, has_functions: bool) -> str:
    """OpenAI's; an answer that was cut is that first."""
    is_calling = ending.has_tool_calls and ending.finish_reason is FinishReason.STOP
    calling = "function_call" if has_functions else "tool_calls"
    return calling if is_calling else ending.finish_reason.value


class WholeChoice:
    """One choice. Feed it all parts, then read its `json`."""

    __slots__ = ("_has_functions", "_index", "_is_chat", "_lists", "_logprobs", "_prompt", "_reply", "_scored", "_text",
                 "_token_ids", "_wants_ids")  # fmt: skip

    def __init__(
        self, *, index: int, is_chat: bool, logprobs: LogprobWriter | None, wants_ids: bool, prompt: PromptJson,
        has_reasoning: bool, has_functions: bool, scored: PromptLogprobWriter | None,
    ) -> None:  # fmt: skip
        self._has_functions = has_functions
        self._index = index
        self._prompt = prompt
        self._is_chat = is_chat
        self._logprobs = logprobs
        self._wants_ids = wants_ids
        self._text = bytearray()
        self._reply = WholeReply(has_reasoning=has_reasoning, has_functions=has_functions)
        self._token_ids = bytearray()
        # Log-probabilities by field: the items of each list.
        self._lists: dict[str, bytearray] = {}
        self._scored = scored
        if logprobs is not None:
            self._add_logprobs(logprobs.begin())

    def add(self, part: Part) -> int:
        """Returns the number of bytes added."""
        num_bytes = _extend(self._text, _dumped(part.text)[1:-1], b"")
        if part.deltas:
            num_bytes += self._reply.add(part.deltas)
        if self._wants_ids:
            num_bytes += _extend(self._token_ids, _dumped(part.token_ids)[1:-1], b",")
        if self._logprobs is not None:
            num_bytes += self._add_logprobs(self._logprobs.part(part))
        if self._scored is not None:
            num_bytes += self._scored.add(part.scored)
        return num_bytes

    def _add_logprobs(self, written: dict[str, Any]) -> int:
        num_bytes = 0
        for name, items in written.items():
            if items:
                num_bytes += _extend(self._lists.setdefault(name, bytearray()), _dumped(items)[1:-1], b",")
        return num_bytes

    def json(self, ending: Ending) -> Json:
        quoted: Json = ['"', self._prompt.echo, self._text, '"']
        text: Json
        if self._is_chat:
            content: Json = ["null"] if self._reply.has_calls and not self._text else quoted
            text = ['"message":{"role":"assistant","content":', *content, ',"refusal":null', *self._reply.pieces(), "}"]
        else:
            text = ['"text":', *quoted]
        pieces: Json = [f'{{"index":{self._index},', *text, ',"logprobs":']
        pieces += self._logprob_pieces()
        reason = finish_name(ending, has_functions=self._has_functions)
        pieces.append(f',"finish_reason":"{reason}","stop_reason":{json.dumps(ending.stop_reason)}')
        if self._wants_ids:
            pieces += [',"prompt_token_ids":[', self._prompt.token_ids, '],"token_ids":[', self._token_ids, "]"]
        if self._scored is not None and not self._is_chat:
            pieces += [',"prompt_logprobs":[', self._scored.items, "]"]
        pieces.append("}")
        return pieces

    def _logprob_pieces(self) -> Json:
        if self._logprobs is None:
            return ["null"]
        pieces: Json = ["{"]
        for name, empty in self._logprobs.write((), ()).items():
            comma = "," if len(pieces) > 1 else ""
            if isinstance(empty, list):
                pieces += [f'{comma}"{name}":[', self._lists.get(name, ""), "]"]
            else:
                pieces.append(f'{comma}"{name}":{json.dumps(empty)}')
        return [*pieces, "}"]


def _extend(items: bytearray, more: str, comma: bytes) -> int:
    before = len(items)
    if more:
        if items:
            items += comma
        items += more.encode()
    return len(items) - before


def _dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
