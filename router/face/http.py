"""The OpenAI face of the router: routes, bodies, streams and errors over HTTP.

Requests that generate are served as plain ASGI: a framework's routing, dependencies and exit stacks cost more time and
memory per request than the router's own work. All other routes use FastAPI.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, RedirectResponse, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import Receive, Scope, Send

from baton import __version__, errors
from baton.errors import quoted, shortened
from baton.metrics import Metrics, exposition
from baton.metrics_server import CONTENT_TYPE
from baton.types import MAX_SLO_S, Slo
from router.api.answer import Answer
from router.api.endpoint import Asked, Computation, Endpoint
from router.api.whole import WholeAnswer
from router.clients import authorization_of, client_of
from router.config import RouterConfig
from router.dispatch.dispatcher import Dispatcher
from router.face import http_errors
from router.face.body import SMALL_BODY_BYTES, BodyReader, check_structure
from router.face.openapi import document
from router.frontend.frontend import Frontend
from router.frontend.request import Caller
from router.frontend.resume import resume_of
from router.messages.response import count as messages_count
from router.messages.response import endpoint as messages_endpoint
from router.observe.status import StatusPage
from router.openai import embeddings as openai_embeddings
from router.openai import response as openai_response
from router.openai.neutral import UnknownFields
from router.openai.request import ChatBody, CompletionBody
from router.openai.tokenize import detokenize, tokenize
from router.responses.endpoint import endpoint as responses_endpoint
from router.responses.store import StoredResponses

_Read = TypeVar("_Read")
_log = logging.getLogger("baton.router.http")

_HTTP_ERRORS = {404: "not_found", 405: "method_not_allowed"}
_TRACE_HEADERS = (b"traceparent", b"tracestate")
# W3C Trace Context requires at least 512 characters of tracestate.
_MAX_TRACE_BYTES = 512
# Milliseconds, as inference gateways send them.
_SLO_HEADERS = {b"x-slo-ttft-ms": "ttft_s", b"x-slo-tpot-ms": "tbt_s"}
# Paths whose streams a client can go on with after it has lost its router.
_RESUMABLE = ("/v1/chat/completions", "/v1/completions")
_MILLISECONDS = re.compile(rb"\d{1,9}(\.\d{1,9})?")


class HttpFace:
    """The ASGI application."""

    def __init__(
        self, frontend: Frontend, dispatcher: Dispatcher, config: RouterConfig, metrics: Metrics, page: StatusPage
    ) -> None:
        self._frontend = frontend
        self._limits = config.limits
        self._has_keys = bool(config.api_keys)
        self._bodies = BodyReader(config.limits, lambda: frontend.prompts.max_request_bytes)
        unknown = UnknownFields(ignores=config.ignore_unknown_fields)
        self._endpoints = {
            "/v1/completions": openai_response.endpoint(CompletionBody, frontend.tokenizer, unknown),
            "/v1/chat/completions": openai_response.endpoint(ChatBody, frontend.tokenizer, unknown),
            "/v1/messages": messages_endpoint(frontend, unknown),
            "/v1/embeddings": openai_embeddings.endpoint(unknown),
        }
        store = StoredResponses(config.store, dispatcher.clock, has_clients=self._has_keys)
        self._endpoints["/v1/responses"] = responses_endpoint(frontend, unknown, store)
        self._computations = {
            "/v1/messages/count_tokens": messages_count(frontend, unknown),
            "/tokenize": tokenize(frontend, unknown),
            "/detokenize": detokenize(frontend, unknown),
        }
        posts = [*self._endpoints, *self._computations]
        self._others = _build_others(frontend, dispatcher, metrics, page, posts)
        stored = _StoredRoutes(store, self._client_of)
        path = "/v1/responses/{response_id}"
        self._others.add_api_route(path, stored.get, methods=["GET", "HEAD"], response_model=None)
        self._others.add_api_route(path, stored.delete, methods=["DELETE"], response_model=None)
        _describe(self._others)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_http = scope["type"] == "http"
        if is_http and scope["method"] == "POST" and (endpoint := self._endpoints.get(scope["path"])):
            await self._generate(endpoint, scope, receive, send)
        elif is_http and scope["method"] == "POST" and (computation := self._computations.get(scope["path"])):
            await self._compute(computation, scope, receive, send)
        elif is_http and scope["method"] == "OPTIONS" and (allowed := _allowed(self._others, scope)):
            await Response(status_code=204, headers={"allow": allowed})(scope, receive, send)
        else:
            await self._others(scope, receive, send)

    def _client_of(self, scope: Scope) -> str:
        address = scope["client"][0] if scope["client"] else ""
        return client_of(address, authorization_of(scope), has_keys=self._has_keys)

    async def _generate(self, endpoint: Endpoint, scope: Scope, receive: Receive, send: Send) -> None:
        stream: _EventStream | None = None
        try:
            async with self._bodies.read(scope, receive) as raw:
                asked = await self._parsed(endpoint, scope, raw)
                request = replace(asked.request, slo=_slo_of(scope), **self._resume_of(scope, asked))
                # As in vLLM, the header has priority over the body's.
                request_id = "" if request.resume is None else request.resume.request_id
                request_id = request_id or _header(scope, b"x-request-id") or request.request_id
                accepted = await self._frontend.start(replace(request, request_id=request_id))
                answer = Answer(self._frontend, asked.form(accepted), accepted)
            wants_stream = asked.wants_stream
            # Else they would live as long as the stream.
            del raw, asked, request, accepted
            leaver = asyncio.create_task(self._cancel_when_left(receive, answer))
            try:
                if wants_stream:
                    stream = _EventStream(answer, send)
                    await stream.run()
                else:
                    await self._send_whole(answer, await answer.whole(), send)
            finally:
                leaver.cancel()
                await answer.close()
        except errors.BatonError as error:
            await _error_response(error, scope["path"])(scope, receive, send)
        except Exception as error:
            if stream is not None and stream.has_begun:
                raise  # the server logs it and closes the connection, so that the client does not take this for the end
            await _defect_response(error, scope["path"])(scope, receive, send)

    def _resume_of(self, scope: Scope, asked: Asked) -> dict[str, Any]:
        """Whether the stream's events have ids, and what the client has of it. Raises InvalidRequest."""
        last, wanted = _header(scope, b"last-event-id"), _header(scope, b"x-baton-resumable")
        if wanted not in ("", "true", "false"):
            raise errors.InvalidRequest(
                f"the header x-baton-resumable is {quoted(wanted)}, expected true or false", param="x-baton-resumable"
            )
        if not last and wanted != "true":
            return {}
        if scope["path"] not in _RESUMABLE or not asked.wants_stream:
            param = "last-event-id" if last else "x-baton-resumable"
            expected = f"expected a stream of {' or '.join(_RESUMABLE)}"
            raise errors.InvalidRequest(f"the header {param} is given, {expected}", param=param)
        return {"resume": resume_of(last) if last else None, "has_event_ids": True}

    async def _compute(self, computation: Computation, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with self._bodies.read(scope, receive) as raw:
                compute = await self._parsed(computation, scope, raw)
                response = Response(await compute(), media_type="application/json")
        except errors.BatonError as error:
            response = _error_response(error, scope["path"])
        except Exception as error:
            response = _defect_response(error, scope["path"])
        await response(scope, receive, send)

    async def _cancel_when_left(self, receive: Receive, answer: Answer) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        # Hundreds of clients may leave at once.
        await self._frontend.turns.wait()
        answer.cancel()

    async def _send_whole(self, answer: Answer, whole: WholeAnswer, send: Send) -> None:
        headers = [
            (b"content-length", str(whole.num_bytes).encode()),
            (b"content-type", b"application/json"),
            (b"x-request-id", answer.request_id.encode("latin-1")),
            (b"x-baton-relay", answer.relay_line().encode("latin-1")),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        num_left = whole.num_bytes
        for piece in whole.pieces():
            await self._frontend.turns.wait()
            num_left -= len(piece)
            await send({"type": "http.response.body", "body": piece, "more_body": num_left > 0})

    async def _parsed(self, read: Callable[[bytes, Caller], _Read], scope: Scope, content: bytes) -> _Read:
        caller = Caller(self._client_of(scope), **_trace_of(scope))

        def work() -> _Read:
            if len(content) > SMALL_BODY_BYTES:
                check_structure(content, self._limits, self._frontend.model.max_tokens)
            return read(content, caller)

        if len(content) > SMALL_BODY_BYTES:
            return await self._frontend.offload.run(work)
        await self._frontend.turns.wait()
        return work()


def _trace_of(scope: Scope) -> dict[str, str]:
    """The caller's trace context, if it sent one."""
    found = {n: v for n, v in scope["headers"] if n in _TRACE_HEADERS and len(v) <= _MAX_TRACE_BYTES}
    if b"traceparent" not in found:
        return {}
    return {name.decode(): value.decode("latin-1") for name, value in found.items()}


def _header(scope: Scope, wanted: bytes) -> str:
    """The first of that name; empty if there is none."""
    return next((value.decode("latin-1") for name, value in scope["headers"] if name == wanted), "")


def _slo_of(scope: Scope) -> Slo:
    """The objectives in the request's head. Raises InvalidRequest with the header's name."""
    found: dict[str, float] = {}
    for name, value in scope["headers"]:
        if name in _SLO_HEADERS:
            header = name.decode()
            if _SLO_HEADERS[name] in found:
                raise errors.InvalidRequest(f"the header {header} is given twice, expected once", param=header)
            ms = float(value) if _MILLISECONDS.fullmatch(value) else 0.0
            if not 0 < ms <= MAX_SLO_S * 1e3:
                expected = f"milliseconds, more than 0 and at most {MAX_SLO_S * 1e3:g}"
                said = quoted(value.decode("latin-1"))
                raise errors.InvalidRequest(f"the header {header} is {said}, expected {expected}", param=header)
            found[_SLO_HEADERS[name]] = ms / 1e3
    return Slo(**found)


class _EventStream:
    """Writes an answer as server-sent events. If a client stops reading, the server closes it and sends
    `http.disconnect`."""

    __slots__ = ("_answer", "_send", "has_begun")

    def __init__(self, answer: Answer, send: Send) -> None:
        self._answer = answer
        self._send = send
        self.has_begun = False

    async def run(self) -> None:
        """Raises an error of the answer only while the response has no status line yet."""
        # The status line is sent with the first token.
        event = await self._answer.next()
        self.has_begun = True
        headers = [
            (b"cache-control", b"no-cache"),
            (b"x-request-id", self._answer.request_id.encode("latin-1")),
            (b"content-type", b"text/event-stream; charset=utf-8"),
        ]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        answer = self._answer
        try:
            while not answer.is_over:
                await self._write(event, is_last=False)
                event = await answer.next()
        except errors.BatonError as error:
            event = answer.failed(error)
        # The last event and the end of the body are sent together.
        await self._write(event, is_last=True)

    async def _write(self, event: bytes, *, is_last: bool) -> None:
        await self._send({"type": "http.response.body", "body": event, "more_body": not is_last})


def _allowed(app: FastAPI, scope: Scope) -> str:
    """The methods of a path, as an Allow header; empty if there is no such path."""
    if scope["path"] == "*":  # the server as a whole
        return "GET, HEAD, OPTIONS, POST"
    if scope["path"] in app.state.posts:
        return "OPTIONS, POST"
    found = [route for route in app.routes if route.matches(scope)[0] is not Match.NONE]
    methods = {name for route in found for name in getattr(route, "methods", ())}
    return ", ".join(sorted(methods | {"OPTIONS"})) if found else ""


def _build_others(
    frontend: Frontend, dispatcher: Dispatcher, metrics: Metrics, page: StatusPage, posts: Sequence[str]
) -> FastAPI:
    app = FastAPI(title="Baton", openapi_url=None, docs_url=None, redoc_url=None)
    app.state.posts = posts
    routes = _Routes(frontend, dispatcher, metrics)
    for path in posts:
        app.add_api_route(path, routes.only_post, methods=["GET", "HEAD", "PUT", "PATCH", "DELETE"])
    answers: dict[str, Callable[..., Awaitable[Response]]] = {
        "/": routes.root, "/health": routes.health, "/ready": routes.ready, "/metrics": routes.metrics,
        "/metrics/targets": routes.metrics_targets, "/version": routes.version, "/v1/models": routes.models,
        "/v1/models/{name:path}": routes.model,
    }  # fmt: skip
    for path, answer in answers.items():
        app.add_api_route(path, answer, methods=["GET", "HEAD"], response_model=None)
    # As SageMaker asks.
    app.add_api_route("/ping", routes.health, methods=["GET", "HEAD", "POST"], response_model=None)
    page.add_to(app)
    app.add_exception_handler(errors.BatonError, _on_baton_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_defect)
    return app


def _describe(app: FastAPI) -> None:
    """Serve the document of all paths that are there."""
    others: dict[str, set[str]] = {"/openapi.json": {"GET"}}
    for route in app.routes:
        if isinstance(route, APIRoute) and route.path not in app.state.posts:
            others.setdefault(route.path, set()).update(route.methods or ())
    content = json.dumps(document(app.state.posts, others)).encode()

    async def serve() -> Response:
        return Response(content, media_type="application/json")

    app.add_api_route("/openapi.json", serve, methods=["GET", "HEAD"], response_model=None)


class _Routes:
    """The routes that do not generate."""

    def __init__(self, frontend: Frontend, dispatcher: Dispatcher, metrics: Metrics) -> None:
        self._frontend = frontend
        self._dispatcher = dispatcher
        self._metrics = metrics
        self._started_s = int(time.time())

    async def only_post(self) -> Response:
        raise HTTPException(405)

    async def root(self) -> Response:
        """For a browser at the bare address: redirects to the status page."""
        return RedirectResponse("/status")

    async def models(self) -> Response:
        return JSONResponse({"object": "list", "data": [self._model_card(n) for n in self._frontend.model.names]})

    async def model(self, name: str) -> Response:
        self._frontend.model.check_name(name)
        return JSONResponse(self._model_card(name))

    def _model_card(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._started_s,
            "owned_by": "baton",
            "max_model_len": self._frontend.model.max_tokens,
            # Of requests that say nothing: what generation_config.json says, in the API's names.
            "default_sampling_params": self._frontend.model.stated_sampling,
        }

    async def version(self) -> Response:
        return JSONResponse({"version": __version__})

    async def health(self) -> Response:
        """The process is alive and its event loop runs; independent of nodes."""
        return JSONResponse({"status": "ok"})

    async def ready(self) -> Response:
        nodes = {x.node.node_id if x.node else x.address: x.state.value for x in self._dispatcher.nodes.members}
        is_ready = self._dispatcher.is_ready
        return JSONResponse(
            {"status": "ready" if is_ready else "not ready", "nodes": nodes}, status_code=200 if is_ready else 503
        )

    async def metrics(self) -> Response:
        return Response(exposition(self._metrics), media_type=CONTENT_TYPE)

    async def metrics_targets(self) -> Response:
        """The workers' metrics ports in the format of Prometheus' http_sd.

        Lost nodes stay in the list while they are members, so that their absence raises an alert; nodes that left in
        order are removed.
        """
        members = [m for m in self._dispatcher.nodes.members if m.is_up or not (m.status and m.status.draining)]
        addresses = [m.node.metrics_address for m in members if m.node is not None]
        return JSONResponse([{"targets": [address]} for address in addresses if address])


class _StoredRoutes:
    """The routes of responses that are kept."""

    def __init__(self, store: StoredResponses, client_of: Callable[[Scope], str]) -> None:
        self._store = store
        self._client_of = client_of

    async def get(self, request: Request, response_id: str) -> Response:
        if request.query_params.get("stream") == "true":
            raise errors.InvalidRequest("stream is true, expected false: the response has ended", param="stream")
        content = self._store.content(self._client_of(request.scope), response_id)
        return Response(content, media_type="application/json")

    async def delete(self, request: Request, response_id: str) -> Response:
        self._store.delete(self._client_of(request.scope), response_id)
        return JSONResponse({"id": response_id, "object": "response", "deleted": True})


def _error_response(error: errors.BatonError, path: str) -> Response:
    headers = {} if error.retry_after_s is None else {"retry-after": str(max(1, math.ceil(error.retry_after_s)))}
    return JSONResponse(http_errors.body_of(error, path), status_code=error.http_status, headers=headers)


def _defect_response(error: Exception, path: str) -> Response:
    _log.error("defect while serving %s", shortened(path, 80), exc_info=error)
    return _error_response(errors.InternalError(errors.described(error)), path)


async def _on_baton_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, errors.BatonError)
    return _error_response(error, request.url.path)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{shortened(request.method, 20)} {shortened(request.url.path, 80)}: {error.detail}"
    code = _HTTP_ERRORS.get(error.status_code)
    body = http_errors.body_of_status(error.status_code, message, code, request.url.path)
    headers = {name.lower(): value for name, value in (error.headers or {}).items()}
    if error.status_code == 405:
        headers["allow"] = _allowed(request.app, request.scope)
    return JSONResponse(body, status_code=error.status_code, headers=headers)


async def _on_defect(request: Request, error: Exception) -> Response:
    return _defect_response(error, request.url.path)
