"""The openai package for Python."""

from __future__ import annotations

import json
from typing import Any, Literal

import openai
from cells import (
    ANSWER,
    BASE_URL,
    CALLING,
    FACT,
    IN_JSON,
    KEY,
    MODEL,
    QUESTION,
    SCHEMA,
    TOOL,
    TOOL_OF_OPENAI,
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

client = openai.OpenAI(base_url=BASE_URL, api_key=KEY, max_retries=0)
FUNCTION = {"type": "function", **TOOL_OF_OPENAI["function"], "strict": True}


class Fact(BaseModel):
    name: Literal["Ada", "Carl"]
    thing: Literal["plums", "jam"]


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def chat(text: str, **more: Any) -> Any:
    return client.chat.completions.create(model=MODEL, messages=user(text), **more)


@case("plain")
def chat_completions() -> None:
    found = chat(QUESTION)
    answers(found.choices[0].message.content)
    equal(found.choices[0].finish_reason, "stop")
    equal(found.usage.total_tokens, found.usage.prompt_tokens + found.usage.completion_tokens)


@case("plain")
def completions() -> None:
    found = client.completions.create(model=MODEL, prompt=f"{QUESTION} Answer:", temperature=0, max_tokens=20)
    answers(found.choices[0].text)


@case("plain")
def models() -> None:
    equal([model.id for model in client.models.list()], [MODEL])


@case("plain")
def asynchronous() -> None:
    import asyncio

    async def ask() -> Any:
        async with openai.AsyncOpenAI(base_url=BASE_URL, api_key=KEY, max_retries=0) as other:
            return await other.chat.completions.create(model=MODEL, messages=user(QUESTION))

    answers(asyncio.run(ask()).choices[0].message.content)


@case("stream")
def chat_chunks() -> None:
    chunks = list(chat(QUESTION, stream=True, stream_options={"include_usage": True}))
    streamed([choice.delta.content or "" for chunk in chunks for choice in chunk.choices])
    told(chunks[-1].usage, "usage of the last chunk")


@case("stream")
def completions_chunks() -> None:
    chunks = client.completions.create(
        model=MODEL, prompt=f"{QUESTION} Answer:", temperature=0, max_tokens=20, stream=True
    )
    streamed([choice.text for chunk in chunks for choice in chunk.choices])


@case("stream")
def chat_helper() -> None:
    with client.chat.completions.stream(model=MODEL, messages=user(QUESTION)) as stream:
        streamed([event.delta for event in stream if event.type == "content.delta"])
        answers(stream.get_final_completion().choices[0].message.content)


def one_call(choice: Any) -> Any:
    (call,) = choice.message.tool_calls
    equal(choice.finish_reason, "tool_calls")
    equal(call.function.name, TOOL)
    equal(json.loads(call.function.arguments), {"person": "Ada"})
    return call


@case("tools")
def required() -> None:
    one_call(chat(CALLING, tools=[TOOL_OF_OPENAI], tool_choice="required", parallel_tool_calls=False).choices[0])


@case("tools")
def named() -> None:
    choice = {"type": "function", "function": {"name": TOOL}}
    (call,) = chat(CALLING, tools=[TOOL_OF_OPENAI], tool_choice=choice).choices[0].message.tool_calls
    equal((call.function.name, json.loads(call.function.arguments)), (TOOL, {"person": "Ada"}))


@case("tools")
def none() -> None:
    message = chat(QUESTION, tools=[TOOL_OF_OPENAI], tool_choice="none").choices[0].message
    equal(message.tool_calls, None)
    answers(message.content)


@case("tools")
def streamed_call() -> None:
    with client.chat.completions.stream(
        model=MODEL, messages=user(CALLING), tools=[openai.pydantic_function_tool(Fact, name="fact"), TOOL_OF_OPENAI],
        tool_choice="required",
    ) as stream:  # fmt: skip
        kinds = [event.type for event in stream]
        one_call(stream.get_final_completion().choices[0])
    told("tool_calls.function.arguments.delta" in kinds, "an event of arguments")


@case("agent")
def chat_loop() -> None:
    messages = user(CALLING)
    for _ in range(4):
        choice = client.chat.completions.create(model=MODEL, messages=messages, tools=[TOOL_OF_OPENAI]).choices[0]
        if not choice.message.tool_calls:
            break
        call = one_call(choice)
        result = facts_of(json.loads(call.function.arguments)["person"])
        messages += [choice.message, {"role": "tool", "tool_call_id": call.id, "content": result}]
    equal(len(messages), 3, "the number of messages")
    answers(choice.message.content)
    equal(choice.finish_reason, "stop")


@case("agent")
def responses_loop() -> None:
    found = client.responses.create(model=MODEL, input=CALLING, tools=[FUNCTION])
    (call,) = [item for item in found.output if item.type == "function_call"]
    equal((call.name, json.loads(call.arguments)), (TOOL, {"person": "Ada"}))
    result = {"type": "function_call_output", "call_id": call.call_id, "output": facts_of("Ada")}
    last = client.responses.create(model=MODEL, input=[result], previous_response_id=found.id, tools=[FUNCTION])
    answers(last.output_text)


FORMAT = {"type": "json_schema", "json_schema": {"name": "fact", "schema": SCHEMA, "strict": True}}


@case("structured")
def json_schema() -> None:
    equal(json.loads(chat(IN_JSON, response_format=FORMAT).choices[0].message.content), FACT)


@case("structured")
def json_object() -> None:
    found = chat(IN_JSON, response_format={"type": "json_object"}).choices[0].message.content
    equal(json.loads(found), FACT)


@case("structured")
def parse() -> None:
    found = client.chat.completions.parse(model=MODEL, messages=user(IN_JSON), response_format=Fact)
    equal(found.choices[0].message.parsed, Fact(**FACT))


@case("structured")
def parsed_stream() -> None:
    with client.chat.completions.stream(model=MODEL, messages=user(IN_JSON), response_format=Fact) as stream:
        equal(stream.get_final_completion().choices[0].message.parsed, Fact(**FACT))


@case("structured")
def parsed_tool() -> None:
    found = client.chat.completions.parse(
        model=MODEL, messages=user(QUESTION), tools=[openai.pydantic_function_tool(Fact)], tool_choice="required",
        parallel_tool_calls=False,
    )  # fmt: skip
    equal(found.choices[0].message.tool_calls[0].function.parsed_arguments, Fact(**FACT))


@case("structured")
def responses_parse() -> None:
    equal(client.responses.parse(model=MODEL, input=IN_JSON, text_format=Fact).output_parsed, Fact(**FACT))


@case("reasoning")
def effort() -> None:
    found = chat(QUESTION, reasoning_effort="low")
    answers(found.choices[0].message.content)
    answers(found.choices[0].message.reasoning_content)
    told(found.usage.completion_tokens_details.reasoning_tokens, "reasoning_tokens")


@case("reasoning")
def template_variable_streamed() -> None:
    extra = {"chat_template_kwargs": {"enable_thinking": True}}
    deltas = [chunk.choices[0].delta for chunk in chat(QUESTION, stream=True, extra_body=extra) if chunk.choices]
    answers("".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas))
    answers("".join(delta.content or "" for delta in deltas))


@case("reasoning")
def with_schema() -> None:
    message = chat(IN_JSON, reasoning_effort="low", response_format=FORMAT).choices[0].message
    equal(json.loads(message.content), FACT)
    answers(message.reasoning_content)


@case("reasoning")
def sent_back() -> None:
    first = chat(QUESTION, reasoning_effort="low").choices[0].message
    talk = [*user(QUESTION), first, *user(QUESTION)]
    answers(client.chat.completions.create(model=MODEL, messages=talk).choices[0].message.content)


@case("reasoning")
def responses_reasoning() -> None:
    found = client.responses.create(model=MODEL, input=QUESTION, reasoning={"effort": "low"})
    (item,) = [item for item in found.output if item.type == "reasoning"]
    answers(item.content[0].text)
    answers(found.output_text)


@case("logprobs")
def of_chat() -> None:
    found = chat(QUESTION, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    equal("".join(entry.token for entry in found).strip(), ANSWER)
    equal({len(entry.top_logprobs) for entry in found}, {2})


@case("logprobs")
def of_a_prompt() -> None:
    found = client.completions.create(model=MODEL, prompt=QUESTION, max_tokens=0, echo=True, logprobs=1).choices[0]
    equal((found.text, found.logprobs.token_logprobs[0], found.logprobs.text_offset[0]), (QUESTION, None, 0))
    told(all(value <= 0 for value in found.logprobs.token_logprobs[1:]), "log-probabilities up to 0")


@case("responses")
def response() -> None:
    found = client.responses.create(model=MODEL, input=QUESTION, instructions="Answer briefly.")
    answers(found.output_text)
    equal(found.status, "completed")


@case("responses")
def response_events() -> None:
    with client.responses.stream(model=MODEL, input=QUESTION) as stream:
        streamed([event.delta for event in stream if event.type == "response.output_text.delta"])
        answers(stream.get_final_response().output_text)


@case("responses")
def kept() -> None:
    found = client.responses.create(model=MODEL, input=QUESTION)
    equal(client.responses.retrieve(found.id).output_text, found.output_text)
    client.responses.delete(found.id)


lacks("messages", "the package has OpenAI's API alone")


@case("embeddings")
def base64_and_floats() -> None:
    found = client.embeddings.create(model=MODEL, input=[QUESTION, CALLING])
    floats = client.embeddings.create(model=MODEL, input=[QUESTION, CALLING], encoding_format="float")
    equal(len(found.data), 2)
    for one, other in zip(found.data, floats.data, strict=True):
        told(max(abs(a - b) for a, b in zip(one.embedding, other.embedding, strict=True)) < 1e-5, "equal embeddings")


@case("embeddings")
def dimensions() -> None:
    found = client.embeddings.create(model=MODEL, input=QUESTION, dimensions=16).data[0].embedding
    equal(len(found), 16)


main()
