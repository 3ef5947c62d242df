"""Renders conversations to one prompt text with the model's own template, in a sandbox.

The template is data that came with the model: it gets the messages, the tools and the variables that transformers
passes to templates, and no other object.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic_core import from_json

from baton.chat import CallMode, ChatMessage, Tool, ToolCall, ToolChoice
from baton.errors import BadConfig, BatonError, InvalidRequest, PromptTooLong, quoted, shortened

# OpenAI's newer name for the system role.
_DEVELOPER = "developer"
# Marks the end of the message that an answer continues, while it is rendered. A template that trims the message takes
# the space at the end, as in transformers.
_MARK = "[what the answer continues ends here] "
# Cost of a message in a template, in characters of text.
_MESSAGE_CHARS = 64
# Variables of templates that turn reasoning on and off, or say how much of it there is to be.
THINKING, _EFFORT = ("enable_thinking", "thinking"), "reasoning_effort"
_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
# Lists and objects in the arguments of a call of an earlier turn that are given to the template as such.
_MAX_CONTAINERS = 4096


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages that the model's chat template turns into a prompt, and the template's ``variables``."""

    messages: tuple[ChatMessage, ...]
    add_generation_prompt: bool = True
    variables: Mapping[str, Any] = field(default_factory=dict)
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = field(default_factory=ToolChoice)
    # The prompt ends inside the last message, which the answer continues.
    continues_final: bool = False
    # How much the model is to reason: "none", or a level that the template knows; None: as the template does by itself.
    reasoning_effort: str | None = None

    @property
    def has_tools(self) -> bool:
        """Whether the model sees tools, and may call them."""
        return bool(self.tools) and self.tool_choice.mode is not CallMode.NONE

    @property
    def requires_calls(self) -> bool:
        return self.tool_choice.mode is CallMode.REQUIRED

    @property
    def has_strict_tools(self) -> bool:
        return self.has_tools and any(tool.is_strict for tool in self.tools)

    @property
    def num_chars(self) -> int:
        """The approximate size, which decides where the template runs."""
        tools = sum(len(tool.description) + _size(tool.parameters) for tool in self.tools)
        return tools + sum(m.num_chars + _MESSAGE_CHARS for m in self.messages) + _size(self.variables)


def _size(value: object) -> int:
    """The approximate size of a template variable."""
    if isinstance(value, Mapping):
        return sum(map(_size, value.values())) + _MESSAGE_CHARS * len(value)
    if isinstance(value, list):
        return sum(map(_size, value)) + _MESSAGE_CHARS
    return len(value) if isinstance(value, str) else 8


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's text, for training; here it only renders its body."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A block with its own scope, as in transformers: variables set inside are not visible outside.
        return nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller: Callable[[], str]) -> str:
        return caller()


class ChatTemplate:
    """Raises BadConfig for a template that cannot be compiled, InvalidRequest for messages that it refuses.

    ``tool_source``: the template for conversations with tools, where the model has one of its own for them.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], tool_source: str | None = None) -> None:
        self._plain = _Template(source, special_tokens)
        self._for_tools = self._plain if tool_source is None else _Template(tool_source, special_tokens)

    def render(self, conversation: Conversation, max_chars: int | None = None) -> str:
        """The prompt. Raises PromptTooLong as soon as it exceeds ``max_chars``."""
        template = self._for_tools if conversation.has_tools else self._plain
        return template.render(conversation, max_chars)

    def check_effort(self, conversation: Conversation, *, reasons: bool) -> None:
        """Raises InvalidRequest for an effort that changes nothing; ``reasons``: whether the model reasons at all."""
        template = self._for_tools if conversation.has_tools else self._plain
        template.check_effort(conversation.reasoning_effort, reasons=reasons)


class _Template:
    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationTag]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            syntax = environment.parse(source)
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, SyntaxError) as error:
            raise BadConfig(f"the model's chat template cannot be compiled: {error}", param="chat_template") from error
        self._special_tokens = special_tokens
        self._knows_developer = any(node.value == _DEVELOPER for node in syntax.find_all(nodes.Const))
        self._variables = meta.find_undeclared_variables(syntax)
        self._takes_parts = _loops_over_content(syntax)
        # A template that tests whether content is a string accepts both.
        self._takes_strings = not self._takes_parts or any(t.name == "string" for t in syntax.find_all(nodes.Test))
        self._call_style = self._find_call_style() if "tool_calls" in source else _CALL_STYLES[0]

    def render(self, conversation: Conversation, max_chars: int | None = None) -> str:
        return self._render(conversation, max_chars, self._call_style)

    def check_effort(self, effort: str | None, *, reasons: bool) -> None:
        if effort is not None and effort not in _EFFORTS:
            raise InvalidRequest(
                f"reasoning_effort is {quoted(effort)}, expected one of {', '.join(_EFFORTS)}",
                param="reasoning_effort",
            )
        if effort is None or _EFFORT in self._variables:
            return
        if effort == "none":
            if reasons and self._variables.isdisjoint(THINKING):
                raise InvalidRequest(
                    "reasoning_effort is 'none', but the model's chat template cannot turn reasoning off",
                    param="reasoning_effort",
                )
        elif not reasons:
            raise InvalidRequest(
                f"reasoning_effort is {quoted(effort)}, expected null or 'none': the model does not reason",
                param="reasoning_effort",
            )

    def _render(self, conversation: Conversation, max_chars: int | None, style: _CallStyle) -> str:
        if "messages" in conversation.variables:
            raise InvalidRequest(
                "chat_template_kwargs has messages, expected other variables of the template",
                param="chat_template_kwargs",
            )
        # A special token that the model does not have stays undefined: templates test for it.
        context: dict[str, Any] = {
            "tools": None,
            "documents": None,
            **self._special_tokens,
            **_effort_variables(conversation.reasoning_effort),
            "add_generation_prompt": conversation.add_generation_prompt,
            **conversation.variables,
            "messages": [self._seen(message, style) for message in _marked(conversation)],
        }
        if conversation.has_tools:
            context["tools"] = [_seen_tool(tool) for tool in conversation.tools]
        try:
            text = _joined(self._template.generate(context), max_chars)
            return _up_to_mark(text, conversation.messages[-1].last_text) if conversation.continues_final else text
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            with_variables = " with these chat_template_kwargs" if conversation.variables else ""
            raise InvalidRequest(
                f"the model's chat template does not take these messages{with_variables}: {shortened(str(error), 200)}",
                param="messages",
            ) from error

    def _seen(self, message: ChatMessage, style: _CallStyle) -> dict[str, Any]:
        """A message in the form for the template."""
        is_foreign = message.role == _DEVELOPER and not self._knows_developer
        seen: dict[str, Any] = {"role": "system" if is_foreign else message.role}
        is_empty = not message.content
        seen["content"] = (
            None if message.tool_calls and is_empty and style.has_null_content else self._seen_content(message.content)
        )
        if message.name is not None:
            seen["name"] = message.name
        if message.reasoning is not None:
            seen |= {"reasoning": message.reasoning, "reasoning_content": message.reasoning}
        # Templates test whether a message has calls, not whether it has some.
        if message.tool_calls:
            seen["tool_calls"] = [_seen_call(call, style) for call in message.tool_calls]
        if message.tool_call_id is not None:
            seen["tool_call_id"] = message.tool_call_id
        return seen

    def _find_call_style(self) -> _CallStyle:
        """The first one with which a call in an earlier turn is rendered as the template's author meant it."""
        for style in _CALL_STYLES:
            try:
                text = self._render(_PROBE, None, style)
            except BatonError:
                continue
            if all(part in text for part in _PROBE_PARTS) and not any(part in text for part in _PROBE_FAULTS):
                return style
        return _CALL_STYLES[0]

    def _seen_content(self, content: str | tuple[str, ...] | None) -> str | list[dict[str, str]]:
        if not isinstance(content, tuple):
            if self._takes_strings:
                return content or ""
            content = () if content is None else (content,)
        if self._takes_parts:
            return [{"type": "text", "text": text} for text in content]
        # Joined as in vLLM.
        return "\n".join(content)


def _effort_variables(effort: str | None) -> dict[str, Any]:
    if effort is None:
        return {}
    return dict.fromkeys(THINKING, effort != "none") | {_EFFORT: effort}


def _seen_tool(tool: Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name}
    if tool.description:
        function["description"] = tool.description
    if tool.parameters is not None:
        function["parameters"] = tool.parameters
    return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class _CallStyle:
    """How a template takes an assistant's turn with calls."""

    # Arguments as an object, not as JSON text.
    has_objects: bool
    # A turn without text has content null, not an empty text.
    has_null_content: bool


_CALL_STYLES = tuple(
    _CallStyle(has_objects, has_null)
    for has_objects, has_null in ((True, True), (True, False), (False, True), (False, False))
)
# A turn with a call, and what is in its text; a Python object's text, or JSON in JSON, is a fault.
_PROBE = Conversation(
    (
        ChatMessage("user", "Where?"),
        ChatMessage("assistant", None, tool_calls=(ToolCall("callabcde", "find_it", '{"key_of": "value_of"}'),)),
        ChatMessage("tool", "here", tool_call_id="callabcde"),
    )
)
_PROBE_PARTS = ("find_it", "key_of", "value_of")
_PROBE_FAULTS = ("{'key_of", '\\"key_of', "None")


def _seen_call(call: ToolCall, style: _CallStyle) -> dict[str, Any]:
    arguments = _parsed(call.arguments) if style.has_objects else call.arguments
    return {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def _parsed(arguments: str) -> Any:
    """The object; the text where there is none, as a model may have written it, or where reading it takes long."""
    if not arguments.strip():
        return {}
    if arguments.count("{") + arguments.count("[") > _MAX_CONTAINERS:
        return arguments
    try:
        # Refuses half of a surrogate pair, which no prompt can have.
        found = from_json(arguments)
    except ValueError:
        return arguments
    return found if isinstance(found, dict) else arguments


def _loops_over_content(syntax: nodes.Template) -> bool:
    """Whether the template iterates over the parts of a message's content: `{% for part in message.content %}`.

    vLLM tests the same, following variables from `messages`; here the name `content` is enough.
    """
    names = {"content"}
    for assignment in syntax.find_all(nodes.Assign):
        if isinstance(assignment.target, nodes.Name) and _is_content(assignment.node, names):
            names.add(assignment.target.name)
    return any(_is_content(loop.iter, names) for loop in syntax.find_all(nodes.For))


def _is_content(node: nodes.Node | None, names: set[str]) -> bool:
    match node:
        case nodes.Getattr(attr="content"):
            return True
        case nodes.Getitem(arg=nodes.Const(value="content")):
            return True
        case nodes.Getitem(arg=nodes.Slice()) | nodes.Filter():
            return _is_content(node.node, names)
        case nodes.Name(ctx="load"):
            return node.name in names
        case _:
            return False


def _marked(conversation: Conversation) -> Sequence[ChatMessage]:
    """Its messages; one that is continued has a mark at its end."""
    if not conversation.continues_final:
        return conversation.messages
    *before, message = conversation.messages
    text = message.last_text + _MARK
    parts = message.content
    return [*before, replace(message, content=(*parts[:-1], text) if isinstance(parts, tuple) and parts else text)]


def _up_to_mark(text: str, last: str) -> str:
    """``last``: what is continued."""
    before, mark, after = text.rpartition(_MARK.strip())
    if not mark or last.strip() not in text:
        raise InvalidRequest(
            "continue_final_message is true, but the model's chat template leaves out the last message or a part of "
            "it; end messages with an assistant's that has text alone",
            param="continue_final_message",
        )
    return before if after.startswith(" ") else before.rstrip()


def _joined(pieces: Iterable[str], max_chars: int | None) -> str:
    kept: list[str] = []
    num_chars = 0
    for piece in pieces:
        num_chars += len(piece)
        if max_chars is not None and num_chars > max_chars:
            raise PromptTooLong(
                f"the messages make a prompt of more than {max_chars} characters, which does not fit into the model's "
                "context; shorten them",
                param="messages",
            )
        kept.append(piece)
    return "".join(kept)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)  # local time without a zone, as in transformers


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON in the form that models were trained on: no HTML escapes, unlike jinja2's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
