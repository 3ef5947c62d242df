"""Nodes without a model: real gRPC sessions, made-up tokens, failures on request. For tests and router benchmarks.

Tokens are a pure function of (prompt + generated so far, seed, position), so that any node continues any sequence and a
wrong continuation shows. Handing over is a call inside the process: all nodes of a `FakeCluster` live in one.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from grpc import aio

from baton import PROTOCOL_VERSION, codec
from baton.timeline import Timeline, Transfer
from baton.types import (
    Failure,
    FinishReason,
    KvLayout,
    Lease,
    ModelDescription,
    NodeDescription,
    NodeStatus,
    PositionLogprobs,
    PrefixCaching,
    Role,
    SequenceSpec,
    TokenChunk,
    TokenLogprob,
    TransferReport,
)
from baton.v1 import common_pb2, node_pb2, node_pb2_grpc

_MASK = 2**64 - 1
_MULTIPLIER = 6364136223846793005


def _mix(state: int, value: int) -> int:
    return ((state ^ value) * _MULTIPLIER + 1442695040888963407) & _MASK


class FakeText:
    """What the fake model says after a context: a running hash of all tokens, drawn with seed and position."""

    __slots__ = ("_position", "_seed", "_state", "_vocab_size", "last_id")

    def __init__(self, token_ids: Sequence[int], seed: int, vocab_size: int) -> None:
        self._state = 0
        self._position = 0
        self._seed = seed
        self._vocab_size = vocab_size
        # -1 before the first token.
        self.last_id = -1
        for token_id in token_ids:
            self.push(token_id)

    def push(self, token_id: int) -> None:
        self._state = _mix(self._state, token_id + 1)
        self.last_id = token_id
        self._position += 1

    def draw(self) -> int:
        return (_mix(_mix(self._state, self._seed), self._position) >> 33) % self._vocab_size


def expected_tokens(
    prompt: Sequence[int], seed: int, max_tokens: int, vocab_size: int, stop_ids: Sequence[int] = ()
) -> list[int]:
    """The oracle: what an undisturbed run generates."""
    text = FakeText(prompt, seed, vocab_size)
    out: list[int] = []
    while len(out) < max_tokens:
        out.append(text.draw())
        text.push(out[-1])
        if out[-1] in stop_ids:
            break
    return out


@dataclass(frozen=True, slots=True)
class FakeConfig:
    vocab_size: int = 512
    max_model_tokens: int = 4096
    num_blocks: int = 1024
    block_tokens: int = 16
    # Its prefix cache has so many leading blocks of every prompt. They count as no used blocks.
    num_cached_blocks: int = 0
    # What comes after a token, for answers that are to be known by heart; what is not here is drawn.
    following: Mapping[int, int] = field(default_factory=dict)
    model_name: str = "fake"
    # Where its metrics would be; no server listens there.
    metrics_address: str = ""
    fingerprint: str = "fake-fingerprint"
    # Time of a decode step, and of a prompt token.
    step_s: float = 0.001
    prefill_token_s: float = 0.0
    transfer_s: float = 0.0
    status_s: float = 0.05
    # It says that it keeps blocks; what they are is the test's to tell (`FakeNode.tell_cache`).
    has_prefix_cache: bool = False
    # What its clock shows beyond ours.
    clock_skew_s: float = 0.0


class _Session:
    """One router's stream; what a step produces leaves as one message."""

    def __init__(self) -> None:
        # None ends it.
        self.outbox: asyncio.Queue[node_pb2.SessionResponse | None] = asyncio.Queue()
        self._draft: node_pb2.SessionResponse | None = None

    @property
    def draft(self) -> node_pb2.SessionResponse:
        if self._draft is None:
            self._draft = node_pb2.SessionResponse()
        return self._draft

    def flush(self, is_muted: bool) -> None:
        draft, self._draft = self._draft, None
        if draft is not None and not is_muted:
            self.outbox.put_nowait(draft)


class _Live:
    """A sequence on a node."""

    __slots__ = ("epoch", "lease", "num_generated", "ready_s", "session", "since_s", "spec", "state", "text")

    def __init__(self, spec: SequenceSpec, session: _Session, state: str, now: float) -> None:
        self.spec = spec
        self.session = session
        self.state = state
        self.since_s = now
        self.epoch = 0
        self.lease: Lease | None = None
        self.ready_s = 0.0
        self.num_generated = len(spec.generated_token_ids)
        # Not before a token is asked for: a reservation costs the router's bench next to nothing.
        self.text: FakeText | None = None

    def text_so_far(self, vocab_size: int) -> FakeText:
        if self.text is None:
            assert self.spec.sampling.seed is not None
            known = (*self.spec.prompt_token_ids, *self.spec.generated_token_ids)
            self.text = FakeText(known, self.spec.sampling.seed, vocab_size)
        return self.text

    def next_chunk(self, vocab_size: int, following: Mapping[int, int]) -> TokenChunk:
        sampling = self.spec.sampling
        text = self.text_so_far(vocab_size)
        token_id = following.get(text.last_id, -1)
        if token_id < 0:
            token_id = text.draw()
        while token_id in sampling.stop_token_ids and self.num_generated < sampling.min_tokens:
            token_id = (token_id + 1) % vocab_size
        text.push(token_id)
        index = self.num_generated
        self.num_generated += 1
        finish = None
        if token_id in sampling.stop_token_ids:
            finish = FinishReason.STOP
        elif self.num_generated == sampling.max_tokens:
            finish = FinishReason.LENGTH
        logprobs = () if sampling.logprobs is None else (_logprobs(token_id, sampling.logprobs, vocab_size),)
        return TokenChunk(self.spec.sequence_id, index, (token_id,), logprobs, finish)


def _logprobs(token_id: int, num_top: int, vocab_size: int) -> PositionLogprobs:
    top = tuple(TokenLogprob((token_id + i) % vocab_size, -0.25 * (i + 1)) for i in range(num_top))
    return PositionLogprobs(TokenLogprob(token_id, -0.25), 1, top)


class FakeNode(node_pb2_grpc.NodeServicer):
    """One worker. Failures: `fail`, `drop`, `duplicate`, `garble`, `stall`, `mute`, `die`."""

    def __init__(self, node_id: str, role: Role, cluster: FakeCluster, config: FakeConfig) -> None:
        self.node_id = node_id
        self.role = role
        self.config = config
        self.is_draining = False
        self.address = ""
        self.incarnation = 0
        # By what would be sent or done: how often to fail, drop or double it from now on.
        self._fail: dict[str, list[Failure]] = {}
        self._drop: Counter[str] = Counter()
        self._duplicate: Counter[str] = Counter()
        self._num_garbled = 0
        self.seen: Counter[str] = Counter()
        # What it was asked last, as a node gets it.
        self.last_spec: SequenceSpec | None = None
        self.num_cached_blocks = config.num_cached_blocks
        self._cluster = cluster
        self._epochs = itertools.count(1)
        self._server: aio.Server | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self.timeline = Timeline()
        # End of the last step that was recorded: they do not overlap.
        self._stepped_s = float("-inf")
        self._reset()

    def now(self) -> float:
        """The clock that it tells others."""
        return time.monotonic() + self.config.clock_skew_s

    def _reset(self) -> None:
        self._live: dict[str, _Live] = {}
        self._cache_number = 0
        self._sessions: list[_Session] = []
        self._work = asyncio.Event()
        self._unstalled = asyncio.Event()
        self._unstalled.set()
        self._stalled_since_s: float | None = None
        self._is_muted = False

    # ── Life and failures ───────────────────────────────────────────────────────────────────────────────────────────

    async def start(self) -> None:
        """Listen; a restarted node takes its old port and is another incarnation."""
        self._reset()
        self.incarnation = time.time_ns()
        self._server = aio.server(options=[("grpc.so_reuseport", 0)])
        node_pb2_grpc.add_NodeServicer_to_server(self, self._server)
        port = self._server.add_insecure_port(self.address or "127.0.0.1:0")
        self.address = f"127.0.0.1:{port}"
        await self._server.start()
        self._tasks = [asyncio.create_task(self._engine()), asyncio.create_task(self._heartbeat())]

    async def die(self) -> None:
        """At once: streams break, everything is forgotten."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        if self._server is not None:
            await self._server.stop(None)
            self._server = None
        self._live.clear()
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def Drain(  # noqa: N802
        self, request: node_pb2.DrainRequest, context: aio.ServicerContext[Any, Any]
    ) -> node_pb2.DrainResponse:
        """It says so and never leaves by itself."""
        self.is_draining = True
        return node_pb2.DrainResponse(
            node_id=self.node_id, incarnation=self.incarnation, num_sequences=len(self._live), grace_s=request.grace_s
        )

    def fail(self, what: str, times: int = 1, code: str = "NoBlocks", retryable: bool = True, blamed: str = "") -> None:
        """``what``: "reserve", "run", "transfer" or "decode"."""
        failure = Failure(code, f"scripted failure of {what} at {self.node_id}", retryable, blamed)
        self._fail.setdefault(what, []).extend([failure] * times)

    def drop(self, what: str, times: int = 1) -> None:
        """``what``: "reserved", "tokens", "prefill_done", "handed_off", "joined" or "commit"."""
        self._drop[what] += times

    def duplicate(self, what: str, times: int = 1) -> None:
        self._duplicate[what] += times

    def garble(self, times: int = 1) -> None:
        """Chunks of tokens whose finish reason does not exist."""
        self._num_garbled += times

    def _tokens(self, chunk: TokenChunk) -> list[common_pb2.Tokens]:
        message = codec.tokens_to_pb(chunk)
        if self._num_garbled > 0:
            self._num_garbled -= 1
            message.finish_reason = 99  # type: ignore[assignment]
        return [message] * self._times("tokens")

    def end_sessions(self) -> None:
        """In good order, as a node does that leaves."""
        for session in self._sessions:
            session.outbox.put_nowait(None)

    def tell_cache(self, stored: Iterable[int], dropped: Iterable[int] = (), *, is_snapshot: bool = False) -> None:
        """Keys of blocks that it has from now on, and has no more."""
        self._cache_number += 1
        for session in self._sessions:
            change = session.draft.cache
            change.number, change.is_snapshot = self._cache_number, is_snapshot
            change.stored = b"".join(key.to_bytes(8, "little") for key in stored)
            change.dropped = b"".join(key.to_bytes(8, "little") for key in dropped)
            session.flush(self._is_muted)

    def stall(self) -> None:
        """The engine makes no step; sessions and status go on, and say so."""
        self._unstalled.clear()
        self._stalled_since_s = time.monotonic()

    def mute(self) -> None:
        """The process hangs: connections stay open and nothing is said any more."""
        self._is_muted = True

    def resume(self) -> None:
        self._is_muted = False
        self._stalled_since_s = None
        self._unstalled.set()

    def _failure(self, what: str) -> Failure | None:
        planned = self._fail.get(what)
        return planned.pop(0) if planned else None

    def _times(self, what: str) -> int:
        """How often to send a message of this kind."""
        self.seen[what] += 1
        if self._drop[what] > 0:
            self._drop[what] -= 1
            return 0
        if self._duplicate[what] > 0:
            self._duplicate[what] -= 1
            return 2
        return 1

    # ── What it says of itself ──────────────────────────────────────────────────────────────────────────────────────

    @property
    def description(self) -> NodeDescription:
        c = self.config
        return NodeDescription(
            node_id=self.node_id,
            incarnation=self.incarnation,
            role=self.role,
            home_role=self.role,
            address=self.address,
            model=ModelDescription(c.model_name, c.fingerprint, "float32", c.max_model_tokens, c.vocab_size),
            kv_layout=KvLayout(1, c.num_blocks, 1, 8, c.block_tokens, "float32"),
            protocol_version=PROTOCOL_VERSION,
            pid=0,
            host_id="fake",
            transports=("fake",),
            device="none",
            kernels="none",
            software_version="fake",
            metrics_address=c.metrics_address,
            prefix_cache=PrefixCaching(phases_agree=True) if c.has_prefix_cache else None,
        )

    @property
    def is_down(self) -> bool:
        return self._server is None

    @property
    def used_blocks(self) -> int:
        return sum(self._blocks(x) for x in self._live.values())

    def _blocks(self, live: _Live) -> int:
        known = len(live.spec.prompt_token_ids) + live.num_generated
        return -(-(known + 1) // self.config.block_tokens)

    def _num_cached_tokens(self, spec: SequenceSpec) -> int:
        """Of the prompt; its last token is computed in any case."""
        num_full = (len(spec.prompt_token_ids) - 1) // self.config.block_tokens
        return min(self.num_cached_blocks, num_full) * self.config.block_tokens

    def _blocks_in(self, state: str) -> int:
        return sum(self._blocks(x) for x in self._live.values() if x.state == state)

    def status(self) -> NodeStatus:
        prompts = [x for x in self._live.values() if x.state == "prompt"]
        running = [x for x in self._live.values() if x.state == "running"]
        stalled_s = 0.0 if self._stalled_since_s is None else time.monotonic() - self._stalled_since_s
        return NodeStatus(
            role=self.role,
            draining=self.is_draining,
            total_blocks=self.config.num_blocks,
            # It preempts no sequence: those that grow overdraw the pool.
            free_blocks=max(0, self.config.num_blocks - self.used_blocks),
            queued_prompt_tokens=sum(x.spec.num_known_tokens for x in prompts),
            num_waiting=len(prompts),
            num_running=len(running),
            running_tokens=sum(len(x.spec.prompt_token_ids) + x.num_generated for x in running),
            stalled_s=stalled_s,
            cached_blocks=self.num_cached_blocks,
            **{f"{s}_blocks": self._blocks_in(s) for s in ("prompt", "sending", "leased", "running")},
        )

    async def Describe(self, request: node_pb2.DescribeRequest, context: Any) -> node_pb2.DescribeResponse:  # noqa: N802
        return node_pb2.DescribeResponse(
            node=codec.node_to_pb(self.description), status=codec.status_to_pb(self.status())
        )

    async def Ledger(self, request: node_pb2.LedgerRequest, context: Any) -> node_pb2.LedgerResponse:  # noqa: N802
        now = time.monotonic()
        owners = [
            node_pb2.LedgerResponse.Owner(
                owner=x.spec.sequence_id,
                state=x.state,
                num_blocks=self._blocks(x),
                epoch=x.epoch,
                age_s=now - x.since_s,
            )
            for x in self._live.values()
        ]
        return node_pb2.LedgerResponse(
            node_id=self.node_id,
            incarnation=self.incarnation,
            total_blocks=self.config.num_blocks,
            # It preempts no sequence: those that grow overdraw the pool.
            free_blocks=max(0, self.config.num_blocks - self.used_blocks),
            owners=owners,
        )

    async def Cache(self, request: node_pb2.CacheRequest, context: Any) -> node_pb2.CacheResponse:  # noqa: N802
        num_dropped, self.num_cached_blocks = (
            (self.num_cached_blocks, 0) if request.drop else (0, self.num_cached_blocks)
        )
        return node_pb2.CacheResponse(
            node_id=self.node_id,
            incarnation=self.incarnation,
            is_on=self.config.num_cached_blocks > 0,
            total_blocks=self.config.num_blocks,
            known_blocks=self.num_cached_blocks,
            cached_blocks=self.num_cached_blocks,
            max_cached_blocks=self.config.num_blocks,
            dropped_blocks=num_dropped,
        )

    async def Clock(self, request: node_pb2.ClockRequest, context: Any) -> node_pb2.ClockResponse:  # noqa: N802
        return node_pb2.ClockResponse(now_s=self.now())

    async def Trace(self, request: node_pb2.TraceRequest, context: Any) -> node_pb2.TraceResponse:  # noqa: N802
        recorded = self.timeline.since(self.now() - codec.last_s_from_pb(request.last_s))
        return codec.recorded_to_pb(self.description, self.role, recorded)

    # ── Sessions ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def Session(  # noqa: N802
        self, request_iterator: AsyncIterator[node_pb2.SessionRequest], context: Any
    ) -> AsyncIterator[node_pb2.SessionResponse]:
        session = _Session()

        async def read() -> None:
            async for request in request_iterator:
                match request.WhichOneof("message"):
                    case "hello":
                        self.open_session(session)
                    case "run":
                        self.on_run(session, request.run)
                    case "reserve":
                        self.on_reserve(session, request.reserve)
                    case "cancel":
                        self.on_cancel(request.cancel.sequence_id)

        async for response in _pumped(self, session, asyncio.create_task(read())):
            yield response

    def open_session(self, session: _Session) -> None:
        self._sessions.append(session)
        session.draft.welcome.node.CopyFrom(codec.node_to_pb(self.description))
        session.draft.welcome.status.CopyFrom(codec.status_to_pb(self.status()))
        session.flush(self._is_muted)

    def close_session(self, session: _Session) -> None:
        """The router is gone: nothing waits for these sequences any more."""
        if session in self._sessions:
            self._sessions.remove(session)
        for live in [x for x in self._live.values() if x.session is session]:
            self._forget(live.spec.sequence_id)

    def on_run(self, session: _Session, message: node_pb2.SessionRequest.Run) -> None:
        spec = codec.sequence_from_pb(message.sequence)
        self.last_spec = spec
        if failure := self._failure("run"):
            return self._send_failed(session, spec.sequence_id, failure)
        now = time.monotonic()
        live = _Live(spec, session, "prompt", now)
        live.lease = codec.lease_from_pb(message.lease) if message.HasField("lease") else None
        # Prompts run one after the other.
        busy_s = max((x.ready_s for x in self._live.values() if x.state == "prompt"), default=now)
        live.ready_s = max(now, busy_s) + spec.num_known_tokens * self.config.prefill_token_s
        self._live[spec.sequence_id] = live
        self._work.set()
        return None

    def on_reserve(self, session: _Session, message: node_pb2.SessionRequest.Reserve) -> None:
        spec = codec.sequence_from_pb(message.sequence)
        live = _Live(spec, session, "leased", time.monotonic())
        failure = self._failure("reserve")
        if failure is None and self.used_blocks + self._blocks(live) > self.config.num_blocks:
            failure = Failure("NoBlocks", f"{self.node_id} has no room", True)
        if failure is not None:
            refused = node_pb2.SequenceFailed(sequence_id=spec.sequence_id, failure=codec.failure_to_pb(failure))
            session.draft.refused.append(refused)
            return session.flush(self._is_muted)
        live.epoch = next(self._epochs)
        self._live[spec.sequence_id] = live
        num_blocks = self._blocks(live)
        lease = Lease(
            spec.sequence_id, live.epoch, self.node_id, self.incarnation, self.address, tuple(range(num_blocks)),
            message.ttl_s,
        )  # fmt: skip
        loop = asyncio.get_running_loop()
        loop.call_later(message.ttl_s, self._expire, spec.sequence_id, live.epoch)
        for _ in range(self._times("reserved")):
            session.draft.reserved.append(codec.lease_to_pb(lease))
        return session.flush(self._is_muted)

    def on_cancel(self, sequence_id: str) -> None:
        self.seen["cancel"] += 1
        self._forget(sequence_id)

    def _expire(self, sequence_id: str, epoch: int) -> None:
        live = self._live.get(sequence_id)
        if live is None or live.epoch != epoch or live.state != "leased":
            return
        self._forget(sequence_id)
        self._send_failed(live.session, sequence_id, Failure("TransferFailed", "the lease expired", True))

    def _forget(self, sequence_id: str) -> None:
        self._live.pop(sequence_id, None)

    def _send_failed(self, session: _Session, sequence_id: str, failure: Failure) -> None:
        session.draft.failed.append(
            node_pb2.SequenceFailed(sequence_id=sequence_id, failure=codec.failure_to_pb(failure))
        )
        session.flush(self._is_muted)

    # ── The engine ──────────────────────────────────────────────────────────────────────────────────────────────────

    async def _heartbeat(self) -> None:
        while True:
            await asyncio.sleep(self.config.status_s)
            status = codec.status_to_pb(self.status())
            for session in self._sessions:
                session.draft.status.CopyFrom(status)
                session.flush(self._is_muted)

    async def _engine(self) -> None:
        while True:
            if not any(x.state in ("prompt", "running") for x in self._live.values()):
                self._work.clear()
                await self._work.wait()
            await self._unstalled.wait()
            now = time.monotonic()
            prompts = [x for x in self._live.values() if x.state == "prompt"]
            is_decoding = any(x.state == "running" for x in self._live.values())
            for live in prompts:
                if live.ready_s <= now:
                    self._finish_prompt(live)
            if is_decoding:
                began_s = self.now()
                await asyncio.sleep(self.config.step_s)
                if self._unstalled.is_set():
                    num_running = sum(x.state == "running" for x in self._live.values())
                    self._decode_step()
                    self._record(began_s, 0, num_running, ())
            elif prompts:
                await asyncio.sleep(max(0.0, min(x.ready_s for x in prompts) - time.monotonic()))
            for session in self._sessions:
                session.flush(self._is_muted)

    def _record(self, began_s: float, num_prompt_tokens: int, num_decoding: int, prompts: Sequence[str]) -> None:
        ended_s = self.now()
        self.timeline.step(max(began_s, self._stepped_s), ended_s, num_prompt_tokens, num_decoding, prompts)
        self._stepped_s = ended_s

    def _finish_prompt(self, live: _Live) -> None:
        spec, session = live.spec, live.session
        chunk = live.next_chunk(self.config.vocab_size, self.config.following)
        done = node_pb2.SessionResponse.PrefillDone(
            sequence_id=spec.sequence_id,
            queue_s=max(0.0, time.monotonic() - live.since_s - spec.num_known_tokens * self.config.prefill_token_s),
            compute_s=spec.num_known_tokens * self.config.prefill_token_s,
            num_computed_tokens=spec.num_known_tokens - self._num_cached_tokens(spec),
            num_cached_tokens=self._num_cached_tokens(spec),
        )
        took_s = spec.num_known_tokens * self.config.prefill_token_s
        self._record(self.now() - took_s, spec.num_known_tokens, 0, [spec.sequence_id])
        session.draft.prefills.extend([done] * self._times("prefill_done"))
        session.draft.tokens.extend(self._tokens(chunk))
        # The first token waits for nothing.
        session.flush(self._is_muted)
        if chunk.finish_reason is not None:
            self._forget(spec.sequence_id)
            if live.lease is not None:
                self._cluster.abort(live.lease)
        elif live.lease is None:
            live.state = "running"
        else:
            live.state = "sending"
            asyncio.get_running_loop().call_later(self.config.transfer_s, self._hand_off, live, chunk)

    def _hand_off(self, live: _Live, first: TokenChunk) -> None:
        sequence_id = live.spec.sequence_id
        if self._live.get(sequence_id) is not live or live.lease is None:
            return None
        failure = self._failure("transfer")
        if failure is None and not self._times("commit"):
            return None  # decode never hears of it; the lease will expire
        if failure is None:
            failure = self._cluster.commit(live.lease, first)
        self._forget(sequence_id)
        if failure is not None:
            return self._send_failed(live.session, sequence_id, failure)
        report = TransferReport("fake", False, 1024 * live.spec.num_known_tokens, len(live.lease.block_ids),
                                self.config.transfer_s, self.config.transfer_s)  # fmt: skip
        ended_s = self.now()
        began_s = ended_s - self.config.transfer_s
        self.timeline.transfer(
            Transfer(sequence_id, live.lease.node_id, "fake", False, report.num_bytes, began_s, began_s, ended_s)
        )
        over = node_pb2.SessionResponse.HandedOff(sequence_id=sequence_id, report=codec.report_to_pb(report))
        live.session.draft.handed_off.extend([over] * self._times("handed_off"))
        return live.session.flush(self._is_muted)

    def on_commit(self, lease: Lease, first: TokenChunk) -> Failure | None:
        """Decode's side of the hand-over: None is the acknowledgement."""
        live = self._live.get(lease.sequence_id)
        if live is None or live.epoch != lease.epoch or live.state != "leased":
            return Failure("TransferFailed", f"{self.node_id} has no such lease", True)
        if failure := self._failure("decode"):
            self._forget(lease.sequence_id)
            self._send_failed(live.session, lease.sequence_id, failure)
            return failure
        live.state = "running"
        live.text_so_far(self.config.vocab_size).push(first.token_ids[0])
        live.num_generated += 1
        joined = node_pb2.SessionResponse.Joined(sequence_id=lease.sequence_id, wait_s=time.monotonic() - live.since_s)
        self.timeline.joined(lease.sequence_id, self.now())
        live.session.draft.joined.extend([joined] * self._times("joined"))
        live.session.flush(self._is_muted)
        self._work.set()
        return None

    def on_abort(self, lease: Lease) -> None:
        live = self._live.get(lease.sequence_id)
        if live is not None and live.epoch == lease.epoch:
            self._forget(lease.sequence_id)

    def _decode_step(self) -> None:
        for live in [x for x in self._live.values() if x.state == "running"]:
            chunk = live.next_chunk(self.config.vocab_size, self.config.following)
            live.session.draft.tokens.extend(self._tokens(chunk))
            if chunk.finish_reason is not None:
                self._forget(live.spec.sequence_id)


async def _pumped(
    node: FakeNode, session: _Session, reader: asyncio.Task[None]
) -> AsyncIterator[node_pb2.SessionResponse]:
    """The session's outbox, for as long as the router's side is open."""
    reader.add_done_callback(lambda _: session.outbox.put_nowait(None))
    try:
        while (message := await session.outbox.get()) is not None:
            yield message
    finally:
        reader.cancel()
        node.close_session(session)


class FakeCluster:
    """Nodes that can hand over to each other."""

    def __init__(self, config: FakeConfig | None = None, *, prefill: int = 0, decode: int = 0, mixed: int = 0) -> None:
        self.config = config or FakeConfig()
        self.nodes: dict[str, FakeNode] = {}
        for role, count in ((Role.PREFILL, prefill), (Role.DECODE, decode), (Role.MIXED, mixed)):
            for i in range(count):
                self.add(f"{role.value}-{i}", role)

    def add(self, node_id: str, role: Role, config: FakeConfig | None = None) -> FakeNode:
        self.nodes[node_id] = FakeNode(node_id, role, self, config or self.config)
        return self.nodes[node_id]

    def __getitem__(self, node_id: str) -> FakeNode:
        return self.nodes[node_id]

    @property
    def addresses(self) -> tuple[str, ...]:
        return tuple(n.address for n in self.nodes.values())

    @property
    def used_blocks(self) -> int:
        return sum(n.used_blocks for n in self.nodes.values())

    def commit(self, lease: Lease, first: TokenChunk) -> Failure | None:
        node = self.nodes[lease.node_id]
        if node.incarnation != lease.incarnation or node.is_down:
            return Failure("TransferFailed", f"{lease.node_id} is gone", True, lease.node_id)
        return node.on_commit(lease, first)

    def abort(self, lease: Lease) -> None:
        self.nodes[lease.node_id].on_abort(lease)

    async def __aenter__(self) -> FakeCluster:
        for node in self.nodes.values():
            await node.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        for node in self.nodes.values():
            await node.die()


async def _serve(arguments: argparse.Namespace) -> None:
    config = FakeConfig(
        step_s=arguments.step_s, vocab_size=arguments.vocab_size, num_blocks=arguments.num_blocks,
        prefill_token_s=arguments.prefill_token_s, max_model_tokens=65536, status_s=0.25,
    )  # fmt: skip
    cluster = FakeCluster(config, prefill=arguments.prefill, decode=arguments.decode, mixed=arguments.mixed)
    async with cluster:
        sys.stdout.write(json.dumps(list(cluster.addresses)) + "\n")
        sys.stdout.flush()
        # The parent process ends this one by closing its input.
        await asyncio.to_thread(sys.stdin.read)


def main() -> None:
    parser = argparse.ArgumentParser(description="Fake nodes in one process; prints their addresses as JSON")
    for name in ("prefill", "decode", "mixed"):
        parser.add_argument(f"--{name}", type=int, default=0)
    parser.add_argument("--step-s", type=float, default=0.001)
    parser.add_argument("--prefill-token-s", type=float, default=0.0)
    parser.add_argument("--vocab-size", type=int, default=512)
    parser.add_argument("--num-blocks", type=int, default=1 << 20)
    asyncio.run(_serve(parser.parse_args()))


if __name__ == "__main__":
    main()
