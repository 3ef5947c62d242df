"""llama-index, with its class for servers like OpenAI's.

It reads the annotations of tools where they are no text.
"""

from typing import Any, Literal

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
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel

TO: dict[str, Any] = {"model": MODEL, "api_base": BASE_URL, "api_key": KEY, "context_window": 2048, "max_retries": 0}


def like(**more: Any) -> OpenAILike:
    return OpenAILike(**TO, is_chat_model=True, is_function_calling_model=True, max_tokens=200, **more)


llm = like()


class Fact(BaseModel):
    """What a person likes."""

    name: Literal["Ada", "Carl"]
    thing: Literal["plums", "jam"]


def facts(person: Literal["Ada", "Carl"]) -> str:
    """What a person likes."""
    return facts_of(person)


TOOLS = [FunctionTool.from_defaults(facts)]


@case("plain")
def chat() -> None:
    answers(llm.chat([ChatMessage(role="user", content=QUESTION)]).message.content)


@case("plain")
def complete() -> None:
    answers(OpenAILike(**TO, is_chat_model=False, max_tokens=20, temperature=0).complete(f"{QUESTION} Answer:").text)


@case("stream")
def stream_chat() -> None:
    streamed([piece.delta or "" for piece in llm.stream_chat([ChatMessage(role="user", content=QUESTION)])])


@case("stream")
async def asynchronous() -> None:
    found = await llm.astream_chat([ChatMessage(role="user", content=QUESTION)])
    streamed([piece.delta or "" async for piece in found])


@case("tools")
def required() -> None:
    found = llm.chat_with_tools(TOOLS, user_msg=CALLING, tool_required=True)
    (call,) = llm.get_tool_calls_from_response(found)
    equal((call.tool_name, call.tool_kwargs), (TOOL, {"person": "Ada"}))


@case("tools")
def predict_and_call() -> None:
    equal(str(llm.predict_and_call(TOOLS, user_msg=CALLING)), facts_of("Ada"))


async def _loops(streams: bool) -> None:
    agent = FunctionAgent(tools=TOOLS, llm=llm, streaming=streams)
    found = await agent.run(CALLING)
    equal([(call.tool_name, call.tool_kwargs) for call in found.tool_calls], [(TOOL, {"person": "Ada"})])
    answers(str(found))


@case("agent")
async def function_agent() -> None:
    await _loops(True)


@case("agent")
async def function_agent_whole() -> None:
    await _loops(False)


@case("structured")
def structured_predict() -> None:
    equal(llm.structured_predict(Fact, PromptTemplate("{question}"), question=QUESTION), Fact(**FACT))


@case("structured")
def as_structured_llm() -> None:
    found = llm.as_structured_llm(Fact).chat([ChatMessage(role="user", content=QUESTION)])
    equal(found.raw, Fact(**FACT))


@case("structured")
def json_schema() -> None:
    """Of a model that is said to have structured outputs."""
    made = like(should_use_structured_outputs=True)
    equal(made.structured_predict(Fact, PromptTemplate("{question}"), question=IN_JSON), Fact(**FACT))


lacks("reasoning", "OpenAILike leaves it out of its messages")


@case("logprobs")
def of_chat() -> None:
    found = like(logprobs=True, top_logprobs=2).chat([ChatMessage(role="user", content=QUESTION)])
    told(found.logprobs, "log-probabilities")


@case("responses")
def response() -> None:
    from llama_index.llms.openai import OpenAIResponses

    made = OpenAIResponses(**TO, max_output_tokens=200)
    answers(made.chat([ChatMessage(role="user", content=QUESTION)]).message.content)


lacks("messages", "OpenAILike has OpenAI's API alone")


@case("embeddings")
def embedding() -> None:
    made = OpenAILikeEmbedding(model_name=MODEL, api_base=BASE_URL, api_key=KEY, max_retries=0)
    told(len(made.get_text_embedding(QUESTION)), "numbers")


main()
