"""Turns one admitted request into the answer of an HTTP client: all choices, whole or as server-sent events.

It connects generations with the JSON of `openai_response`; it uses no sockets.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

from baton import errors
from router.frontend import Accepted, Ending, Frontend, Generation, GenerationRequest
from router.openai_logprobs import LogprobWriter
from router.openai_request import ChatBody, CompletionBody
from router.openai_response import DONE, ChoiceWriter, Envelope, relay_json, usage
from router.openai_whole import Json, PromptJson, WholeAnswer, prompt_json
from router.text import Part


class Choice:
    """One choice: reads its tokens and writes its chunks or its whole text."""

    __slots__ = ("_generation", "_has_begun", "_writer", "ending", "prompt")

    def __init__(self, generation: Generation, writer: ChoiceWriter) -> None:
        self._generation = generation
        self._writer = writer
        # The repeated prompt; set before the first read, dropped once it has been sent.
        self.prompt = PromptJson()
        self._has_begun = False
        self.ending: Ending | None = None

    async def next(self) -> str:
        """The next chunks; `ending` is set with the last of them. Raises the error that ended the sequence."""
        text = ""
        while not text:
            text = self._chunks(await self._generation.next())
        return text

    def _chunks(self, part: Part | Ending) -> str:
        text = ""
        if not self._has_begun:
            self._has_begun = True
            text = self._writer.begin(self.prompt)
            self.prompt = PromptJson()
        if isinstance(part, Ending):
            self.ending = part
        else:
            if part.text or part.token_ids:
                text += self._writer.chunk(part)
            self.ending = self._generation.ending
        return text if self.ending is None else text + self._writer.end(self.ending)

    async def whole(self, keep: Callable[[int], None]) -> Json:
        """``keep`` is called with the number of bytes that are kept until the end."""
        choice = self._writer.whole()
        while isinstance(part := await self._generation.next(), Part):
            keep(choice.add(part))
        self.ending = part
        return choice.json(part, self.prompt)


class Answer:
    """Read it with `whole`, or with `next` until `is_over`; end it early with `cancel`."""

    __slots__ = ("_accepted", "_choices", "_envelope", "_frontend", "_is_prepared", "_kept_bytes", "_merger", "_n",
                 "_prompt_ids", "_wants_ids", "_wants_relay", "_wants_usage", "is_over")  # fmt: skip

    def __init__(
        self, frontend: Frontend, body: CompletionBody | ChatBody, request: GenerationRequest, accepted: Accepted
    ) -> None:  # fmt: skip
        self._accepted = accepted
        self._frontend = frontend
        self._kept_bytes = 0
        # Not the body itself: it would be kept as long as the stream.
        self._wants_usage = body.wants_usage
        self._wants_ids = bool(body.return_token_ids)
        self._wants_relay = bool(body.return_relay)
        is_chat = request.is_chat
        self._envelope = Envelope(
            answer_id=("chatcmpl-" if is_chat else "cmpl-") + accepted.request_id,
            model=accepted.model,
            created=int(time.time()),
            is_chat=is_chat,
            wants_usage=body.wants_usage,
        )
        self._n = request.n
        self._is_prepared = not (accepted.echoes or self._wants_ids)
        # A conversation's ids are repeated once for all choices.
        self._prompt_ids = ""
        self._choices: list[Choice] = []
        self._merger: _Merger | None = None
        # The last event has been returned.
        self.is_over = False
        for i, generation in enumerate(accepted.generations):
            logprobs = None
            if request.sampling.logprobs is not None:
                logprobs = LogprobWriter(
                    frontend.tokenizer, is_chat=is_chat, as_ids=bool(body.return_tokens_as_token_ids)
                )  # fmt: skip
            writer = ChoiceWriter(
                envelope=self._envelope, index=i, logprobs=logprobs, token_ids=self._wants_ids,
                num_prompt_tokens=len(generation.prompt_token_ids), running_usage=body.wants_running_usage,
            )  # fmt: skip
            self._choices.append(Choice(generation, writer))

    @property
    def request_id(self) -> str:
        return self._accepted.request_id

    def cancel(self) -> None:
        """No effect if everything is over; else the reader gets Cancelled."""
        self._frontend.cancel(self._accepted, "the client left")

    async def _prepare(self) -> None:
        """Write the JSON of the repeated prompts."""
        self._is_prepared = True
        for first in range(0, len(self._choices), self._n):
            echo = self._accepted.echoes[first // self._n] if self._accepted.echoes else ""
            ids = self._accepted.generations[first].prompt_token_ids if self._wants_ids else ()
            prompt = await prompt_json(echo, ids, self._frontend.turns)
            for choice in self._choices[first : first + self._n]:
                choice.prompt = prompt
            if self._envelope.is_chat:
                self._prompt_ids = prompt.token_ids

    async def whole(self) -> WholeAnswer:
        """Wait for all choices; raises the first error."""
        if not self._is_prepared:
            await self._prepare()
        if len(self._choices) == 1:
            choices = [await self._choices[0].whole(self._keep)]
        else:
            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(choice.whole(self._keep)) for choice in self._choices]
            except ExceptionGroup as failed:
                raise errors.cause_of(failed) from None
            choices = [t.result() for t in tasks]
        return self._envelope.whole(choices, f',"usage":{_compact(self._usage())}{self._extras()}')

    def _keep(self, num_bytes: int) -> None:
        self._kept_bytes += num_bytes
        self._frontend.backlog.keep_answer(num_bytes, self._kept_bytes)

    def relay_line(self) -> str:
        return self._endings[0].relay.line()

    async def next(self) -> bytes:
        """The next server-sent events, at least one; the last ones include usage and the end.

        Raises an error of a sequence; earlier events have been sent.
        """
        if not self._is_prepared:
            await self._prepare()
        if len(self._choices) == 1:
            text = await self._choices[0].next()
            self.is_over = self._choices[0].ending is not None
        else:
            if self._merger is None:
                self._merger = _Merger(self._choices)
            text = await self._merger.next()
            self.is_over = self._merger.num_left == 0
        return text.encode() + self._closing() if self.is_over else text.encode()

    async def close(self) -> None:
        """Release everything, whatever was read."""
        self.cancel()
        self._frontend.backlog.num_bytes -= self._kept_bytes
        self._kept_bytes = 0
        if self._merger is not None:
            await self._merger.close()

    def _closing(self) -> bytes:
        extra = self._extras()
        if self._wants_usage:
            extra += f',"usage":{_compact(self._usage())}'
        return (self._envelope.last_chunk(extra).encode() if extra else b"") + DONE

    @property
    def _endings(self) -> list[Ending]:
        """The endings of all choices, which have ended."""
        return [c.ending for c in self._choices if c.ending is not None]

    def _usage(self) -> dict[str, Any]:
        """A prompt counts once, however many choices it has."""
        firsts = self._accepted.generations[:: self._n]
        num_prompt = sum(len(g.prompt_token_ids) for g in firsts)
        endings = self._endings
        return usage(num_prompt, endings, sum(e.num_cached_tokens for e in endings[:: self._n]))

    def _extras(self) -> str:
        """Further members of the answer's JSON, each with a leading comma."""
        extra = f',"prompt_token_ids":[{self._prompt_ids}]' if self._wants_ids and self._envelope.is_chat else ""
        if self._wants_relay:
            relays = [relay_json(e.relay) for e in self._endings]
            found = {"request_id": self.request_id, "relay": relays[0], "relays": relays}
            extra += f',"baton":{_compact(found)}'
        return extra


def _compact(value: dict[str, Any]) -> str:
    return json.dumps(value, separators=(",", ":"))


class _Merger:
    """Merges several choices, each read by a task of its own; the bounded queue makes them wait for the client."""

    def __init__(self, choices: Sequence[Choice]) -> None:
        self.num_left = len(choices)
        self._queue: asyncio.Queue[tuple[str, bool] | Exception] = asyncio.Queue(len(choices))
        self._tasks = [asyncio.create_task(self._read(c)) for c in choices]

    async def _read(self, choice: Choice) -> None:
        try:
            while choice.ending is None:
                text = await choice.next()
                await self._queue.put((text, choice.ending is not None))
        except Exception as error:
            await self._queue.put(error)

    async def next(self) -> str:
        item = await self._queue.get()
        if isinstance(item, Exception):
            raise item
        text, is_last = item
        self.num_left -= is_last
        return text

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)
