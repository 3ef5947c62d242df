"""Wire the router together and run it until it is told to stop. The one place where its parts meet."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import random
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import uvicorn
from starlette.types import ASGIApp

from baton import errors
from baton.clock import MonotonicClock
from baton.metrics import Metrics, add_process
from baton.registry import Registry
from router.config import RouterConfig
from router.dispatch import Dispatcher
from router.frontend import Frontend
from router.history import History
from router.http import HttpFace
from router.keys import ApiKeys, HttpGuard
from router.membership import State
from router.metrics import RouterMetrics
from router.registry import RegistryWatch
from router.router import GrpcFace
from router.sessions import NodeLink, hello
from router.spans import Spans
from router.status import StatusPage
from router.tokenizer import ModelFacts, Tokenizer, load_facts

_log = logging.getLogger("baton.router")


@dataclass(frozen=True, slots=True)
class Router:
    """A running router. ``http`` is a base URL, ``grpc`` a host:port; None where that face is off."""

    http: str | None
    grpc: str | None
    dispatcher: Dispatcher
    frontend: Frontend
    status: StatusPage


async def serve(config: RouterConfig, stop: asyncio.Event | None = None) -> None:
    """Run until ``stop`` is set (or the task is cancelled), then drain and leave nothing behind."""
    async with running(config) as router, asyncio.TaskGroup() as group:
        # What exists now stays: looking through it for garbage stopped every stream for 20 to 30 ms, again and again.
        gc.collect()
        gc.freeze()
        writer = group.create_task(_write_ready_file(config, router))
        try:
            await (stop or asyncio.Event()).wait()
        finally:
            writer.cancel()


@asynccontextmanager
async def running(config: RouterConfig, spans: Spans | None = None) -> AsyncIterator[Router]:
    """A router for the length of the block. Raises BadConfig if it cannot start."""
    if spans is None and config.otel:
        spans = Spans(config.router_id)
    folder = config.model_folder
    tokenizer = None if folder is None else await asyncio.to_thread(Tokenizer.load, folder)
    facts = ModelFacts() if folder is None else load_facts(folder)
    metrics = Metrics({"cluster": config.cluster_name, "model_name": lambda: frontend.model_name})
    add_process(metrics, "router")
    counted = RouterMetrics(metrics, has_vllm_names=config.vllm_metrics)
    clock = MonotonicClock()
    greeting = hello(config.router_id, time.time_ns())
    dispatcher = Dispatcher(
        config,
        clock,
        lambda address, events: NodeLink(address, events, greeting, config.link),
        counted,
    )
    counted.add_state(dispatcher.phases, lambda: list(dispatcher.members), lambda: dispatcher.is_ready)
    name = config.model_name or (folder.resolve().name if folder is not None else None)
    frontend = Frontend(
        dispatcher, tokenizer=tokenizer, facts=facts, model_name=name, limits=config.limits,
        rng=random.SystemRandom(),
    )  # fmt: skip
    history = History(dispatcher)
    if spans is not None:
        dispatcher.watch_ends(spans.on_ended)
    page = StatusPage(frontend, dispatcher, history, config.router_id)
    grpc_face = GrpcFace(frontend, dispatcher, config, history) if config.grpc_port is not None else None
    app: ASGIApp = HttpFace(frontend, dispatcher, config, metrics, page)
    if keys := ApiKeys(config.api_keys):
        app = HttpGuard(app, keys)
    http_server = _HttpServer(app, config)
    watch = None
    if config.registry is not None:
        watch = RegistryWatch(Registry(config.registry), dispatcher.on_listing, config.watch, clock)
    try:
        dispatcher.start()
        if watch is not None:
            await watch.start()
        grpc_address = await grpc_face.start() if grpc_face is not None else None
        http_address = await http_server.start() if config.http_port is not None else None
        _log.info("router %s serves http %s grpc %s", config.router_id, http_address, grpc_address)
        yield Router(http_address, grpc_address, dispatcher, frontend, page)
    finally:
        if watch is not None:
            await watch.close()
        # Streams end first (well or with an error), then the faces have nothing left to wait for.
        await dispatcher.close(config.limits.drain_s)
        await http_server.stop()
        if grpc_face is not None:
            await grpc_face.stop()
        if spans is not None:
            await spans.close()


async def _write_ready_file(config: RouterConfig, router: Router) -> None:
    if config.ready_file is None:
        return
    if config.ready_needs_nodes:
        await _all_up(router.dispatcher)
    facts = {"http": router.http, "grpc": router.grpc, "pid": os.getpid()}
    partial = config.ready_file.with_name(config.ready_file.name + ".partial")
    partial.write_text(json.dumps(facts) + "\n")
    partial.replace(config.ready_file)  # never half a file


async def _all_up(dispatcher: Dispatcher) -> None:
    changed = asyncio.Event()
    dispatcher.watch(changed.set)
    while not all(x.state is State.READY for x in dispatcher.members):
        changed.clear()
        await changed.wait()


def listen(host: str, port: int) -> socket.socket:
    """A socket for the HTTP face. Raises BadConfig if the address is taken or not ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named, asyncio sets TCP_NODELAY on what it accepts. Without, the first token of a second request
    # on a connection waited 40 ms for the client's delayed ACK of the response head.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise errors.BadConfig(f"cannot listen on {host}:{port}: {error}", param="http_port") from error
    return listener


class _HttpServer:
    """uvicorn on this event loop, on a socket bound here, without its signal handlers."""

    def __init__(self, app: ASGIApp, config: RouterConfig) -> None:
        self._host = config.http_host
        self._port = config.http_port
        self._server = uvicorn.Server(
            uvicorn.Config(
                app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=2,
                timeout_keep_alive=30, server_header=False, interface="asgi3", ws="none", proxy_headers=False,
            )
        )  # fmt: skip
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> str:
        assert self._port is not None
        listener = listen(self._host, self._port)
        port = listener.getsockname()[1]
        # `_serve` is what `serve` runs inside its signal handling, which belongs to the process, not to us.
        self._task = asyncio.create_task(self._server._serve([listener]), name="http")  # noqa: SLF001
        host = f"[{self._host}]" if listener.family is socket.AF_INET6 else self._host
        return f"http://{host}:{port}"

    async def stop(self) -> None:
        if self._task is not None:
            self._server.should_exit = True
            await self._task
