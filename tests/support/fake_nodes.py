"""Fake nodes whose failures are scripted: what fails, what is lost or repeated on the way to the router, who hangs."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from baton import errors
from baton.node_messages import (
    CacheChanged,
    Cancel,
    FromRouter,
    HandedOff,
    Joined,
    NodeMessage,
    NotMigrated,
    PrefillDone,
    Send,
)
from baton.types import (
    Lease,
    NodeDescription,
    NodeStatus,
    PositionLogprobs,
    PrefixCaching,
    Role,
    SequenceSpec,
    TokenChunk,
)
from baton.v1 import node_pb2
from engine.blocks import BlockState
from engine.fake import Row
from engine.replica import Listener, Replica
from engine.schedule import Reserved, Scheduler
from worker import fake
from worker.admin import NodeServicer
from worker.fake import PacedRunner, Push, expected_tokens
from worker.service import NodeService

_NAMES: Mapping[type[NodeMessage], str] = {
    Lease: "reserved", TokenChunk: "tokens", PrefillDone: "prefill_done", Joined: "joined", HandedOff: "handed_off",
    NotMigrated: "not_migrated",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class FakeConfig(fake.FakeConfig):
    # What comes after a token, for answers that are to be known by heart; what is not here is drawn.
    following: Mapping[int, int] = field(default_factory=dict)
    # It says that it keeps blocks; what they are is the test's to tell (`FakeNode.tell_cache`).
    has_prefix_cache: bool = False
    # It says that its cache has so many leading blocks of every prompt. They count as no used blocks.
    num_cached_blocks: int = 0


class Script:
    """What is to go wrong on a node from now on, and what it has said and been asked."""

    def __init__(self, node_id: str, config: FakeConfig) -> None:
        self._node_id = node_id
        self._block_tokens = config.block_tokens
        self.num_cached_blocks = config.num_cached_blocks
        self.has_cache = config.num_cached_blocks > 0
        self._fail: dict[str, list[errors.BatonError]] = {}
        self._drop: Counter[str] = Counter()
        self._duplicate: Counter[str] = Counter()
        self.num_garbled = 0
        self.garbles_cache = False
        # Messages, by name; "cancel" is one that came.
        self.seen: Counter[str] = Counter()
        self.last_spec: SequenceSpec | None = None
        # By the node's clock; what it claims while it makes no steps.
        self.stalled_since_s: float | None = None
        # Cleared: nothing is said any more, and connections stay open.
        self.speaks = asyncio.Event()
        self.speaks.set()

    def fail(self, what: str, times: int = 1, code: str = "NoBlocks") -> None:
        """``what``: "reserve", "run", "transfer" or "join"."""
        error = errors.from_code(code, f"scripted failure of {what} at {self._node_id}")
        self._fail.setdefault(what, []).extend([error] * times)

    def drop(self, what: str, times: int = 1) -> None:
        """``what``: "reserved", "tokens", "prefill_done", "handed_off", "joined", "not_migrated" or "commit"."""
        self._drop[what] += times

    def duplicate(self, what: str, times: int = 1) -> None:
        self._duplicate[what] += times

    def garble(self, times: int = 1) -> None:
        """Chunks of tokens whose finish reason does not exist."""
        self.num_garbled += times

    def failure(self, what: str) -> errors.BatonError | None:
        planned = self._fail.get(what)
        return planned.pop(0) if planned else None

    def raise_failure(self, what: str) -> None:
        error = self.failure(what)
        if error is not None:
            raise error

    def forget(self) -> None:
        """Nothing more goes wrong."""
        self._fail.clear()
        self._drop.clear()
        self._duplicate.clear()

    def cached(self, done: PrefillDone) -> PrefillDone:
        """As if leading blocks of the prompt had been in the cache; its last token is computed in any case."""
        num_full = (done.num_computed_tokens - 1) // self._block_tokens
        num_cached = min(self.num_cached_blocks, num_full) * self._block_tokens
        num_computed = done.num_computed_tokens - num_cached
        return replace(done, num_computed_tokens=num_computed, num_cached_tokens=num_cached)

    def times(self, what: str) -> int:
        """How often to send a message of this kind."""
        self.seen[what] += 1
        if self._drop[what] > 0:
            self._drop[what] -= 1
            return 0
        if self._duplicate[what] > 0:
            self._duplicate[what] -= 1
            return 2
        return 1


class _Runner(PacedRunner):
    def __init__(self, config: FakeConfig, memory: memoryview) -> None:
        super().__init__(config, memory)
        self._following = config.following

    def _draw_one(self, row: Row) -> tuple[int, PositionLogprobs | None]:
        token_id, report = super()._draw_one(row)
        if self._following:
            *_, (_, cell, count) = self._runs(0, row.block_ids, 0, row.stop)
            token_id = self._following.get(self._cells[cell + count - 1] - 1, token_id)
        if report is not None:
            top = tuple(replace(x, token_id=(token_id + i) % self.vocab_size) for i, x in enumerate(report.top))
            report = replace(report, chosen=replace(report.chosen, token_id=token_id), top=top)
        return token_id, report


class _Replica(Replica):
    script: Script

    @property
    def stalled_s(self) -> float:
        since_s = self.script.stalled_since_s
        return super().stalled_s if since_s is None else self._clock.now() - since_s

    def status(self, role: Role) -> NodeStatus:
        return replace(super().status(role), cached_blocks=self.script.num_cached_blocks)

    def submit(self, spec: SequenceSpec, *, hands_off: bool, listener: Listener) -> None:
        self.script.last_spec = spec
        self.script.raise_failure("run")
        super().submit(spec, hands_off=hands_off, listener=listener)

    def reserve(self, spec: SequenceSpec, num_headroom_tokens: int = 0) -> Reserved:
        self.script.raise_failure("reserve")
        return super().reserve(spec, num_headroom_tokens)

    def join(self, sequence_id: str, tokens: TokenChunk, listener: Listener) -> None:
        self.script.raise_failure("join")
        super().join(sequence_id, tokens, listener)


class _Service(NodeService):
    script: Script

    def received(self, event: FromRouter) -> None:
        if isinstance(event.message, Cancel):
            self.script.seen["cancel"] += 1
        super().received(event)

    def _send(self, action: Send) -> None:
        if isinstance(action.message, PrefillDone):
            action = replace(action, message=self.script.cached(action.message))
        name = _NAMES.get(type(action.message))
        for _ in range(1 if name is None else self.script.times(name)):
            super()._send(action)


class _Context:
    """A session's context, as far as a session uses it."""

    def __init__(self, context: Any, script: Script) -> None:
        self._context = context
        self._script = script

    async def write(self, response: node_pb2.SessionResponse) -> None:
        for tokens in response.tokens[: self._script.num_garbled]:
            self._script.num_garbled -= 1
            tokens.finish_reason = 99  # type: ignore[assignment]
        if response.HasField("cache") and self._script.garbles_cache:
            response.cache.stored = b"123"
        await self._script.speaks.wait()
        await self._context.write(response)


class _Servicer(NodeServicer):
    script: Script

    async def Session(self, request_iterator: AsyncIterator[node_pb2.SessionRequest], context: Any) -> None:  # noqa: N802
        await super().Session(request_iterator, _Context(context, self.script))  # type: ignore[arg-type]

    async def Ledger(self, request: node_pb2.LedgerRequest, context: Any) -> node_pb2.LedgerResponse:  # noqa: N802
        await self.script.speaks.wait()
        return await super().Ledger(request, context)

    async def SetRole(self, request: node_pb2.SetRoleRequest, context: Any) -> node_pb2.SetRoleResponse:  # noqa: N802
        await self.script.speaks.wait()
        return await super().SetRole(request, context)

    async def Cache(self, request: node_pb2.CacheRequest, context: Any) -> node_pb2.CacheResponse:  # noqa: N802
        script, node = self.script, self._node
        known, dropped = script.num_cached_blocks, 0
        if request.drop:
            script.num_cached_blocks, known, dropped = 0, 0, known
        num_blocks = node.kv_layout.num_blocks
        return node_pb2.CacheResponse(
            node_id=node.node_id,
            incarnation=node.incarnation,
            is_on=script.has_cache,
            total_blocks=num_blocks,
            known_blocks=known,
            cached_blocks=known,
            max_cached_blocks=num_blocks,
            dropped_blocks=dropped,
        )


class FakeNode(fake.FakeNode):
    replica_type = _Replica
    service_type = _Service
    servicer_type = _Servicer

    config: FakeConfig

    def __init__(self, node_id: str, role: Role, cluster: fake.FakeCluster, config: FakeConfig) -> None:
        self.script = Script(node_id, config)
        self._cache_number = 0
        super().__init__(node_id, role, cluster, config)

    @property
    def description(self) -> NodeDescription:
        caching = PrefixCaching(phases_agree=True) if self.config.has_prefix_cache else None
        return replace(super().description, prefix_cache=caching)

    @property
    def num_leased(self) -> int:
        """Sequences that are computed elsewhere and have not arrived."""
        return sum(line.state is BlockState.LEASED for line in self.replica.ledger()[2])

    # ── What is to go wrong ─────────────────────────────────────────────────────────────────────────────────────────

    def fail(self, what: str, times: int = 1, code: str = "NoBlocks") -> None:
        self.script.fail(what, times, code)

    def drop(self, what: str, times: int = 1) -> None:
        self.script.drop(what, times)

    def duplicate(self, what: str, times: int = 1) -> None:
        self.script.duplicate(what, times)

    def garble(self, times: int = 1) -> None:
        self.script.garble(times)

    def end_sessions(self) -> None:
        """In good order, as a node does that leaves."""
        self.service.sessions.close()

    def tell_cache(self, stored: Iterable[int], dropped: Iterable[int] = (), *, is_snapshot: bool = False) -> None:
        """Keys of blocks that it has from now on, and has no more."""
        self._cache_number += 1
        change = CacheChanged(self._cache_number, tuple(stored), tuple(dropped), is_snapshot)
        for number in self.service.sessions.numbers:
            self.service.sessions.put(number, change)

    def stall(self) -> None:
        """The engine makes no step; sessions and status go on, and say so."""
        self.runner.hold()
        self.script.stalled_since_s = self.clock.now()

    def mute(self) -> None:
        """The process hangs: connections stay open and nothing is said any more."""
        self.script.speaks.clear()

    def resume(self) -> None:
        self.script.speaks.set()
        self.script.stalled_since_s = None
        self.runner.resume()

    async def die(self) -> None:
        self.script.speaks.set()
        await super().die()

    # ── How the parts are made ──────────────────────────────────────────────────────────────────────────────────────

    def new_runner(self) -> PacedRunner:
        return _Runner(self.config, self.memory)

    def new_replica(self, scheduler: Scheduler) -> Replica:
        return _scripted(super().new_replica(scheduler), self.script)

    def new_service(self, sender: fake.Sender, receiver: fake.Receiver) -> NodeService:
        return _scripted(super().new_service(sender, receiver), self.script)

    def new_servicer(self) -> NodeServicer:
        return _scripted(super().new_servicer(), self.script)

    def deliver(self, push: Push, first_token: TokenChunk) -> None:
        error = self.script.failure("transfer")
        if error is not None:
            push.end(error)
        elif self.script.times("commit"):
            super().deliver(push, first_token)


def _scripted(part: Any, script: Script) -> Any:
    part.script = script
    return part


class FakeCluster(fake.FakeCluster):
    def __init__(self, config: FakeConfig | None = None, **pools: int) -> None:
        super().__init__(config or FakeConfig(), **pools)

    def new_node(self, node_id: str, role: Role, config: Any) -> FakeNode:
        return FakeNode(node_id, role, self, config)


__all__ = ["FakeCluster", "FakeConfig", "FakeNode", "Script", "expected_tokens"]
