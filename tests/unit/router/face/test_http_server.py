"""The HTTP listener over real sockets: hostile and half-finished requests, silent and stuck clients, old clients."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import re
import socket
from dataclasses import replace
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

import httptools
import pytest

from router.face.http_connection import Connection
from router.serve import Router
from tests.support.fake_nodes import FakeConfig
from tests.support.http_wire import Wire, asked, get, parsed, post, served
from tests.support.router import VOCAB_SIZE, until, write_model_folder

SLOW = FakeConfig(vocab_size=VOCAB_SIZE, max_model_tokens=2048, step_s=0.02)
ENDLESS = {"prompt": [5, 6, 7], "max_tokens": 1500, "min_tokens": 1500}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_folder(tmp_path_factory.mktemp("models") / "tiny")


def closed(router: Router, reason: str) -> float:
    """How many connections were closed for this reason."""
    return router.metrics.connections_closed.children[(reason,)].value


def no_errors(caplog: pytest.LogCaptureFixture) -> None:
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING or r.exc_info] == []


# ── Heads ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

BIG = "x" * 70_000
POST = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n"
MALFORMED = {
    "no host": (b"GET /health HTTP/1.1\r\n\r\n", 400),
    "two hosts": (b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
    "no http": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    "http/2 preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    "another version": (b"GET /health HTTP/2.0\r\nHost: a\r\n\r\n", 505),
    "no method": (b"FROBNICATE /health HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "bytes in the path": (b"GET /\xff\xfe HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "bad url": (b"GET http://[ HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "nul in a header": (b"GET /health HTTP/1.1\r\nHost: a\r\nX: a\x00b\r\n\r\n", 400),
    "space before the colon": (b"GET /health HTTP/1.1\r\nHost : a\r\n\r\n", 400),
    "large header": (get("/health", f"X-Large: {BIG}"), 431),
    "large url": (get(f"/health?{BIG}"), 431),
    "many headers": (get("/health", *(f"X-{i}: 1" for i in range(300))), 431),
    "to another host": (b"CONNECT b:80 HTTP/1.1\r\nHost: b\r\nContent-Length: 5\r\n\r\n", 501),
    "both lengths": (
        POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400,
    ),
    "two lengths": (POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n", 400),
    "negative length": (POST + b"Content-Length: -1\r\n\r\n", 400),
    "no number": (POST + b"Content-Length: 1e3\r\n\r\n", 400),
    "overflowing length": (POST + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n", 400),
    "length beyond the limit": (
        POST + b"Content-Length: 99999999999\r\nConnection: close\r\n\r\n", 413,
    ),
    "compressed body": (
        POST + b"Content-Encoding: gzip\r\nContent-Length: 2\r\nConnection: close\r\n\r\n\x1f\x8b", 415,
    ),
    "unknown encoding": (POST + b"Transfer-Encoding: gzip\r\n\r\n", 400),
    "compressed and chunked": (
        POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501,
    ),
    "compressed and chunked, in two headers": (
        POST + b"Transfer-Encoding: deflate\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 501,
    ),
    "bad chunk size": (
        POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n", 400,
    ),
    "overflowing chunk size": (
        POST + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 20 + b"\r\n{}", 400,
    ),
}  # fmt: skip


async def test_malformed_requests_are_refused_by_status_and_not_logged(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with served(folder) as (router, _):
        for name, (data, status) in MALFORMED.items():
            got = await asked(router, data)
            assert got.startswith(b"HTTP/1.1 %d " % status), (name, got[:200])
            error = json.loads(got.partition(b"\r\n\r\n")[2])["error"]
            assert 0 < len(error["message"]) < 500, name
        assert closed(router, "malformed") >= 15
        assert closed(router, "large_head") == 3
        assert (await asked(router, get("/health", "Connection: close"))).startswith(b"HTTP/1.1 200 ")
        no_errors(caplog)


@pytest.mark.parametrize("headers", ["", "Connection: close\r\n"])
async def test_a_client_that_is_still_sending_hears_why_its_body_is_refused(folder: Path, headers: str) -> None:
    def sent_whole(url: SplitResult) -> bytes:
        with socket.create_connection((url.hostname, url.port), timeout=10) as sock:
            sock.sendall(POST + f"{headers}Content-Length: 30000000\r\n\r\n".encode())
            sock.sendall(b"x" * 30_000_000)
            return sock.recv(65536)

    async with served(folder) as (router, _):
        got = await asyncio.to_thread(sent_whole, urlsplit(router.http or ""))
        assert got.startswith(b"HTTP/1.1 413 ")
        assert b"larger than" in got


async def test_a_head_without_an_end_is_cut_off(folder: Path) -> None:
    """20 MB of one header: refused at the limit, not kept until it is complete."""
    async with served(folder) as (router, _):
        wire = await Wire.open(router)
        wire.send(b"GET /health HTTP/1.1\r\nHost: a\r\nX-Large: ")
        for _ in range(20):
            wire.send(b"x" * 1_000_000)
        assert b"HTTP/1.1 431 " in await wire.rest()
        wire.close()


@pytest.mark.parametrize("end", [b"0\r\nX-Large: ", b"1;ext="], ids=["trailer", "extension"])
async def test_what_comes_with_chunks_and_has_no_end_is_cut_off(folder: Path, end: bytes) -> None:
    async with served(folder) as (router, _):
        wire = await Wire.open(router)
        wire.send(POST + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{    \r\n" + end)
        for _ in range(20):
            wire.send(b"x" * 1_000_000)
        assert b"HTTP/1.1 431 " in await wire.rest()
        wire.close()
        # Much in small chunks is no such thing, and trailers that end are left alone.
        content = json.dumps({"prompt": [5], "max_tokens": 2}).encode() + b" " * 30_000
        chunks = b"".join(b"1;a=b\r\n%c\r\n" % byte for byte in content) + b"0\r\ntraceparent: 1\r\n\r\n"
        wire = await Wire.open(router)
        wire.send(POST + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + get())
        assert [(await wire.answer())[0] for _ in range(2)] == [200, 200]
        wire.close()


async def test_a_request_that_asks_for_another_protocol_is_served_in_this_one(folder: Path) -> None:
    """Java's client asks for HTTP/2 with each request, those with a body as well."""
    body = {"prompt": [5], "max_tokens": 2}
    h2c = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAEAAEAAAAIAAAAB")
    async with served(folder) as (router, _):
        wire = await Wire.open(router)
        wire.send(post(body, *h2c) + get("/health", *h2c) + post(body, *h2c) + get())
        answers = [await wire.answer() for _ in range(4)]
        assert [status for status, _, _ in answers] == [200] * 4
        assert json.loads(answers[0][2])["usage"]["completion_tokens"] == 2
        # A head, and its body later.
        head, _, content = post(body, *h2c, "Expect: 100-continue").partition(b"\r\n\r\n")
        wire.send(head[:40])
        await asyncio.sleep(0.05)
        wire.send(head[40:] + b"\r\n\r\n")
        assert (await wire.answer())[0] == 100
        for byte in content:
            wire.send(bytes([byte]))
        assert (await wire.answer())[0] == 200
        wire.send(get("/health", "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Key: a") + get())
        assert [(await wire.answer())[0] for _ in range(2)] == [200, 200]
        wire.close()


async def test_whitespace_around_a_header_is_not_part_of_its_value(folder: Path) -> None:
    content = json.dumps({"prompt": [5], "max_tokens": 2, "return_relay": True}).encode()
    async with served(folder) as (router, _):
        wire = await Wire.open(router)
        wire.send(POST + b"x-slo-ttft-ms: \t1500 \t\r\nContent-Length: %d \r\n\r\n%s" % (len(content), content))
        answer = await wire.answer()
        assert answer[0] == 200, answer
        assert b'"ttft_s":1.5' in answer[-1]


async def test_old_and_odd_requests_that_are_right(folder: Path) -> None:
    async with served(folder) as (router, _):
        assert (await asked(router, b"GET /health HTTP/1.0\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
        wire = await Wire.open(router)
        # A body without a purpose, then more requests in one go.
        wire.send(get("/health", "Content-Length: 3") + b"abc" + get("/health") * 3)
        for _ in range(4):
            assert (await wire.answer())[::2] == (200, b'{"status":"ok"}')
        wire.send(post({"prompt": [5], "max_tokens": 2}, "Expect: 100-continue"))
        assert (await wire.answer())[0] == 100
        assert (await wire.answer())[0] == 200
        wire.close()


@pytest.mark.parametrize("count", [70, 3000])
async def test_requests_that_come_at_once_are_answered_one_after_the_other(folder: Path, count: int) -> None:
    body = {"prompt": [5], "max_tokens": 2}
    async with served(folder) as (router, _):
        wire = await Wire.open(router)
        # Large enough to hold what is behind it back in the middle.
        wire.send(get() * count + post(body | {"user": "u" * 9000}) + get("/nowhere", "Connection: close"))
        statuses = [(await wire.answer())[0] for _ in range(count + 2)]
        assert statuses == [200] * (count + 1) + [404]
        assert await wire.rest() == b""
        wire.close()
        # A client that has said all it has to say.
        got = await asked(router, get() * count, half_close=True)
        assert got.count(b"HTTP/1.1 200 ") == count


async def test_of_requests_that_come_at_once_few_are_read_ahead(folder: Path) -> None:
    async with served(folder, SLOW) as (router, _):
        wire = await Wire.open(router)
        wire.send(post({"prompt": [5], "max_tokens": 200, "min_tokens": 200}))
        await until(lambda: router.dispatcher.scheduler.num_in_flight == 1)
        for _ in range(100):
            wire.send(get() * 1000)
        await asyncio.sleep(0.2)
        # By type: isinstance asks deprecated objects of torch for their class, which warns.
        found = [x for x in gc.get_objects() if type(x) is Connection]
        (connection,) = [x for x in found if x.transport.get_protocol() is x]
        assert 16 <= len(connection.pipeline) < 200
        assert len(connection._held) <= 2**18
        wire.close()
        await until(lambda: router.dispatcher.scheduler.num_in_flight == 0)


# ── Time and number ───────────────────────────────────────────────────────────────────────────────────────────────────


async def test_silent_and_slow_connections_are_closed(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    limits = {"head_timeout_s": 0.5, "keep_alive_s": 1.0, "write_timeout_s": 1.0}
    async with served(folder, **limits) as (router, _):
        silent, unfinished, blank, kept = [await Wire.open(router) for _ in range(4)]
        unfinished.send(b"GET /health HTTP/1.1\r\nHost: a\r\nX-Slow: ")
        kept.send(get())
        assert (await kept.answer())[0] == 200

        async def drip(wire: Wire, data: bytes) -> None:
            while not wire.writer.transport.is_closing():
                wire.send(data)
                await asyncio.sleep(0.05)

        async with asyncio.TaskGroup() as tasks:
            drips = [tasks.create_task(drip(unfinished, b"x")), tasks.create_task(drip(blank, b"\r\n"))]
            for wire in (silent, unfinished, blank, kept):
                assert await wire.rest(timeout_s=8) == b""
            for task in drips:
                task.cancel()
        assert closed(router, "slow_head") == 3
        assert closed(router, "idle") == 1
        body = await Wire.open(router)
        body.send(post(ENDLESS)[:-5])
        assert b"HTTP/1.1 408 " in await body.rest()
        no_errors(caplog)


async def test_when_all_connections_are_taken_the_idle_make_room(folder: Path) -> None:
    async with served(folder, SLOW, max_connections=8) as (router, _):
        busy = [await Wire.open(router) for _ in range(2)]
        for wire in busy:
            wire.send(post({**ENDLESS, "stream": True}))
            await wire.reader.readuntil(b"data: ")
        silent = [await Wire.open(router) for _ in range(40)]
        for _ in range(5):
            assert (await asked(router, get("/health", "Connection: close"))).startswith(b"HTTP/1.1 200 ")
        assert closed(router, "displaced") >= 34
        for wire in busy:
            await wire.reader.readuntil(b"data: ")  # they go on
        more = [await Wire.open(router) for _ in range(6)]
        for wire in more:
            wire.send(post({**ENDLESS, "stream": True}))
            await wire.reader.readuntil(b"data: ")
        refused = await asked(router, b"")
        assert refused.startswith(b"HTTP/1.1 503 ")
        assert closed(router, "full") == 1
        for wire in (*busy, *silent, *more):
            wire.close()
        await until(lambda: router.dispatcher.scheduler.num_in_flight == 0)


async def test_a_client_that_takes_nothing_is_given_up(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Streamed, whole, and closed on its side: none of them is kept."""
    limits = {"write_timeout_s": 1.0}
    big = {"prompt": [5, 6, 7], "max_tokens": 1000, "min_tokens": 1000, "logprobs": 5, "n": 8}
    async with served(folder, **limits) as (router, _):
        stuck = [await Wire.open(router, buffer_bytes=4096) for _ in range(3)]
        for wire in stuck:
            wire.writer.transport.pause_reading()  # type: ignore[attr-defined]
        stuck[0].send(post({**big, "stream": True}))
        stuck[1].send(post(big))
        stuck[2].send(post(big, "Connection: close"))
        await until(lambda: closed(router, "stuck") == 3, timeout_s=60)
        await until(lambda: router.dispatcher.scheduler.num_in_flight == 0)
        for wire in stuck:
            wire.close()
        no_errors(caplog)


async def test_a_slow_client_is_not_a_dead_one(folder: Path) -> None:
    limits = {"write_timeout_s": 1.0}
    asked_for = {"prompt": [5, 6, 7], "max_tokens": 1000, "min_tokens": 1000, "stream": True}
    async with served(folder, **limits) as (router, _):
        wire = await Wire.open(router, buffer_bytes=4096)
        wire.send(post(asked_for))
        got = b""
        while not got.endswith(b"0\r\n\r\n"):
            got += (chunk := await wire.reader.read(20_000))
            assert chunk
            await asyncio.sleep(0.3)
        assert b"data: [DONE]" in got
        assert closed(router, "stuck") == 0
        wire.close()


# ── Half-closed, old, and gone ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("stream", [False, True])
async def test_a_half_closed_client_gets_its_answer(folder: Path, stream: bool) -> None:
    async with served(folder, SLOW) as (router, _):
        body = {"prompt": [5, 6, 7], "max_tokens": 20, "min_tokens": 20, "stream": stream}
        got = await asked(router, post(body), half_close=True)
        assert got.startswith(b"HTTP/1.1 200 OK\r\n")
        assert (b"data: [DONE]" if stream else b'"finish_reason":"length"') in got
        assert (await asked(router, get(), half_close=True)).endswith(b'{"status":"ok"}')
        refused = await asked(router, post({"prompt": []}), half_close=True)
        assert refused.startswith(b"HTTP/1.1 400 Bad Request\r\n")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_left_is_not_taken_for_a_half_closed_one(folder: Path, stream: bool) -> None:
    async with served(folder, SLOW) as (router, cluster):
        wire = await Wire.open(router)
        wire.send(post({**ENDLESS, "stream": stream}))
        await until(lambda: router.dispatcher.scheduler.num_in_flight == 1)
        if stream:
            await wire.reader.readuntil(b"data: ")
        wire.writer.close()
        # The sequence would run for 30 s.
        await until(lambda: router.dispatcher.scheduler.num_in_flight == 0 and cluster.used_blocks == 0, timeout_s=10)


async def test_a_client_that_closes_its_side_in_mid_stream_gets_the_rest(folder: Path) -> None:
    async with served(folder, SLOW) as (router, _):
        wire = await Wire.open(router)
        wire.send(post({"prompt": [5, 6, 7], "max_tokens": 20, "min_tokens": 20, "stream": True}))
        got = await wire.reader.readuntil(b"data: ")
        wire.writer.write_eof()
        got += await wire.rest()
        # It was asked whether it is there, and its parser sees nothing of that.
        assert re.search(rb"\r\n0[0-9a-f]+\r\n", got)
        body = Body()
        httptools.HttpResponseParser(body).feed_data(got)
        assert body.is_complete
        assert b'"finish_reason":"length"' in body.content
        assert body.content.endswith(b"data: [DONE]\n\n")
        wire.close()


class Body:
    """What a client's parser makes of an answer."""

    def __init__(self) -> None:
        self.content = b""
        self.is_complete = False

    def on_body(self, part: bytes) -> None:
        self.content += part

    def on_message_complete(self) -> None:
        self.is_complete = True


async def test_a_client_that_leaves_while_no_token_comes_is_noticed(folder: Path) -> None:
    async with served(folder, SLOW) as (router, cluster):
        wire = await Wire.open(router)
        wire.send(post({**ENDLESS, "stream": True}))
        await wire.reader.readuntil(b"data: ")
        for node in cluster.nodes.values():
            node.mute()
        # Nothing unread: with that the kernel would send a reset at once.
        await asyncio.sleep(0.1)
        wire.writer.close()
        await until(lambda: router.dispatcher.scheduler.num_in_flight == 0)
        for node in cluster.nodes.values():
            node.resume()


LONG_PROMPT = {"prompt": [5] * 1500, "max_tokens": 500, "min_tokens": 500}
# A long prompt takes half a minute, in steps of 0.16 s.
SLOW_PROMPTS = replace(SLOW, prefill_token_s=0.02, max_batch_tokens=8)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_while_its_prompt_is_computed_takes_it_along(folder: Path, stream: bool) -> None:
    async with served(folder, SLOW_PROMPTS) as (router, cluster):
        wire = await Wire.open(router)
        wire.send(post({**LONG_PROMPT, "stream": stream}))
        await until(lambda: cluster.nodes["prefill-0"].used_blocks > 0)
        wire.writer.close()
        await until(lambda: router.dispatcher.scheduler.num_in_flight == 0 and cluster.used_blocks == 0, timeout_s=10)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_in_mid_transfer_takes_it_along(folder: Path, stream: bool) -> None:
    async with served(folder, replace(SLOW, transfer_s=30.0)) as (router, cluster):
        wire = await Wire.open(router)
        wire.send(post({**ENDLESS, "stream": stream}))
        await until(lambda: cluster.nodes["prefill-0"].script.seen["prefill_done"] == 1)
        if stream:
            await wire.reader.readuntil(b"\n\n")
        wire.writer.close()
        await until(lambda: router.dispatcher.scheduler.num_in_flight == 0 and cluster.used_blocks == 0, timeout_s=10)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_the_queue_is_not_served(folder: Path, stream: bool) -> None:
    # Blocks for one of them.
    async with served(folder, replace(SLOW_PROMPTS, num_blocks=130)) as (router, cluster):
        first, second = [await Wire.open(router) for _ in range(2)]
        first.send(post({**LONG_PROMPT, "stream": True}))
        await until(lambda: cluster.nodes["prefill-0"].used_blocks > 0)
        second.send(post({**LONG_PROMPT, "stream": stream}))
        await until(lambda: router.dispatcher.scheduler.num_waiting == 1)
        second.writer.close()
        await until(lambda: router.dispatcher.scheduler.num_in_flight == 1, timeout_s=10)
        assert router.dispatcher.scheduler.num_waiting == 0
        first.writer.close()
        await until(lambda: router.dispatcher.scheduler.num_in_flight == 0 and cluster.used_blocks == 0, timeout_s=10)


async def test_http_1_0_gets_no_chunks(folder: Path) -> None:
    async with served(folder) as (router, _):
        body = {"prompt": [5, 6, 7], "max_tokens": 20, "min_tokens": 20, "stream": True}
        head, _, content = (await asked(router, post(body, version="1.0"))).partition(b"\r\n\r\n")
        status, headers = parsed(head)
        assert status == 200
        assert "transfer-encoding" not in headers
        assert headers["connection"] == "close"
        events = content.split(b"\n\n")
        assert all(event.startswith(b"data: ") for event in events[:-1])
        assert events[-2:] == [b"data: [DONE]", b""]
        whole = await asked(router, post({**body, "stream": False}, version="1.0"))
        assert json.loads(whole.partition(b"\r\n\r\n")[2])["choices"][0]["finish_reason"] == "length"


# ── Methods and paths ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("path", ["/health", "/ready", "/v1/models", "/v1/models/tiny", "/metrics", "/status"])
async def test_head_says_what_get_says_without_a_body(folder: Path, path: str) -> None:
    async with served(folder) as (router, _):
        wire = await Wire.open(router)
        wire.send(get(path))
        status, headers, body = await wire.answer()
        assert (status, bool(body)) == (200, True)
        wire.send(get(path, "Connection: close", method="HEAD"))
        head, _, rest = (await wire.rest()).partition(b"\r\n\r\n")
        wire.close()
        assert parsed(head)[0] == 200
        assert parsed(head)[1]["content-type"] == headers["content-type"]
        assert rest == b""


async def test_options_and_405_name_the_methods(folder: Path) -> None:
    expected = {"/v1/completions": "OPTIONS, POST", "/v1/chat/completions": "OPTIONS, POST"}
    expected |= dict.fromkeys(("/", "/health", "/ready", "/v1/models", "/v1/models/tiny"), "GET, HEAD, OPTIONS")
    expected |= {"/metrics/targets": "GET, HEAD, OPTIONS"}
    async with served(folder) as (router, _):
        wire = await Wire.open(router)
        for path, methods in expected.items():
            wire.send(get(path, method="OPTIONS"))
            status, headers, _ = await wire.answer()
            assert status == 204
            assert headers["allow"] == methods, path
            wire.send(get(path, "Content-Length: 0", method="DELETE"))
            status, headers, _ = await wire.answer()
            assert status == 405
            assert headers["allow"] == methods, path
        wire.send(get("/nowhere", method="OPTIONS"))
        assert (await wire.answer())[0] == 404
        wire.send(get("*", method="OPTIONS"))
        status, headers, _ = await wire.answer()
        assert (status, headers["allow"]) == (204, "GET, HEAD, OPTIONS, POST")
        wire.close()


async def test_the_root_leads_to_the_status_page_and_an_unknown_model_to_the_known(folder: Path) -> None:
    async with served(folder) as (router, _):
        wire = await Wire.open(router)
        wire.send(get("/"))
        status, headers, _ = await wire.answer()
        assert (status, headers["location"]) == (307, "/status")
        wire.send(get("/v1/models/nope"))
        status, _, body = await wire.answer()
        assert status == 404
        assert json.loads(body)["error"]["message"] == "the model 'nope' does not exist; this server has 'tiny'"
        wire.close()
