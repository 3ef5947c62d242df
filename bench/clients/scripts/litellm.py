"""litellm, as a library."""

from __future__ import annotations

import json
from typing import Any, Literal

import litellm
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
    URL,
    answers,
    case,
    equal,
    facts_of,
    main,
    streamed,
    told,
)
from pydantic import BaseModel

litellm.suppress_debug_info = True
OPENAI: dict[str, Any] = {"model": f"openai/{MODEL}", "api_base": BASE_URL, "api_key": KEY, "num_retries": 0}
VLLM = OPENAI | {"model": f"hosted_vllm/{MODEL}"}
# Without a limit of its own the client asks for more than this model's context.
ANTHROPIC = OPENAI | {"model": f"anthropic/{MODEL}", "api_base": URL, "max_tokens": 200}


class Fact(BaseModel):
    name: Literal["Ada", "Carl"]
    thing: Literal["plums", "jam"]


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def chat(text: str, through: dict[str, Any] = OPENAI, **more: Any) -> Any:
    return litellm.completion(messages=user(text), **through, **more)


@case("plain")
def openai_provider() -> None:
    answers(chat(QUESTION).choices[0].message.content)


@case("plain")
def vllm_provider() -> None:
    answers(chat(QUESTION, VLLM).choices[0].message.content)


@case("plain")
def text_completion() -> None:
    through = OPENAI | {"model": f"text-completion-openai/{MODEL}"}
    found = litellm.text_completion(prompt=f"{QUESTION} Answer:", max_tokens=20, temperature=0, **through)
    answers(found.choices[0].text)


@case("stream")
def chunks() -> None:
    streamed([chunk.choices[0].delta.content or "" for chunk in chat(QUESTION, stream=True)])


@case("stream")
async def asynchronous() -> None:
    found = await litellm.acompletion(messages=user(QUESTION), stream=True, **OPENAI)
    streamed([chunk.choices[0].delta.content or "" async for chunk in found])


def one_call(choice: Any) -> Any:
    (call,) = choice.message.tool_calls
    equal((call.function.name, json.loads(call.function.arguments)), (TOOL, {"person": "Ada"}))
    return call


@case("tools")
def required() -> None:
    one_call(chat(CALLING, tools=[TOOL_OF_OPENAI], tool_choice="required").choices[0])


@case("tools")
def named() -> None:
    one_call(
        chat(CALLING, tools=[TOOL_OF_OPENAI], tool_choice={"type": "function", "function": {"name": TOOL}}).choices[0]
    )


def loop(through: dict[str, Any]) -> None:
    messages = user(CALLING)
    for _ in range(4):
        choice = litellm.completion(messages=messages, tools=[TOOL_OF_OPENAI], **through).choices[0]
        if not choice.message.tool_calls:
            break
        call = one_call(choice)
        messages += [choice.message, {"role": "tool", "tool_call_id": call.id, "content": facts_of("Ada")}]
    equal(len(messages), 3, "the number of messages")
    answers(choice.message.content)


@case("agent")
def chat_loop() -> None:
    loop(OPENAI)


@case("agent")
def messages_loop() -> None:
    loop(ANTHROPIC)


@case("structured")
def json_schema() -> None:
    form = {"type": "json_schema", "json_schema": {"name": "fact", "schema": SCHEMA, "strict": True}}
    equal(json.loads(chat(IN_JSON, response_format=form).choices[0].message.content), FACT)


@case("structured")
def pydantic_model() -> None:
    equal(Fact.model_validate_json(chat(IN_JSON, response_format=Fact).choices[0].message.content), Fact(**FACT))


@case("structured")
def json_object() -> None:
    equal(json.loads(chat(IN_JSON, response_format={"type": "json_object"}).choices[0].message.content), FACT)


@case("reasoning")
def vllm_variable() -> None:
    message = chat(QUESTION, VLLM, extra_body={"chat_template_kwargs": {"enable_thinking": True}}).choices[0].message
    answers(message.content)
    answers(message.reasoning_content)


@case("reasoning")
def streamed_reasoning() -> None:
    found = chat(QUESTION, VLLM, extra_body={"chat_template_kwargs": {"enable_thinking": True}}, stream=True)
    answers("".join(getattr(chunk.choices[0].delta, "reasoning_content", None) or "" for chunk in found))


@case("reasoning")
def anthropic_thinking() -> None:
    message = chat(
        QUESTION, ANTHROPIC, thinking={"type": "enabled", "budget_tokens": 1024}, allowed_openai_params=["thinking"]
    )
    answers(message.choices[0].message.reasoning_content)


@case("logprobs")
def of_chat() -> None:
    found = chat(QUESTION, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    equal("".join(entry.token for entry in found).strip(), ANSWER)


@case("responses")
def response() -> None:
    found = litellm.responses(input=QUESTION, **OPENAI)
    (message,) = [item for item in found.output if item.type == "message"]
    answers(message.content[0].text)


@case("responses")
def response_events() -> None:
    kinds = [str(getattr(event.type, "value", event.type)) for event in litellm.responses(
        input=QUESTION, stream=True, **OPENAI)]  # fmt: skip
    told("response.completed" in kinds, "the event response.completed")


@case("messages")
def anthropic_provider() -> None:
    answers(chat(QUESTION, ANTHROPIC).choices[0].message.content)


@case("messages")
def anthropic_chunks() -> None:
    found = chat(QUESTION, ANTHROPIC, stream=True)
    streamed([chunk.choices[0].delta.content or "" for chunk in found])


@case("embeddings")
def embedding() -> None:
    found = litellm.embedding(input=[QUESTION, CALLING], **OPENAI).data
    equal(len(found), 2)
    told(len(found[0]["embedding"]), "numbers")


main()
