"""Clients of a chaos run: what they keep of a stream, and what they do when they are refused or lose their router."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from cli.chaos.client import Caller, Stream
from cli.chaos.load import Behaviour, Manner
from cli.chaos.verdict import Heard
from loadgen.client import Server


def event(token: int, text: str, finish: str | None = None, event_id: str = "") -> str:
    said = {"choices": [{"text": text, "token_ids": [token], "finish_reason": finish}]}
    return (f"id: {event_id}\n" if event_id else "") + f"data: {json.dumps(said)}\n\n"


def chunked(text: str) -> bytes:
    return f"{len(text.encode()):x}\r\n{text}\r\n".encode()


@asynccontextmanager
async def router(*answers: Sequence[str] | int) -> AsyncIterator[tuple[Caller, list[bytes]]]:
    """Gives each of the answers once: a status, or the events of a stream, of which the last may be "cut"."""
    heads: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append((await reader.readuntil(b"\r\n\r\n")).lower())
        answer = answers[len(heads) - 1]
        if isinstance(answer, int):
            writer.write(f"HTTP/1.1 {answer} x\r\ncontent-length: 4\r\n\r\nbusy".encode())
        else:
            writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
            whole = [part for part in answer if part != "cut"]
            writer.write(b"".join(map(chunked, whole)) + (b"" if "cut" in answer else b"0\r\n\r\n"))
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    here = Server("127.0.0.1", port)
    async with server:
        yield Caller((here, here), {"authorization": "Bearer k"}, asyncio.get_running_loop().time, 0.0), heads


async def ask(caller: Caller, behaviour: Behaviour | None = None) -> Stream:
    return await caller.ask(0, "/v1/completions", b"{}", behaviour or Behaviour())


async def test_a_stream_is_kept_whole() -> None:
    async with router([event(1, "a"), event(2, "b", "stop"), "data: [DONE]\n\n"]) as (caller, heads):
        stream = await ask(caller)
    assert stream.heard == Heard((1, 2), "ab", "stop")
    assert len(stream.stamps_s) == 2
    assert b"authorization: bearer k" in heads[0]
    assert b"x-baton-resumable: true" in heads[0]


async def test_a_refused_request_is_asked_again() -> None:
    async with router(503, 429, [event(1, "a", "stop")]) as (caller, _):
        stream = await ask(caller)
    assert (stream.heard, stream.num_refused) == (Heard((1,), "a", "stop"), 2)


async def test_an_error_is_an_outcome() -> None:
    async with router(400) as (caller, heads):
        assert (await ask(caller)).error == "HTTP 400: busy"
    assert len(heads) == 1
    async with router([event(1, "a"), 'data: {"error": "gone"}\n\n']) as (caller, _):
        assert (await ask(caller)).heard == Heard((1,), "a", None, "gone")


async def test_a_lost_stream_goes_on_behind_its_last_whole_event() -> None:
    first = [event(1, "a", event_id="r.1"), event(2, "b", event_id="r.2"), "id: r.3\ndata: {", "cut"]
    async with router(first, [event(3, "c", "stop", "r.3")]) as (caller, heads):
        stream = await ask(caller)
    assert (stream.heard, stream.num_resumed) == (Heard((1, 2, 3), "abc", "stop"), 1)
    assert b"last-event-id: r.2" in heads[1]
    assert b"x-baton-resumable" not in heads[1]


async def test_a_lost_stream_without_ids_has_no_outcome() -> None:
    async with router([event(1, "a"), "cut"]) as (caller, heads):
        assert (await ask(caller)).heard == Heard((1,), "a", None)
    assert len(heads) == 1


async def test_a_client_leaves_when_it_has_enough() -> None:
    async with router([event(1, "a"), event(2, "b"), event(3, "c", "stop")]) as (caller, _):
        stream = await ask(caller, Behaviour(Manner.LEAVES, after=3))
        assert (len(stream.token_ids), stream.has_left) == (3, False)
    async with router([event(1, "a"), event(2, "b"), "cut"]) as (caller, _):
        stream = await ask(caller, Behaviour(Manner.LEAVES, after=1))
        assert stream.has_left


def test_calls_of_tools_are_their_names_and_arguments() -> None:
    call = {"index": 0, "id": "drawn anew", "function": {"name": "facts", "arguments": '{"a"'}}
    chat = Stream()
    for delta, ids in (({"role": "assistant", "content": ""}, []), ({"tool_calls": [call]}, [5])):
        said = {"choices": [{"delta": delta, "token_ids": ids}]}
        chat.take(f"data: {json.dumps(said)}".encode(), 1.0 + len(ids))
    assert chat.heard == Heard((5,), 'facts{"a"')
    assert Stream(stamps_s=[1.0, 3.5, 4.0]).longest_gap_s == 2.5
