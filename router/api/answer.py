"""Turns one admitted request into the answer of an HTTP client: all choices, whole or as server-sent events.

It connects generations with the form of an API; it uses no sockets.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from baton import errors
from router.api.whole import Json, WholeAnswer
from router.frontend.frontend import Frontend
from router.frontend.generation import Accepted, Ending, Generation
from router.text.detokenizer import Part
from router.turns import Turns


class WholeWriter(Protocol):
    """The whole of one choice, in an API's form."""

    def add(self, part: Part) -> int:
        """Returns the number of bytes that are kept until the end."""

    def json(self, ending: Ending) -> Json: ...


class Writer(Protocol):
    """One choice in an API's form."""

    def begin(self) -> str:
        """What is sent before the first part."""

    def chunk(self, part: Part) -> str: ...

    def end(self, ending: Ending) -> str: ...

    def whole(self) -> WholeWriter:
        """The whole choice instead of chunks."""


class Form(Protocol):
    """An API's form of one answer."""

    @property
    def writers(self) -> Sequence[Writer]:
        """One for each choice."""

    async def prepare(self, turns: Turns) -> None:
        """Called once, before anything is written."""

    def closing(self, endings: Sequence[Ending]) -> bytes:
        """The last events of a stream."""

    def failed(self, error: errors.BatonError) -> bytes:
        """The last event of a stream that failed after its beginning."""

    def whole(self, choices: Sequence[Json], endings: Sequence[Ending]) -> WholeAnswer: ...


class Choice:
    """One choice: reads its tokens and writes its chunks or its whole text."""

    __slots__ = ("_generation", "_has_begun", "_writer", "ending")

    def __init__(self, generation: Generation, writer: Writer) -> None:
        self._generation = generation
        self._writer = writer
        self._has_begun = False
        self.ending: Ending | None = None

    async def next(self) -> str:
        """The next chunks; `ending` is set with the last of them. Raises the error that ended the sequence."""
        text = ""
        while not text and self.ending is None:
            text = self._chunks(await self._generation.next())
        return text

    def _chunks(self, part: Part | Ending) -> str:
        text = ""
        resume = self._generation.resume
        if not self._has_begun:
            self._has_begun = True
            text = self._writer.begin()
            text = text if resume is None else ""
        if isinstance(part, Ending):
            self.ending = part
        else:
            if part.text or part.token_ids or part.scored:
                # One that the client has is written for what the writer counts.
                chunk = self._writer.chunk(part)
                text += "" if part.is_known else chunk
            self.ending = self._generation.ending
        if self.ending is None or (resume is not None and resume.has_end):
            return text
        return text + self._writer.end(self.ending)

    async def whole(self, keep: Callable[[int], None]) -> Json:
        """``keep`` is called with the number of bytes that are kept until the end."""
        choice = self._writer.whole()
        while isinstance(part := await self._generation.next(), Part):
            keep(choice.add(part))
        self.ending = part
        return choice.json(part)


class Answer:
    """Read it with `whole`, or with `next` until `is_over`; end it early with `cancel`."""

    __slots__ = ("_accepted", "_choices", "_form", "_frontend", "_is_prepared", "_kept_bytes", "_merger", "is_over")

    def __init__(self, frontend: Frontend, form: Form, accepted: Accepted) -> None:
        self._accepted = accepted
        self._frontend = frontend
        self._form = form
        self._kept_bytes = 0
        self._is_prepared = False
        self._choices = [Choice(g, w) for g, w in zip(accepted.generations, form.writers, strict=True)]
        self._merger: _Merger | None = None
        # The last event has been returned.
        self.is_over = False

    @property
    def request_id(self) -> str:
        return self._accepted.request_id

    def cancel(self) -> None:
        """No effect if everything is over; else the reader gets Cancelled."""
        self._frontend.cancel(self._accepted, "the client left")

    async def _prepare(self) -> None:
        self._is_prepared = True
        await self._form.prepare(self._frontend.turns)

    async def whole(self) -> WholeAnswer:
        """Wait for all choices; raises the first error."""
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
        return self._form.whole(choices, self._endings)

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
        return text.encode() + self._form.closing(self._endings) if self.is_over else text.encode()

    def failed(self, error: errors.BatonError) -> bytes:
        """The last event of a stream whose `next` raised."""
        return self._form.failed(error)

    async def close(self) -> None:
        """Release everything, whatever was read."""
        self.cancel()
        self._frontend.backlog.num_bytes -= self._kept_bytes
        self._kept_bytes = 0
        if self._merger is not None:
            await self._merger.close()

    @property
    def _endings(self) -> list[Ending]:
        """The endings of all choices, which have ended."""
        return [c.ending for c in self._choices if c.ending is not None]


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
