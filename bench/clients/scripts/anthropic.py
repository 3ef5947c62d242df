"""The anthropic package."""

from __future__ import annotations

from typing import Any, Literal

import anthropic
from cells import (
    CALLING,
    FACT,
    IN_JSON,
    KEY,
    MODEL,
    PARAMETERS,
    QUESTION,
    SCHEMA,
    TOOL,
    TOOL_ABOUT,
    URL,
    answers,
    case,
    equal,
    facts_of,
    lacks,
    main,
    streamed,
    told,
)
from pydantic import BaseModel

client = anthropic.Anthropic(base_url=URL, api_key=KEY, max_retries=0)
TOOLS: list[Any] = [{"name": TOOL, "description": TOOL_ABOUT, "input_schema": PARAMETERS}]
THINKING: Any = {"type": "enabled", "budget_tokens": 1024}


class Fact(BaseModel):
    name: Literal["Ada", "Carl"]
    thing: Literal["plums", "jam"]


def ask(text: str, **more: Any) -> Any:
    return client.messages.create(model=MODEL, max_tokens=200, messages=[{"role": "user", "content": text}], **more)


def text_of(message: Any) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


@case("plain")
def message() -> None:
    found = ask(QUESTION, system="Answer briefly.")
    answers(text_of(found))
    equal(found.stop_reason, "end_turn")


@case("stream")
def events() -> None:
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    with client.messages.stream(model=MODEL, max_tokens=200, messages=messages) as stream:
        streamed(list(stream.text_stream))
        answers(text_of(stream.get_final_message()))


@case("stream")
def raw_events() -> None:
    kinds = [event.type for event in ask(QUESTION, stream=True)]
    equal((kinds[0], kinds[-1]), ("message_start", "message_stop"))


def one_use(found: Any) -> Any:
    (use,) = [block for block in found.content if block.type == "tool_use"]
    equal((use.name, use.input, found.stop_reason), (TOOL, {"person": "Ada"}, "tool_use"))
    return use


@case("tools")
def any_tool() -> None:
    one_use(ask(CALLING, tools=TOOLS, tool_choice={"type": "any", "disable_parallel_tool_use": True}))


@case("tools")
def named() -> None:
    one_use(ask(CALLING, tools=TOOLS, tool_choice={"type": "tool", "name": TOOL}))


@case("tools")
def streamed_use() -> None:
    with client.messages.stream(
        model=MODEL, max_tokens=200, messages=[{"role": "user", "content": CALLING}], tools=TOOLS,
        tool_choice={"type": "any"},
    ) as stream:  # fmt: skip
        told([event for event in stream if event.type == "input_json"], "events of input_json")
        one_use(stream.get_final_message())


@case("agent")
def loop() -> None:
    messages: list[Any] = [{"role": "user", "content": CALLING}]
    for _ in range(4):
        found = client.messages.create(model=MODEL, max_tokens=200, messages=messages, tools=TOOLS)
        if found.stop_reason != "tool_use":
            break
        use = one_use(found)
        result = {"type": "tool_result", "tool_use_id": use.id, "content": facts_of("Ada")}
        messages += [{"role": "assistant", "content": found.content}, {"role": "user", "content": [result]}]
    equal(len(messages), 3, "the number of messages")
    answers(text_of(found))


@case("agent")
def tool_runner() -> None:
    asked: list[str] = []

    @anthropic.beta_tool
    def facts(person: str) -> str:
        """What a person likes.

        Args:
            person: A name.
        """
        asked.append(person)
        return facts_of(person)

    runner = client.beta.messages.tool_runner(
        model=MODEL, max_tokens=200, messages=[{"role": "user", "content": CALLING}], tools=[facts]
    )
    answers(text_of(runner.until_done()))
    equal(asked, ["Ada"])


@case("structured")
def output_config() -> None:
    import json

    found = ask(IN_JSON, extra_body={"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}})
    equal(json.loads(text_of(found)), FACT)


@case("structured")
def parse() -> None:
    found = client.messages.parse(
        model=MODEL, max_tokens=200, messages=[{"role": "user", "content": IN_JSON}], output_format=Fact
    )
    equal(found.parsed_output, Fact(**FACT))


@case("structured")
def named_tool() -> None:
    tools: list[Any] = [{"name": "fact", "input_schema": SCHEMA}]
    (use,) = ask(QUESTION, tools=tools, tool_choice={"type": "tool", "name": "fact"}).content
    equal(use.input, FACT)


@case("reasoning")
def thinking() -> None:
    thought, text = ask(QUESTION, thinking=THINKING).content
    equal((thought.type, text.type), ("thinking", "text"))
    answers(thought.thinking)
    answers(text.text)


@case("reasoning")
def thinking_streamed() -> None:
    with client.messages.stream(
        model=MODEL, max_tokens=200, messages=[{"role": "user", "content": QUESTION}], thinking=THINKING
    ) as stream:
        answers("".join(event.thinking for event in stream if event.type == "thinking"))
        answers(text_of(stream.get_final_message()))


@case("reasoning")
def sent_back() -> None:
    first = ask(QUESTION, thinking=THINKING)
    talk: list[Any] = [
        {"role": "user", "content": QUESTION}, {"role": "assistant", "content": first.content},
        {"role": "user", "content": QUESTION},
    ]  # fmt: skip
    answers(text_of(client.messages.create(model=MODEL, max_tokens=200, messages=talk)))


lacks("logprobs", "the API has none")
lacks("responses", "the package has Anthropic's API alone")


@case("messages")
def count_tokens() -> None:
    counted = client.messages.count_tokens(model=MODEL, messages=[{"role": "user", "content": QUESTION}]).input_tokens
    equal(counted, ask(QUESTION).usage.input_tokens)


@case("messages")
def models() -> None:
    equal([model.id for model in client.models.list()], [MODEL])


@case("messages")
def errors() -> None:
    try:
        client.messages.create(model="other", max_tokens=1, messages=[{"role": "user", "content": "Hello"}])
    except anthropic.NotFoundError as error:
        told("other" in str(error), "the model's name in the error")
    else:
        raise AssertionError("an unknown model was accepted")


lacks("embeddings", "the API has none")
main()
