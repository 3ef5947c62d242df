"""The grammar of a reply that has to have tool calls, or whose answer is to have a form, in the model's own format.

Rules are in llguidance's form of Lark. Marks that are tokens of the model are written as such, `<[id]>`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from baton.chat import Tool
from router.grammar.grammars import of_json_text, of_lark
from router.reply.arguments import Parameters
from router.reply.formats import (
    CALL_BEGIN,
    CALL_END,
    CALL_SEPARATOR,
    CALLS_BEGIN,
    CALLS_END,
    THINK_BEGIN,
    THINK_END,
    CallFormat,
    ReasoningFormat,
    ReplyFormat,
)
from router.text.chat import Conversation
from router.text.tokenizer import Tokenizer

# A model that cannot end would call for ever.
_MAX_CALLS = 64
_ANY_TEXT = "/(?s:.*)/"
# Around the arguments of a DeepSeek's call.
_FENCE_BEGIN, _FENCE_END = "\n```json\n", "\n```"


def reply_grammar(
    form: ReplyFormat, conversation: Conversation, prompt_end: str, tokenizer: Tokenizer, answer: str
) -> str:
    """Of a reply that has to call tools, or whose answer follows the grammar ``answer``, if it does not call some, or
    whose calls of strict tools have valid arguments. Empty if nothing can be made sure of.

    What the model reasons before that is free. Raises InvalidRequest for a tool.
    """
    choice, is_required = conversation.tool_choice, conversation.requires_calls
    writer = _Writer(tokenizer, is_compact=is_required)
    ways = ["@answer"] if answer and not is_required else []
    if conversation.has_tools and form.calls is not None:
        names = set(choice.names)
        tools = [tool for tool in conversation.tools if tool.name in names or not names]
        max_calls = _MAX_CALLS if choice.is_parallel else 1
        calls = writer.calls(form.calls, tools, max_calls)
        if not answer and not is_required:
            if not writer.can_be_among_text(form.calls):
                return ""
            calls = f"{_ANY_TEXT} (call {_ANY_TEXT}){{0,{max_calls}}}"
        ways.append(calls)
    thought = "" if form.reasoning is None else writer.thought(form.reasoning, prompt_end.rstrip())
    if ways == ["@answer"] and not thought:
        return answer
    reply = {"lark_grammar": "\n".join([f"start: {thought}({' | '.join(ways)})", *writer.rules, ""])}
    if not answer or is_required:
        return of_lark(reply["lark_grammar"], param="tools")
    first, *others = json.loads(answer)["grammars"]
    return json.dumps({"grammars": [reply, {**first, "name": "answer"}, *others]})


class _Writer:
    """Collects the rules that the parts of an answer need."""

    def __init__(self, tokenizer: Tokenizer, *, is_compact: bool) -> None:
        """``is_compact``: arguments have the space between their parts that models have learned, and no other."""
        self._tokenizer = tokenizer
        self._is_compact = is_compact
        self.rules: list[str] = []

    def _mark(self, text: str) -> str:
        token_id = self._tokenizer.token_id(text)
        return _quoted(text) if token_id is None else f"<[{token_id}]>"

    def calls(self, calls: CallFormat, tools: Sequence[Tool], max_calls: int) -> str:
        """Between one and so many."""
        match calls:
            case CallFormat.HERMES:
                return self._hermes(tools, max_calls)
            case CallFormat.LLAMA3_JSON:
                # The model was trained on one call at a time.
                return self._objects(tools, "parameters")
            case CallFormat.MISTRAL:
                return self._mistral(tools, max_calls)
            case CallFormat.QWEN3_CODER:
                return self._qwen3_coder(tools, max_calls)
            case CallFormat.DEEPSEEK_V3 | CallFormat.DEEPSEEK_V31:
                return self._deepseek(tools, max_calls, is_v3=calls is CallFormat.DEEPSEEK_V3)

    def can_be_among_text(self, calls: CallFormat) -> bool:
        """Whether a token tells a call's beginning from text, and nothing comes between it and the call."""
        has_own = calls in (CallFormat.HERMES, CallFormat.QWEN3_CODER)
        return has_own and self._tokenizer.token_id("<tool_call>") is not None

    def thought(self, reasoning: ReasoningFormat, prompt_end: str) -> str:
        """Reasoning up to its end, with a space behind; empty if the prompt has closed it."""
        if prompt_end.endswith(THINK_END):
            return ""
        begin = "" if prompt_end.endswith(THINK_BEGIN) else f'({self._mark(THINK_BEGIN)} "\\n")'
        if self._tokenizer.token_id(THINK_END) is None:
            self.rules.append("thought[lazy]: /(?s:.*)<\\/think>/")
            inside = "thought"
        else:
            # No text has the token in it.
            inside = f"{_ANY_TEXT} {self._mark(THINK_END)}"
        if not begin:
            return f'{inside} "\\n\\n" '
        if reasoning is ReasoningFormat.DEEPSEEK_R1:
            return f'{begin}? {inside} "\\n\\n" '
        return f'({begin} {inside} "\\n\\n")? '

    def _hermes(self, tools: Sequence[Tool], max_calls: int) -> str:
        begin, end = self._mark("<tool_call>"), self._mark("</tool_call>")
        self.rules.append(f'call: {begin} "\\n" ({self._objects(tools, "arguments")}) "\\n" {end}')
        return _repeated("call", '"\\n"', max_calls)

    def _mistral(self, tools: Sequence[Tool], max_calls: int) -> str:
        begin = self._mark("[TOOL_CALLS]")
        if self._tokenizer.token_id("[ARGS]") is None:
            self.rules.append(f"call: {self._objects(tools, 'arguments')}")
            return f'{begin} " "? "[" {_repeated("call", _quoted(", "), max_calls)} "]"'
        named = [f"{_quoted(tool.name)} {self._mark('[ARGS]')} {self._arguments(tool)}" for tool in tools]
        self.rules.append(f"call: {begin} ({' | '.join(named)})")
        return _repeated("call", "", max_calls)

    def _qwen3_coder(self, tools: Sequence[Tool], max_calls: int) -> str:
        begin, end = self._mark("<tool_call>"), self._mark("</tool_call>")
        self.rules.append(f'call: {begin} "\\n" ({" | ".join(map(self._function, tools))}) "\\n" {end}')
        return _repeated("call", '"\\n"', max_calls)

    def _deepseek(self, tools: Sequence[Tool], max_calls: int, *, is_v3: bool) -> str:
        begin, separator, end = self._mark(CALL_BEGIN), self._mark(CALL_SEPARATOR), self._mark(CALL_END)
        named = []
        for tool in tools:
            if is_v3:
                opening = f"{_quoted('function')} {separator} {_quoted(f'{tool.name}{_FENCE_BEGIN}')}"
                named.append(f"{opening} {self._arguments(tool)} {_quoted(_FENCE_END)}")
            else:
                named.append(f"{_quoted(tool.name)} {separator} {self._arguments(tool)}")
        self.rules.append(f"call: {begin} ({' | '.join(named)}) {end}")
        calls = _repeated("call", _quoted("\n") if is_v3 else "", max_calls)
        return f"{self._mark(CALLS_BEGIN)} {calls} {self._mark(CALLS_END)}"

    def _objects(self, tools: Sequence[Tool], key: str) -> str:
        """A call of one of the tools as JSON."""
        named = [(f'{{"name": {json.dumps(tool.name)}, {json.dumps(key)}: ', tool) for tool in tools]
        return " | ".join(f'{_quoted(opening)} {self._arguments(tool)} "}}"' for opening, tool in named)

    def _arguments(self, tool: Tool) -> str:
        # As in OpenAI's API, a tool without parameters takes no argument.
        none = {"properties": {}, "additionalProperties": False}
        return self._json({"type": "object"} | dict(none if tool.parameters is None else tool.parameters), tool)

    def _json(self, schema: Mapping[str, Any], tool: Tool) -> str:
        """The name of a rule for values of the schema. What a grammar cannot say of a schema is refused where the tool
        is strict, else left out."""
        name = f"json_{len(self.rules)}"
        text = of_json_text(schema, tool.is_strict, param=f"tools ({tool.name})", is_compact=self._is_compact)
        self.rules.append(f"{name}: %json {text}")
        return name

    def _function(self, tool: Tool) -> str:
        schema = tool.parameters or {}
        properties = schema.get("properties")
        required = schema.get("required")
        found = [f"{_quoted(f'<function={tool.name}>')} {_quoted(chr(10))}"]
        for key, about in properties.items() if isinstance(properties, Mapping) else ():
            is_required = isinstance(required, list) and key in required
            parameter = f"{_quoted(f'<parameter={key}>')} {_quoted(chr(10))} {self._value(tool, key, about)}"
            found.append(f"({parameter}){'' if is_required else '?'}")
        return " ".join([*found, _quoted("</function>")])

    def _value(self, tool: Tool, key: str, about: Any) -> str:
        """A parameter's value and the end of it."""
        end = "\n</parameter>\n"
        parameters = Parameters(tool.parameters or {})
        choices = about.get("enum") if isinstance(about, Mapping) else None
        if isinstance(choices, list) and choices and all(isinstance(choice, str) for choice in choices):
            return f"({' | '.join(map(_quoted, choices))}) {_quoted(end)}"
        if parameters.may_be_text(key):
            name = f"text_{len(self.rules)}"
            self.rules.append(f"{name}[lazy]: /(?s:.*)\\n<\\/parameter>\\n/")
            return name
        schema = dict(about) | {k: v for k, v in (tool.parameters or {}).items() if k in ("$defs", "definitions")}
        return f"{self._json(schema, tool)} {_quoted(end)}"


def _repeated(rule: str, separator: str, most: int) -> str:
    return rule if most == 1 else f"{rule} ({separator} {rule}){{0,{most - 1}}}"


def _quoted(text: str) -> str:
    return json.dumps(text)
