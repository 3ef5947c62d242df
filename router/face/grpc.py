"""The gRPC face of the router: baton.v1.Router with Generate, Status, Ledger, Cache, Drain and Trace."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

from grpc import aio

from baton import codec, errors
from baton.channels import face_credentials
from baton.chat import MAX_TOOLS
from baton.chat_codec import choice_from_pb, message_from_pb, object_of, tools_from_pb
from baton.guard import Guard, Refusals, host_of_peer
from baton.server import GrpcServer, ServerLimits
from baton.types import (
    DEFAULTED_SAMPLING,
    MAX_ALLOWED_TOKEN_IDS,
    MAX_BAD_WORDS,
    MAX_LOGIT_BIASES,
    MAX_STOP_TOKEN_IDS,
    Slo,
)
from baton.v1 import router_pb2, router_pb2_grpc
from router.clients import client_of
from router.config import RouterConfig
from router.dispatch.dispatcher import Dispatcher
from router.face.body import SMALL_BODY_BYTES, check_structure
from router.face.client_codec import delta_to_pb, finished_to_pb, member_to_pb, resume_from_pb, trace_to_pb
from router.face.grpc_messages import ParseInTurns
from router.face.keys import Keys
from router.frontend.frontend import Frontend
from router.frontend.generation import Accepted, Ending
from router.frontend.request import Caller, GenerationRequest
from router.grammar import grammars
from router.nodes.admin import NodeAdmin
from router.observe.history import History
from router.text.chat import Conversation

_log = logging.getLogger("baton.router")

# W3C Trace Context requires at least 512 characters of tracestate.
_MAX_TRACE_CHARS = 512

Context = aio.ServicerContext[Any, Any]

SERVICE_NAME = router_pb2.DESCRIPTOR.services_by_name["Router"].full_name


class RouterService(router_pb2_grpc.RouterServicer):
    def __init__(self, frontend: Frontend, dispatcher: Dispatcher, config: RouterConfig, history: History) -> None:
        self._frontend = frontend
        self._dispatcher = dispatcher
        self._config = config
        self._history = history
        # Of the OpenAI API; 0: there is none.
        self.http_port = 0
        self._nodes = NodeAdmin(dispatcher.nodes.membership, dispatcher.nodes.links, dispatcher.clock)

    async def Generate(  # type: ignore[override]  # noqa: N802 (gRPC names)
        self,
        request: router_pb2.GenerateRequest,
        context: Context,
    ) -> None:
        accepted: Accepted | None = None
        try:
            self._check_sizes(request)
            accepted = await self._frontend.start(await self._asked(request, context))
            # Written here, not yielded, so that a client that does not read for too long is given up.
            async for response in _responses(accepted):
                await self._write(context, response)
        finally:
            if accepted is not None:
                self._frontend.cancel(accepted, "the client left")

    async def _write(self, context: Context, response: router_pb2.GenerateResponse) -> None:
        timeout_s = self._config.limits.write_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                await context.write(response)
        except TimeoutError:
            _log.info("%s took nothing for %g s and is given up", context.peer(), timeout_s)
            # It would not read a status either: the call is cut off.
            raise asyncio.CancelledError from None

    async def _asked(self, request: router_pb2.GenerateRequest, context: Context) -> GenerationRequest:
        if request.sampling.grammar:
            # What nodes are told is made and bounded here.
            message = "sampling.grammar is for nodes, expected structured_output in the request"
            raise errors.InvalidRequest(message, param="sampling.grammar")
        kind = request.WhichOneof("input")
        prompt: str | tuple[int, ...] | Conversation
        match kind:
            case "prompt":
                prompt = request.prompt
            case "prompt_token_ids":
                prompt = tuple(request.prompt_token_ids.token_ids)
            case "chat":
                prompt = await self._conversation(request.chat)
            case _:
                raise errors.InvalidRequest(
                    "the request has no input, expected prompt, prompt_token_ids or chat", param="input"
                )
        trace = _trace_context(context)
        grammar, grammar_param = _grammar(request.structured_output)
        sampling = replace(codec.sampling_from_pb(request.sampling), grammar=grammar)
        if request.prompt_only:
            if sampling.prompt_logprobs is None and not sampling.pooling:
                expected = "expected sampling.prompt_logprobs or sampling.pooling beside it"
                raise errors.InvalidRequest(f"prompt_only asks for nothing, {expected}", param="prompt_only")
            sampling = replace(sampling, max_tokens=1, min_tokens=0)
        return GenerationRequest(
            prompts=(prompt,),
            sampling=sampling,
            grammar_param=grammar_param,
            bad_words=tuple(request.bad_words),
            is_prompt_only=request.prompt_only,
            truncate_to=request.truncate_prompt_tokens or None,
            truncates_end=request.truncate_prompt_end,
            unset_sampling=tuple(name for name in DEFAULTED_SAMPLING if not request.sampling.HasField(name)),
            model=request.model,
            request_id=request.request_id,
            stops=tuple(request.stop),
            include_stop=request.include_stop_in_output,
            cache_salt=request.cache_salt,
            priority=request.priority,
            slo=Slo(request.slo_ttft_s or None, request.slo_tbt_s or None),
            add_special_tokens=not request.skip_special_tokens_in_prompt and kind != "chat",
            is_chat=kind == "chat",
            resume=resume_from_pb(request.resume) if request.HasField("resume") else None,
            timeout_s=self._timeout_s(request, context),
            caller=Caller(self._client_of(context), trace.get("traceparent", ""), trace.get("tracestate", "")),
        )

    async def _conversation(self, chat: router_pb2.Chat) -> Conversation:
        """Raises InvalidRequest for JSON in it that is none, or that takes long to read."""
        texts = [chat.variables, *(tool.parameters for tool in chat.tools)]

        def work() -> Conversation:
            for text in texts:
                check_structure(text.encode(), self._config.limits, self._frontend.model.max_tokens)
            return Conversation(
                tuple(map(message_from_pb, chat.messages)),
                variables=object_of(chat.variables, "variables") or {},
                tools=tools_from_pb(chat.tools),
                tool_choice=choice_from_pb(chat.tool_choice),
                reasoning_effort=chat.reasoning_effort or None,
                add_generation_prompt=not chat.continue_final_message,
                continues_final=chat.continue_final_message,
            )

        return work() if sum(map(len, texts)) <= SMALL_BODY_BYTES else await self._frontend.offload.run(work)

    def _client_of(self, context: Context) -> str:
        said = dict(context.invocation_metadata() or ()).get("authorization", "")
        return client_of(host_of_peer(context.peer()), str(said).encode(), has_keys=bool(self._config.api_keys))

    def _check_sizes(self, request: router_pb2.GenerateRequest) -> None:
        """Runs before anything is copied out of the message: its lists may have millions of items."""
        sampling = request.sampling
        # One that is cut is bounded by the message's size.
        most = None if request.truncate_prompt_tokens else self._frontend.model.max_tokens
        for param, items, limit in (
            ("prompt", request.prompt_token_ids.token_ids, most),
            ("chat", request.chat.messages, self._config.limits.max_body_containers),
            ("tools", request.chat.tools, MAX_TOOLS),
            ("tool_choice", request.chat.tool_choice.names, MAX_TOOLS),
            ("stop", request.stop, self._config.limits.max_stop_strings),
            ("stop_token_ids", sampling.stop_token_ids, MAX_STOP_TOKEN_IDS),
            ("logit_bias", sampling.logit_bias, MAX_LOGIT_BIASES),
            ("bad_words", request.bad_words, MAX_BAD_WORDS),
            ("bad_word_ids", sampling.bad_word_ids, 2 * MAX_BAD_WORDS),
            ("allowed_token_ids", sampling.allowed_token_ids, MAX_ALLOWED_TOKEN_IDS),
            ("structured_output.choice", request.structured_output.choice, grammars.MAX_CHOICES),
            ("resume.token_ids", request.resume.token_ids, self._frontend.model.max_tokens),
        ):
            if limit is not None and len(items) > limit:
                kind = errors.PromptTooLong if param == "prompt" else errors.InvalidRequest
                raise kind(f"{param} has {len(items)} entries, expected at most {limit}", param=param)

    def _timeout_s(self, request: router_pb2.GenerateRequest, context: Context) -> float | None:
        """The request's own timeout or the call's deadline, whichever is sooner."""
        limit_s = self._config.limits.max_timeout_s
        asked_s = request.timeout_s or None
        if asked_s is not None and not 0 < asked_s <= limit_s:
            raise errors.InvalidRequest(
                f"timeout_s is {asked_s}, expected more than 0 and at most {limit_s}", param="timeout_s"
            )
        call_s: float | None = context.time_remaining()
        bounds = [b for b in (asked_s, None if call_s is None else min(call_s, limit_s)) if b is not None]
        return max(min(bounds), 0.001) if bounds else None

    async def Status(  # noqa: N802
        self,
        request: router_pb2.StatusRequest,
        context: Context,
    ) -> router_pb2.StatusResponse:
        num_queued = self._dispatcher.scheduler.num_waiting
        return router_pb2.StatusResponse(
            router_id=self._config.router_id,
            model=self._frontend.model.name,
            num_queued=num_queued,
            num_running=self._dispatcher.scheduler.num_in_flight - num_queued,
            chat_refusal=self._frontend.prompts.chat_refusal,
            nodes=[member_to_pb(x) for x in self._dispatcher.nodes.members],
            http_port=self.http_port,
        )

    async def Ledger(  # noqa: N802
        self,
        request: router_pb2.ClusterLedgerRequest,
        context: Context,
    ) -> router_pb2.ClusterLedgerResponse:
        nodes, unreachable = await self._nodes.ledgers()
        return router_pb2.ClusterLedgerResponse(nodes=nodes, unreachable=unreachable)

    async def Cache(  # noqa: N802
        self,
        request: router_pb2.ClusterCacheRequest,
        context: Context,
    ) -> router_pb2.ClusterCacheResponse:
        nodes, unreachable = await self._nodes.caches(drop=request.drop)
        return router_pb2.ClusterCacheResponse(nodes=nodes, unreachable=unreachable)

    async def Drain(  # noqa: N802
        self,
        request: router_pb2.DrainNodeRequest,
        context: Context,
    ) -> router_pb2.DrainNodeResponse:
        address, answer = await self._nodes.drain(request.node, request.grace_s)
        return router_pb2.DrainNodeResponse(drain=answer, address=address)

    async def SetRole(  # noqa: N802
        self,
        request: router_pb2.SetNodeRoleRequest,
        context: Context,
    ) -> router_pb2.SetNodeRoleResponse:
        role = codec.role_from_pb(request.role) if request.role else None
        address, answer = await self._nodes.set_role(request.node, role)
        return router_pb2.SetNodeRoleResponse(role=answer, address=address)

    async def Trace(  # noqa: N802
        self,
        request: router_pb2.ClusterTraceRequest,
        context: Context,
    ) -> AsyncIterator[router_pb2.ClusterTraceResponse]:
        last_s = codec.last_s_from_pb(request.last_s)
        now = self._dispatcher.clock.now()
        yield trace_to_pb(self._config.router_id, now, self._history.since(now - last_s))
        for node in await self._nodes.traces(request.last_s):
            yield router_pb2.ClusterTraceResponse(node=node)


def _grammar(asked: router_pb2.StructuredOutput) -> tuple[str, str]:
    """And the field that it was made of."""
    kind = asked.WhichOneof("form")
    if kind is not None and asked.choice:
        message = f"structured_output has {kind} and choice, expected one of them"
        raise errors.InvalidRequest(message, param="structured_output")
    if asked.compact and kind not in ("json_schema", "json_object"):
        message = "structured_output.compact is true, expected json_schema or json_object beside it"
        raise errors.InvalidRequest(message, param="structured_output.compact")
    param = f"structured_output.{kind or 'choice'}"
    match kind:
        case "json_schema":
            schema, is_strict = asked.json_schema, not asked.lenient
            return grammars.of_json_schema(schema, is_strict, param=param, is_compact=asked.compact), param
        case "json_object" if asked.json_object:
            return grammars.of_json_object(param=param, is_compact=asked.compact), param
        case "regex":
            return grammars.of_regex(asked.regex, param=param), param
        case "grammar":
            return grammars.of_grammar(asked.grammar, param=param), param
        case None if asked.choice:
            return grammars.of_choice(tuple(asked.choice), param=param), param
    return "", "grammar"


def _trace_context(context: Context) -> dict[str, str]:
    """The caller's W3C trace context, if it sent one."""
    found: dict[str, str] = {}
    for name, value in context.invocation_metadata() or ():
        if name in ("traceparent", "tracestate") and isinstance(value, str) and len(value) <= _MAX_TRACE_CHARS:
            found[name] = value
    return found


async def _responses(accepted: Accepted) -> AsyncIterator[router_pb2.GenerateResponse]:
    generation = accepted.generations[0]
    # The reservation is sent first: writing to this client costs 0.1 ms.
    await asyncio.sleep(0)
    yield router_pb2.GenerateResponse(
        accepted=router_pb2.GenerateResponse.Accepted(
            request_id=accepted.request_id,
            model=accepted.model,
            prompt_token_ids=generation.prompt_token_ids,
            seed=generation.seed,
        )
    )
    while True:
        part = await generation.next()
        if isinstance(part, Ending):
            yield finished_to_pb(part, len(generation.prompt_token_ids))
            return
        if (part.text or part.token_ids or part.scored) and not part.is_known:
            yield delta_to_pb(part)


class GrpcFace:
    """The gRPC server of the router. Health of "" and of the service says whether it can serve requests."""

    def __init__(
        self, frontend: Frontend, dispatcher: Dispatcher, config: RouterConfig, history: History,
        on_malformed: Callable[[], None], refusals: Refusals,
    ) -> None:  # fmt: skip
        self._dispatcher = dispatcher
        self._config = config
        keys = Keys(config.client_keys, config.admin_key)
        limits = ServerLimits(
            # Half of the limit for JSON: there are no escapes, and ids are short.
            max_message_bytes=frontend.prompts.max_request_bytes // 2,
            keepalive_s=20.0,
            keepalive_timeout_s=20.0,
            least_ping_interval_s=5.0,
        )
        self._server = GrpcServer(
            limits,
            on_malformed,
            # A call without a key is refused as such, whatever its message.
            guards=[Guard(keys.check_call, refusals)] if keys else [],
            # Conversations are bounded as over HTTP; other parts are far smaller.
            parsers=[ParseInTurns(frontend.turns, 2 * config.limits.max_body_containers)],
            credentials=face_credentials(config.access),
        )
        self._service = RouterService(frontend, dispatcher, config, history)
        self._server.add(router_pb2_grpc.add_RouterServicer_to_server, self._service, SERVICE_NAME)
        self._was_ready = False
        self._updates: set[asyncio.Task[None]] = set()

    async def start(self, http_address: str | None) -> str:
        """Returns host:port; ``http_address`` is the base URL of the other face, if there is one. Raises BadConfig if
        it cannot be bound."""
        self._service.http_port = urlsplit(http_address or "").port or 0
        asked = f"{self._config.grpc_host}:{self._config.grpc_port}"
        address = self._server.bind(asked, param="grpc_port")
        self._was_ready = self._dispatcher.is_ready
        await self._server.start(is_serving=self._was_ready)
        self._dispatcher.nodes.watch(self._on_change)
        self._on_change()
        return address

    def _on_change(self) -> None:
        if self._dispatcher.is_ready is not self._was_ready:
            self._was_ready = self._dispatcher.is_ready
            task = asyncio.create_task(self._server.set_serving(self._was_ready))
            self._updates.add(task)
            task.add_done_callback(self._updates.discard)

    async def stop(self) -> None:
        await self._server.stop(0.5)
