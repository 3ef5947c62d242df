"""pydantic-ai, with OpenAI's two APIs and Anthropic's."""

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
from pydantic_ai import Agent, NativeOutput, PromptedOutput, ToolOutput
from pydantic_ai.messages import ThinkingPart, ToolCallPart
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider

provider = OpenAIProvider(base_url=BASE_URL, api_key=KEY)
chat = OpenAIChatModel(MODEL, provider=provider)
responses = OpenAIResponsesModel(MODEL, provider=provider)


def messages_model() -> Any:
    # Without a limit of its own the client asks for more than this model's context.
    return AnthropicModel(MODEL, provider=AnthropicProvider(base_url=URL, api_key=KEY), settings={"max_tokens": 200})


class Fact(BaseModel):
    """What a person likes."""

    name: Literal["Ada", "Carl"]
    thing: Literal["plums", "jam"]


def parts(result: Any, kind: type) -> list[Any]:
    return [part for message in result.all_messages() for part in message.parts if isinstance(part, kind)]


@case("plain")
def run_sync() -> None:
    result = Agent(chat, instructions="Answer briefly.").run_sync(QUESTION)
    answers(result.output)


async def _streams(model: Any) -> None:
    async with Agent(model).run_stream(QUESTION) as result:
        streamed([piece async for piece in result.stream_text(delta=True, debounce_by=None)])


@case("stream")
async def run_stream() -> None:
    await _streams(chat)


def _calls(model: Any) -> None:
    """A call that is required: the answer is a call of the tool for answers."""
    result = Agent(model, output_type=ToolOutput(Fact, name="fact")).run_sync(QUESTION)
    equal(result.output, Fact(**FACT))
    equal([part.tool_name for part in parts(result, ToolCallPart)], ["fact"])


@case("tools")
def of_chat() -> None:
    _calls(chat)


@case("tools")
def of_responses() -> None:
    _calls(responses)


@case("tools")
def of_messages() -> None:
    _calls(messages_model())


def _loops(model: Any) -> None:
    agent = Agent(model)

    @agent.tool_plain
    def facts(person: Literal["Ada", "Carl"]) -> str:
        """What a person likes."""
        return facts_of(person)

    result = agent.run_sync(CALLING)
    answers(result.output)
    equal([(part.tool_name, part.args_as_dict()) for part in parts(result, ToolCallPart)], [(TOOL, {"person": "Ada"})])


@case("agent")
def chat_loop() -> None:
    _loops(chat)


@case("agent")
def responses_loop() -> None:
    _loops(responses)


@case("agent")
def messages_loop() -> None:
    _loops(messages_model())


@case("structured")
def tool_output() -> None:
    equal(Agent(chat, output_type=ToolOutput(Fact)).run_sync(QUESTION).output, Fact(**FACT))


@case("structured")
def native_output() -> None:
    equal(Agent(chat, output_type=NativeOutput(Fact)).run_sync(IN_JSON).output, Fact(**FACT))


@case("structured")
def prompted_output() -> None:
    equal(Agent(chat, output_type=PromptedOutput(Fact)).run_sync(IN_JSON).output, Fact(**FACT))


@case("structured")
def native_output_of_responses() -> None:
    equal(Agent(responses, output_type=NativeOutput(Fact)).run_sync(IN_JSON).output, Fact(**FACT))


@case("structured")
async def streamed_output() -> None:
    async with Agent(chat, output_type=NativeOutput(Fact)).run_stream(IN_JSON) as result:
        equal(await result.get_output(), Fact(**FACT))


def _thinks(model: Any, settings: Any) -> None:
    result = Agent(model, model_settings=settings).run_sync(QUESTION)
    answers(result.output)
    (thought,) = parts(result, ThinkingPart)
    # Where an API has both, the content is the summary.
    answers(thought.content or "".join(thought.provider_details["raw_content"]))


@case("reasoning")
def chat_effort() -> None:
    _thinks(chat, {"extra_body": {"reasoning_effort": "low"}})


@case("reasoning")
def responses_effort() -> None:
    _thinks(responses, {"extra_body": {"reasoning": {"effort": "low"}}})


@case("reasoning")
def messages_thinking() -> None:
    _thinks(messages_model(), {"anthropic_thinking": {"type": "enabled", "budget_tokens": 1024}, "max_tokens": 200})


@case("logprobs")
def chat_logprobs() -> None:
    result = Agent(chat, model_settings={"openai_logprobs": True, "openai_top_logprobs": 2}).run_sync(QUESTION)
    details = result.all_messages()[-1].provider_details
    equal("".join(entry["token"] for entry in details["logprobs"]).strip(), ANSWER)


@case("responses")
def response() -> None:
    answers(Agent(responses).run_sync(QUESTION).output)


@case("responses")
async def response_stream() -> None:
    await _streams(responses)


@case("messages")
def message() -> None:
    answers(Agent(messages_model()).run_sync(QUESTION).output)


@case("messages")
async def message_stream() -> None:
    await _streams(messages_model())


@case("embeddings")
async def embedder() -> None:
    from pydantic_ai import Embedder
    from pydantic_ai.embeddings.openai import OpenAIEmbeddingModel

    found = await Embedder(OpenAIEmbeddingModel(MODEL, provider=provider)).embed_query(QUESTION)
    told(len(found.embeddings[0]), "numbers")


main()
