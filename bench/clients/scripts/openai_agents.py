"""openai-agents, with its default settings (the Responses API), and with chat."""

from __future__ import annotations

from typing import Any, Literal

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    Runner,
    function_tool,
    set_default_openai_client,
    set_tracing_disabled,
)
from cells import (
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
from openai import AsyncOpenAI
from openai.types.shared import Reasoning
from pydantic import BaseModel

client = AsyncOpenAI(base_url=BASE_URL, api_key=KEY, max_retries=0)
set_default_openai_client(client, use_for_tracing=False)
set_tracing_disabled(True)
asked: list[str] = []


class Fact(BaseModel):
    name: Literal["Ada", "Carl"]
    thing: Literal["plums", "jam"]


@function_tool
def facts(person: Literal["Ada", "Carl"]) -> str:
    """What a person likes."""
    asked.append(person)
    return facts_of(person)


def agent(model: Any = MODEL, **more: Any) -> Agent:
    return Agent(name="Assistant", instructions="Answer briefly.", model=model, **more)


def chat() -> Any:
    return OpenAIChatCompletionsModel(model=MODEL, openai_client=client)


@case("plain")
async def run() -> None:
    answers((await Runner.run(agent(), QUESTION)).final_output)


@case("plain")
async def run_by_chat() -> None:
    answers((await Runner.run(agent(chat()), QUESTION)).final_output)


async def _streams(model: Any) -> None:
    found = Runner.run_streamed(agent(model), QUESTION)
    pieces = [
        event.data.delta
        async for event in found.stream_events()
        if event.type == "raw_response_event" and event.data.type == "response.output_text.delta"
    ]
    streamed(pieces)
    answers(found.final_output)


@case("stream")
async def events() -> None:
    await _streams(MODEL)


@case("stream")
async def events_by_chat() -> None:
    await _streams(chat())


async def _loops(model: Any, **more: Any) -> None:
    asked.clear()
    found = await Runner.run(agent(model, tools=[facts], **more), CALLING, max_turns=4)
    equal(asked, ["Ada"], "the calls")
    answers(found.final_output)


@case("tools")
async def required() -> None:
    await _loops(MODEL, model_settings=ModelSettings(tool_choice="required"))


@case("tools")
async def named() -> None:
    await _loops(MODEL, model_settings=ModelSettings(tool_choice=TOOL))


@case("agent")
async def loop() -> None:
    await _loops(MODEL)


@case("agent")
async def loop_by_chat() -> None:
    await _loops(chat())


@case("agent")
async def streamed_loop() -> None:
    asked.clear()
    found = Runner.run_streamed(agent(tools=[facts]), CALLING, max_turns=4)
    kinds = [event.name async for event in found.stream_events() if event.type == "run_item_stream_event"]
    told("tool_called" in kinds and "tool_output" in kinds, "events of the call")
    answers(found.final_output)


@case("agent")
async def handoff() -> None:
    """The request requires both calls; what the second is about is a guess of the model."""
    asked.clear()
    required = ModelSettings(tool_choice="required")
    other = agent(tools=[facts], model_settings=required)
    first = Agent(name="First", model=MODEL, handoffs=[other], model_settings=required)
    found = await Runner.run(first, CALLING, max_turns=5)
    equal(found.last_agent.name, "Assistant", "the last agent")
    equal(found.final_output.strip(), facts_of(asked[-1]))


@case("structured")
async def output_type() -> None:
    equal((await Runner.run(agent(output_type=Fact), IN_JSON)).final_output, Fact(**FACT))


@case("structured")
async def output_type_by_chat() -> None:
    equal((await Runner.run(agent(chat(), output_type=Fact), IN_JSON)).final_output, Fact(**FACT))


@case("reasoning")
async def effort() -> None:
    settings = ModelSettings(reasoning=Reasoning(effort="low"))
    found = await Runner.run(agent(model_settings=settings), QUESTION)
    answers(found.final_output)
    told([item for item in found.new_items if item.type == "reasoning_item"], "an item of reasoning")


@case("reasoning")
async def effort_in_a_loop() -> None:
    await _loops(MODEL, model_settings=ModelSettings(reasoning=Reasoning(effort="none")))


lacks("logprobs", "Responses here have none")


@case("responses")
async def default_settings() -> None:
    found = await Runner.run(agent(), QUESTION)
    answers(found.final_output)
    told(found.last_response_id, "the response's id")


@case("responses")
async def previous_response() -> None:
    first = await Runner.run(agent(), QUESTION)
    again = await Runner.run(agent(), QUESTION, previous_response_id=first.last_response_id)
    answers(again.final_output)


lacks("messages", "the client has OpenAI's API alone")
lacks("embeddings", "the client has none")
main()
