"""Has conversations with a running cluster over its OpenAI API, and keeps all that makes an answer an answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from tests.support.conversations import Conversation, Key
from tests.support.load import REQUEST_TIMEOUT_S


@dataclass(frozen=True, slots=True)
class Choice:
    """What must not depend on where and from which blocks it was computed; log-probabilities as they were sent."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: str
    logprobs: Any


@dataclass(frozen=True, slots=True)
class Talked:
    """All answers, the prompt tokens that they took, those that were found in a cache among them, and attempts that
    failed."""

    choices: dict[Key, Choice]
    num_prompt_tokens: int
    num_cached_tokens: int
    num_reruns: int


async def talk(
    base_url: str,
    talks: Sequence[Conversation],
    concurrency: int = 12,
    on_answer: Callable[[int], None] = lambda num_answered: None,
) -> Talked:
    """Every turn is asked once the one that it continues is answered. Raises if one fails.

    ``on_answer`` is told after each answer how many there are.
    """
    usages: list[Mapping[str, Any]] = []
    num_reruns = 0
    choices: dict[Key, Choice] = {}
    gate = asyncio.Semaphore(concurrency)
    async with httpx.AsyncClient(base_url=base_url, timeout=REQUEST_TIMEOUT_S) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]

        async def one(conversation: Conversation, turn: int, answered: Mapping[int, asyncio.Event]) -> None:
            nonlocal num_reruns
            parent = conversation.turns[turn].parent
            if parent is not None:
                await answered[parent].wait()
            async with gate:
                prompt = conversation.prompt(turn, {key: choice.token_ids for key, choice in choices.items()})
                answer = await _ask(client, _body(model, conversation, turn, prompt))
            usages.append(answer["usage"])
            num_reruns += sum(relay["attempts"] - 1 for relay in answer["baton"]["relays"])
            for choice in answer["choices"]:
                key = (conversation.number, turn, choice["index"])
                choices[key] = Choice(
                    tuple(choice["token_ids"]), choice["text"], choice["finish_reason"], choice["logprobs"]
                )
            answered[turn].set()
            on_answer(len(usages))

        async with asyncio.TaskGroup() as group:
            for conversation in talks:
                answered = {turn: asyncio.Event() for turn in range(len(conversation.turns))}
                for turn in answered:
                    group.create_task(one(conversation, turn, answered))
    return Talked(
        choices,
        sum(usage["prompt_tokens"] for usage in usages),
        sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in usages),
        num_reruns,
    )


def _body(model: str, conversation: Conversation, turn: int, prompt: Sequence[int]) -> dict[str, Any]:
    asked = conversation.turns[turn]
    biases = asked.sampling.get("logit_bias", {})
    body = {
        "model": model,
        "prompt": list(prompt),
        "n": asked.num_choices,
        "max_tokens": asked.max_tokens,
        "ignore_eos": True,
        "return_token_ids": True,
        "return_relay": True,
        **asked.sampling,
        "logit_bias": {str(token_id): bias for token_id, bias in biases.items()},
    }
    return body | ({"cache_salt": conversation.salt.decode()} if conversation.salt else {})


async def _ask(client: httpx.AsyncClient, body: Mapping[str, Any]) -> Any:
    response = await client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def assert_same(found: Talked, expected: Talked) -> None:
    assert found.choices.keys() == expected.choices.keys()
    wrong = {
        key: (found.choices[key], choice) for key, choice in expected.choices.items() if found.choices[key] != choice
    }
    assert not wrong, f"{len(wrong)} of {len(expected.choices)} answers differ from those without a cache: {wrong}"
