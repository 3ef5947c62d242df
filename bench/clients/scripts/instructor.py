"""instructor, over the openai and the anthropic packages."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import anthropic
import instructor
import openai
from cells import (
    BASE_URL,
    CALLING,
    FACT,
    IN_JSON,
    KEY,
    MODEL,
    QUESTION,
    TOOL,
    TOOL_ABOUT,
    URL,
    case,
    equal,
    lacks,
    main,
    told,
)
from pydantic import BaseModel, create_model

base = openai.OpenAI(base_url=BASE_URL, api_key=KEY, max_retries=0)


class Fact(BaseModel):
    """What a person likes."""

    name: Literal["Ada", "Carl"]
    thing: Literal["plums", "jam"]


Facts: Any = create_model(TOOL, __doc__=TOOL_ABOUT, person=(Literal["Ada", "Carl"], ...))


def _created(mode: Any, text: str, response_model: Any = Fact, **more: Any) -> Any:
    client = instructor.from_openai(base, mode=mode)
    messages: list[Any] = [{"role": "user", "content": text}]
    return client.chat.completions.create(
        model=MODEL, messages=messages, response_model=response_model, max_retries=1, **more
    )


def _is_fact(mode: Any, text: str) -> None:
    equal(_created(mode, text).model_dump(), FACT)


lacks("plain", "every answer is an object: see structured")


@case("stream")
def partial() -> None:
    client = instructor.from_openai(base, mode=instructor.Mode.TOOLS)
    found = list(
        client.chat.completions.create_partial(
            model=MODEL, messages=[{"role": "user", "content": QUESTION}], response_model=Fact
        )
    )
    told(len(found) > 1, "more than one piece")
    equal(found[-1].model_dump(), FACT)


@case("tools")
def mode_tools() -> None:
    _is_fact(instructor.Mode.TOOLS, QUESTION)


@case("tools")
def mode_tools_strict() -> None:
    _is_fact(instructor.Mode.TOOLS_STRICT, QUESTION)


lacks("agent", "the client has no loop")


@case("structured")
def mode_tools_again() -> None:
    _is_fact(instructor.Mode.TOOLS, QUESTION)


@case("structured")
def mode_json() -> None:
    _is_fact(instructor.Mode.JSON, IN_JSON)


@case("structured")
def mode_json_schema() -> None:
    _is_fact(instructor.Mode.JSON_SCHEMA, IN_JSON)


@case("structured")
def mode_md_json() -> None:
    _is_fact(instructor.Mode.MD_JSON, IN_JSON)


@case("structured")
def mode_parallel_tools() -> None:
    # The model decides, and by itself it calls this one.
    found = list(_created(instructor.Mode.PARALLEL_TOOLS, CALLING, Iterable[Facts]))
    equal([call.model_dump() for call in found], [{"person": "Ada"}])


@case("structured")
def iterable() -> None:
    client = instructor.from_openai(base, mode=instructor.Mode.TOOLS)
    found = client.chat.completions.create_iterable(
        model=MODEL, messages=[{"role": "user", "content": QUESTION}], response_model=Fact, max_tokens=150
    )
    told(isinstance(next(iter(found)), Fact), "a fact")


lacks("reasoning", "every answer is an object")
lacks("logprobs", "every answer is an object")


@case("responses")
def mode_responses_tools() -> None:
    client = instructor.from_openai(base, mode=instructor.Mode.RESPONSES_TOOLS)
    found = client.responses.create(model=MODEL, input=QUESTION, response_model=Fact, max_retries=1)
    equal(found.model_dump(), FACT)


@case("messages")
def anthropic_tools() -> None:
    client = instructor.from_anthropic(anthropic.Anthropic(base_url=URL, api_key=KEY, max_retries=0))
    found = client.messages.create(
        model=MODEL, max_tokens=200, messages=[{"role": "user", "content": QUESTION}], response_model=Fact,
        max_retries=1,
    )  # fmt: skip
    equal(found.model_dump(), FACT)


lacks("embeddings", "the client has none")
main()
