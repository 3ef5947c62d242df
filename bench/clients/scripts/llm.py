"""The `llm` command and its library, with a model in extra-openai-models.yaml."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from cells import (
    BASE_URL,
    CALLING,
    FACT,
    IN_JSON,
    KEY,
    MODEL,
    QUESTION,
    SCHEMA,
    answers,
    case,
    equal,
    facts_of,
    lacks,
    main,
    streamed,
    told,
)

MODELS = f"""
- model_id: baton
  model_name: {MODEL}
  api_base: {BASE_URL}
  supports_schema: true
  supports_tools: true
  reasoning: true
- model_id: baton-text
  model_name: {MODEL}
  api_base: {BASE_URL}
  completion: true
"""
folder = Path(os.environ["LLM_USER_PATH"])
folder.mkdir(parents=True, exist_ok=True)
(folder / "extra-openai-models.yaml").write_text(MODELS)
# The client wants one even where the server wants none.
os.environ["OPENAI_API_KEY"] = KEY
import llm  # noqa: E402 (it reads its folder)

FUNCTION = """
def facts(person: str) -> str:
    "What a person likes."
    return f"{person} likes plums."
"""


def command(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "llm", *arguments], capture_output=True, text=True, timeout=50, check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"llm ended with {done.returncode}: {done.stderr.strip()[-400:]}")
    return done.stdout


@case("plain")
def whole() -> None:
    answers(command("-m", "baton", "--no-stream", QUESTION))


@case("plain")
def completion() -> None:
    answers(command("-m", "baton-text", "--no-stream", "-o", "temperature", "0", f"{QUESTION} Answer:"))


@case("stream")
def printed() -> None:
    answers(command("-m", "baton", QUESTION))


@case("stream")
def library() -> None:
    streamed(list(llm.get_model("baton").prompt(QUESTION)))


lacks("tools", "the client cannot require a call")


@case("agent")
def functions() -> None:
    answers(command("-m", "baton", "--no-stream", "--functions", FUNCTION, CALLING))


@case("agent")
def streamed_functions() -> None:
    answers(command("-m", "baton", "--functions", FUNCTION, CALLING))


@case("agent")
def chain() -> None:
    asked: list[str] = []

    def facts(person: str) -> str:
        """What a person likes."""
        asked.append(person)
        return facts_of(person)

    answers(llm.get_model("baton").chain(CALLING, tools=[facts]).text())
    equal(asked, ["Ada"])


@case("structured")
def schema() -> None:
    equal(json.loads(command("-m", "baton", "--no-stream", "--schema", json.dumps(SCHEMA), IN_JSON)), FACT)


@case("structured")
def json_object() -> None:
    equal(json.loads(command("-m", "baton", "--no-stream", "-o", "json_object", "1", IN_JSON)), FACT)


@case("reasoning")
def effort() -> None:
    answers(command("-m", "baton", "--no-stream", "-o", "reasoning_effort", "low", QUESTION))


@case("logprobs")
def of_a_completion() -> None:
    found = llm.get_model("baton-text").prompt(f"{QUESTION} Answer:", temperature=0, logprobs=2, stream=False)
    answers(found.text())
    raw: Any = found.json()
    told(raw.get("logprobs") or raw["choices"][0].get("logprobs"), "log-probabilities")


lacks("responses", "models in the file have chat or completions")
lacks("messages", "the client has OpenAI's API alone")
lacks("embeddings", "its models for embeddings have OpenAI's names")
main()
