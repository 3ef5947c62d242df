"""A proxy between an HTTP client and a router that records when bytes pass, to find the client's own part of a delay.

    python -m bench.tap PORT FILE

Prints its port, and adds a line of JSON to FILE for each streamed answer: ``request_s``, from the first to the last
byte of the request, and ``first_s``, from its first byte to the first event of the answer. One request at a time on a
connection, as in HTTP/1.1. Its own cost is the way through one more process.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import TextIO

_CHUNK_BYTES = 1 << 16


class _Connection:
    """The stamps of the current request."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._began_s: float | None = None
        self._asked_s = 0.0

    def asked(self, data: bytes) -> None:
        now = time.perf_counter()
        if data.startswith(b"POST"):
            self._began_s = now
        self._asked_s = now

    def answered(self, data: bytes) -> None:
        if self._began_s is not None and b"data: " in data:
            now = time.perf_counter()
            self._out.write(json.dumps({"request_s": self._asked_s - self._began_s, "first_s": now - self._began_s}))
            self._out.write("\n")
            self._out.flush()
            self._began_s = None


async def _serve(port: int, out: TextIO) -> None:
    async def through(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = _Connection(out)
        there, back = await asyncio.open_connection("127.0.0.1", port)

        async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter, *, is_request: bool) -> None:
            note = connection.asked if is_request else connection.answered
            try:
                while data := await source.read(_CHUNK_BYTES):
                    note(data)
                    target.write(data)
                    await target.drain()
            except ConnectionError:
                return
            finally:
                target.close()

        async with asyncio.TaskGroup() as group:
            group.create_task(copy(reader, back, is_request=True))
            group.create_task(copy(there, writer, is_request=False))

    server = await asyncio.start_server(through, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def main() -> None:
    with Path(sys.argv[2]).open("a") as out:
        asyncio.run(_serve(int(sys.argv[1]), out))


if __name__ == "__main__":
    main()
