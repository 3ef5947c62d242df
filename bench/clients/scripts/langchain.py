"""langchain-openai, and the agents of langchain."""

from __future__ import annotations

from typing import Any, Literal

from cells import (
    ANSWER,
    BASE_URL,
    CALLING,
    FACT,
    IN_JSON,
    KEY,
    MODEL,
    QUESTION,
    TOOL,
    answers,
    case,
    equal,
    facts_of,
    lacks,
    main,
    streamed,
    told,
)
from langchain.agents import create_agent
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel

TO: dict[str, Any] = {"model": MODEL, "base_url": BASE_URL, "api_key": KEY, "max_retries": 0}
chat = ChatOpenAI(**TO)
responses = ChatOpenAI(**TO, use_responses_api=True)


class Fact(BaseModel):
    """What a person likes."""

    name: Literal["Ada", "Carl"]
    thing: Literal["plums", "jam"]


@tool
def facts(person: Literal["Ada", "Carl"]) -> str:
    """What a person likes."""
    return facts_of(person)


@case("plain")
def invoke() -> None:
    found = chat.invoke(QUESTION)
    answers(found.text)
    told(found.usage_metadata, "usage")


@case("plain")
def completions() -> None:
    answers(OpenAI(**TO, temperature=0, max_tokens=20).invoke(f"{QUESTION} Answer:"))


@case("stream")
def chunks() -> None:
    streamed([chunk.text for chunk in chat.stream(QUESTION)])


@case("stream")
async def asynchronous() -> None:
    streamed([chunk.text async for chunk in chat.astream(QUESTION)])


def one_call(message: Any) -> Any:
    (call,) = message.tool_calls
    equal((call["name"], call["args"]), (TOOL, {"person": "Ada"}))
    return call


@case("tools")
def required() -> None:
    one_call(chat.bind_tools([facts], tool_choice="required", parallel_tool_calls=False).invoke(CALLING))


@case("tools")
def named() -> None:
    one_call(chat.bind_tools([facts], tool_choice=TOOL).invoke(CALLING))


@case("tools")
def streamed_call() -> None:
    whole: Any = None
    for chunk in chat.bind_tools([facts], tool_choice=TOOL, strict=True).stream(CALLING):
        whole = chunk if whole is None else whole + chunk
    one_call(whole)


@case("agent")
def by_hand() -> None:
    bound = chat.bind_tools([facts])
    talk: list[Any] = [HumanMessage(CALLING)]
    for _ in range(4):
        talk.append(bound.invoke(talk))
        if not talk[-1].tool_calls:
            break
        call = one_call(talk[-1])
        talk.append(ToolMessage(facts.invoke(call["args"]), tool_call_id=call["id"]))
    equal(len(talk), 4, "the number of messages")
    answers(talk[-1].text)


def _agent(model: Any) -> None:
    found = create_agent(model, [facts], system_prompt="Answer briefly.").invoke(
        {"messages": [{"role": "user", "content": CALLING}]}
    )["messages"]
    equal([message.type for message in found], ["human", "ai", "tool", "ai"], "the loop")
    answers(found[-1].text)


@case("agent")
def created_agent() -> None:
    _agent(chat)


@case("agent")
def created_agent_by_responses() -> None:
    _agent(responses)


def _structured(method: str, model: Any = chat) -> None:
    text = QUESTION if method == "function_calling" else IN_JSON
    equal(model.with_structured_output(Fact, method=method).invoke(text), Fact(**FACT))


@case("structured")
def json_schema() -> None:
    _structured("json_schema")


@case("structured")
def function_calling() -> None:
    _structured("function_calling")


@case("structured")
def json_mode() -> None:
    _structured("json_mode")


@case("structured")
def by_responses() -> None:
    _structured("json_schema", responses)


@case("reasoning")
def by_responses_reasoning() -> None:
    message = ChatOpenAI(**TO, use_responses_api=True, reasoning={"effort": "low"}).invoke(QUESTION)
    answers(message.text)
    told([block for block in message.content_blocks if block["type"] == "reasoning"], "a block of reasoning")
    told(message.usage_metadata["output_token_details"]["reasoning"], "reasoning tokens")


@case("logprobs")
def of_chat() -> None:
    found = ChatOpenAI(**TO, logprobs=True, top_logprobs=2).invoke(QUESTION).response_metadata["logprobs"]["content"]
    equal("".join(entry["token"] for entry in found).strip(), ANSWER)


@case("responses")
def response() -> None:
    answers(responses.invoke(QUESTION).text)


@case("responses")
def response_chunks() -> None:
    streamed([chunk.text for chunk in responses.stream(QUESTION)])


@case("responses")
def continued() -> None:
    first = responses.invoke(QUESTION)
    again = ChatOpenAI(**TO, use_responses_api=True, use_previous_response_id=True)
    answers(again.invoke([HumanMessage(QUESTION), first, HumanMessage(QUESTION)]).text)


lacks("messages", "langchain-openai has OpenAI's API alone")


@case("embeddings")
def embedding() -> None:
    # Otherwise the client splits texts with OpenAI's tokenizer.
    found = OpenAIEmbeddings(**TO, check_embedding_ctx_length=False).embed_documents([QUESTION, CALLING])
    equal(len(found), 2)
    told(len(found[0]), "numbers")


main()
