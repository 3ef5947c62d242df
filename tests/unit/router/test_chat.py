"""What a chat template is given: roles, contents, names that models do not have."""

from __future__ import annotations

import json
from typing import Any

import pytest

from baton.errors import InvalidRequest
from router.chat import ChatMessage, ChatTemplate, Conversation
from router.frontend import Caller
from router.openai_request import ChatBody, parse

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


def test_what_is_not_there_is_undefined_and_what_transformers_gives_is_none() -> None:
    source = "{{ tools is none }}{{ documents is none }}{{ sep_token is defined }}{{ bos_token is defined }}"
    user = (ChatMessage("user", "x"),)
    assert ChatTemplate(source, {"sep_token": "|"}).render(Conversation(user)) == "TrueTrueTrueFalse"
    other = Conversation(user, variables={"bos_token": "b"})
    assert ChatTemplate("{{ bos_token }}", {"bos_token": "a"}).render(other) == "b"
    with pytest.raises(InvalidRequest) as refused:
        ChatTemplate(source, {}).render(Conversation(user, variables={"messages": []}))
    assert refused.value.param == "chat_template_kwargs"
