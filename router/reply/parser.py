"""From an answer's text, in pieces, to deltas: reasoning, content, and tool calls.

A call counts from its name and the beginning of its arguments on: what comes then is passed on as it comes, so a model
that is not held by a grammar may leave them incomplete or no valid JSON. What only looks like a call is content. Space
between content and calls belongs to neither.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection

from pydantic_core import from_json

from baton.chat import Tool
from router.reply.arguments import Parameters
from router.reply.feed import Feed, Malformed, Reading
from router.reply.formats import (
    CALL_BEGIN,
    CALL_END,
    CALL_MARKS,
    CALL_SEPARATOR,
    CALLS_BEGIN,
    CALLS_END,
    THINK_BEGIN,
    THINK_END,
    CallFormat,
    ReasoningFormat,
)
from router.text.deltas import CallArguments, CallBegin, ContentText, Delta, ReasoningText

_SPACES = " \t\r\n"
_NEWLINES = re.compile(r"\n*")
_NAME = re.compile(r"[\w.:/-]*")
_XML_NAME = re.compile(r"[^<>\n]*")
_ARGUMENTS = ("arguments", "parameters")
_PARAMETER_ENDS = ("\n</parameter>", "</parameter>")
_FENCE = "```"


class _EnoughCalls(Exception):
    """As many calls have come as may."""


class ReplyParser:
    """One choice. Feed it all text with `push`, then call `close`."""

    __slots__ = ("_deltas", "_feed", "_has_reasoned", "_is_open", "_max_calls", "_names", "_new_id", "_num_calls",
                 "_parameters", "_reading")  # fmt: skip

    def __init__(
        self, *, calls: CallFormat | None, reasoning: ReasoningFormat | None, prompt_end: str = "",
        tools: Collection[Tool] = (), max_calls: int | None = None, new_id: Callable[[], str],
    ) -> None:  # fmt: skip
        """``calls`` and ``reasoning``: None where the text has none. ``prompt_end``: the end of the prompt's text.
        Calls after ``max_calls``, and all text behind them, are left out."""
        self._feed = Feed()
        self._deltas: list[Delta] = []
        self._new_id = new_id
        self._max_calls = max_calls
        self._num_calls = 0
        self._has_reasoned = False
        self._names = frozenset(tool.name for tool in tools)
        self._parameters = {tool.name: Parameters(tool.parameters or {}) for tool in tools}
        self._is_open = True
        self._reading = self._read(calls, reasoning, prompt_end.rstrip())
        self._advance()

    @property
    def num_calls(self) -> int:
        return self._num_calls

    @property
    def has_reasoned(self) -> bool:
        return self._has_reasoned

    def push(self, text: str) -> list[Delta]:
        if not text or not self._is_open:
            return []
        self._feed.add(text)
        return self._advance()

    def close(self) -> list[Delta]:
        self._feed.is_over = True
        return self._advance() if self._is_open else []

    def _advance(self) -> list[Delta]:
        self._is_open = next(self._reading, 0) is None
        found, self._deltas = self._deltas, []
        return found

    def _read(self, calls: CallFormat | None, reasoning: ReasoningFormat | None, prompt_end: str) -> Reading[None]:
        if reasoning is not None:
            yield from self._read_reasoning(reasoning, prompt_end)
        if calls is None:
            yield from self._read_content()
            return
        try:
            if calls is CallFormat.LLAMA3_JSON:
                yield from self._read_first_call()
            yield from self._read_calls(calls)
        except _EnoughCalls:
            return

    # ── Reasoning and content ───────────────────────────────────────────────────────────────────────────────────────

    def _read_reasoning(self, reasoning: ReasoningFormat, prompt_end: str) -> Reading[None]:
        feed = self._feed
        if not prompt_end.endswith(THINK_BEGIN):
            may_be_bare = reasoning is ReasoningFormat.DEEPSEEK_R1 and not prompt_end.endswith(THINK_END)
            feed.keep()
            try:
                yield from feed.space()
                if not ((yield from feed.take(THINK_BEGIN)) or may_be_bare):
                    raise Malformed
                feed.release()
            except Malformed:
                feed.rewind()
                return
        self._has_reasoned = True
        yield from feed.matching(_NEWLINES)
        if (yield from feed.until((THINK_END,), self._reason, "\n")) is not None:
            feed.release()
            yield from feed.matching(_NEWLINES)

    def _read_content(self) -> Reading[None]:
        while True:
            self._say(self._feed.rest())
            if not (yield from self._feed.more()):
                return

    def _say(self, text: str) -> None:
        if text:
            self._deltas.append(ContentText(text))

    def _reason(self, text: str) -> None:
        self._deltas.append(ReasoningText(text))

    # ── Calls ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _read_calls(self, calls: CallFormat) -> Reading[None]:
        """Content, and calls that have a mark before them."""
        feed, marks = self._feed, CALL_MARKS[calls]
        while (mark := (yield from feed.until(marks, self._say, _SPACES))) is not None:
            try:
                match calls:
                    case CallFormat.HERMES:
                        yield from self._hermes()
                    case CallFormat.MISTRAL:
                        yield from self._mistral()
                    case CallFormat.QWEN3_CODER:
                        yield from self._qwen3_coder(mark)
                    case CallFormat.LLAMA3_JSON:
                        yield from self._llama3()
                    case CallFormat.DEEPSEEK_V3 | CallFormat.DEEPSEEK_V31:
                        yield from self._deepseek(mark)
                yield from feed.space()
            except Malformed:
                self._say(feed.give_back())

    def _read_first_call(self) -> Reading[None]:
        """A Llama's answer that begins with a brace may be a call; what comes later is none without its mark."""
        feed = self._feed
        feed.keep()
        try:
            yield from feed.space()
            if (yield from feed.next_character()) == "{":
                yield from self._llama3()
                yield from feed.space()
            else:
                feed.rewind()
        except Malformed:
            self._say(feed.give_back())

    def _hermes(self) -> Reading[None]:
        feed = self._feed
        yield from feed.space()
        yield from self._json_call()
        yield from feed.space()
        # Small models write a brace too many or too few.
        while (yield from feed.take("}")):
            yield from feed.space()
        yield from feed.take("</tool_call>")

    def _llama3(self) -> Reading[None]:
        """Calls with a semicolon between them. Any object may begin so: the name must be that of a tool."""
        feed = self._feed
        while True:
            yield from feed.space()
            yield from self._json_call(self._names)
            yield from feed.space()
            feed.keep()
            if not (yield from feed.take(";")):
                feed.rewind()
                return

    def _mistral(self) -> Reading[None]:
        feed = self._feed
        yield from feed.space()
        if (yield from feed.take("[")):
            yield from self._mistral_list()
            return
        name = yield from feed.matching(_NAME)
        if (yield from feed.take("[CALL_ID]")):
            yield from feed.matching(_NAME)
        yield from feed.take("[ARGS]")
        yield from feed.space()
        if not name or (yield from feed.next_character()) != "{":
            raise Malformed
        self._begin(name)
        yield from feed.value(self._argue)

    def _mistral_list(self) -> Reading[None]:
        feed = self._feed
        while True:
            yield from feed.space()
            yield from self._json_call()
            yield from feed.space()
            feed.keep()
            if not (yield from feed.take(",")):
                feed.release()
                yield from feed.take("]")
                return

    def _deepseek(self, mark: str) -> Reading[None]:
        """One call; what is written tells which of the two formats it has."""
        feed = self._feed
        if mark == CALLS_BEGIN:
            yield from feed.space()
            yield from feed.expect(CALL_BEGIN)
        yield from feed.space()
        name = yield from feed.matching(_NAME)
        yield from feed.space()
        yield from feed.expect(CALL_SEPARATOR)
        yield from feed.space()
        if (yield from feed.next_character()) != "{":
            # It was the type.
            name = yield from feed.matching(_NAME)
            yield from feed.space()
            if (yield from feed.take(_FENCE)):
                yield from feed.take("json")
                yield from feed.space()
        if not name or (yield from feed.next_character()) != "{":
            raise Malformed
        self._begin(name)
        yield from feed.value(self._argue)
        for end in (_FENCE, CALL_END, CALLS_END):
            yield from feed.space()
            yield from feed.take(end)

    def _json_call(self, names: Collection[str] | None = None) -> Reading[None]:
        """An object with a name and arguments. Raises Malformed if there is no call of one of the names in it."""
        try:
            yield from self._members(names)
        except Malformed:
            if self._feed.is_kept:
                raise

    def _members(self, names: Collection[str] | None) -> Reading[None]:
        feed, name, arguments = self._feed, "", ""
        has_begun = False
        yield from feed.expect("{")
        while True:
            yield from feed.space()
            if (yield from feed.take("}")):
                break
            key = yield from self._string()
            yield from feed.space()
            yield from feed.expect(":")
            yield from feed.space()
            if key == "name" and not has_begun:
                name = yield from self._string()
                if not name or (names is not None and name not in names):
                    raise Malformed
            elif key in _ARGUMENTS and name and not has_begun and (yield from feed.next_character()) == "{":
                self._begin(name)
                has_begun = True
                yield from feed.value(self._argue)
            else:
                value = yield from self._value()
                arguments = _as_object(value) if key in _ARGUMENTS and not has_begun else arguments
            if name and arguments and not has_begun:
                self._begin(name)
                has_begun = True
                self._argue(arguments)
            yield from feed.space()
            if not (yield from feed.take(",")):
                yield from feed.expect("}")
                break
        if not has_begun:
            if not name:
                raise Malformed
            self._begin(name)
            self._argue("{}")

    def _value(self) -> Reading[str]:
        pieces: list[str] = []
        yield from self._feed.value(pieces.append)
        return "".join(pieces)

    def _string(self) -> Reading[str]:
        if (yield from self._feed.next_character()) != '"':
            raise Malformed
        return _text_of((yield from self._value()))

    def _qwen3_coder(self, mark: str) -> Reading[None]:
        feed = self._feed
        if mark != "<function=":
            yield from feed.space()
            yield from feed.expect("<function=")
        name = (yield from feed.matching(_XML_NAME)).strip()
        yield from feed.expect(">")
        if not name:
            raise Malformed
        self._begin(name)
        parameters = self._parameters.get(name) or Parameters({})
        opening = "{"
        while True:
            yield from feed.space()
            if not (yield from feed.take("<parameter=")):
                break
            key = (yield from feed.matching(_XML_NAME)).strip()
            yield from feed.expect(">")
            self._argue(f"{opening}{_quoted(key)}: ")
            opening = ", "
            yield from feed.take("\n")
            yield from self._xml_value(parameters, key)
        self._argue("{}" if opening == "{" else "}")
        yield from feed.take("</function>")
        yield from feed.space()
        yield from feed.take("</tool_call>")

    def _xml_value(self, parameters: Parameters, key: str) -> Reading[None]:
        """Text is passed on as it comes; what may be something else is converted when it is complete."""
        feed = self._feed
        pieces: list[str] = []
        is_text = parameters.is_text(key)
        if is_text:
            self._argue('"')
        emit: Callable[[str], None] = self._argue_quoted if is_text else pieces.append
        if (yield from feed.until(_PARAMETER_ENDS, emit, "")) is None:
            raise Malformed
        feed.release()
        self._argue('"' if is_text else parameters.json_of(key, "".join(pieces)))

    def _begin(self, name: str) -> None:
        if self._num_calls == self._max_calls:
            raise _EnoughCalls
        self._feed.release()
        self._deltas.append(CallBegin(self._num_calls, self._new_id(), name))
        self._num_calls += 1

    def _argue(self, text: str) -> None:
        last = self._deltas[-1] if self._deltas else None
        if isinstance(last, CallArguments):  # of the same call: another one begins with CallBegin
            self._deltas[-1] = CallArguments(last.index, last.text + text)
        else:
            self._deltas.append(CallArguments(self._num_calls - 1, text))

    def _argue_quoted(self, text: str) -> None:
        self._argue(_quoted(text)[1:-1])


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _text_of(written: str) -> str:
    try:
        # Refuses half of a surrogate pair, which no message can have.
        return str(from_json(written))
    except ValueError:
        raise Malformed from None


def _as_object(written: str) -> str:
    """Arguments that came before the name, or as a text of JSON, or as null."""
    if written.startswith('"'):
        written = _text_of(written).strip()
    if written == "null":
        return "{}"
    if not written.startswith("{"):
        raise Malformed
    return written
