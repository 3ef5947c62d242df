"""Parses bodies of the Messages API into `GenerationRequest`.

What the API has in common with OpenAI's is read by the same code, with the same extensions (`seed`, `min_p`,
`priority`). Blocks of content become the turns that chat templates know: a tool's result is a turn of its own.
"""

from __future__ import annotations

import json
from typing import Any

from baton.chat import CallMode, ChatMessage, Tool, ToolCall, ToolChoice
from baton.errors import InvalidRequest, quoted
from router.api.json_object import JsonObject
from router.frontend.request import Caller, GenerationRequest
from router.grammar.grammars import of_json_schema
from router.openai.neutral import refuse_unless
from router.openai.request import CommonBody
from router.openai.structured import AskedForm
from router.text.chat import THINKING, Conversation

# Fields that are known and have no effect with null or with these values.
_NEUTRAL: tuple[tuple[str, tuple[object, ...], str], ...] = (
    ("n", (1,), "an answer is one message"),
    ("stream_options", (), "a stream has its usage in any case"),
    ("return_token_ids", (False,), "blocks have text alone"),
    ("return_tokens_as_token_ids", (False,), "there are no log-probabilities"),
    ("return_relay", (False,), "the header x-baton-relay has it"),
    ("container", (), "the server runs no code"),
    ("mcp_servers", ([],), "the server calls no tools by itself"),
    ("context_management", ({}, {"edits": []}), "prompts are never cut"),
    ("diagnostics", (), "there are none"),
    ("thread", (), "the server keeps no conversations; send all messages"),
    ("inference_geo", (), "the operator decides where the nodes are"),
    ("speed", ("standard",), "there is one speed"),
)

_MODES = {"auto": CallMode.AUTO, "any": CallMode.REQUIRED, "tool": CallMode.REQUIRED, "none": CallMode.NONE}


class MessagesBody(CommonBody):
    # Validated one by one, as in chat.
    messages: list[Any]
    system: str | list[Any] | None = None
    stop_sequences: list[str] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    thinking: Any = None
    output_config: Any = None
    chat_template_kwargs: dict[str, Any] | None = None
    # No effect: prefixes of prompts are cached in any case.
    cache_control: Any = None
    container: Any = None
    mcp_servers: Any = None
    context_management: Any = None
    diagnostics: Any = None
    thread: Any = None
    inference_geo: Any = None
    speed: Any = None

    @property
    def stops_param(self) -> str:
        return "stop_sequences" if self.stop_sequences else "stop"

    @property
    def stops(self) -> tuple[str, ...]:
        return super().stops + tuple(self.stop_sequences or ())

    def request(self, caller: Caller, *, needs_max_tokens: bool = True) -> GenerationRequest:
        """Raises InvalidRequest for a value that the server cannot honour."""
        for name, values, why in _NEUTRAL:
            refuse_unless(name, getattr(self, name), values, why)
        if self.max_tokens is None and needs_max_tokens:
            raise InvalidRequest("you must provide a max_tokens parameter", param="max_tokens")
        turns = self.turns()
        continues = bool(turns) and turns[-1].role == "assistant"
        if continues and turns[-1].tool_calls:
            raise InvalidRequest("messages ends with tool_use, expected a tool_result for it", param="messages")
        conversation = Conversation(
            tuple(turns),
            add_generation_prompt=not continues,
            variables=self._variables(),
            tools=tuple(_tool(JsonObject(tool, f"tools.{i}")) for i, tool in enumerate(self.tools or ())),
            tool_choice=_choice(self.tool_choice),
            continues_final=continues,
            reasoning_effort=self._effort(),
        )
        sampling = self.sampling(self.max_tokens, "max_tokens", None)
        return self._request((conversation,), sampling, caller, is_chat=True)

    def _effort(self) -> str | None:
        if self.output_config is None:
            return None
        config = JsonObject(self.output_config, "output_config")
        effort = config.optional("effort", str)
        config.finish("format")
        return effort

    def _own_form(self) -> AskedForm:
        form = self.output_config.get("format") if isinstance(self.output_config, dict) else None
        if form is None:
            return AskedForm()
        wanted = JsonObject(form, "output_config.format")
        if wanted.required("type", str) != "json_schema":
            raise wanted.fault("type", "'json_schema'")
        schema, param = wanted.required("schema", dict), wanted.at("schema")
        wanted.finish()
        return AskedForm(of_json_schema(schema, param=param), param)

    def _variables(self) -> dict[str, Any]:
        """Of the chat template."""
        variables = dict(self.chat_template_kwargs or {})
        if self.thinking is not None:
            thinking = JsonObject(self.thinking, "thinking")
            kind = thinking.required("type", str)
            if kind not in ("enabled", "disabled", "adaptive"):
                raise thinking.fault("type", "'enabled', 'disabled' or 'adaptive'")
            # What the model thinks counts as its output, so max_tokens bounds it; a bound of its own has no effect.
            thinking.finish("budget_tokens", "display")
            variables = dict.fromkeys(THINKING, kind != "disabled") | variables
        return variables

    def turns(self) -> list[ChatMessage]:
        turns: list[ChatMessage] = []
        if self.system:
            turns.append(ChatMessage("system", _texts(self.system, "system")))
        for i, message in enumerate(self.messages):
            for turn in _turns_of(JsonObject(message, f"messages.{i}")):
                if turns and _can_join(turns[-1], turn):
                    # As the API does: templates may want the roles to alternate.
                    turns[-1] = ChatMessage("user", _parts(turns[-1]) + _parts(turn))
                else:
                    turns.append(turn)
        return turns


def _tool(tool: JsonObject) -> Tool:
    if tool.optional("type", str) not in (None, "custom"):
        raise tool.fault("type", "null or 'custom': the server has no tools of its own")
    name = tool.required("name", str)
    description, schema = tool.optional("description", str), tool.required("input_schema", dict)
    is_strict = bool(tool.optional("strict", bool))
    tool.finish("cache_control", "eager_input_streaming", "allowed_callers", "defer_loading")
    return Tool(name, description or "", schema, is_strict)


def _choice(choice: object) -> ToolChoice:
    if choice is None:
        return ToolChoice()
    found = JsonObject(choice, "tool_choice")
    kind, is_parallel = found.required("type", str), not found.optional("disable_parallel_tool_use", bool)
    if kind not in _MODES:
        raise found.fault("type", "'auto', 'any', 'tool' or 'none'")
    names = (found.required("name", str),) if kind == "tool" else ()
    found.finish()
    return ToolChoice(_MODES[kind], names, is_parallel and kind != "tool")


def _turns_of(message: JsonObject) -> list[ChatMessage]:
    role = message.required("role", str)
    if role not in ("user", "assistant", "system"):
        raise message.fault("role", "'user', 'assistant' or 'system'")
    content = message.get("content")
    message.finish()
    if isinstance(content, str):
        return [ChatMessage(role, content)]
    if not isinstance(content, list):
        raise message.fault("content", "a string or a list of blocks")
    blocks = [JsonObject(block, f"{message.at('content')}.{i}") for i, block in enumerate(content)]
    if role == "assistant":
        return [_assistant_turn(blocks)]
    return _user_turns(blocks) if role == "user" else [ChatMessage(role, tuple(map(_text, blocks)))]


def _user_turns(blocks: list[JsonObject]) -> list[ChatMessage]:
    turns: list[ChatMessage] = []
    for block in blocks:
        kind = block.required("type", str)
        if kind == "tool_result":
            turns.append(_tool_turn(block))
        elif kind == "text":
            text = _text(block)
            if turns and turns[-1].role == "user":
                turns[-1] = ChatMessage("user", (*_parts(turns[-1]), text))
            else:
                turns.append(ChatMessage("user", (text,)))
        else:
            raise block.fault("type", "'text' or 'tool_result'")
    return turns


def _tool_turn(block: JsonObject) -> ChatMessage:
    call_id, content = block.required("tool_use_id", str), block.get("content")
    # Templates have no place for is_error; the content says it.
    block.finish("type", "is_error", "cache_control")
    return ChatMessage("tool", _texts(content or "", block.at("content")), tool_call_id=call_id)


def _assistant_turn(blocks: list[JsonObject]) -> ChatMessage:
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[ToolCall] = []
    for block in blocks:
        kind = block.required("type", str)
        if kind == "text":
            texts.append(_text(block))
        elif kind == "thinking":
            thoughts.append(block.required("thinking", str))
            block.finish("type", "signature", "cache_control")
        elif kind == "tool_use":
            arguments = json.dumps(block.required("input", dict), ensure_ascii=False)
            calls.append(ToolCall(block.required("id", str), block.required("name", str), arguments))
            block.finish("type", "caller", "cache_control")
        else:
            raise block.fault("type", "'text', 'thinking' or 'tool_use'")
    return ChatMessage(
        "assistant", tuple(texts) or None, reasoning="\n".join(thoughts) or None, tool_calls=tuple(calls)
    )


def _texts(content: object, where: str) -> str | tuple[str, ...]:
    """Of a text or of blocks of text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequest(f"{where} is {quoted(content)}, expected a string or a list of blocks", param=where)
    return tuple(_text(JsonObject(block, f"{where}.{i}")) for i, block in enumerate(content))


def _text(block: JsonObject) -> str:
    if block.required("type", str) != "text":
        raise block.fault("type", "'text'")
    text = block.required("text", str)
    block.finish("cache_control", "citations")
    return text


def _can_join(before: ChatMessage, turn: ChatMessage) -> bool:
    return before.role == turn.role == "user"


def _parts(message: ChatMessage) -> tuple[str, ...]:
    content = message.content
    return content if isinstance(content, tuple) else (content or "",)
