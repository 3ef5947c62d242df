"""What a chat template is given: roles, contents, names that models do not have."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from baton.chat import ChatMessage, ToolCall
from baton.errors import InvalidRequest
from router.frontend.request import Caller
from router.openai.request import ChatBody, parse
from router.text.chat import ChatTemplate, Conversation
from tests.support.tool_templates import TOOL_TEMPLATES

PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
KNOWS_DEVELOPER = (
    "{% for m in messages %}{% if m.role in ['system', 'developer'] %}<{{ m.role }}>{% endif %}"
    "{{ m.content }}{% endfor %}"
)
PARTS = "{% for m in messages %}{% for part in m['content'] %}({{ part.text }}){% endfor %}{% endfor %}"
EITHER = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content | selectattr('type', 'equalto', 'text') %}({{ part['text'] }}){% endfor %}"
    "{% endif %}{% endfor %}"
)
THROUGH_A_NAME = (
    "{% for m in messages %}{% set said = m.content %}{% for p in said %}({{ p.text }}){% endfor %}{% endfor %}"
)
IN_A_MACRO = (
    "{% macro show(content) %}{% if content is string %}{{ content }}{% else %}{% for p in content %}({{ p.text }})"
    "{% endfor %}{% endif %}{% endmacro %}{% for m in messages %}{{ show(m.content) }}{% endfor %}"
)
# Goes through a string, not through parts.
SPLITS = "{% for m in messages %}{% for line in m.content.split('\\n') %}({{ line }}){% endfor %}{% endfor %}"


def rendered(template: str, *messages: dict[str, Any]) -> str:
    """From a client's messages to the prompt."""
    body = parse(ChatBody, json.dumps({"messages": messages}).encode())
    (conversation,) = body.request(Caller()).prompts
    assert isinstance(conversation, Conversation)
    return ChatTemplate(template, {}).render(conversation)


DEVELOPER = ({"role": "developer", "content": "Be brief."}, {"role": "user", "content": "hi"})
TWO_PARTS = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}


def test_developer_is_system_for_templates_that_do_not_know_it() -> None:
    assert rendered(PLAIN, *DEVELOPER) == "[system]Be brief.[user]hi"
    assert rendered(KNOWS_DEVELOPER, *DEVELOPER) == "<developer>Be brief.hi"
    # A word of the text around is not a role.
    assert rendered("I am a developer. {# 'developer' #}" + PLAIN, *DEVELOPER).endswith("[system]Be brief.[user]hi")


@pytest.mark.parametrize(
    ("template", "of_parts", "of_text"),
    [
        (PLAIN, "[user]a\nb", "[user]c"),
        (SPLITS, "(a)(b)", "(c)"),
        (PARTS, "(a)(b)", "(c)"),
        (EITHER, "(a)(b)", "c"),
        (THROUGH_A_NAME, "(a)(b)", "(c)"),
        (IN_A_MACRO, "(a)(b)", "c"),
    ],
)
def test_parts_of_a_content(template: str, of_parts: str, of_text: str) -> None:
    assert rendered(template, TWO_PARTS) == of_parts
    assert rendered(template, {"role": "user", "content": "c"}) == of_text


def test_an_assistant_may_have_said_nothing() -> None:
    turn = {"role": "user", "content": "a"}
    for silent in ({"role": "assistant", "content": None}, {"role": "assistant"}, {"role": "assistant", "content": []}):
        assert rendered(PLAIN, turn, silent, turn) == "[user]a[assistant][user]a"
        assert rendered(PARTS, turn, silent, turn) == "(a)(a)"
    with pytest.raises(InvalidRequest) as refused:
        rendered(PLAIN, {"role": "user", "content": None})
    assert refused.value.param == "messages.0.content"


def test_arguments_of_calls_are_what_the_template_takes() -> None:
    call = ToolCall("call_1", "weather", '{"city": "Paris"}')
    talk = (
        ChatMessage("user", "Is it warm?"),
        ChatMessage("assistant", None, tool_calls=(call,)),
        ChatMessage("tool", "12", tool_call_id="call_1"),
    )
    # It joins text, and takes an empty text for an answer.
    assert ChatTemplate(TOOL_TEMPLATES["deepseek_r1"], {"bos_token": "<s>"}).render(Conversation(talk)) == (
        "<s><｜User｜>Is it warm?<｜Assistant｜><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>"
        "weather\n"
        '{"city": "Paris"}<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜><｜tool▁outputs▁begin｜>'
        "<｜tool▁output▁begin｜>12<｜tool▁output▁end｜><｜tool▁outputs▁end｜>"
    )
    # They go through tojson.
    hermes = ChatTemplate(TOOL_TEMPLATES["hermes"], {})
    assert '"arguments": {"city": "Paris"}}' in hermes.render(Conversation(talk))
    # A model's own mistakes, half of a surrogate pair among them, and what takes long to read stay text.
    for wrong in ('{"city": ', '{"city": "\\ud83d"}', "[1]", "[" * 100_000, '{"a":' * 2000 + "1" + "}" * 2000):
        broken = replace(talk[1], tool_calls=(ToolCall("call_1", "weather", wrong),))
        assert f'"arguments": {json.dumps(wrong)}' in hermes.render(Conversation((talk[0], broken)))
    empty = replace(talk[1], tool_calls=(ToolCall("call_1", "weather", " "),))
    assert '"arguments": {}}' in hermes.render(Conversation((talk[0], empty)))
    # Printed without a filter, an object would be Python's text.
    printing = "{% for m in messages %}{{ m.content or '' }}{% for c in m.tool_calls or [] %}{{ c.function.name }}"
    printing += "{{ c.function.arguments }}{% endfor %}{% endfor %}"
    assert ChatTemplate(printing, {}).render(Conversation(talk)) == 'Is it warm?weather{"city": "Paris"}12'


def test_what_is_not_there_is_undefined_and_what_transformers_gives_is_none() -> None:
    source = "{{ tools is none }}{{ documents is none }}{{ sep_token is defined }}{{ bos_token is defined }}"
    user = (ChatMessage("user", "x"),)
    assert ChatTemplate(source, {"sep_token": "|"}).render(Conversation(user)) == "TrueTrueTrueFalse"
    other = Conversation(user, variables={"bos_token": "b"})
    assert ChatTemplate("{{ bos_token }}", {"bos_token": "a"}).render(other) == "b"
    with pytest.raises(InvalidRequest) as refused:
        ChatTemplate(source, {}).render(Conversation(user, variables={"messages": []}))
    assert refused.value.param == "chat_template_kwargs"
