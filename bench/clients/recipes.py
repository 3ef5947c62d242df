"""The clients that the bench runs: what is installed for each, and which script is its.

Releases are the newest that the index has when an environment is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

FEATURES: Mapping[str, str] = {
    "plain": "whole answers",
    "stream": "streams, joined equal to the whole answer",
    "tools": "a call that the request requires, or of a named function",
    "agent": "a loop: the model calls by itself, gets the result, and ends with the answer",
    "structured": "answers by a JSON schema, through each of the client's ways",
    "reasoning": "reasoning apart from the answer",
    "logprobs": "log-probabilities",
    "responses": "`/v1/responses`",
    "messages": "`/v1/messages`",
    "embeddings": "`/v1/embeddings`",
}


@dataclass(frozen=True, slots=True)
class Client:
    """``packages`` are those of pip, or of npm; ``named`` are those whose versions are told."""

    name: str
    packages: tuple[str, ...]
    named: tuple[str, ...]
    # Of bench/clients/scripts; none: it is run by a module of its own.
    script: str = ""
    is_node: bool = False
    torch: bool = False

    @property
    def key(self) -> str:
        """In file names and on the command line."""
        return self.name.replace(" ", "-").lower()


def _python(name: str, script: str, *packages: str) -> Client:
    return Client(name, packages, tuple(package.partition("[")[0] for package in packages), script)


CLIENTS = (
    _python("openai", "openai.py", "openai"),
    # By the tag: npm prefers releases for its own node, which may be older than the one that runs them.
    Client("openai npm", ("openai@latest", "zod@latest"), ("openai",), "openai.mjs", is_node=True),
    _python("anthropic", "anthropic.py", "anthropic"),
    _python("litellm", "litellm.py", "litellm"),
    _python("langchain", "langchain.py", "langchain-openai", "langchain"),
    _python("instructor", "instructor.py", "instructor", "anthropic"),
    _python("pydantic-ai", "pydantic_ai.py", "pydantic-ai-slim[openai,anthropic]"),
    _python("openai-agents", "openai_agents.py", "openai-agents"),
    _python(
        "llama-index", "llama_index.py",
        "llama-index-core", "llama-index-llms-openai-like", "llama-index-embeddings-openai-like",
    ),
    _python("llm", "llm.py", "llm"),
    Client(
        "vercel ai",
        ("ai@latest", "@ai-sdk/openai@latest", "@ai-sdk/openai-compatible@latest", "@ai-sdk/anthropic@latest",
         "zod@latest"),
        ("ai", "@ai-sdk/openai", "@ai-sdk/openai-compatible", "@ai-sdk/anthropic"), "vercel_ai.mjs", is_node=True,
    ),
    Client("lm-eval", ("lm-eval[api,hf]",), ("lm-eval", "transformers"), torch=True),
)  # fmt: skip
