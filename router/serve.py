"""Builds the router from its parts and runs it until it is told to stop."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from baton import descriptors
from baton.clock import MonotonicClock
from baton.defects import Defects
from baton.errors import BadConfig, quoted
from baton.faults.faults import Faults
from baton.files import is_there
from baton.guard import Refusals
from baton.metrics import Metrics, add_process
from baton.ready import write_json_atomically
from baton.registry import Registry
from baton.tls import face_files
from baton.types import SamplingParams
from router.cluster.membership import State
from router.config import LimitsConfig, RouterConfig
from router.dispatch.dispatcher import Dispatcher
from router.face.grpc import GrpcFace
from router.face.http import HttpFace
from router.face.http_connection import ConnectionLimits
from router.face.http_server import HttpServer
from router.face.keys import HttpGuard, Keys
from router.frontend.frontend import Frontend
from router.grammar.check import GrammarCheck
from router.metrics import RouterMetrics
from router.nodes.registry import RegistryWatch
from router.nodes.sessions import NodeLink, hello
from router.observe.history import History
from router.observe.spans import Spans
from router.observe.status import StatusPage
from router.text.model_files import ModelFacts, load_facts, stated
from router.text.tokenizer import TOKENIZER_FILE, Tokenizer

_log = logging.getLogger("baton.router")
# Full garbage collections run a twentieth as often as by default: with 8,192 sequences in flight one takes 80 ms. A
# request leaves no cyclic garbage; other garbage waits for it, at most 100 MB.
_GC_THRESHOLDS = (700, 10, 200)
# Of answers, which pages of other origins may read.
_EXPOSED_HEADERS = ("retry-after", "x-baton-relay", "x-request-id")


@dataclass(frozen=True, slots=True)
class Router:
    """A running router. ``http`` is a base URL, ``grpc`` a host:port; None where that face is off."""

    http: str | None
    grpc: str | None
    dispatcher: Dispatcher
    frontend: Frontend
    status: StatusPage
    metrics: RouterMetrics


async def serve(config: RouterConfig, stop: asyncio.Event | None = None) -> None:
    """Run until ``stop`` is set (or the task is cancelled), then drain and release everything."""
    descriptors.raise_limit()
    descriptors.say_less_of_accept(asyncio.get_running_loop())
    async with running(config) as router, asyncio.TaskGroup() as group:
        # Objects that exist now are kept: scanning them for garbage stopped every stream for 20 to 30 ms, repeatedly.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*_GC_THRESHOLDS)
        writer = group.create_task(_write_ready_file(config, router))
        try:
            await (stop or asyncio.Event()).wait()
        finally:
            writer.cancel()


@asynccontextmanager
async def running(config: RouterConfig, spans: Spans | None = None) -> AsyncIterator[Router]:
    """A router for the duration of the block. Raises BadConfig if it cannot start."""
    if spans is None and config.otel:
        spans = Spans(config.router_id)
    tokenizer, facts = await asyncio.to_thread(_model_of, config)
    metrics = Metrics({"cluster": config.registry.cluster, "model_name": lambda: frontend.model.name})
    add_process(metrics, "router")
    counted = RouterMetrics(metrics, has_vllm_names=config.vllm_metrics)
    clock = MonotonicClock()
    defects = Defects(_log, clock, counted.defects.add)
    faults = Faults.of(config.faults, config.router_id, "router", clock)
    greeting = hello(config.router_id, time.time_ns())
    dispatcher = Dispatcher(
        config,
        clock,
        lambda address, nodes: NodeLink(
            address, nodes, greeting, config.link, dispatcher.turns, defects, config.access, faults
        ),
        counted,
    )
    counted.add_state(
        lambda: Counter(active.flow.phase for active in dispatcher.scheduler.in_flight),
        lambda: dispatcher.nodes.members,
        lambda: dispatcher.is_ready,
    )
    counted.add_index(dispatcher.scheduler.prefix_index)
    counted.add_policy(config.policy)
    folder = config.model_folder
    names = config.model_names or ((folder.resolve().name,) if folder is not None else ())
    rng = random.SystemRandom()
    frontend = Frontend(
        dispatcher, tokenizer=tokenizer, facts=facts, model_names=names, limits=config.limits,
        rng=rng, seeds=rng if config.seed is None else random.Random(config.seed),
        shares_between_keys=config.shares_between_keys,
        slo=config.slo.default, tool_call_parser=config.tool_call_parser, reasoning_parser=config.reasoning_parser,
        grammar_check=_grammar_check(config),
    )  # fmt: skip
    history = History(dispatcher)
    if spans is not None:
        dispatcher.records.watch(spans.on_ended)
    page = StatusPage(frontend, dispatcher, history, config.router_id)
    # A client with an old key is nothing to wake an operator for.
    refusals = Refusals(clock, counted.access_refusals.add, logging.INFO)
    grpc_face = None
    if config.grpc_port is not None:
        grpc_face = GrpcFace(frontend, dispatcher, config, history, counted.malformed.add, refusals)
    shares = descriptors.shares(descriptors.num_allowed())
    http_server = HttpServer(
        _http_app(frontend, dispatcher, config, metrics, page, refusals), config.http_host, config.http_port or 0,
        _connection_limits(config.limits, shares.http), counted.connections_closed.add, face_files(config.access),
    )  # fmt: skip
    watch = None
    if config.registry.is_used:
        watch = RegistryWatch(
            Registry(config.registry, faults=faults), dispatcher.nodes.on_listing, config.watch, clock, defects
        )
    faults_by_time = None if faults is None else asyncio.create_task(faults.run(), name="faults")
    try:
        dispatcher.nodes.start()
        if watch is not None:
            await watch.start()
        http_address = await http_server.start() if config.http_port is not None else None
        grpc_address = await grpc_face.start(http_address) if grpc_face is not None else None
        _log.info("router %s serves http %s grpc %s", config.router_id, http_address, grpc_address)
        yield Router(http_address, grpc_address, dispatcher, frontend, page, counted)
    finally:
        if faults_by_time is not None:
            faults_by_time.cancel()
        if watch is not None:
            await watch.close()
        # Streams end first, so that the faces have no request to wait for.
        await dispatcher.close(config.limits.drain_s)
        await http_server.stop()
        if grpc_face is not None:
            await grpc_face.stop()
        await frontend.close()
        if spans is not None:
            await spans.close()


def _http_app(
    frontend: Frontend, dispatcher: Dispatcher, config: RouterConfig, metrics: Metrics, page: StatusPage,
    refusals: Refusals,
) -> ASGIApp:  # fmt: skip
    app: ASGIApp = HttpFace(frontend, dispatcher, config, metrics, page)
    if keys := Keys(config.client_keys, config.admin_key):
        app = HttpGuard(app, keys, refusals)
    if config.allowed_origins:
        app = CORSMiddleware(
            app, config.allowed_origins, allow_methods=("*",), allow_headers=("*",), expose_headers=_EXPOSED_HEADERS
        )  # fmt: skip
    return app


def _connection_limits(limits: LimitsConfig, num_allowed: int) -> ConnectionLimits:
    return ConnectionLimits(
        max_connections=min(limits.max_connections, num_allowed),
        head_timeout_s=limits.head_timeout_s,
        keep_alive_s=limits.keep_alive_s,
        write_timeout_s=limits.write_timeout_s,
        max_head_bytes=limits.max_head_bytes,
        max_headers=limits.max_headers,
    )


def _model_of(config: RouterConfig) -> tuple[Tokenizer | None, ModelFacts]:
    """Raises BadConfig and UnsupportedModel for what cannot be used."""
    folder = config.model_folder
    if folder is None:
        return None, ModelFacts()
    facts = load_facts(folder, sampling_defaults=config.generation_config == "auto")
    if facts.sampling != SamplingParams():
        _log.info("defaults of sampling from generation_config.json: %s", stated(facts.sampling))
    return tokenizer_of(config, folder), facts


def tokenizer_of(config: RouterConfig, folder: Path) -> Tokenizer | None:
    """``folder``: the model's. Raises BadConfig and UnsupportedModel."""
    tokenizer = Tokenizer.load(Path(config.tokenizer or folder), config.chat_template)
    if tokenizer is None and (config.tokenizer or config.chat_template):
        if config.tokenizer:
            raise BadConfig(
                f"--tokenizer is {quoted(config.tokenizer)}, which has no tokenizer.json", param="tokenizer"
            )
        raise BadConfig(
            f"--chat-template needs a tokenizer, and {folder} has no tokenizer.json", param="chat_template"
        )  # fmt: skip
    return tokenizer


def _grammar_check(config: RouterConfig) -> GrammarCheck | None:
    """With the tokenizer that nodes have, whatever the router's is."""
    file = None if config.model_folder is None else config.model_folder / TOKENIZER_FILE
    return None if file is None or not is_there(file) else GrammarCheck(config.grammar, file)


async def _write_ready_file(config: RouterConfig, router: Router) -> None:
    if config.ready_file is None:
        return
    if config.ready_needs_nodes:
        await _all_up(router.dispatcher)
    facts = {"http": router.http, "grpc": router.grpc, "pid": os.getpid()}
    write_json_atomically(config.ready_file, facts)


async def _all_up(dispatcher: Dispatcher) -> None:
    changed = asyncio.Event()
    dispatcher.nodes.watch(changed.set)
    while not all(x.state is State.READY for x in dispatcher.nodes.members):
        changed.clear()
        await changed.wait()
