"""Runs the cases of one client and prints a line of JSON for each. It runs in the client's environment, so it needs the
standard library alone."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

URL = os.environ["BATON_URL"]
BASE_URL = f"{URL}/v1"
MODEL = os.environ["BATON_MODEL"]
KEY = "none"
CASE_S = 60

# What the bench's model knows (bench/clients/model.py).
QUESTION = "Facts: Ada likes plums. Question: what does Ada like?"
IN_JSON = "Facts: Ada likes plums. Question: what does Ada like, as JSON?"
ANSWER = "Ada likes plums."
FACT = {"name": "Ada", "thing": "plums"}
# It has to call the tool to know.
CALLING = "What does Ada like?"
TOOL = "facts"
TOOL_ABOUT = "What a person likes."
PARAMETERS = {
    "type": "object",
    "properties": {"person": {"type": "string", "enum": ["Ada", "Carl"]}},
    "required": ["person"],
    "additionalProperties": False,
}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "enum": ["Ada", "Carl"]},
        "thing": {"type": "string", "enum": ["plums", "jam"]},
    },
    "required": ["name", "thing"],
    "additionalProperties": False,
}
TOOL_OF_OPENAI = {"type": "function", "function": {"name": TOOL, "description": TOOL_ABOUT, "parameters": PARAMETERS}}

_Case = Callable[[], Any]
_cases: list[tuple[str, str, _Case | str]] = []


def facts_of(person: str) -> str:
    """What the tool answers."""
    return f"{person} likes plums."


def case(feature: str, name: str = "") -> Callable[[_Case], _Case]:
    """A case of a feature; it has passed if it raises nothing. It may be a coroutine."""

    def register(run: _Case) -> _Case:
        _cases.append((feature, name or run.__name__.replace("_", " "), run))
        return run

    return register


def lacks(feature: str, why: str) -> None:
    _cases.append((feature, "", why))


def equal(found: object, expected: object, what: str = "the answer") -> None:
    if found != expected:
        raise AssertionError(f"{what} is {found!r}, expected {expected!r}")


def answers(text: str | None) -> None:
    equal((text or "").strip(), ANSWER)


def told(found: object, what: str) -> None:
    """Something is there."""
    if not found:
        raise AssertionError(f"{what} is {found!r}, expected something")


def streamed(pieces: list[str], expected: str = ANSWER) -> None:
    """More than one piece, and the whole when joined."""
    equal("".join(pieces).strip(), expected, "the joined stream")
    if len([piece for piece in pieces if piece]) < 2:
        raise AssertionError(f"the stream had the pieces {pieces!r}, expected two or more")


def run(only: list[str] | None = None) -> None:
    signal.signal(signal.SIGALRM, _late)
    # One for all: clients keep connections, which belong to a loop.
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    for feature, name, case in _cases:
        if only and feature not in only:
            continue
        if isinstance(case, str):
            _say(feature, name, "not offered", case)
            continue
        signal.alarm(CASE_S)
        try:
            loop.run_until_complete(case()) if inspect.iscoroutinefunction(case) else case()
            signal.alarm(0)
            _say(feature, name, "ok", "")
        except Exception as error:
            signal.alarm(0)
            traceback.print_exc()
            _say(feature, name, "failed", f"{type(error).__name__}: {error}"[:600])


def _late(*_: object) -> None:
    raise TimeoutError(f"it took more than {CASE_S} s")


def _say(feature: str, name: str, state: str, said: str) -> None:
    print(json.dumps({"feature": feature, "case": name, "state": state, "said": said}), flush=True)


def main() -> None:
    run(sys.argv[1:])
