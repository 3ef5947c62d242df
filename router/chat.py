"""Chat messages to one prompt text, by the model's own template, in a sandbox.

The template is data that came with a model: it sees the messages and nothing else.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from baton.errors import BadConfig, InvalidRequest, PromptTooLong, shortened
from router.tokenizer import SpecialTokens


@dataclass(frozen=True, slots=True)
class ChatMessage:
    role: str
    content: str
    name: str | None = None

    def as_template_sees_it(self) -> dict[str, str]:
        seen = {"role": self.role, "content": self.content}
        return seen if self.name is None else seen | {"name": self.name}


class _GenerationTag(Extension):
    """`{% generation %}` marks what the assistant wrote, for training; here it only renders its body."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """Raises BadConfig for a template that cannot be compiled, InvalidRequest for messages it refuses."""

    def __init__(self, source: str, special: SpecialTokens) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationTag]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise BadConfig(f"the model's chat template cannot be compiled: {error}", param="chat_template") from error
        self._special = special

    def render(
        self,
        messages: Sequence[ChatMessage],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
        max_chars: int | None = None,
    ) -> str:
        """The prompt. Raises PromptTooLong as soon as it has more than ``max_chars``."""
        try:
            pieces = self._template.generate(
                **(variables or {}),
                messages=[m.as_template_sees_it() for m in messages],
                add_generation_prompt=add_generation_prompt,
                bos_token=self._special.bos_token,
                eos_token=self._special.eos_token,
                unk_token=self._special.unk_token,
                pad_token=self._special.pad_token,
            )
            return _joined(pieces, max_chars)
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise InvalidRequest(
                f"the model's chat template does not take these messages: {shortened(str(error), 200)}",
                param="messages",
            ) from error


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
    return datetime.datetime.now().astimezone().strftime(format)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """JSON as models were trained on: no HTML escapes, unlike jinja2's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)
