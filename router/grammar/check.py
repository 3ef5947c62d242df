"""Finds out whether nodes can follow a grammar, in a process of its own: no limit of the library bounds every grammar,
and a call of it cannot be ended otherwise."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import baton
from baton.errors import InternalError, InvalidRequest, Overloaded, described, shortened
from baton.grammar_limits import LIMITS
from baton.settings import setting

_log = logging.getLogger("baton.router")

_PROGRAM = Path(__file__).with_name("child.py")
# Of one answer.
_MAX_ANSWER_BYTES = 1 << 20
_MAX_MESSAGE_CHARS = 400
# Tokens that a new grammar is followed for.
_NUM_STEPS = 16


@dataclass(frozen=True, slots=True)
class GrammarConfig:
    """Of the process that checks grammars of structured output before a node gets one."""

    # For one grammar: common schemas take milliseconds, so what takes longer than this is not sent to nodes.
    limit_s: float = field(default=2.0, metadata=setting(least=0.1))
    # For the process, the tokenizer of 150,000 tokens included.
    max_bytes: int = field(default=2 << 30, metadata=setting(least=256 << 20))
    # It reads the tokenizer first.
    start_limit_s: float = 60.0
    # Grammars that are being checked or wait for it; one more is refused with Overloaded.
    max_waiting: int = 32
    # Whose outcome is remembered.
    max_known: int = 1024


class GrammarCheck:
    """Used by the event loop alone. Its process starts with the first grammar, and again after one that ended it."""

    def __init__(self, config: GrammarConfig, tokenizer_file: Path) -> None:
        self._config = config
        self._tokenizer_file = tokenizer_file
        self._process: Process | None = None
        self._turn = _Turn()
        # By digest, those that are being checked or wait for it.
        self._underway: dict[bytes, asyncio.Task[str | None]] = {}
        self.num_built = 0
        # By digest, why a grammar is refused; None: it is not. The one that was asked for longest ago comes first.
        self._known: OrderedDict[bytes, str | None] = OrderedDict()

    async def check(self, grammar: str, *, param: str, client: str = "") -> None:
        """Raises InvalidRequest for ``param``, and Overloaded if too many others wait. Clients take turns."""
        key = hashlib.blake2b(grammar.encode(), digest_size=16).digest()
        if key in self._known:
            self._known.move_to_end(key)
            why = self._known[key]
        else:
            # The one who asked may leave: the process goes on, for others too.
            why = await asyncio.shield(self._underway.get(key) or self._begun(key, grammar, client))
        if why is not None:
            raise InvalidRequest(f"{param} cannot be followed: {why}", param=param)

    def _begun(self, key: bytes, grammar: str, client: str) -> asyncio.Task[str | None]:
        if len(self._underway) >= self._config.max_waiting:
            message = f"{len(self._underway)} grammars wait to be checked, the limit; try again"
            raise Overloaded(message, retry_after_s=1.0)
        task = self._underway[key] = asyncio.create_task(self._why_not(key, grammar, client))
        task.add_done_callback(lambda done: self._over(key, done))
        return task

    def _over(self, key: bytes, task: asyncio.Task[str | None]) -> None:
        del self._underway[key]
        if not task.cancelled() and (error := task.exception()) is not None:
            # Those who asked may have left.
            _log.warning("a grammar could not be checked: %s", described(error))

    async def _why_not(self, key: bytes, grammar: str, client: str) -> str | None:
        async with self._turn.of(client):
            if self._process is None:
                self._process = await self._started()
            try:
                answer = await self._answer(self._process, grammar, 2 * self._config.limit_s)
            except BaseException:
                # Its answer would be taken for the next one's.
                await self._end()
                raise
            if answer == b"":
                await self._end()
                limits = f"{self._config.limit_s:g} s or {self._config.max_bytes >> 20} MiB"
                # Not remembered: the machine may have been busy.
                return f"it takes more than {limits} to build; simplify it"
        self.num_built += 1
        told: str | None = json.loads(answer)
        why = self._known[key] = None if told is None else shortened(_plain(told), _MAX_MESSAGE_CHARS)
        if len(self._known) > self._config.max_known:
            self._known.popitem(last=False)
        return why

    async def _started(self) -> Process:
        command = (sys.executable, "-P", str(_PROGRAM), str(Path(baton.__file__).parents[1]))
        process = await asyncio.create_subprocess_exec(
            *command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, limit=_MAX_ANSWER_BYTES
        )
        self._process = process
        told = {
            "tokenizer": str(self._tokenizer_file),
            "limits": dict(LIMITS),
            "limit_s": self._config.limit_s,
            "num_steps": _NUM_STEPS,
            "max_bytes": self._config.max_bytes,
        }
        answer = await self._answer(process, told, self._config.start_limit_s)
        if answer == b"null\n":
            return process
        await self._end()
        if answer == b"":
            raise InternalError(f"the process that checks grammars did not start with {self._tokenizer_file}")
        message = f"grammars cannot be followed with this model's tokenizer: {shortened(json.loads(answer), 200)}"
        raise InvalidRequest(message)

    @staticmethod
    async def _answer(process: Process, told: object, limit_s: float) -> bytes:
        """Its line; empty if it has ended instead, or says nothing."""
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(told).encode() + b"\n")
        try:
            async with asyncio.timeout(limit_s):
                await process.stdin.drain()
                return await process.stdout.readline()
        except (TimeoutError, ConnectionError):
            return b""

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def close(self) -> None:
        for task in list(self._underway.values()):
            task.cancel()
        if self._underway:
            await asyncio.wait(list(self._underway.values()))
        await self._end()


class _Turn:
    """One at a time; of those that wait, one of each client before the second of any."""

    def __init__(self) -> None:
        self._is_taken = False
        # By client, the one whose turn is next first.
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    @asynccontextmanager
    async def of(self, client: str) -> AsyncIterator[None]:
        if self._is_taken:
            turn = asyncio.get_running_loop().create_future()
            self._waiting.setdefault(client, deque()).append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._pass_on()
                raise
        self._is_taken = True
        try:
            yield
        finally:
            self._pass_on()

    def _pass_on(self) -> None:
        while self._waiting:
            client, turns = self._waiting.popitem(last=False)
            turn = turns.popleft()
            if turns:
                self._waiting[client] = turns
            if not turn.done():
                turn.set_result(None)
                return
        self._is_taken = False


def _plain(told: str) -> str:
    """What the library says of a schema whose references lead only to each other means nothing to a client."""
    if told.startswith("NoExtensionBias"):
        return "it allows no text, as where references ($ref) lead only to each other"
    return told.removesuffix("\n<non-verbose/>")
