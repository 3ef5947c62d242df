"""Renders chat messages to one prompt text with the model's own template, in a sandbox.

The template is data that came with the model: it gets the messages and the variables that transformers passes to
templates, and no other object.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from baton.errors import BadConfig, InvalidRequest, PromptTooLong, shortened
from router.deltas import ToolCall

# OpenAI's newer name for the system role.
_DEVELOPER = "developer"
# Marks the end of the message that an answer continues, while it is rendered. A template that trims the message takes
# the space at the end, as in transformers.
_MARK = "CONTINUE_FINAL_MESSAGE_TAG "


@dataclass(frozen=True, slots=True)
class ChatMessage:
    role: str
    # Text, the texts of its parts, or None for an assistant's turn without text.
    content: str | tuple[str, ...] | None
    name: str | None = None
    # Of an assistant's turn.
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    # Of a tool's turn: the call that it answers.
    tool_call_id: str | None = None

    @property
    def num_chars(self) -> int:
        texts = self.content if isinstance(self.content, tuple) else (self.content or "",)
        calls = sum(len(call.name) + len(call.arguments) for call in self.tool_calls)
        return sum(len(text) + 1 for text in texts) + len(self.reasoning or "") + calls


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
    """Raises BadConfig for a template that cannot be compiled, InvalidRequest for messages that it refuses."""

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
        self._takes_parts = _loops_over_content(syntax)
        # A template that tests whether content is a string accepts both.
        self._takes_strings = not self._takes_parts or any(t.name == "string" for t in syntax.find_all(nodes.Test))

    def render(
        self,
        messages: Sequence[ChatMessage],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
        continues_final: bool = False,
        max_chars: int | None = None,
    ) -> str:
        """The prompt. Raises PromptTooLong as soon as it exceeds ``max_chars``.

        ``continues_final``: it ends where the content of the last message ends.
        """
        if variables and "messages" in variables:
            raise InvalidRequest(
                "chat_template_kwargs has messages, expected other variables of the template",
                param="chat_template_kwargs",
            )
        # A special token that the model does not have stays undefined: templates test for it.
        context = {
            "tools": None,
            "documents": None,
            **self._special_tokens,
            "add_generation_prompt": add_generation_prompt,
        }
        if continues_final:
            last = _last_text(messages[-1])
            messages = [*messages[:-1], _marked(messages[-1])]
        try:
            pieces = self._template.generate(
                {**context, **(variables or {}), "messages": [self._seen(m) for m in messages]}
            )
            text = _joined(pieces, max_chars)
            return _up_to_mark(text, last) if continues_final else text
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise InvalidRequest(
                f"the model's chat template does not take these messages: {shortened(str(error), 200)}",
                param="messages",
            ) from error

    def _seen(self, message: ChatMessage) -> dict[str, Any]:
        """A message in the form for the template."""
        is_foreign = message.role == _DEVELOPER and not self._knows_developer
        seen = {"role": "system" if is_foreign else message.role, "content": self._seen_content(message.content)}
        return seen if message.name is None else seen | {"name": message.name}

    def _seen_content(self, content: str | tuple[str, ...] | None) -> str | list[dict[str, str]]:
        if not isinstance(content, tuple):
            if self._takes_strings:
                return content or ""
            content = () if content is None else (content,)
        if self._takes_parts:
            return [{"type": "text", "text": text} for text in content]
        # Joined as in vLLM.
        return "\n".join(content)


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


def _last_text(message: ChatMessage) -> str:
    content = message.content or ""
    return content[-1] if isinstance(content, tuple) else content


def _marked(message: ChatMessage) -> ChatMessage:
    text = _last_text(message) + _MARK
    parts = message.content
    return replace(message, content=(*parts[:-1], text) if isinstance(parts, tuple) and parts else text)


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
