"""Sends a load to a server and collects the answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from loadgen.client import Answer, Asking, Server, ask, seconds_since
from loadgen.load import Load, Request, prompts


class Event(Enum):
    SENT = "sent"
    ANSWERED = "answered"


Watch = Callable[[Event], None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """The answers in the order of their requests. ``wall_s``: from the beginning to the last answer or the cut; of an
    open loop at least the time in which so many requests come at its rate."""

    load: Load
    answers: tuple[Answer, ...]
    wall_s: float

    @classmethod
    def joined(cls, outcomes: Sequence[Outcome]) -> Outcome:
        """Several runs of a load as one: all requests, and the sum of the times."""
        requests = tuple(request for outcome in outcomes for request in outcome.load.requests)
        answers = tuple(answer for outcome in outcomes for answer in outcome.answers)
        return cls(replace(outcomes[0].load, requests=requests), answers, sum(each.wall_s for each in outcomes))

    @property
    def num_cut(self) -> int:
        """Requests without an outcome when the load's time was up: neither answered nor refused."""
        return len(self.load.requests) - len(self.answers)

    @property
    def whole(self) -> tuple[Answer, ...]:
        return tuple(answer for answer in self.answers if answer.error is None)


async def run(load: Load, server: Server, asking: Asking, seed: str, watch: Watch = lambda _: None) -> Outcome:
    """The whole load, or as much of it as its time allows. Equal seeds make equal prompts."""
    lengths = [request.prompt_tokens for request in load.requests]
    outputs = (request.output_tokens for request in load.requests)
    # Before the clock runs: at its due time a request has only to be written.
    bodies = [asking.body(prompt, output) for prompt, output in zip(prompts(seed, lengths), outputs, strict=True)]
    answers: list[Answer] = []
    began_s = time.perf_counter()
    clock = seconds_since(began_s)

    async def one(number: int, request: Request, due_s: float) -> None:
        watch(Event.SENT)
        answers.append(await ask(server, asking, bodies[number], number, request, due_s, clock))
        watch(Event.ANSWERED)

    async def stream(waiting: Iterator[tuple[int, Request]]) -> None:
        for number, request in waiting:
            await one(number, request, clock())

    try:
        async with asyncio.timeout(load.last_due_s + load.limit_s), asyncio.TaskGroup() as group:
            waiting = enumerate(load.requests)
            for _ in range(load.streams):
                group.create_task(stream(waiting))
            if not load.streams:
                for number, request in waiting:
                    await asyncio.sleep(max(0.0, request.due_s - clock()))
                    group.create_task(one(number, request, request.due_s))
    except TimeoutError:
        # What has no answer is counted as cut off.
        pass
    least_s = len(load.requests) / load.rate if load.rate else 0.0
    return Outcome(load, tuple(sorted(answers, key=lambda answer: answer.number)), max(clock(), least_s))
