"""What the router knows of the nodes' prefix caches: its memory, what a placement costs with it, and what it is worth.

Pure code, no process. ``memory`` is one index with blocks of many nodes. ``placement`` is `bench.placement` where nodes
hold the prompt. ``worth`` runs the scheduler against simulated nodes, at equal load with and without what nodes say of
their caches (the nodes have them in both cases): chat turns, and one long prompt that all requests begin with.
"""

from __future__ import annotations

import heapq
import itertools
import random
import statistics
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from baton.node_messages import CacheChanged
from baton.prefix import PrefixScheme
from baton.types import KvLayout, ModelDescription, NodeDescription, NodeStatus, PrefixCaching, Role
from router.cluster.config import PolicyConfig
from router.cluster.policy import Decision, Demand
from router.cluster.prefix_index import PrefixIndex
from router.cluster.scheduler import Scheduler
from router.config import LimitsConfig

BLOCK_TOKENS = 16
# As nodes have it (`worker.session.SessionConfig`).
_MESSAGE_KEYS = 2048
# Room is no matter here.
NUM_BLOCKS = 1 << 17


def run(quick: bool) -> dict[str, Any]:
    return {
        "memory": [_memory(1000, 1000 if quick else 10_000, num_copies) for num_copies in (1, 2)],
        "placement": [
            _placement(num_nodes, holders, 100 if quick else 1000)
            for num_nodes in (10, 100, 1000)
            for holders in ("none", "a tenth", "all")
        ],
        "worth": [
            _worth(traffic, is_aware, 1000 if quick else 8000) for traffic in (CHAT, HOT) for is_aware in (False, True)
        ],
    }


# -- memory


def _memory(num_nodes: int, num_blocks: int, num_copies: int) -> dict[str, Any]:
    """A twentieth of each node's blocks is on all nodes, and the rest on as many as there are copies. Times of the
    processor."""
    source = random.Random(1)
    index = PrefixIndex(max_blocks=2 * num_nodes * num_blocks)
    before_bytes = _resident_bytes()
    common = [source.getrandbits(64) for _ in range(num_blocks // 20)]
    began_s, longest_s = time.process_time(), 0.0
    own: list[int] = []
    for number in range(num_nodes):
        if number % num_copies == 0:
            own = [source.getrandbits(64) for _ in range(num_blocks - len(common))]
        keys, number_of = [*common, *own], 0
        for first in range(0, len(keys), _MESSAGE_KEYS):
            chunk_s = time.process_time()
            number_of += _MESSAGE_KEYS
            index.change(
                f"n{number}", CacheChanged(number_of, tuple(keys[first : first + _MESSAGE_KEYS]), (), first == 0)
            )
            longest_s = max(longest_s, time.process_time() - chunk_s)
    took_s = time.process_time() - began_s
    used_bytes = _resident_bytes() - before_bytes
    forget_s = time.process_time()
    index.forget("n1")
    forget_s = time.process_time() - forget_s
    return {
        "nodes": num_nodes,
        "blocks_each": num_blocks,
        "copies": num_copies,
        "memory_mib": used_bytes / 2**20,
        "bytes_per_block": used_bytes / (num_nodes * num_blocks),
        "us_per_block": took_s / (num_nodes * num_blocks) * 1e6,
        "longest_message_ms": longest_s * 1e3,
        "forget_node_ms": forget_s * 1e3,
    }


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


# -- one placement


@dataclass(eq=False, slots=True)
class _Prompt:
    num_tokens: int
    block_keys: Sequence[int]

    def keys(self, scheme: PrefixScheme) -> Sequence[int]:
        return self.block_keys


@dataclass(eq=False, slots=True)
class _Item:
    number: int
    prompt: _Prompt
    arrived_s: float = 0.0
    client: str = ""
    has_tokens: bool = False
    on_end: Callable[[float], None] = field(default=lambda now: None)

    def can_move_from(self, node_id: str) -> bool:
        return False

    @property
    def sequence_id(self) -> str:
        return f"{self.number}/0/0"

    def demand(self, now: float) -> Demand:
        return Demand(self.prompt.num_tokens, prompt=self.prompt)


def _description(node_id: str, role: Role, num_blocks: int = NUM_BLOCKS) -> NodeDescription:
    model = ModelDescription("bench", "bench", "bfloat16", 1 << 20, 512)
    layout = KvLayout(32, num_blocks, 8, 128, BLOCK_TOKENS, "bfloat16")
    return NodeDescription(
        node_id, 1, role, "a:1", model, layout, 1, 1, "h", (), "none", "none", "0",
        prefix_cache=PrefixCaching(phases_agree=True),
    )  # fmt: skip


def _placement(num_nodes: int, holders: str, num_samples: int) -> dict[str, Any]:
    """A prompt of 1,600 tokens of which nodes hold 80 of 100 blocks."""
    scheduler: Scheduler[_Item] = Scheduler(LimitsConfig(), PolicyConfig(), 0.0)
    prompt = _Prompt(1605, [key * 7919 for key in range(1, 101)])
    every = {"none": 0, "a tenth": 10, "all": 1}[holders]
    for number in range(num_nodes // 2):
        for role in (Role.PREFILL, Role.DECODE):
            status = NodeStatus(
                role, total_blocks=1 << 20, free_blocks=1 << 20, queued_prompt_tokens=number * 7 % 50,
                running_tokens=number * 11 % 50,
            )  # fmt: skip
            node = _description(f"{role.value}-{number}", role, 1 << 20)
            scheduler.node_up(node, status, True, 0.0)
            held = prompt.block_keys[:80] if every and number % every == 0 else [1]
            scheduler.cache_changed(node.node_id, CacheChanged(1, tuple(held), is_snapshot=True))
    samples_s = []
    for number in range(num_samples):
        item = _Item(number, prompt)
        scheduler.arrive(item, 0.5)
        began_s = time.perf_counter()
        waiting = scheduler.next(0.5)
        assert waiting is item
        decision = scheduler.decide(item, 0.5)
        assert isinstance(decision, Decision)
        scheduler.assign(item, decision, prompt.num_tokens, 0.5)
        samples_s.append(time.perf_counter() - began_s)
        scheduler.prefilled(item.sequence_id)
        scheduler.release(item, 0.5)
        scheduler.depart(item, 0.5)
    return {"nodes": num_nodes, "holders": holders, "placement_us": statistics.median(samples_s) * 1e6}


# -- what it is worth


@dataclass(frozen=True, slots=True)
class Traffic:
    """Conversations, each of some turns that end with an answer; all begin with one of ``num_shared`` prompts."""

    name: str
    num_users: int
    num_turns: int
    num_shared: int
    shared_tokens: int
    message_tokens: int
    answer_tokens: int
    think_s: float


# By load alone, chat turns take about two thirds of the prompt pool's time.
CHAT = Traffic("chat turns", 600, 6, 12, 600, 60, 120, 4.0)
HOT = Traffic("one hot prompt", 200, 1, 1, 2000, 400, 30, 1.0)

_NUM_OF_ROLE = 8
# Simulated nodes: a prompt's part that does not depend on its length, a token of it, a step, a token of KV in each
# step, a byte to the decode node.
_PROMPT_S, _TOKEN_S, _STEP_S, _KV_S, _BYTE_S = 2e-3, 1e-4, 1e-2, 5e-8, 1e-10
_STATUS_S = 0.2


class _Node:
    """Computes prompts one after the other; generates beside that, a little slower for each token of KV."""

    def __init__(self, description: NodeDescription, cache_blocks: int) -> None:
        self.description = description
        self.cache: OrderedDict[int, None] = OrderedDict()
        self.cache_blocks = cache_blocks
        self.number = 0
        self.free_at_s = 0.0
        self.queued: dict[_Item, int] = {}
        self.running: dict[_Item, int] = {}

    def num_hit(self, keys: Iterable[int]) -> int:
        return sum(1 for _ in itertools.takewhile(self.cache.__contains__, keys))

    def store(self, keys: Sequence[int]) -> CacheChanged:
        """The last blocks go first when there is no room."""
        stored = tuple(key for key in keys if key not in self.cache)
        for key in reversed(keys):
            self.cache[key] = None
            self.cache.move_to_end(key)
        dropped = []
        while len(self.cache) > self.cache_blocks:
            dropped.append(self.cache.popitem(last=False)[0])
        self.number += len(stored) + len(dropped)
        return CacheChanged(self.number, stored, tuple(dropped))

    def status(self) -> NodeStatus:
        running_tokens = sum(self.running.values())
        used = sum(-(-tokens // BLOCK_TOKENS) for tokens in self.running.values())
        return NodeStatus(
            self.description.home_role, total_blocks=NUM_BLOCKS, free_blocks=NUM_BLOCKS - used,
            queued_prompt_tokens=sum(self.queued.values()), num_running=len(self.running),
            running_tokens=running_tokens,
        )  # fmt: skip


class _Simulation:
    def __init__(self, traffic: Traffic, is_aware: bool) -> None:
        self.traffic = traffic
        self.is_aware = is_aware
        self.now = 0.0
        self.source = random.Random(7)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._counter = itertools.count()
        self.scheduler: Scheduler[_Item] = Scheduler(LimitsConfig(max_client_running=1 << 20), PolicyConfig(), 0.0)
        self.nodes: dict[str, _Node] = {}
        for role in (Role.PREFILL, Role.DECODE):
            for number in range(_NUM_OF_ROLE):
                node = _Node(_description(f"{role.value}-{number}", role), cache_blocks=5000)
                self.nodes[node.description.node_id] = node
                self.scheduler.node_up(node.description, node.status(), True, 0.0)
                if is_aware:
                    self.scheduler.cache_changed(node.description.node_id, CacheChanged(0, (), is_snapshot=True))
        # The keys of a prompt and of the answer behind it.
        self._all_keys: dict[_Item, Sequence[int]] = {}
        self._count_anew()

    def at(self, when_s: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when_s, next(self._counter), what))

    def run(self, num_requests: int) -> None:
        for user in range(self.traffic.num_users):
            self.at(self.source.random() * self.traffic.think_s, lambda user=user: self._converse(user, 0))  # type: ignore[misc]
        self.at(_STATUS_S, self._statuses)
        self._run_until(num_requests // 4)
        # The caches were empty when it began.
        self._count_anew()
        self._run_until(num_requests)

    def _run_until(self, num_requests: int) -> None:
        while len(self.ttfts_s) < num_requests:
            self.now, _, what = heapq.heappop(self._events)
            what()
            while (item := self.scheduler.next(self.now)) is not None and self._place(item):
                pass

    def _count_anew(self) -> None:
        self.began_s = self.now
        self.ttfts_s: list[float] = []
        self.num_tokens = self.num_hit_tokens = self.num_moved_tokens = 0
        self.prefills: Counter[str] = Counter()
        self.decodes: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()

    def _statuses(self) -> None:
        for node_id, node in self.nodes.items():
            self.scheduler.node_status(node_id, node.status())
        self.at(self.now + _STATUS_S, self._statuses)

    def _converse(self, user: int, conversation: int, turn: int = 0, num_before: int = 0) -> None:
        traffic = self.traffic
        shared = (user + conversation) % traffic.num_shared
        num_tokens = (num_before or traffic.shared_tokens) + traffic.message_tokens
        num_after = num_tokens + traffic.answer_tokens

        def key(block: int) -> int:
            is_shared = (block + 1) * BLOCK_TOKENS <= traffic.shared_tokens
            return hash(("shared", shared, block) if is_shared else (user, conversation, block)) & (1 << 63) - 1

        keys = [key(block) for block in range(num_after // BLOCK_TOKENS)]

        def ended(now: float) -> None:
            pause_s = self.source.expovariate(1 / traffic.think_s)
            is_last = turn + 1 == traffic.num_turns
            following = (user, conversation + 1) if is_last else (user, conversation, turn + 1, num_after)
            self.at(now + pause_s, lambda: self._converse(*following))

        prompt = _Prompt(num_tokens, keys[: num_tokens // BLOCK_TOKENS])
        item = _Item(next(self._counter), prompt, self.now, on_end=ended)
        self._all_keys[item] = keys
        self.scheduler.arrive(item, self.now)

    def _place(self, item: _Item) -> bool:
        decision = self.scheduler.decide(item, self.now)
        if not isinstance(decision, Decision):
            return False
        self.scheduler.assign(item, decision, item.prompt.num_tokens, self.now)
        placement, num_tokens, keys = decision.placement, item.prompt.num_tokens, item.prompt.block_keys
        prefill, decode = self.nodes[placement.prefill_id], self.nodes[placement.decode_id]
        self.prefills[placement.prefill_id] += 1
        self.decodes[placement.decode_id] += 1
        self.reasons[decision.reason.value] += 1
        began_s = max(self.now, prefill.free_at_s)
        num_hit = min(prefill.num_hit(keys) * BLOCK_TOKENS, (num_tokens - 1) // BLOCK_TOKENS * BLOCK_TOKENS)
        compute_s = _PROMPT_S + (num_tokens - num_hit) * _TOKEN_S
        prefill.free_at_s = began_s + compute_s
        prefill.queued[item] = num_tokens - num_hit
        self.num_tokens += num_tokens
        self.num_hit_tokens += num_hit
        num_moved = 0 if prefill is decode else num_tokens - decode.num_hit(keys) * BLOCK_TOKENS
        self.num_moved_tokens += num_moved
        self.at(
            began_s + compute_s,
            lambda: self._computed(item, prefill, decode, num_tokens - num_hit, compute_s, num_moved),
        )
        return True

    def _computed(
        self, item: _Item, prefill: _Node, decode: _Node, num_computed: int, compute_s: float, num_moved: int
    ) -> None:  # fmt: skip
        del prefill.queued[item]
        self.ttfts_s.append(self.now - item.arrived_s)
        self.scheduler.prefilled(item.sequence_id)
        self.scheduler.rates.computed(prefill.description.node_id, num_computed, compute_s)
        move_s = num_moved * self._token_bytes * _BYTE_S
        if num_moved:
            self.scheduler.rates.moved(num_moved * self._token_bytes, move_s)
        self._tell(prefill, item.prompt.block_keys)
        decode.running[item] = item.prompt.num_tokens
        token_s = _STEP_S + _KV_S * sum(decode.running.values())
        self._tell(decode, item.prompt.block_keys)
        self.at(self.now + move_s + token_s * self.traffic.answer_tokens, lambda: self._ended(item, decode, token_s))

    @property
    def _token_bytes(self) -> int:
        return 32 * 8 * 2 * 128 * 2

    def _ended(self, item: _Item, decode: _Node, token_s: float) -> None:
        num_beside = sum(decode.running.values())
        del decode.running[item]
        self._tell(decode, self._all_keys.pop(item))
        node_id = decode.description.node_id
        self.scheduler.rates.generated(node_id, self.traffic.answer_tokens, token_s, num_beside)
        self.scheduler.release(item, self.now)
        self.scheduler.depart(item, self.now)
        item.on_end(self.now)

    def _tell(self, node: _Node, keys: Sequence[int]) -> None:
        change = node.store(keys)
        if self.is_aware:
            self.scheduler.cache_changed(node.description.node_id, change)


def _worth(traffic: Traffic, is_aware: bool, num_requests: int) -> dict[str, Any]:
    simulation = _Simulation(traffic, is_aware)
    simulation.run(num_requests)
    ordered = sorted(simulation.ttfts_s)
    return {
        "traffic": traffic.name,
        "placement": "by load and prefix" if is_aware else "by load",
        "hit_rate": simulation.num_hit_tokens / simulation.num_tokens,
        "ttft_p50_ms": ordered[len(ordered) // 2] * 1e3,
        "ttft_p99_ms": ordered[len(ordered) * 99 // 100] * 1e3,
        "moved_share": simulation.num_moved_tokens / simulation.num_tokens,
        "busiest_prefill_over_mean": _spread(simulation.prefills),
        "busiest_decode_over_mean": _spread(simulation.decodes),
        "requests_per_s": len(simulation.ttfts_s) / (simulation.now - simulation.began_s),
        "on_decode_alone": simulation.reasons["prefix"] / simulation.reasons.total(),
    }


def _spread(counts: Counter[str]) -> float:
    role = next(iter(counts)).split("-")[0]
    mine = [count for node_id, count in counts.items() if node_id.startswith(role)]
    return max(mine) / (sum(mine) / _NUM_OF_ROLE)
