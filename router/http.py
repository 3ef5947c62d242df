"""The OpenAI face: routes, bodies, streams and errors over HTTP. What they say is decided elsewhere."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from baton import errors
from router.config import RouterConfig
from router.dispatch import Dispatcher
from router.frontend import Accepted, Ending, Frontend, GenerationRequest, Part
from router.openai_request import ChatBody, CompletionBody, parse
from router.openai_response import (
    DONE,
    ChoiceWriter,
    Envelope,
    LogprobWriter,
    error_body,
    error_event,
    relay_json,
    usage,
)

_log = logging.getLogger("baton.router.http")

_HTTP_ERRORS = {404: "not_found", 405: "method_not_allowed"}


class Answer:
    """One admitted request on its way to an HTTP client: all of its choices, in either shape."""

    def __init__(
        self, frontend: Frontend, body: CompletionBody | ChatBody, request: GenerationRequest, accepted: Accepted
    ):
        self._accepted = accepted
        # Not the body itself: it would live as long as the stream.
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
        self._echoes = _echoes(frontend, body, request, accepted)
        self._endings: dict[int, Ending] = {}
        self._writers = [
            ChoiceWriter(
                envelope=self._envelope,
                index=i,
                logprobs=None if request.sampling.logprobs is None else LogprobWriter(
                    frontend.tokenizer, is_chat=is_chat, as_ids=bool(body.return_tokens_as_token_ids),
                    start_offset=len(self._echoes[i]),
                ),
                token_ids=bool(body.return_token_ids),
                prompt_token_ids=generation.prompt_token_ids,
            )
            for i, generation in enumerate(accepted.generations)
        ]  # fmt: skip

    @property
    def request_id(self) -> str:
        return self._accepted.request_id

    def cancel(self) -> None:
        self._accepted.cancel("the client left")

    async def whole(self) -> dict[str, Any]:
        """Wait for all choices; raises the first error."""
        generations = self._accepted.generations
        if len(generations) == 1:
            choices = [await self._whole_choice(0)]
        else:
            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(self._whole_choice(i)) for i in range(len(generations))]
            except* errors.BatonError as failed:
                raise failed.exceptions[0] from None
            choices = [t.result() for t in tasks]
        return self._envelope.whole(choices, {"usage": self._usage(), **self._extras()})

    def relay_line(self) -> str:
        return self._endings[0].relay.line()

    async def _whole_choice(self, index: int) -> dict[str, Any]:
        generation = self._accepted.generations[index]
        parts: list[Part] = []
        while True:
            part = await generation.next()
            if isinstance(part, Ending):
                self._endings[index] = part
                return self._writers[index].whole(parts, part, self._echoes[index])
            parts.append(part)

    async def events(self) -> AsyncIterator[bytes]:
        """Server-sent events. Raises an error of the sequence; what was yielded before stands."""
        if len(self._accepted.generations) == 1:
            async for text in self._choice_events(0):
                # The last chunk, usage and the end leave in one write.
                yield text.encode() + (self._closing() if self._endings else b"")
        else:
            async for text in self._merged_events():
                yield text.encode()
            yield self._closing()

    def _closing(self) -> bytes:
        extra = self._extras()
        if self._wants_usage:
            extra["usage"] = self._usage()
        return (self._envelope.last_chunk(extra).encode() if extra else b"") + DONE

    async def _choice_events(self, index: int) -> AsyncIterator[str]:
        generation, writer = self._accepted.generations[index], self._writers[index]
        opening = None
        while True:
            part = await generation.next()
            if opening is None:
                opening = writer.begin(self._echoes[index])
            if isinstance(part, Ending):
                self._endings[index] = part
                yield opening + writer.end(part)
                return
            text = writer.chunk(part) if part.text or part.token_ids else ""
            ending = generation.ending
            if ending is not None:
                self._endings[index] = ending
                yield opening + text + writer.end(ending)
                return
            if opening or text:
                yield opening + text
            opening = ""

    async def _merged_events(self) -> AsyncIterator[str]:
        """Several choices, each read by a task of its own; the queue holds them back to the client's pace."""
        count = len(self._accepted.generations)
        queue: asyncio.Queue[str | errors.BatonError | None] = asyncio.Queue(count)

        async def read(index: int) -> None:
            try:
                async for text in self._choice_events(index):
                    await queue.put(text)
                await queue.put(None)
            except errors.BatonError as error:
                await queue.put(error)

        tasks = [asyncio.create_task(read(i)) for i in range(count)]
        try:
            while count:
                item = await queue.get()
                if item is None:
                    count -= 1
                elif isinstance(item, errors.BatonError):
                    raise item
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    def _usage(self) -> dict[str, Any]:
        """Prompts count once, however many choices they have."""
        firsts = self._accepted.generations[:: self._n]
        num_prompt = sum(len(g.prompt_token_ids) for g in firsts)
        num_cached = sum(self._endings[i].num_cached_tokens for i in range(0, len(self._endings), self._n))
        return usage(num_prompt, [self._endings[i] for i in sorted(self._endings)], num_cached)

    def _extras(self) -> dict[str, Any]:
        extra: dict[str, Any] = {}
        if self._wants_ids and self._envelope.is_chat:
            extra["prompt_token_ids"] = self._accepted.generations[0].prompt_token_ids
        if self._wants_relay:
            relays = [relay_json(self._endings[i].relay) for i in sorted(self._endings)]
            extra["baton"] = {"request_id": self.request_id, "relay": relays[0], "relays": relays}
        return extra


class EventStream(Response):
    """Streams an answer, whose first event is there already; a client that leaves or stops reading cancels it."""

    media_type = "text/event-stream"

    def __init__(self, first: bytes, events: AsyncIterator[bytes], answer: Answer, write_timeout_s: float) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-request-id": answer.request_id})
        del self.headers["content-length"]
        self._first = first
        self._events = events
        self._answer = answer
        self._write_timeout_s = write_timeout_s
        # When the write that is under way began. Looked at now and then: a timer per write cost 10 us a token.
        self._writing_since_s: float | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writer = asyncio.create_task(self._write(send))
        leaver = asyncio.create_task(_left(receive))
        self._watch = asyncio.get_running_loop().call_later(self._write_timeout_s / 2, self._check, writer)
        try:
            await asyncio.wait([writer, leaver], return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._watch.cancel()
            self._answer.cancel()
            writer.cancel()
            leaver.cancel()
            results = await asyncio.gather(writer, leaver, return_exceptions=True)
        if isinstance(results[0], Exception):
            raise results[0]

    def _check(self, writer: asyncio.Task[None]) -> None:
        loop = asyncio.get_running_loop()
        since_s = self._writing_since_s
        if since_s is not None and loop.time() - since_s > self._write_timeout_s:
            _log.warning("%s: the client took nothing for %.0f s", self._answer.request_id, self._write_timeout_s)
            writer.cancel()
            return
        self._watch = loop.call_later(self._write_timeout_s / 2, self._check, writer)

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            is_open = await self._send(send, self._first)
            if is_open:
                async for event in self._events:
                    is_open = await self._send(send, event)
        except errors.BatonError as error:
            await self._send(send, error_event(error))
        if is_open:
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, body: bytes) -> bool:
        """Whether more may follow; the last event leaves together with the end of the body."""
        more = not body.endswith(DONE)
        self._writing_since_s = asyncio.get_running_loop().time()
        await send({"type": "http.response.body", "body": body, "more_body": more})
        self._writing_since_s = None
        return more


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def build_app(
    frontend: Frontend, dispatcher: Dispatcher, config: RouterConfig, registry: CollectorRegistry
) -> FastAPI:  # fmt: skip
    app = FastAPI(title="Baton", openapi_url=None, docs_url=None, redoc_url=None)
    face = _Face(frontend, dispatcher, config, registry)
    app.add_api_route("/v1/completions", face.completions, methods=["POST"], response_model=None)
    app.add_api_route("/v1/chat/completions", face.chat, methods=["POST"], response_model=None)
    app.add_api_route("/v1/models", face.models, methods=["GET"], response_model=None)
    app.add_api_route("/v1/models/{name:path}", face.model, methods=["GET"], response_model=None)
    app.add_api_route("/health", face.health, methods=["GET"], response_model=None)
    app.add_api_route("/ready", face.ready, methods=["GET"], response_model=None)
    app.add_api_route("/metrics", face.metrics, methods=["GET"], response_model=None)
    app.add_exception_handler(errors.BatonError, _on_baton_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_defect)
    return app


class _Face:
    def __init__(
        self, frontend: Frontend, dispatcher: Dispatcher, config: RouterConfig, registry: CollectorRegistry
    ) -> None:
        self._frontend = frontend
        self._dispatcher = dispatcher
        self._config = config
        self._registry = registry
        self._started_s = int(time.time())

    async def completions(self, request: Request) -> Response:
        body = parse(CompletionBody, await self._read(request))
        return await self._answer(request, body, body.request())

    async def chat(self, request: Request) -> Response:
        body = parse(ChatBody, await self._read(request))
        prompt = self._frontend.chat_prompt(
            body.flat_messages(),
            add_generation_prompt=body.add_generation_prompt is not False,
            variables=body.chat_template_kwargs,
        )
        return await self._answer(request, body, body.request(prompt))

    async def _answer(
        self, http: Request, body: CompletionBody | ChatBody, request: GenerationRequest
    ) -> Response:  # fmt: skip
        answer = Answer(self._frontend, body, request, await self._frontend.start(request))
        if body.stream:
            events = answer.events()
            # The status line waits for the first token: until then an error can still have a status of its own.
            first = await _unless_left(http, answer, lambda: anext(events))
            return EventStream(first, events, answer, self._config.limits.write_timeout_s)
        content = await _unless_left(http, answer, answer.whole)
        headers = {"x-request-id": answer.request_id, "x-baton-relay": answer.relay_line()}
        return JSONResponse(content, headers=headers)

    async def _read(self, request: Request) -> bytes:
        limit = self._config.limits.max_body_bytes
        declared = request.headers.get("content-length", "0")
        if declared.isdigit() and int(declared) > limit:
            raise _TooLarge(limit)
        chunks: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._config.limits.write_timeout_s):
                async for chunk in request.stream():
                    size += len(chunk)
                    if size > limit:
                        raise _TooLarge(limit)
                    chunks.append(chunk)
        except TimeoutError:
            raise errors.DeadlineExceeded("the request's body did not arrive in time") from None
        return b"".join(chunks)

    async def models(self) -> Response:
        names = [self._frontend.model_name] if self._frontend.model_name else []
        return JSONResponse({"object": "list", "data": [self._model_card(n) for n in names]})

    async def model(self, name: str) -> Response:
        if name != self._frontend.model_name:
            raise errors.UnknownModel(f"the model {name!r} does not exist", param="model")
        return JSONResponse(self._model_card(name))

    def _model_card(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._started_s,
            "owned_by": "baton",
            "max_model_len": self._frontend.max_model_tokens,
        }

    async def health(self) -> Response:
        """The process is alive and its loop turns; says nothing about nodes."""
        return JSONResponse({"status": "ok"})

    async def ready(self) -> Response:
        nodes = {x.node.node_id if x.node else x.address: x.state.value for x in self._dispatcher.members}
        is_ready = self._dispatcher.is_ready
        return JSONResponse(
            {"status": "ready" if is_ready else "not ready", "nodes": nodes}, status_code=200 if is_ready else 503
        )

    async def metrics(self) -> Response:
        return PlainTextResponse(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)


class _TooLarge(errors.InvalidRequest):
    http_status = 413

    def __init__(self, limit: int) -> None:
        super().__init__(f"the body is larger than {limit} bytes")

    @property
    def code(self) -> str:
        return "RequestTooLarge"


async def _unless_left(http: Request, answer: Answer, wait_for: Callable[[], Awaitable[Any]]) -> Any:
    """Await, but cancel the answer as soon as the client is gone."""
    waiting = asyncio.ensure_future(wait_for())
    leaver = asyncio.create_task(_left(http.receive))
    try:
        await asyncio.wait([waiting, leaver], return_when=asyncio.FIRST_COMPLETED)
        if waiting.done():
            return waiting.result()
        raise errors.Cancelled("the client left")
    except BaseException:
        answer.cancel()
        raise
    finally:
        for task in (waiting, leaver):
            task.cancel()
        await asyncio.gather(waiting, leaver, return_exceptions=True)


def _echoes(
    frontend: Frontend, body: CompletionBody | ChatBody, request: GenerationRequest, accepted: Accepted
) -> list[str]:
    """The prompt's text before each choice, where it was asked for."""
    if not isinstance(body, CompletionBody) or not body.echo:
        return [""] * len(accepted.generations)

    def text(prompt: str | tuple[int, ...]) -> str:
        if isinstance(prompt, str) or frontend.tokenizer is None:
            return prompt if isinstance(prompt, str) else ""
        return frontend.tokenizer.decode(prompt, skip_special_tokens=request.skip_special_tokens)

    texts = [text(p) for p in request.prompts]
    return [texts[i // request.n] for i in range(len(accepted.generations))]


async def _on_baton_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, errors.BatonError)
    headers = {} if error.retry_after_s is None else {"retry-after": str(max(1, round(error.retry_after_s)))}
    return JSONResponse(error_body(error), status_code=error.http_status, headers=headers)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    code = _HTTP_ERRORS.get(error.status_code)
    body = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}
    return JSONResponse(body, status_code=error.status_code, headers=error.headers)


async def _on_defect(request: Request, error: Exception) -> Response:
    _log.error("defect while serving %s", request.url.path, exc_info=error)
    return JSONResponse(error_body(errors.InternalError(f"{type(error).__name__}: {error}")), status_code=500)
