"""Grammars of answers that have to call tools: whatever a model draws within them is read as calls, with arguments that
are valid by the tool's schema."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import jsonschema
import pytest
import tokenizers
from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from baton.chat import CallMode, ChatMessage, Tool, ToolChoice
from baton.errors import InvalidRequest
from router.grammar.grammars import of_json_schema
from router.reply.forced import reply_grammar
from router.reply.formats import CallFormat, ReasoningFormat, ReplyFormat
from router.text.chat import Conversation
from router.text.deltas import CallArguments, CallBegin, ContentText
from router.text.tokenizer import Tokenizer
from tests.support.replies import parser, read
from tests.support.tool_templates import TOOL_TEMPLATES

TOOLS = (
    Tool(
        "weather",
        "Of a city.",
        {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", 'Zü"rich']}, "days": {"type": "integer"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    ),
    Tool("now"),
    Tool(
        "pick",
        "",
        {
            "type": "object",
            "properties": {"what": {"$ref": "#/$defs/thing"}, "really": {"type": "boolean"}},
            "required": ["what", "really"],
            "additionalProperties": False,
            "$defs": {"thing": {"type": "array", "items": {"enum": [1, 2]}, "maxItems": 2}},
        },
    ),
)
EOS = 256
SPECIALS = ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")
DEEPSEEK = (
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁calls▁end｜>",
)
PLAIN_MARKS = ("<tool_call>", "</tool_call>", "<think>", "</think>", *DEEPSEEK)


def tokenizer_of(marks: tuple[str, ...]) -> tokenizers.Tokenizer:
    """A token for every byte, and one for each mark."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken("</s>", special=True, normalized=False)])
    for mark in marks:
        added = AddedToken(mark, special=mark in SPECIALS, normalized=False)
        (inner.add_special_tokens if mark in SPECIALS else inner.add_tokens)([added])
    return inner


MARKS = {"bytes": (), "tokens": PLAIN_MARKS, "special tokens": (*PLAIN_MARKS, *SPECIALS)}
INNER = {name: tokenizer_of(marks) for name, marks in MARKS.items()}


def grammar_of(
    calls: CallFormat | None, reasoning: ReasoningFormat | None, conversation: Conversation, prompt_end: str, kind: str,
    answer: str = "",
) -> str:  # fmt: skip
    return reply_grammar(ReplyFormat(calls, reasoning), conversation, prompt_end, Tokenizer(INNER[kind]), answer)


def follows(grammar: str, kind: str, text: str) -> bool:
    """Whether the text is all of a reply."""
    inner = INNER[kind]
    matcher = LLMatcher(LLTokenizer(inner.to_str(), eos_token=EOS), grammar)
    assert not matcher.is_error(), matcher.get_error()
    ids = inner.encode(text, add_special_tokens=False).ids
    return all(matcher.consume_token(token_id) for token_id in ids) and matcher.is_accepting()


def drawn(grammar: str, kind: str, seed: int, most: int = 600) -> str:
    """A text of the grammar, drawn token by token; the end where it is allowed."""
    inner, rng = INNER[kind], random.Random(seed)
    matcher = LLMatcher(LLTokenizer(inner.to_str(), eos_token=EOS), grammar)
    assert not matcher.is_error(), matcher.get_error()
    ids: list[int] = []
    while len(ids) < most:
        mask = matcher.compute_bitmask()
        allowed = [i for i in range(inner.get_vocab_size()) if mask[i // 8] >> (i % 8) & 1]
        if EOS in allowed:
            return Tokenizer(inner).decode(ids, skip_special_tokens=False)
        # Free text ends soon: a mark is taken where one may be.
        token_id = max(allowed) if max(allowed) > EOS and rng.random() < 0.5 else rng.choice(allowed)
        ids.append(token_id)
        assert matcher.consume_token(token_id)
    pytest.fail(f"no end within {most} tokens: {Tokenizer(inner).decode(ids, skip_special_tokens=False)}")


def asked(names: tuple[str, ...] = (), *, is_parallel: bool = False) -> Conversation:
    choice = ToolChoice(CallMode.REQUIRED, names, is_parallel)
    return Conversation((ChatMessage("user", "x"),), tools=TOOLS, tool_choice=choice)


def calls_in(text: str, calls: CallFormat, reasoning: ReasoningFormat | None = None, prompt_end: str = "") -> list[str]:
    """The names; there is nothing else but reasoning, and the arguments are valid."""
    reader = parser(calls, reasoning, prompt_end, tools=TOOLS)
    deltas = read(reader, [text])
    assert not [delta for delta in deltas if isinstance(delta, ContentText)], text
    names = [delta.name for delta in deltas if isinstance(delta, CallBegin)]
    arguments = [json.loads(delta.text) for delta in deltas if isinstance(delta, CallArguments)]
    schemas = {tool.name: tool.parameters or {"type": "object"} for tool in TOOLS}
    for name, found in zip(names, arguments, strict=True):
        jsonschema.validate(found, schemas[name])
    return names


@pytest.mark.parametrize("kind", MARKS)
@pytest.mark.parametrize("calls", CallFormat)
def test_what_is_drawn_is_a_call(calls: CallFormat, kind: str) -> None:
    grammar = grammar_of(calls, None, asked(), "", kind)
    found = [name for seed in range(8) for name in calls_in(drawn(grammar, kind, seed), calls)]
    assert len(found) == 8
    assert len(set(found)) > 1
    named = grammar_of(calls, None, asked(("pick",)), "", kind)
    assert calls_in(drawn(named, kind, 1), calls) == ["pick"]
    parallel = grammar_of(calls, None, asked(("now",), is_parallel=True), "", kind)
    assert set(calls_in(drawn(parallel, kind, 1), calls)) == {"now"}


@pytest.mark.parametrize("kind", MARKS)
def test_calls_in_the_formats_of_deepseek(kind: str) -> None:
    begin, call, separator, end, last = DEEPSEEK
    both = asked(("now",), is_parallel=True)
    fenced = f"{call}function{separator}now\n```json\n{{}}\n```{end}"
    bare = f"{call}now{separator}{{}}{end}"
    for calls, one, two in (
        (CallFormat.DEEPSEEK_V3, fenced, f"{fenced}\n{fenced}"),
        (CallFormat.DEEPSEEK_V31, bare, f"{bare}{bare}"),
    ):
        parallel = grammar_of(calls, None, both, "", kind)
        single = grammar_of(calls, None, asked(("now",)), "", kind)
        assert follows(parallel, kind, f"{begin}{two}{last}")
        assert follows(single, kind, f"{begin}{one}{last}")
        assert not follows(single, kind, f"{begin}{two}{last}")
        assert not follows(parallel, kind, f"{one}")
        thinking = grammar_of(calls, ReasoningFormat.DEEPSEEK_R1, asked(("now",)), "<think>\n", kind)
        assert follows(thinking, kind, f"Hm.\n</think>\n\n{begin}{one}{last}")


def test_the_template_shows_the_format() -> None:
    shown = {name: ReplyFormat.of(template).calls for name, template in TOOL_TEMPLATES.items()}
    assert shown == {
        "hermes": CallFormat.HERMES, "qwen3": CallFormat.HERMES, "llama3": CallFormat.LLAMA3_JSON,
        "mistral": CallFormat.MISTRAL, "qwen3_coder": CallFormat.QWEN3_CODER,
        "deepseek_r1": CallFormat.DEEPSEEK_V3, "deepseek_v31": CallFormat.DEEPSEEK_V31,
    }  # fmt: skip
    literal = "{{ tools }}<｜tool▁call▁begin｜>function<｜tool▁sep｜>x"
    assert ReplyFormat.of(literal).calls is CallFormat.DEEPSEEK_V3
    # A model that is shown no tools does not call them.
    assert ReplyFormat.of(literal.replace("tools", "tool_calls")).calls is None


CALL = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
QWEN, R1 = ReasoningFormat.QWEN3, ReasoningFormat.DEEPSEEK_R1


@pytest.mark.parametrize("kind", MARKS)
@pytest.mark.parametrize(
    ("reasoning", "prompt_end", "thought"),
    [
        (QWEN, "<think>\n", "I <b>\n</think>\n\n"),
        (QWEN, "assistant\n", "<think>\nI <b>\n</think>\n\n"),
        (QWEN, "assistant\n", ""),
        (R1, "<｜Assistant｜>", "<think>\nI <b>\n</think>\n\n"),
        (R1, "<｜Assistant｜>", "I <b>\n</think>\n\n"),
        (QWEN, "</think>\n\n", ""),
    ],
)
def test_reasoning_comes_first_and_is_free(
    reasoning: ReasoningFormat, prompt_end: str, thought: str, kind: str
) -> None:
    grammar = grammar_of(CallFormat.HERMES, reasoning, asked(("now",)), prompt_end, kind)
    assert follows(grammar, kind, thought + CALL)
    assert not follows(grammar, kind, f"{thought}I {CALL}")
    assert calls_in(thought + CALL, CallFormat.HERMES, reasoning, prompt_end) == ["now"]


@pytest.mark.parametrize("kind", MARKS)
def test_a_form_holds_for_the_answer_behind_the_reasoning(kind: str) -> None:
    form = of_json_schema({"enum": ["yes", "no"]}, param="x")
    alone = Conversation((ChatMessage("user", "x"),))
    grammar = grammar_of(None, QWEN, alone, "<think>\n", kind, form)
    assert follows(grammar, kind, 'hm {\n</think>\n\n"yes"')
    assert not follows(grammar, kind, '"yes"')
    assert grammar_of(None, QWEN, alone, "</think>\n\n", kind, form) == form
    # A model that may call has both ways.
    may_call = replace(asked(("now",)), tool_choice=ToolChoice(names=("now",)))
    for calls, call in ((CallFormat.HERMES, CALL), (CallFormat.LLAMA3_JSON, '{"name": "now", "parameters": {}}')):
        both = grammar_of(calls, None, may_call, "", kind, form)
        assert follows(both, kind, call)
        assert follows(both, kind, '"no"')
        assert not follows(both, kind, "no")


def test_strict_tools_have_valid_arguments_wherever_they_are_called() -> None:
    strict = tuple(replace(tool, is_strict=True) for tool in TOOLS)
    free = replace(asked(), tools=strict, tool_choice=ToolChoice())
    assert free.has_strict_tools
    assert not replace(free, tool_choice=ToolChoice(CallMode.NONE)).has_strict_tools
    grammar = grammar_of(CallFormat.HERMES, QWEN, free, "", "tokens")
    for text in ("Just { text.", f"I look.\n{CALL}", f"{CALL}\n{CALL} done", f"<think>\nhm\n</think>\n\nI look.{CALL}"):
        assert follows(grammar, "tokens", text), text
    assert not follows(grammar, "tokens", CALL.replace("{}", '{"a": 1}'))
    assert not follows(grammar, "tokens", CALL.replace("now", "later"))
    xml = "<tool_call>\n<function=pick>\n<parameter=what>\n[1]\n</parameter>\n<parameter=really>\n{}\n</parameter>\n"
    grammar = grammar_of(CallFormat.QWEN3_CODER, None, free, "", "tokens")
    assert follows(grammar, "tokens", "See: " + xml.replace("{}", "true") + "</function>\n</tool_call>")
    assert not follows(grammar, "tokens", "See: " + xml.replace("{}", "maybe") + "</function>\n</tool_call>")
    # Text could begin as these do.
    for calls, kind in (
        (CallFormat.HERMES, "bytes"),
        (CallFormat.LLAMA3_JSON, "tokens"),
        (CallFormat.MISTRAL, "tokens"),
    ):
        assert grammar_of(calls, None, free, "", kind) == ""


def test_free_text_of_a_parameter_may_hold_anything() -> None:
    tool = Tool("write", "", {"type": "object", "properties": {"code": {"type": "string"}}, "required": ["code"]})
    grammar = grammar_of(CallFormat.QWEN3_CODER, None, replace(asked(), tools=(tool,)), "", "tokens")
    text = (
        "<tool_call>\n<function=write>\n<parameter=code>\nif a < b:\n\n  </p>\n</parameter>\n</function>\n</tool_call>"
    )
    assert follows(grammar, "tokens", text)
    (_, arguments) = read(parser(CallFormat.QWEN3_CODER, tools=(tool,)), [text])
    assert arguments == CallArguments(0, '{"code": "if a < b:\\n\\n  </p>"}')


def test_hostile_schemas_are_refused_by_the_tools_name() -> None:
    deep: object = {"type": "string"}
    for _ in range(300):
        deep = {"type": "array", "items": deep}
    tool = Tool("deep", "", {"type": "object", "properties": {"a": deep}})
    with pytest.raises(InvalidRequest) as refused:
        grammar_of(CallFormat.HERMES, None, replace(asked(), tools=(tool,)), "", "bytes")
    assert "deep" in str(refused.value.param)
