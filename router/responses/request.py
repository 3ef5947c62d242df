"""Parses bodies of the Responses API into `GenerationRequest`.

What the API has in common with the older ones is read by the same code, with the same extensions (`seed`, `min_p`,
`priority`). Items become the turns that chat templates know: an assistant's thoughts, text and calls in a row are one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from baton.chat import MAX_TOOLS, CallMode, ChatMessage, Tool, ToolCall, ToolChoice
from baton.errors import InvalidRequest, quoted
from router.api.json_object import JsonObject
from router.frontend.request import Caller, GenerationRequest
from router.grammar.grammars import of_json_object
from router.openai.neutral import refuse_unless
from router.openai.request import CommonBody
from router.openai.structured import AskedForm, of_schema_fields
from router.text.chat import Conversation

_MODES = {mode.value: mode for mode in CallMode}
# Fields that are known and have no effect with null or with these values.
_NEUTRAL: tuple[tuple[str, tuple[object, ...], str], ...] = (
    ("n", (1,), "an answer is one response"),
    ("max_tokens", (), "the API's name for it is max_output_tokens"),
    ("return_token_ids", (False,), "items have text alone"),
    ("return_tokens_as_token_ids", (False,), "items have text alone"),
    ("return_relay", (False,), "the header x-baton-relay has it"),
    ("background", (False,), "a response ends with its request"),
    ("conversation", (), "previous_response_id continues a conversation"),
    ("prompt", (), "the server keeps no prompts"),
    ("truncation", ("disabled",), "inputs are never cut"),
    ("context_management", ([],), "inputs are never cut"),
    ("moderation", (), "the server moderates nothing"),
    ("top_logprobs", (0,), "items have no log-probabilities"),
)
# Further output of tools that no answer has.
_INCLUDABLE = ("reasoning.encrypted_content", "web_search_call.", "code_interpreter_call.", "computer_call_output.",
               "file_search_call.", "message.input_image.")  # fmt: skip
_MAX_METADATA, _MAX_KEY_CHARS, _MAX_VALUE_CHARS = 16, 64, 512
# Of the JSON that a response repeats, kept for each answer: an eighth of what the prompt's ids take in a long context.
_MAX_ECHO_CHARS = 512 * 1024
_ROLES = ("user", "assistant", "system", "developer")
_TEXT_PARTS = ("input_text", "output_text", "text")


# Given an item's id and the field that has it: the item, as an assistant's turn of its own.
Kept = Callable[[str, str], ChatMessage]


class ResponsesBody(CommonBody):
    # Items are validated one by one, as messages in chat.
    input: str | list[Any]
    instructions: str | None = None
    max_output_tokens: int | None = None
    previous_response_id: str | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    text: Any = None
    reasoning: Any = None
    include: list[str] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    # No effect: it counts calls of the server's own tools.
    max_tool_calls: int | None = None
    prompt_cache_options: Any = None
    background: Any = None
    conversation: Any = None
    prompt: Any = None
    truncation: Any = None
    context_management: Any = None
    moderation: Any = None
    top_logprobs: int | None = None

    def request(
        self, caller: Caller, history: Sequence[ChatMessage], turns: Sequence[ChatMessage]
    ) -> GenerationRequest:
        """``history``: the turns of the previous response's conversation. Raises InvalidRequest for a value that the
        server cannot honour."""
        for name, values, why in _NEUTRAL:
            refuse_unless(name, getattr(self, name), values, why)
        for name in self.include or ():
            if not name.startswith(_INCLUDABLE):
                raise InvalidRequest(f"include has {quoted(name)}, which no answer has", param="include")
        if not turns:
            raise InvalidRequest("input is empty, expected text or one item at least", param="input")
        first = [ChatMessage("system", self.instructions)] if self.instructions else []
        conversation = Conversation(
            (*first, *history, *turns),
            variables=self.chat_template_kwargs or {},
            tools=tuple(_tool(JsonObject(tool, f"tools.{i}")) for i, tool in enumerate(self.tools or ())),
            tool_choice=_choice(self.tool_choice, is_parallel=self.parallel_tool_calls is not False),
            reasoning_effort=self._effort(),
        )
        self._check_text()
        sampling = self.sampling(self.max_output_tokens, "max_output_tokens", None)
        return self._request(
            (conversation,), sampling, caller, max_tokens_param="max_output_tokens", is_chat=True
        )  # fmt: skip

    def _effort(self) -> str | None:
        if self.reasoning is None:
            return None
        reasoning = JsonObject(self.reasoning, "reasoning")
        effort = reasoning.optional("effort", str)
        # A summary is what another model makes of the reasoning; here all of the reasoning is in the answer.
        reasoning.finish("summary", "generate_summary")
        return effort

    def _check_text(self) -> None:
        if self.text is not None:
            text = JsonObject(self.text, "text")
            refuse_unless("text.verbosity", text.get("verbosity"), ("medium",), "the models know no verbosity")
            text.finish("format")

    def _own_form(self) -> AskedForm:
        form = self.text.get("format") if isinstance(self.text, dict) else None
        if form is None:
            return AskedForm()
        wanted = JsonObject(form, "text.format")
        kind = wanted.required("type", str)
        if kind == "json_schema":
            return of_schema_fields({name: value for name, value in form.items() if name != "type"}, "text.format")
        if kind not in ("text", "json_object"):
            raise wanted.fault("type", "'text', 'json_object' or 'json_schema'")
        wanted.finish()
        return AskedForm() if kind == "text" else AskedForm(of_json_object(param="text.format"), "text.format")

    def turns(self, kept: Kept) -> list[ChatMessage]:
        """Of the input; ``kept`` finds the items that it refers to."""
        if isinstance(self.input, str):
            return [ChatMessage("user", self.input)]
        turns = _Turns()
        for i, item in enumerate(self.input):
            _add(turns, JsonObject(item, f"input.{i}"), kept)
        return turns.closed()


def _tool(tool: JsonObject) -> Tool:
    if tool.required("type", str) != "function":
        raise tool.fault("type", "'function': the server has no tools of its own")
    name = tool.required("name", str)
    description, parameters = tool.optional("description", str), tool.optional("parameters", dict)
    is_strict = bool(tool.optional("strict", bool))
    tool.finish("defer_loading", "allowed_callers")
    return Tool(name, description or "", parameters, is_strict)


def _choice(choice: object, *, is_parallel: bool) -> ToolChoice:
    if choice is None or isinstance(choice, str):
        if choice is not None and choice not in _MODES:
            expected = "'none', 'auto', 'required' or an object"
            raise InvalidRequest(f"tool_choice is {quoted(choice)}, expected {expected}", param="tool_choice")
        return ToolChoice(_MODES[choice or "auto"], is_parallel=is_parallel)
    found = JsonObject(choice, "tool_choice")
    kind = found.required("type", str)
    if kind == "function":
        name = found.required("name", str)
        found.finish()
        return ToolChoice(CallMode.REQUIRED, (name,), is_parallel=False)
    if kind != "allowed_tools":
        raise found.fault("type", "'function' or 'allowed_tools': the server has no tools of its own")
    mode, tools = found.required("mode", str), found.required("tools", list)
    if mode not in ("auto", "required"):
        raise found.fault("mode", "'auto' or 'required'")
    if not 0 < len(tools) <= MAX_TOOLS:
        raise found.fault("tools", f"1 to {MAX_TOOLS} tools")
    allowed = [JsonObject(tool, f"tool_choice.tools.{i}") for i, tool in enumerate(tools)]
    return ToolChoice(_MODES[mode], tuple(tool.required("name", str) for tool in allowed), is_parallel)


@dataclass(slots=True)
class _Turns:
    """The turns so far, and what belongs to the assistant's turn that may still grow."""

    _turns: list[ChatMessage] = field(default_factory=list)
    _reasoning: list[str] = field(default_factory=list)
    _texts: list[str] = field(default_factory=list)
    _calls: list[ToolCall] = field(default_factory=list)

    def add(self, turn: ChatMessage) -> None:
        self.closed()
        self._turns.append(turn)

    def think(self, text: str) -> None:
        if self._texts or self._calls:
            self.closed()
        self._reasoning.append(text)

    def say(self, texts: Sequence[str]) -> None:
        if self._texts or self._calls:
            self.closed()
        self._texts += texts

    def call(self, call: ToolCall) -> None:
        self._calls.append(call)

    def again(self, item: ChatMessage) -> None:
        """An item that was an answer's."""
        if item.reasoning:
            self.think(item.reasoning)
        if isinstance(item.content, tuple):
            self.say(item.content)
        for call in item.tool_calls:
            self.call(call)

    def closed(self) -> list[ChatMessage]:
        if self._reasoning or self._texts or self._calls:
            reasoning = "\n".join(self._reasoning) or None
            turn = ChatMessage("assistant", tuple(self._texts) or None, None, reasoning, tuple(self._calls))
            self._turns.append(turn)
            self._reasoning, self._texts, self._calls = [], [], []
        return self._turns


def _add(turns: _Turns, item: JsonObject, kept: Kept) -> None:
    kind = item.optional("type", str) or "message"
    if kind == "message":
        role, texts = item.required("role", str), _texts(item, "content")
        if role not in _ROLES:
            raise item.fault("role", " or ".join(map(repr, _ROLES)))
        item.finish("id", "status", "phase")
        if role == "assistant":
            turns.say(texts)
        else:
            turns.add(ChatMessage(role, texts))
    elif kind == "function_call":
        turns.call(
            ToolCall(item.required("call_id", str), item.required("name", str), item.required("arguments", str))
        )  # fmt: skip
        item.finish("id", "status", "caller")
    elif kind == "function_call_output":
        call_id = item.required("call_id", str)
        turns.add(ChatMessage("tool", _texts(item, "output"), tool_call_id=call_id))
        item.finish("id", "status", "name", "caller")
    elif kind == "reasoning":
        parts = item.optional("content", list) or item.optional("summary", list) or []
        item.finish("id", "status", "summary", "encrypted_content")
        for i, part in enumerate(parts):
            thought = JsonObject(part, f"{item.where}.content.{i}")
            thought.finish("type", "text")
            turns.think(thought.required("text", str))
    elif kind == "item_reference":
        turns.again(kept(item.required("id", str), item.at("id")))
        item.finish()
    else:
        expected = "'message', 'function_call', 'function_call_output', 'reasoning' or 'item_reference'"
        raise item.fault("type", expected)


def _texts(item: JsonObject, name: str) -> tuple[str, ...]:
    """Of a text or of parts of text."""
    content = item.get(name)
    if isinstance(content, str):
        return (content,)
    if not isinstance(content, list):
        raise item.fault(name, "a string or a list of parts")
    return tuple(_text(JsonObject(part, f"{item.at(name)}.{i}")) for i, part in enumerate(content))


def _text(part: JsonObject) -> str:
    kind = part.required("type", str)
    if kind == "refusal":
        text = part.required("refusal", str)
    elif kind in _TEXT_PARTS:
        text = part.required("text", str)
    else:
        raise part.fault("type", "'input_text', 'output_text' or 'refusal'")
    part.finish("annotations", "logprobs", "prompt_cache_breakpoint")
    return text


def echoed(body: ResponsesBody, *, is_stored: bool) -> str:
    """The members of a response that repeat the request, as JSON with a leading comma. Raises InvalidRequest if there
    is too much to keep as long as the answer lasts."""
    _check_metadata(body.metadata or {})
    reasoning = body.reasoning if isinstance(body.reasoning, dict) else {}
    text = body.text if isinstance(body.text, dict) else {}
    found = {
        "background": False,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": reasoning.get("effort"), "summary": reasoning.get("summary")},
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": is_stored,
        "text": {"format": text.get("format") or {"type": "text"}},
        "tool_choice": body.tool_choice or "auto",
        "tools": body.tools or [],
        "top_logprobs": 0,
        "truncation": "disabled",
        "user": body.user,
    }
    echo = "," + json.dumps(found, separators=(",", ":"))[1:-1]
    if len(echo) > _MAX_ECHO_CHARS:
        raise InvalidRequest(
            f"tools and the other fields that a response repeats have {len(echo)} characters of JSON, expected at most "
            f"{_MAX_ECHO_CHARS}",
            param="tools",
        )
    return echo


def _check_metadata(metadata: Mapping[str, Any]) -> None:
    """OpenAI's own bounds."""
    if len(metadata) > _MAX_METADATA:
        raise InvalidRequest(f"metadata has {len(metadata)} pairs, expected at most {_MAX_METADATA}", param="metadata")
    for key, value in metadata.items():
        if len(key) > _MAX_KEY_CHARS or not isinstance(value, str) or len(value) > _MAX_VALUE_CHARS:
            expected = f"keys of at most {_MAX_KEY_CHARS} characters and texts of at most {_MAX_VALUE_CHARS}"
            raise InvalidRequest(f"metadata has {quoted(key)}: {quoted(value)}, expected {expected}", param="metadata")
