"""The gRPC client of a Baton router: `Client` for threads, `AsyncClient` for asyncio. Needs grpcio and protobuf only.

    with baton.Client("127.0.0.1:8001") as client:
        for part in client.generate("Once upon a time", max_tokens=32):
            print(part.text, end="")

A call that ends early (``close`` on the iterator, a break out of the loop) cancels the request in the cluster. A stream
that has lost its router goes on at another one, or at the same one once it is back, with the next token.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
from grpc import aio

from baton import codec, errors
from baton.access import AccessConfig
from baton.channels import dial, dial_blocking
from baton.chat import ChatMessage, Tool, ToolCall, ToolChoice
from baton.chat_codec import choice_to_pb, message_to_pb, tool_to_pb
from baton.grpc_errors import ERROR_CODE_KEY, error_of
from baton.observe import FailedAttempt, Moved, Relay, Stamp
from baton.resuming import Loss, ResumableStream
from baton.tls import dialling_context
from baton.types import DEFAULTED_SAMPLING, FinishReason, PositionLogprobs, Role, SamplingParams, Slo
from baton.v1 import router_pb2, router_pb2_grpc

_MAX_MESSAGE_BYTES = 64 * 1024 * 1024
_OPTIONS = [
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    # A router that is back is found soon.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # A router's machine may end or vanish without a word: without an answer to a ping its calls end. Routers allow a
    # ping each 5 s.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # Pings by which gRPC measures the bandwidth hold back others until they are answered, by default for a minute.
    ("grpc.http2.ping_timeout_ms", 10_000),
    # Else gRPC stops after two, as a stream's client sends nothing.
    ("grpc.http2.max_pings_without_data", 0),
]
# How long a stream without a router looks for one.
PATIENCE_S = 30.0

# Text, token ids, or chat messages; one of them may be (role, content).
Prompt = str | Sequence[int] | Sequence[tuple[str, str] | ChatMessage]


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    # Part of completion_tokens.
    reasoning_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Accepted:
    """The router has admitted the request."""

    request_id: str
    model: str
    prompt_token_ids: tuple[int, ...]
    text: str = ""


@dataclass(frozen=True, slots=True)
class CallDelta:
    """More of a tool call. The first one of a call has its id and name."""

    index: int
    call_id: str
    name: str
    # Of the arguments' JSON text.
    arguments: str


@dataclass(frozen=True, slots=True)
class Delta:
    """New output. Text may lag behind token ids while a character or a stop string is incomplete."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[PositionLogprobs, ...] = ()
    reasoning: str = ""
    calls: tuple[CallDelta, ...] = ()
    # Of the prompt's tokens from the second on; before any output.
    prompt_logprobs: tuple[PositionLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    finish_reason: FinishReason
    usage: Usage
    relay: Relay
    stop_reason: str = ""
    text: str = ""
    has_tool_calls: bool = False
    # Of the prompt, if asked for; of length 1.
    embedding: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer."""

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    prompt_token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    relay: Relay
    stop_reason: str = ""
    logprobs: tuple[PositionLogprobs, ...] = ()
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    prompt_logprobs: tuple[PositionLogprobs, ...] = ()
    embedding: tuple[float, ...] = ()

    @property
    def message(self) -> ChatMessage:
        """As the next request of a conversation repeats it."""
        return ChatMessage("assistant", self.text or None, None, self.reasoning or None, self.tool_calls)


Part = Accepted | Delta | Finished


@dataclass(frozen=True, slots=True)
class StructuredOutput:
    """The form that the answer is to have: exactly one of the fields, beside ``lenient`` and ``compact``."""

    json_schema: Mapping[str, Any] | str | None = None
    json_object: bool = False
    regex: str | None = None
    choice: Sequence[str] = ()
    # Lark's form, or GBNF.
    grammar: str | None = None
    # Keywords of the schema that cannot be followed are ignored instead of refused.
    lenient: bool = False
    # JSON on one line, with a space behind each comma and colon; else a model may break lines.
    compact: bool = False

    def to_pb(self) -> router_pb2.StructuredOutput:
        message = router_pb2.StructuredOutput(choice=self.choice, lenient=self.lenient, compact=self.compact)
        if (schema := self.json_schema) is not None:
            message.json_schema = schema if isinstance(schema, str) else json.dumps(schema)
        if self.json_object:
            message.json_object = True
        if self.regex is not None:
            message.regex = self.regex
        if self.grammar is not None:
            message.grammar = self.grammar
        return message


@dataclass(frozen=True, slots=True)
class Options:
    """The parameters of a request beside the prompt; proto/baton/v1 defines them."""

    # Sent with all fields. Without it, fields that are not set by name have the model's defaults
    # (generation_config.json).
    sampling: SamplingParams | None = None
    stop: Sequence[str] = ()
    include_stop_in_output: bool = False
    timeout_s: float = 0.0
    request_id: str = ""
    model: str = ""
    skip_special_tokens_in_prompt: bool = False
    cache_salt: str = ""
    priority: int = 0
    slo_ttft_s: float = 0.0
    slo_tbt_s: float = 0.0
    structured_output: StructuredOutput | None = None
    bad_words: Sequence[str] = ()
    prompt_only: bool = False
    # Tokens of the prompt that are kept: the last ones, or the first. -1: as many as leave room for the answer. 0: all.
    truncate_prompt_tokens: int = 0
    truncate_prompt_end: bool = False
    # Of a conversation.
    tools: Sequence[Tool] = ()
    tool_choice: ToolChoice | None = None
    reasoning_effort: str = ""
    # Of the model's chat template, such as enable_thinking.
    template_variables: Mapping[str, Any] = field(default_factory=dict)
    # The answer continues the last message.
    continue_final_message: bool = False


_OPTION_NAMES = frozenset(f.name for f in fields(Options))
_SAMPLING_NAMES = frozenset(f.name for f in fields(SamplingParams))


class Client:
    """Thread-safe. Every method raises an error of baton.errors."""

    def __init__(
        self,
        address: str | Sequence[str],
        *,
        api_key: str = "",
        patience_s: float = PATIENCE_S,
        tls_ca: str | Path | None = None,
        tls_name: str = "",
    ) -> None:
        """``address``: host:port of a router, or of several of one cluster, with a comma between them or as a sequence;
        the first is asked first. ``patience_s``: how long a stream that has lost its router looks for one; 0: not.
        ``tls_ca``: a file with the authority of the routers' certificates, in PEM; without it channels are plain.
        ``tls_name``: the name in the certificates, if it is not the host of ``address``. Raises BadConfig."""
        self._metadata = _credentials(api_key)
        self._patience_s = patience_s
        access = _trusting(tls_ca, tls_name)
        self._channels = [dial_blocking(each, access, _OPTIONS) for each in _addresses(address)]
        self._stubs = [router_pb2_grpc.RouterStub(channel) for channel in self._channels]
        self._stub = self._stubs[0]

    def generate(
        self, prompt: Prompt, options: Options | None = None, **settings: object
    ) -> Generator[Part, None, None]:
        """Accepted, Deltas, Finished. ``settings`` are fields of Options or SamplingParams, for short calls."""
        request, now = _request(prompt, options, settings), time.monotonic()
        stream = ResumableStream(request, len(self._stubs), self._patience_s, now)
        wait_s: float | None = 0.0
        while wait_s is not None:
            if wait_s:
                time.sleep(wait_s)
            stub = self._stubs[stream.router]
            call = stub.Generate(stream.request(time.monotonic()), metadata=self._metadata)
            try:
                for message in call:
                    if stream.take(message):
                        yield _part(message)
                return
            except grpc.RpcError as error:
                wait_s = stream.wait_s(_loss(error), time.monotonic())
                if wait_s is None:
                    raise error_of(error) from error
            finally:
                call.cancel()

    def complete(self, prompt: Prompt, options: Options | None = None, **settings: object) -> Completion:
        """Wait for the whole answer."""
        return _collect(list(self.generate(prompt, options, **settings)))

    def status(self, timeout_s: float = 5.0) -> router_pb2.StatusResponse:
        try:
            return self._stub.Status(router_pb2.StatusRequest(), timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise error_of(error) from error

    def ledger(self, timeout_s: float = 10.0) -> router_pb2.ClusterLedgerResponse:
        try:
            return self._stub.Ledger(router_pb2.ClusterLedgerRequest(), timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise error_of(error) from error

    def cache(self, *, drop: bool = False, timeout_s: float = 10.0) -> router_pb2.ClusterCacheResponse:
        """The prefix caches of all nodes; ``drop``: each forgets all of its blocks first."""
        request = router_pb2.ClusterCacheRequest(drop=drop)
        try:
            return self._stub.Cache(request, timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise error_of(error) from error

    def drain(self, node: str, grace_s: float = 0.0, timeout_s: float = 10.0) -> router_pb2.DrainNodeResponse:
        """Ask a node, by id or address, to finish its requests and exit; returns once it has agreed."""
        try:
            return self._stub.Drain(_drain_request(node, grace_s), timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise error_of(error) from error

    def set_role(self, node: str, role: Role | None, timeout_s: float = 10.0) -> router_pb2.SetNodeRoleResponse:
        """Put a node, by id or address, into a pool, and let no scheduler move it; None: into the one that it started
        in, and let them."""
        try:
            return self._stub.SetRole(_role_request(node, role), timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise error_of(error) from error

    def trace(self, last_s: float = 0.0, timeout_s: float = 30.0) -> list[router_pb2.ClusterTraceResponse]:
        """The recorded activity of the last seconds (0: all that is kept), the router's part first."""
        request = router_pb2.ClusterTraceRequest(last_s=last_s)
        try:
            return list(self._stub.Trace(request, timeout=timeout_s, metadata=self._metadata))
        except grpc.RpcError as error:
            raise error_of(error) from error

    def close(self) -> None:
        for channel in self._channels:
            channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncClient:
    """Create it and use it on one event loop."""

    def __init__(
        self,
        address: str | Sequence[str],
        *,
        api_key: str = "",
        patience_s: float = PATIENCE_S,
        tls_ca: str | Path | None = None,
        tls_name: str = "",
    ) -> None:
        """As `Client`."""
        self._metadata = _credentials(api_key)
        self._patience_s = patience_s
        access = _trusting(tls_ca, tls_name)
        self._channels = [dial(each, access, _OPTIONS) for each in _addresses(address)]
        self._stubs = [router_pb2_grpc.RouterStub(channel) for channel in self._channels]
        self._stub = self._stubs[0]

    async def generate(self, prompt: Prompt, options: Options | None = None, **settings: object) -> AsyncIterator[Part]:
        """As `Client.generate`. To cancel at once when leaving the loop early, use `contextlib.aclosing`."""
        request, now = _request(prompt, options, settings), time.monotonic()
        stream = ResumableStream(request, len(self._stubs), self._patience_s, now)
        wait_s: float | None = 0.0
        while wait_s is not None:
            if wait_s:
                await asyncio.sleep(wait_s)
            stub = self._stubs[stream.router]
            call = stub.Generate(stream.request(time.monotonic()), metadata=self._metadata)
            try:
                async for message in call:
                    if stream.take(message):
                        yield _part(message)
                return
            except aio.AioRpcError as error:
                wait_s = stream.wait_s(_loss(error), time.monotonic())
                if wait_s is None:
                    raise error_of(error) from error
            finally:
                call.cancel()

    async def complete(self, prompt: Prompt, options: Options | None = None, **settings: object) -> Completion:
        return _collect([part async for part in self.generate(prompt, options, **settings)])

    async def status(self, timeout_s: float = 5.0) -> router_pb2.StatusResponse:
        try:
            return await self._stub.Status(router_pb2.StatusRequest(), timeout=timeout_s, metadata=self._metadata)
        except aio.AioRpcError as error:
            raise error_of(error) from error

    async def ledger(self, timeout_s: float = 10.0) -> router_pb2.ClusterLedgerResponse:
        try:
            return await self._stub.Ledger(
                router_pb2.ClusterLedgerRequest(), timeout=timeout_s, metadata=self._metadata
            )
        except aio.AioRpcError as error:
            raise error_of(error) from error

    async def cache(self, *, drop: bool = False, timeout_s: float = 10.0) -> router_pb2.ClusterCacheResponse:
        """As `Client.cache`."""
        request = router_pb2.ClusterCacheRequest(drop=drop)
        try:
            return await self._stub.Cache(request, timeout=timeout_s, metadata=self._metadata)
        except aio.AioRpcError as error:
            raise error_of(error) from error

    async def drain(self, node: str, grace_s: float = 0.0, timeout_s: float = 10.0) -> router_pb2.DrainNodeResponse:
        """As `Client.drain`."""
        try:
            return await self._stub.Drain(_drain_request(node, grace_s), timeout=timeout_s, metadata=self._metadata)
        except aio.AioRpcError as error:
            raise error_of(error) from error

    async def set_role(self, node: str, role: Role | None, timeout_s: float = 10.0) -> router_pb2.SetNodeRoleResponse:
        """As `Client.set_role`."""
        try:
            return await self._stub.SetRole(_role_request(node, role), timeout=timeout_s, metadata=self._metadata)
        except aio.AioRpcError as error:
            raise error_of(error) from error

    async def trace(self, last_s: float = 0.0, timeout_s: float = 30.0) -> list[router_pb2.ClusterTraceResponse]:
        """As `Client.trace`."""
        request = router_pb2.ClusterTraceRequest(last_s=last_s)
        try:
            return [part async for part in self._stub.Trace(request, timeout=timeout_s, metadata=self._metadata)]
        except aio.AioRpcError as error:
            raise error_of(error) from error

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def relay_from_pb(message: router_pb2.Relay, usage: router_pb2.Usage) -> Relay:
    return Relay(
        prefill_node_id=message.prefill_node_id,
        decode_node_id=message.decode_node_id,
        router_queue_s=message.router_queue_s,
        prefill_queue_s=message.prefill_queue_s,
        prefill_s=message.prefill_s,
        ttft_s=message.ttft_s,
        e2e_s=message.e2e_s,
        tbt_mean_s=message.tbt_mean_s,
        tbt_max_s=message.tbt_max_s,
        attempts=message.attempts,
        num_tokens=usage.completion_tokens,
        num_cached_tokens=usage.cached_tokens,
        transfer=codec.report_from_pb(message.transfer) if message.HasField("transfer") else None,
        tokenize_s=message.tokenize_s,
        rerun_s=message.rerun_s,
        placement_s=message.placement_s,
        reserve_s=message.reserve_s,
        network_s=message.network_s,
        second_token_s=message.second_token_s,
        lease_wait_s=message.lease_wait_s,
        recovery_s=message.recovery_s,
        stamps=tuple(Stamp(stamp.name, stamp.at_s) for stamp in message.stamps),
        failures=tuple(_failure_from_pb(failure) for failure in message.failures),
        slo=Slo(message.slo_ttft_s or None, message.slo_tbt_s or None),
        moves=tuple(_move_from_pb(move) for move in message.moves),
        placement_reason=message.placement_reason,
    )


def _failure_from_pb(message: router_pb2.Relay.FailedAttempt) -> FailedAttempt:
    return FailedAttempt(
        message.prefill_node_id, message.decode_node_id, message.blamed_node_id, message.code, message.message,
        message.at_s, message.silent_s,
    )  # fmt: skip


def _move_from_pb(message: router_pb2.Relay.Moved) -> Moved:
    return Moved(
        message.source_node_id, message.target_node_id, message.reason, message.at_s, message.pause_s, message.num_bytes
    )  # fmt: skip


def _trusting(tls_ca: str | Path | None, tls_name: str) -> AccessConfig:
    access = AccessConfig(tls_ca=None if tls_ca is None else Path(tls_ca), tls_name=tls_name)
    # gRPC would say that the router cannot be reached.
    dialling_context(access)
    return access


def _credentials(api_key: str) -> tuple[tuple[str, str], ...]:
    if not (api_key.isascii() and api_key.isprintable()):
        raise errors.InvalidRequest("the API key has other characters than printable ASCII", param="api_key")
    return (("authorization", f"Bearer {api_key}"),) if api_key else ()


def _addresses(address: str | Sequence[str]) -> list[str]:
    found = address.split(",") if isinstance(address, str) else list(address)
    found = [each.strip() for each in found]
    if not found or not all(found):
        raise errors.InvalidRequest("an address is empty, expected host:port of each router", param="address")
    return found


def _loss(error: grpc.RpcError) -> Loss:
    """A status without a name of ours is of a connection that broke, or could not be made."""
    is_unavailable = isinstance(error, grpc.Call | aio.AioRpcError) and error.code() is grpc.StatusCode.UNAVAILABLE
    found = error_of(error)
    is_named = isinstance(error, grpc.Call | aio.AioRpcError) and ERROR_CODE_KEY in dict(
        error.trailing_metadata() or ()
    )
    is_connection = is_unavailable and (not is_named or isinstance(found, errors.Draining))
    return Loss(is_connection, found.retryable)


def _request(prompt: Prompt, options: Options | None, settings: Mapping[str, object]) -> router_pb2.GenerateRequest:
    options = options or Options()
    is_whole = options.sampling is not None or "sampling" in settings
    options = _merged(options, settings)
    sampling = codec.sampling_to_pb(options.sampling or SamplingParams())
    for name in DEFAULTED_SAMPLING:
        if not is_whole and name not in settings:
            sampling.ClearField(name)
    with _sendable():
        request = router_pb2.GenerateRequest(
            request_id=options.request_id,
            model=options.model,
            sampling=sampling,
            stop=options.stop,
            include_stop_in_output=options.include_stop_in_output,
            timeout_s=options.timeout_s,
            skip_special_tokens_in_prompt=options.skip_special_tokens_in_prompt,
            cache_salt=options.cache_salt,
            priority=options.priority,
            slo_ttft_s=options.slo_ttft_s,
            slo_tbt_s=options.slo_tbt_s,
            structured_output=None if options.structured_output is None else options.structured_output.to_pb(),
            bad_words=options.bad_words,
            prompt_only=options.prompt_only,
            truncate_prompt_tokens=options.truncate_prompt_tokens,
            truncate_prompt_end=options.truncate_prompt_end,
        )
        _set_input(request, prompt, options)
    return request


def _drain_request(node: str, grace_s: float) -> router_pb2.DrainNodeRequest:
    with _sendable():
        return router_pb2.DrainNodeRequest(node=node, grace_s=grace_s)


def _role_request(node: str, role: Role | None) -> router_pb2.SetNodeRoleRequest:
    with _sendable():
        request = router_pb2.SetNodeRoleRequest(node=node)
    if role is not None:
        request.role = codec.role_to_pb(role)
    return request


@contextmanager
def _sendable() -> Iterator[None]:
    """What a message cannot hold is the caller's mistake: a wrong type, a token id below 0, or text with halves of
    surrogate pairs, Python's form of a command line's bytes that are not UTF-8."""
    try:
        yield
    except UnicodeEncodeError as error:
        raise errors.InvalidRequest(f"a text of the request cannot be sent as UTF-8: {error.reason}") from error
    except (TypeError, ValueError) as error:
        raise errors.InvalidRequest(f"the request has a value of a wrong type or size: {error}") from error


def _merged(options: Options, settings: Mapping[str, object]) -> Options:
    """Options with some fields replaced, its own or those of its sampling."""
    unknown = settings.keys() - _OPTION_NAMES - _SAMPLING_NAMES
    if unknown:
        raise errors.InvalidRequest(f"unknown settings {sorted(unknown)}", param=min(unknown))
    inner = {k: v for k, v in settings.items() if k in _SAMPLING_NAMES}
    outer = {k: v for k, v in settings.items() if k in _OPTION_NAMES}
    if inner:
        outer["sampling"] = replace(outer.get("sampling", options.sampling) or SamplingParams(), **inner)  # type: ignore[type-var]
    return replace(options, **outer)  # type: ignore[arg-type]


def _set_input(request: router_pb2.GenerateRequest, prompt: Prompt, options: Options) -> None:
    chat_options = (options.tools, options.tool_choice, options.reasoning_effort, options.template_variables)
    if (any(chat_options) or options.continue_final_message) and (
        isinstance(prompt, str) or not all(isinstance(item, tuple | ChatMessage) for item in prompt)
    ):
        raise errors.InvalidRequest(
            "tools, tool_choice, reasoning_effort, template_variables and continue_final_message are for "
            "conversations, expected a prompt of messages",
            param="prompt",
        )
    if isinstance(prompt, str):
        request.prompt = prompt
        return
    ids: list[int] = []
    messages: list[router_pb2.ChatMessage] = []
    for item in prompt:
        if isinstance(item, int):
            ids.append(item)
        else:
            messages.append(message_to_pb(item if isinstance(item, ChatMessage) else ChatMessage(*item)))
    if ids and messages:
        raise errors.InvalidRequest("the prompt mixes token ids and messages", param="prompt")
    if messages:
        chat = request.chat
        chat.messages.extend(messages)
        chat.tools.extend(map(tool_to_pb, options.tools))
        if options.tool_choice is not None:
            chat.tool_choice.CopyFrom(choice_to_pb(options.tool_choice))
        chat.reasoning_effort = options.reasoning_effort
        chat.continue_final_message = options.continue_final_message
        chat.variables = json.dumps(dict(options.template_variables)) if options.template_variables else ""
    else:
        request.prompt_token_ids.token_ids.extend(ids)
        request.prompt_token_ids.SetInParent()


def _part(message: router_pb2.GenerateResponse) -> Part:
    match message.WhichOneof("message"):
        case "accepted":
            a = message.accepted
            return Accepted(a.request_id, a.model, tuple(a.prompt_token_ids))
        case "delta":
            d = message.delta
            logprobs, prompt = (tuple(map(codec.logprobs_from_pb, x)) for x in (d.logprobs, d.prompt_logprobs))
            calls = tuple(CallDelta(c.index, c.call_id, c.name, c.arguments) for c in d.calls)
            return Delta(d.text, tuple(d.token_ids), logprobs, d.reasoning, calls, prompt)
        case "finished":
            f = message.finished
            reason = codec.finish_from_pb(f.finish_reason)
            if reason is None:
                raise errors.InternalError("the router finished without a reason")
            u = f.usage
            usage = Usage(u.prompt_tokens, u.completion_tokens, u.cached_tokens, u.reasoning_tokens)
            relay, embedding = relay_from_pb(f.relay, u), tuple(f.embedding)
            return Finished(
                reason, usage, relay, f.stop_reason, has_tool_calls=f.has_tool_calls, embedding=embedding
            )  # fmt: skip
        case other:
            raise errors.InternalError(f"the router sent a message this client does not know: {other}")


def _collect(parts: Sequence[Part]) -> Completion:
    accepted, *deltas = parts
    finished = parts[-1]
    if not isinstance(accepted, Accepted) or not isinstance(finished, Finished):
        raise errors.InternalError("the router's stream did not open with Accepted and end with Finished")
    whole = [d for d in deltas if isinstance(d, Delta)]
    return Completion(
        request_id=accepted.request_id,
        text="".join(d.text for d in whole),
        token_ids=tuple(i for d in whole for i in d.token_ids),
        prompt_token_ids=accepted.prompt_token_ids,
        finish_reason=finished.finish_reason,
        usage=finished.usage,
        relay=finished.relay,
        stop_reason=finished.stop_reason,
        logprobs=tuple(p for d in whole for p in d.logprobs),
        reasoning="".join(d.reasoning for d in whole),
        tool_calls=_calls([call for d in whole for call in d.calls]),
        prompt_logprobs=tuple(p for d in whole for p in d.prompt_logprobs),
        embedding=finished.embedding,
    )


def _calls(deltas: Sequence[CallDelta]) -> tuple[ToolCall, ...]:
    found: dict[int, ToolCall] = {}
    for delta in deltas:
        call = found.get(delta.index) or ToolCall(delta.call_id, delta.name, "")
        found[delta.index] = replace(call, arguments=call.arguments + delta.arguments)
    return tuple(found.values())
