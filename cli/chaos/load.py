"""What is asked: requests whose only right tokens an undisturbed run gives, and clients that behave badly. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from demo import tasks
from loadgen.load import prompts

_TIMEOUT_S = 120.0
_LONG_TOKENS = 320
_SCHEMA = {
    "type": "object",
    "properties": {"person": {"enum": ["Ada", "Bo"]}, "likes": {"enum": ["plums", "jam", "tea"]}},
    "required": ["person", "likes"],
    "additionalProperties": False,
}
_TOOLS = [{"type": "function", "function": {"name": "facts", "parameters": _SCHEMA}}]
_SAMPLED = {"temperature": 0.9, "top_p": 0.95, "ignore_eos": True}


@dataclass(frozen=True, slots=True)
class Question:
    """One body, without its model and id. ``expected``: the only right answer, where that is known beforehand."""

    kind: str
    path: str
    body: Mapping[str, Any]
    expected: str | None = None

    def bytes_of(self, model: str, request_id: str) -> bytes:
        common = {"model": model, "request_id": request_id, "stream": True, "return_token_ids": True}
        return json.dumps({**common, "timeout": _TIMEOUT_S, **self.body}).encode()


def _completion(kind: str, prompt: str | Sequence[int], max_tokens: int, **more: Any) -> Question:
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, **more}
    return Question(kind, "/v1/completions", body)


def demo_questions(seed: int, count: int) -> list[Question]:
    """For the demo's model: recall, which shows a damaged block as a wrong word, long streams, sampled ones, JSON by a
    schema, and calls of tools; interleaved."""
    recalls = tasks.recall_prompts(seed, count, num_pairs=(20, 150), num_questions=(1, 6))
    others = tasks.mixed_prompts(seed, count)
    found: list[Question] = []
    for i, (recall, other) in enumerate(zip(recalls, others, strict=True)):
        match i % 6:
            case 0 | 1:
                body = {"prompt": recall.prompt, "max_tokens": recall.num_output_tokens + 4, "temperature": 0}
                found.append(Question("recall", "/v1/completions", body, recall.expected))
            case 2:
                found.append(_completion("long", other.prompt, _LONG_TOKENS, ignore_eos=True))
            case 3:
                found.append(_completion("sampled", other.prompt, 96, **{**_SAMPLED, "seed": i}))
            case 4:
                form = {"type": "json_schema", "json_schema": {"name": "likes", "schema": _SCHEMA}}
                found.append(_completion("json", recall.prompt, 120, response_format=form))
            case _:
                body = {
                    "messages": [{"role": "user", "content": f"What does Ada like, of {i} things?"}],
                    "tools": _TOOLS, "tool_choice": "required", "parallel_tool_calls": False,
                    "max_tokens": 160, "temperature": 0,
                }  # fmt: skip
                found.append(Question("tools", "/v1/chat/completions", body))
    return found


def own_questions(seed: int, count: int) -> list[Question]:
    """For any model: prompts of random ids, greedy and sampled, short and long answers."""
    lengths = [64 + 97 * (i % 11) for i in range(count)]
    found = []
    for i, prompt in enumerate(prompts(f"chaos {seed}", lengths)):
        if i % 3 == 2:
            found.append(_completion("long", prompt, _LONG_TOKENS, ignore_eos=True))
        else:
            sampled = {**_SAMPLED, "seed": i} if i % 3 else {"ignore_eos": True}
            found.append(_completion("sampled" if i % 3 else "short", prompt, 48, **sampled))
    return found


class Manner(Enum):
    READS = "reads to the end"
    LEAVES = "leaves in mid-stream"
    DAWDLES = "reads slowly"


@dataclass(frozen=True, slots=True)
class Behaviour:
    """How a client takes its answer. ``after``: tokens after which it leaves."""

    manner: Manner = Manner.READS
    after: int = 0
    pause_s: float = 0.0


def behaviour(seed: int, number: int) -> Behaviour:
    """The same for one seed, whatever else is asked. Six of seven read to the end."""
    drawn = hashlib.blake2b(f"{seed} {number}".encode(), digest_size=4).digest()
    if drawn[0] < 22:
        return Behaviour(Manner.LEAVES, after=drawn[1] % 40)
    if drawn[0] < 37:
        return Behaviour(Manner.DAWDLES, pause_s=0.01 + drawn[1] / 256 * 0.09)
    return Behaviour()
