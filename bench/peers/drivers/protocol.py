"""The driver protocol: one JSON line as request, one as answer. Uses the standard library only.

Token counts and prompts come from the bench, seconds from the driver's own clock, so figures do not include the pipes.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any, Protocol, TextIO

# Token limit of a step, for every engine that has such a limit.
MAX_BATCH_TOKENS = 2048
MAX_SEQUENCES = 64
MAX_MODEL_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Start:
    """The arguments of a driver. ``converted`` is the output of the environment's converter, or the model itself."""

    model: str
    converted: str
    num_threads: int
    cores: tuple[int, ...]
    # Capacity for keys and values, in tokens.
    kv_tokens: int

    def line(self) -> str:
        return json.dumps(asdict(self))


class Engine(Protocol):
    """An engine with the model loaded. Greedy, and no sequence ends by itself."""

    # Settings, for the record.
    settings: dict[str, Any]

    def prefill(self, prompt: list[int]) -> tuple[float, int]:
        """Seconds from the prompt to its first token, and that token. The sequence is dropped afterwards."""
        ...

    def fill(self, prompts: list[list[int]]) -> None:
        """Compute the prompts, so that each sequence has its first token."""
        ...

    def decode(self, num_steps: int) -> tuple[float, int]:
        """Run so many steps of all sequences of ``fill``; returns seconds and tokens."""
        ...

    def clear(self) -> None:
        """Drop the sequences of ``fill``."""
        ...


def serve(make: Callable[[Start], Engine], packages: tuple[str, ...]) -> None:
    """Create the engine, report that it is ready, and answer until the input ends. Printed output goes to the log."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    given = json.loads(sys.argv[1])
    engine = make(Start(**{**given, "cores": tuple(given["cores"])}))
    _tell(answers, {"settings": engine.settings, "versions": {name: metadata.version(name) for name in packages}})
    for line in sys.stdin:
        _tell(answers, _answer(engine, json.loads(line)))


def _answer(engine: Engine, question: dict[str, Any]) -> dict[str, Any]:
    try:
        match question["do"]:
            case "prefill":
                seconds, token = engine.prefill(question["prompt"])
                return {"seconds": seconds, "token": token}
            case "fill":
                engine.fill(question["prompts"])
                return {}
            case "decode":
                seconds, tokens = engine.decode(question["steps"])
                return {"seconds": seconds, "tokens": tokens}
            case "clear":
                engine.clear()
                return {}
            case other:
                return {"error": f"asked for {other!r}, expected prefill, fill, decode or clear"}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def _tell(answers: TextIO, answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()
