"""The crowd of ``python -m bench.slow``, a process of its own: many token streams, and clients that hardly read.

It reads its job, one line of JSON, from standard input, prints a line when every stream has had a token, and prints
what came of them when its input closes. Streams come from many loopback addresses, so that the router takes them for
many clients.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import re
import socket
import sys
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass

from loadgen.client import Reply

_STREAMS_PER_ADDRESS = 5
_READ_BYTES = 1 << 16
_SLOW_BUFFER_BYTES = 4096
_SLOW_CHUNK_BYTES = 512
_SLOW_EVERY_S = 1.0
_SLOW_TOKENS = 1000
_IDS = re.compile(rb'"token_ids": ?\[([^\]]*)\]')
_TCP_ESTABLISHED = 1
# A refused stream is asked for again after this time.
_AGAIN_S = 0.5
_OK = 200


@dataclass(frozen=True, slots=True)
class CrowdJob:
    """``prompts`` are asked in turn, greedy, for ``max_tokens``; ``oracle`` has the right ids of each. Of the
    ``num_slow`` clients half read a piece a second and half read nothing; with ``slow_logprobs`` their answers are
    larger, and cost nodes more, too."""

    host: str
    port: int
    num_streams: int
    num_slow: int
    slow_logprobs: int
    max_tokens: int
    prompts: tuple[str, ...]
    oracle: tuple[tuple[int, ...], ...]

    def line(self) -> str:
        return json.dumps(asdict(self)) + "\n"

    @classmethod
    def parse(cls, line: str) -> CrowdJob:
        fields = json.loads(line)
        fields["prompts"] = tuple(fields["prompts"])
        fields["oracle"] = tuple(tuple(ids) for ids in fields["oracle"])
        return cls(**fields)


def address_of(kind: int, number: int) -> str:
    """Of 127.0.0.0/8; clients of one kind do not meet those of another."""
    return f"127.{kind}.{number // 250}.{1 + number % 250}"


def request_of(body: dict[str, object]) -> bytes:
    content = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


def ids_in(events: bytes) -> list[int]:
    """All token ids of a stream, in their order."""
    return [int(number) for found in _IDS.findall(events) for number in found.split(b",") if number.strip()]


def outcome(ids: Sequence[int], right: Sequence[int], *, is_whole: bool) -> str:
    """An answer that was cut has to be the beginning of the right one."""
    if list(ids) != list(right[: len(ids)]):
        return "wrong tokens"
    if not is_whole:
        return "cut"
    return "whole" if len(ids) == len(right) else "short"


@contextlib.asynccontextmanager
async def posted(host: str, port: int, source: str, body: dict[str, object]) -> AsyncIterator[Reply]:
    """A request from this address, and its answer from the head on. Raises OSError."""
    reader, writer = await asyncio.open_connection(host, port, local_addr=(source, 0), limit=_READ_BYTES)
    try:
        writer.write(request_of(body))
        reply = Reply(reader)
        await reply.head()
        yield reply
    finally:
        writer.transport.abort()


class Crowd:
    def __init__(self, job: CrowdJob) -> None:
        self._job = job
        self._turns = itertools.count()
        self._num_begun = 0
        self.has_begun = asyncio.Event()
        self.ended: Counter[str] = Counter()
        self.slow: Counter[str] = Counter()
        self.num_tokens = 0

    async def run(self) -> None:
        """Until it is cancelled."""
        async with asyncio.TaskGroup() as group:
            for number in range(self._job.num_streams):
                group.create_task(self._stream(number))
            for number in range(self._job.num_slow):
                group.create_task(self._slow(number, reads=number % 2 == 0))

    async def _stream(self, number: int) -> None:
        """One answer after the other."""
        source, is_first = address_of(1, number // _STREAMS_PER_ADDRESS), True
        while True:
            turn = next(self._turns) % len(self._job.prompts)
            events, is_whole = bytearray(), False
            try:
                async with posted(self._job.host, self._job.port, source, self._body(turn)) as reply:
                    if reply.status != _OK:
                        self.ended[f"HTTP {reply.status}"] += 1
                        await asyncio.sleep(_AGAIN_S)
                        continue
                    async for part in reply.parts():
                        events += part
                        if is_first:
                            is_first = False
                            self._begun()
                is_whole = b"[DONE]" in events and b'"error"' not in events
                if not is_whole:
                    self.ended["failed"] += 1
            except (OSError, ValueError) as error:
                self.ended[f"failed: {type(error).__name__}"] += 1
                await asyncio.sleep(_AGAIN_S)
            finally:
                if events:
                    ids = ids_in(bytes(events))
                    self.num_tokens += len(ids)
                    self.ended[outcome(ids, self._job.oracle[turn], is_whole=is_whole)] += 1

    def _body(self, turn: int) -> dict[str, object]:
        return {
            "prompt": self._job.prompts[turn], "max_tokens": self._job.max_tokens, "temperature": 0,
            "ignore_eos": True, "stream": True, "return_token_ids": True,
        }  # fmt: skip

    def _begun(self) -> None:
        self._num_begun += 1
        if self._num_begun == self._job.num_streams:
            self.has_begun.set()

    async def _slow(self, number: int, *, reads: bool) -> None:
        """A long answer over a small window; asked for again when the server has closed it."""
        loop = asyncio.get_running_loop()
        more = {"logprobs": self._job.slow_logprobs} if self._job.slow_logprobs else {}
        body = {**self._body(number % len(self._job.prompts)), "max_tokens": _SLOW_TOKENS, **more}
        while True:
            with socket.socket() as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SLOW_BUFFER_BYTES)
                client.setblocking(False)
                client.bind((address_of(2, number), 0))
                try:
                    await loop.sock_connect(client, (self._job.host, self._job.port))
                    await loop.sock_sendall(client, request_of(body))
                    self.slow["asked"] += 1
                    while client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _TCP_ESTABLISHED:
                        if reads and not await loop.sock_recv(client, _SLOW_CHUNK_BYTES):
                            break
                        await asyncio.sleep(_SLOW_EVERY_S)
                except OSError:
                    await asyncio.sleep(_AGAIN_S)
                self.slow["closed by the router"] += 1


async def _main() -> None:
    crowd = Crowd(CrowdJob.parse(await asyncio.to_thread(sys.stdin.readline)))
    running = asyncio.create_task(crowd.run())
    closing = asyncio.create_task(asyncio.to_thread(sys.stdin.read))
    beginning = asyncio.create_task(crowd.has_begun.wait())
    await asyncio.wait({running, closing, beginning}, return_when=asyncio.FIRST_COMPLETED)
    if beginning.done():
        sys.stdout.write("begun\n")
        sys.stdout.flush()
    await asyncio.wait({running, closing}, return_when=asyncio.FIRST_COMPLETED)
    beginning.cancel()
    if running.done():
        running.result()
    running.cancel()
    await asyncio.wait({running})
    said = {"ended": crowd.ended, "slow": crowd.slow, "tokens": crowd.num_tokens}
    sys.stdout.write(json.dumps(said) + "\n")


if __name__ == "__main__":
    asyncio.run(_main())
