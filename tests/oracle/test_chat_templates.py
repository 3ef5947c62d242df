"""Rendered as `apply_chat_template` of transformers renders: shapes of public models, special tokens from any file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import pytest
import tokenizers
import transformers
from tokenizers import AddedToken, models

from baton.chat import CallMode, ChatMessage, Tool, ToolCall, ToolChoice
from baton.errors import InvalidRequest
from router.text.chat import ChatTemplate, Conversation
from router.text.model_files import load_tokenizer_facts
from tests.support.chat_templates import TEMPLATES
from tests.support.tool_templates import TOOL_TEMPLATES

CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one turn": [{"role": "user", "content": "hello"}],
    "system": [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "hi <b>&\n\nthere"}],
    "three turns": [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "<think>\nsum\n</think>\n\n2"},
        {"role": "user", "content": " and 1? "},
    ],
    "all roles": [
        {"role": "system", "content": "Schön"},
        {"role": "user", "content": "a\r\nb"},
        {"role": "assistant", "content": "é😀"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d "},
    ],
    "twice the user": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
    "late system": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}],
    "tool": [{"role": "tool", "content": "12"}],
    "names": [{"role": "user", "content": "a", "name": "Ada"}],
    "nothing said": [{"role": "user", "content": ""}],
}
VARIABLES: list[dict[str, Any]] = [
    {},
    {"enable_thinking": False, "date_string": "1 May 2030", "controls": {"length": "short"}, "bos_token": "<other>"},
    {"tools": [{"name": "f", "type": "function"}], "documents": [{"title": "T", "text": "x"}]},
]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def write_tokenizer(folder: Path, config: dict[str, Any], specials_map: dict[str, Any] | None = None) -> Path:
    """A model folder with a tokenizer.json of a few words, and these files beside it."""
    folder.mkdir(exist_ok=True)
    inner = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    inner.add_special_tokens([AddedToken(t, special=True) for t in ("<s>", "</s>", "<unk>", "<sep>", "<img>")])
    inner.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if specials_map is not None:
        (folder / "special_tokens_map.json").write_text(json.dumps(specials_map))
    return folder


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = write_tokenizer(
        tmp_path_factory.mktemp("t") / "m", {"tokenizer_class": "PreTrainedTokenizerFast"} | TOKENS
    )
    return transformers.AutoTokenizer.from_pretrained(folder)


def outcome(render: Callable[[], str], *also: type[Exception]) -> str | None:
    """The text; None for a template that refuses."""
    try:
        return render()
    except (InvalidRequest, jinja2.TemplateError, *also):
        return None


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_of_many_shapes(theirs: Any, name: str) -> None:
    template = ChatTemplate(TEMPLATES[name], TOKENS)
    num_texts = 0
    for title, conversation in CONVERSATIONS.items():
        for variables in VARIABLES:
            for is_open in (True, False):
                expected = outcome(
                    lambda: theirs.apply_chat_template(
                        conversation,  # noqa: B023 (called at once)
                        chat_template=TEMPLATES[name],
                        tokenize=False,
                        add_generation_prompt=is_open,  # noqa: B023
                        **variables,  # noqa: B023
                    )
                )
                messages = tuple(ChatMessage(m["role"], m["content"], m.get("name")) for m in conversation)
                ours = Conversation(messages, add_generation_prompt=is_open, variables=variables)
                found = outcome(lambda: template.render(ours))  # noqa: B023
                assert found == expected, (title, variables, is_open)
                num_texts += found is not None
    assert num_texts > 0


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_last_message_is_continued_as_in_transformers(theirs: Any, name: str) -> None:
    template = ChatTemplate(TEMPLATES[name], TOKENS)
    for last in ("d", "d ", " d\n", "<think>\nsum\n</think>\n\n2", ""):
        conversation = [{"role": "user", "content": "a"}, {"role": "assistant", "content": last}]
        expected = outcome(
            lambda: theirs.apply_chat_template(
                conversation,  # noqa: B023 (called at once)
                chat_template=TEMPLATES[name],
                tokenize=False,
                continue_final_message=True,
            ),
            ValueError,
        )
        messages = tuple(ChatMessage(m["role"], m["content"]) for m in conversation)
        ours = Conversation(messages, add_generation_prompt=False, continues_final=True)
        assert outcome(lambda: template.render(ours)) == expected, last  # noqa: B023


TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Of a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "é <b>"}}},
        },
    },
    {"type": "function", "function": {"name": "now"}},
]
ARGUMENTS: dict[str, Any] = {"city": "Zürich", "days": [1, 2], "exact": True}


def with_calls(num_calls: int, **fields: Any) -> list[dict[str, Any]]:
    """A conversation in the form of transformers: arguments are objects."""
    ids = [f"callid{i:03d}" for i in range(num_calls)]
    calls = [{"id": i, "type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}} for i in ids]
    answers = [{"role": "tool", "content": "12 degrees", "tool_call_id": i} for i in ids]
    question = {"role": "user", "content": "Is it warm?"}
    return [question, {"role": "assistant", "content": None, "tool_calls": calls} | fields, *answers]


TALKS: dict[str, list[dict[str, Any]]] = {
    "a question": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Is it warm?"}],
    "one call": with_calls(1),
    "two calls": with_calls(2),
    "text and a call": with_calls(1, content="I look."),
    "reasoning and a call": with_calls(1, reasoning_content="hm\n"),
    "an answer": [*with_calls(1), {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "And now?"}],
}


def message_of(turn: dict[str, Any], arguments: Any) -> ChatMessage:
    calls = tuple(ToolCall(call["id"], call["function"]["name"], arguments) for call in turn.get("tool_calls", ()))
    return ChatMessage(
        turn["role"], turn["content"], reasoning=turn.get("reasoning_content"), tool_calls=calls,
        tool_call_id=turn.get("tool_call_id"),
    )  # fmt: skip


def tool_of(tool: dict[str, Any]) -> Tool:
    function = tool["function"]
    return Tool(function["name"], function.get("description", ""), function.get("parameters"))


# transformers makes objects of all arguments, which DeepSeek's cannot take.
@pytest.mark.parametrize("name", sorted(TOOL_TEMPLATES.keys() - {"deepseek_r1", "deepseek_v31"}))
def test_tools_and_their_turns(theirs: Any, name: str) -> None:
    template = ChatTemplate(TOOL_TEMPLATES[name], TOKENS)
    num_texts = 0
    for title, talk in TALKS.items():
        for tools in ([], TOOLS):
            expected = outcome(
                lambda: theirs.apply_chat_template(
                    talk,  # noqa: B023 (called at once)
                    chat_template=TOOL_TEMPLATES[name],
                    tools=tools or None,  # noqa: B023
                    tokenize=False,
                    add_generation_prompt=True,
                )
            )
            messages = tuple(message_of(turn, json.dumps(ARGUMENTS)) for turn in talk)
            ours = Conversation(messages, tools=tuple(map(tool_of, tools)))
            assert outcome(lambda: template.render(ours)) == expected, (title, bool(tools))  # noqa: B023
            num_texts += expected is not None
    assert num_texts >= 8


def test_there_are_many_and_some_refuse() -> None:
    assert len(TEMPLATES) >= 25
    refusing = ("inst_strict", "inst_with_system", "gemma", "fragile")
    twice = Conversation((ChatMessage("user", "a"), ChatMessage("user", "b")))
    for name in refusing:
        with pytest.raises(InvalidRequest) as refused:
            ChatTemplate(TEMPLATES[name], TOKENS).render(twice)
        assert refused.value.param == "messages"


CONTENT = {"content": "<s>", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
FOLDERS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "strings": ({"bos_token": "<s>", "eos_token": "</s>", "sep_token": "<sep>", "cls_token": "<s>"}, None),
    "objects": ({"bos_token": CONTENT | {"__type": "AddedToken"}, "mask_token": "<sep>"}, None),
    "none": ({}, None),
    "nulls": ({"bos_token": None, "eos_token": "</s>"}, None),
    "map alone": ({}, {"bos_token": "<s>", "eos_token": CONTENT, "pad_token": "</s>"}),
    "map wins": ({"bos_token": "</s>"}, {"bos_token": "<s>"}),
    "decoder makes the map void": (
        {"eos_token": "</s>", "added_tokens_decoder": {"2": CONTENT | {"special": True}}}, {"bos_token": "<s>"}
    ),
    "named tokens": ({"extra_special_tokens": {"image_token": "<img>"}, "eos_token": "</s>"}, None),
    "tokens of its own": ({"image_token": "<img>", "add_bos_token": True}, None),
    "additional": ({"additional_special_tokens": ["<sep>"], "eos_token": "</s>"}, None),
    "llama's own": ({"tokenizer_class": "LlamaTokenizerFast", "eos_token": "<sep>"}, None),
    "qwen's own": ({"tokenizer_class": "Qwen2Tokenizer"}, None),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_special_tokens_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    config, specials_map = FOLDERS[name]
    folder = write_tokenizer(tmp_path / "m", {"tokenizer_class": "PreTrainedTokenizerFast"} | config, specials_map)
    theirs: Any = transformers.AutoTokenizer.from_pretrained(folder)
    assert load_tokenizer_facts(folder).special_tokens == theirs.special_tokens_map


def test_where_a_template_comes_from(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "m", {"tokenizer_class": "PreTrainedTokenizerFast"})

    def found() -> str | None:
        return load_tokenizer_facts(folder).chat_template

    def check() -> None:
        theirs: Any = transformers.AutoTokenizer.from_pretrained(folder)
        assert found() == theirs.get_chat_template()

    assert found() is None
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "of a processor"}))
    assert found() == "of a processor"
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "in the config"}
    write_tokenizer(folder, config)
    check()
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "named in the config"}]
    write_tokenizer(folder, config | {"chat_template": named})
    check()
    write_tokenizer(folder, config | {"chat_template": {"default": "by name", "rag": "r"}})
    check()
    more = folder / "additional_chat_templates"
    more.mkdir()
    (more / "default.jinja").write_text("in the folder")
    (more / "rag.jinja").write_text("another")
    check()
    (folder / "chat_template.jinja").write_text("in a file")
    check()


def test_a_template_of_its_own_for_tools(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    folder = write_tokenizer(tmp_path / "m", config | {"chat_template": named})
    facts = load_tokenizer_facts(folder)
    assert (facts.chat_template, facts.tool_template) == ("d", "t")
    theirs: Any = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs.get_chat_template(tools=TOOLS) == "t"
    more = folder / "additional_chat_templates"
    more.mkdir()
    (more / "tool_use.jinja").write_text("in the folder")
    (folder / "chat_template.jinja").write_text("in a file")
    facts = load_tokenizer_facts(folder)
    assert (facts.chat_template, facts.tool_template) == ("in a file", "in the folder")
    template = ChatTemplate("plain", {}, "{{ tools[0].function.name }}")
    user = (ChatMessage("user", "x"),)
    assert template.render(Conversation(user)) == "plain"
    assert template.render(Conversation(user, tools=(Tool("f"),))) == "f"
    never = ToolChoice(CallMode.NONE)
    assert template.render(Conversation(user, tools=(Tool("f"),), tool_choice=never)) == "plain"
