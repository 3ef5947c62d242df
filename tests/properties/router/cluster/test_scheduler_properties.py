"""The scheduler under arrivals, placements, moves, ends, refusals, prefix hits and nodes that come and go: its books
balance throughout, and of several choices of a prompt only the first runs until nodes have the prompt's blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from baton.errors import Overloaded, Unavailable
from baton.node_messages import CacheChanged
from baton.prefix import PrefixScheme, key_of
from baton.types import KvLayout, ModelDescription, NodeDescription, NodeStatus, PrefixCaching, Role
from router.cluster.config import PolicyConfig
from router.cluster.policy import Decision, Demand, Obstacle
from router.cluster.rebalance import MoveReason, Planned
from router.cluster.scheduler import Scheduler

NODES = {"p0": Role.PREFILL, "d0": Role.DECODE, "m0": Role.MIXED}
CLIENTS = ("a", "b")
BLOCK_TOKENS, NUM_BLOCKS = 16, 8


@dataclass(frozen=True)
class Limits:
    max_queued: int = 6
    max_active: int = 10
    max_client_share: float = 0.5
    max_client_running: int = 2
    client_alone_s: float = 2.0
    refuse_after_s: float = 2.0


@dataclass(eq=False)
class Prompt:
    token_ids: tuple[int, ...]

    def keys(self, scheme: PrefixScheme) -> list[int]:
        return [key_of(value) for value in scheme.block_hashes(self.token_ids, len(self.token_ids))]


# Two that begin alike, one without a full block.
PROMPTS = [Prompt((7,) * 32 + (8,) * 8), Prompt((7,) * 35), Prompt((9,) * 12)]


@dataclass(eq=False)
class Item:
    client: str
    number: int
    prompt: Prompt
    has_tokens: bool = False
    # It decodes here; empty while it moves, too.
    decodes_on: str = ""
    num_attempts: int = 0
    avoid: set[str] = field(default_factory=set)

    @property
    def sequence_id(self) -> str:
        return f"{self.number}/{self.num_attempts}"

    @property
    def num_known_tokens(self) -> int:
        return len(self.prompt.token_ids)

    def can_move_from(self, node_id: str) -> bool:
        return self.decodes_on == node_id

    def demand(self, now: float) -> Demand:
        return Demand(self.num_known_tokens, avoid=self.avoid, prompt=self.prompt)


def description(node_id: str) -> NodeDescription:
    role = NODES[node_id]
    return NodeDescription(
        node_id, 1, role, "a:1", ModelDescription("m", "f", "float32", 100, 10),
        KvLayout(1, NUM_BLOCKS, 1, 8, BLOCK_TOKENS, "float32"), 1, 1, "h", (), "cpu", "none", "0",
        prefix_cache=PrefixCaching(phases_agree=True),
    )  # fmt: skip


def keys_of(prompt: Prompt) -> list[int]:
    scheme = PrefixScheme.of(description("p0"))
    assert scheme is not None
    return prompt.keys(scheme)


class Cluster(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.scheduler: Scheduler[Item] = Scheduler(Limits(), PolicyConfig(), self.now)
        self.num_made = 0
        self.waiting: set[Item] = set()
        # By a leader that has not shared, those that wait for it.
        self.behind: dict[Item, set[Item]] = {}
        self.running: set[Item] = set()
        # With their targets.
        self.moving: dict[Item, str] = {}
        self.available: set[str] = set()
        self.up: set[str] = set()

    def status(self, node_id: str, free: int) -> NodeStatus:
        return NodeStatus(NODES[node_id], total_blocks=NUM_BLOCKS, free_blocks=free)

    @rule(node_id=st.sampled_from(sorted(NODES)), is_available=st.booleans())
    def node_up(self, node_id: str, is_available: bool) -> None:
        if node_id in self.up:
            self.scheduler.node_changed(node_id, is_available, self.now)
        else:
            self.scheduler.node_up(description(node_id), self.status(node_id, NUM_BLOCKS), is_available, self.now)
        self.up.add(node_id)
        (self.available.add if is_available else self.available.discard)(node_id)
        assert self.scheduler.has_news

    @precondition(lambda self: self.up)
    @rule(data=st.data())
    def node_down(self, data: st.DataObject) -> None:
        node_id = data.draw(st.sampled_from(sorted(self.up)))
        there = {x.sequence_id for x in self.running if node_id in self.nodes_of(x)}
        lost = self.scheduler.node_down(node_id, self.now)
        assert set(lost) == there
        self.up.discard(node_id)
        self.available.discard(node_id)
        for item in [self.scheduler.item(sequence_id) for sequence_id in lost]:
            assert item is not None
            self.run_again(item)

    @precondition(lambda self: self.up)
    @rule(data=st.data(), free=st.integers(0, NUM_BLOCKS), drains=st.booleans())
    def node_speaks(self, data: st.DataObject, free: int, drains: bool) -> None:
        node_id = data.draw(st.sampled_from(sorted(self.up)))
        status = replace(self.status(node_id, free), draining=drains)
        self.scheduler.node_status(node_id, status)
        self.scheduler.has_news = False
        self.scheduler.node_status(node_id, status)
        assert not self.scheduler.has_news, "a status that repeats the one before changes nothing"

    @precondition(lambda self: self.up)
    @rule(data=st.data(), prompt=st.sampled_from(PROMPTS), is_snapshot=st.booleans())
    def cache_changes(self, data: st.DataObject, prompt: Prompt, is_snapshot: bool) -> None:
        node_id = data.draw(st.sampled_from(sorted(self.up)))
        stored = data.draw(st.lists(st.sampled_from([*keys_of(prompt), 1, 2]), unique=True))
        dropped = tuple(data.draw(st.lists(st.sampled_from([*keys_of(prompt), 1, 2]), unique=True)))
        self.scheduler.cache_changed(node_id, CacheChanged(1, tuple(stored), dropped, is_snapshot))

    @rule(client=st.sampled_from(CLIENTS), prompt=st.sampled_from(PROMPTS), num_choices=st.integers(1, 3))
    def arrive(self, client: str, prompt: Prompt, num_choices: int) -> None:
        try:
            self.scheduler.check_capacity(num_choices, client, self.now)
        except (Overloaded, Unavailable):
            return
        prompt = Prompt(prompt.token_ids)
        leader = None
        for _ in range(num_choices):
            self.num_made += 1
            item = Item(client, self.num_made, prompt)
            self.scheduler.arrive(item, self.now, prompt if num_choices > 1 else None)
            self.waiting.add(item)
            if leader is not None:
                self.behind[leader].add(item)
            elif num_choices > 1 and self.scheduler.prefix_scheme is not None and keys_of(prompt):
                leader = item
                self.behind[leader] = set()

    @rule(data=st.data())
    def shares(self, data: st.DataObject) -> None:
        item = data.draw(st.sampled_from([*sorted(self.running, key=lambda x: x.number), None]))
        if item is not None:
            self.scheduler.has_shared(item, self.now)
            self.behind.pop(item, None)

    @rule()
    def place(self) -> None:
        while (item := self.scheduler.next(self.now)) is not None:
            assert item in self.waiting
            assert not any(item in behind for behind in self.behind.values()), "it waits for another one"
            decision = self.scheduler.decide(item, self.now)
            if isinstance(decision, Obstacle):
                assert (decision is Obstacle.NO_NODE) == (not self.available)
                break
            assert set(decision.placement.node_ids) <= self.available
            index, placement = self.scheduler.prefix_index, decision.placement
            for node_id, num_hit in (
                (placement.prefill_id, decision.num_prefill_hit), (placement.decode_id, decision.num_decode_hit),
            ):  # fmt: skip
                leading = keys_of(item.prompt)[: num_hit // BLOCK_TOKENS]
                assert all(node_id in index.holders_of(key) for key in leading), "it holds what is counted on"
            assert decision.num_prefill_hit < item.num_known_tokens
            if self.scheduler.waits_for_sibling(item, decision, self.now):
                bringing = [
                    x for x in self.running if x.prompt is item.prompt and placement.decode_id in self.nodes_of(x)
                ]
                assert bringing, "nothing brings the blocks"
                continue
            self.assign(item, decision)

    def assign(self, item: Item, decision: Decision) -> None:
        self.scheduler.assign(item, decision, item.num_known_tokens, self.now)
        assert self.scheduler.item(item.sequence_id) is item
        self.waiting.discard(item)
        self.running.add(item)

    def nodes_of(self, item: Item) -> tuple[str, ...]:
        attempt = self.scheduler.attempt(item)
        placed = () if attempt is None else attempt.placement.node_ids
        return placed if item not in self.moving else (*placed, self.moving[item])

    def run_again(self, item: Item) -> None:
        self.scheduler.release(item, self.now)
        self.moving.pop(item, None)
        item.decodes_on = ""
        item.num_attempts += 1
        self.scheduler.rerun(item, self.now)
        self.running.discard(item)
        self.waiting.add(item)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), what=st.sampled_from(["confirmed", "prefilled", "full", "failed", "worked"]))
    def progress(self, data: st.DataObject, what: str) -> None:
        item = data.draw(st.sampled_from(sorted(self.running, key=lambda x: x.number)))
        attempt = self.scheduler.attempt(item)
        assert attempt is not None
        match what:
            case "confirmed":
                self.scheduler.confirmed(attempt.sequence_id)
            case "prefilled":
                self.scheduler.prefilled(attempt.sequence_id)
                item.has_tokens = True
                if item not in self.moving:
                    item.decodes_on = attempt.placement.decode_id
            case "full":
                self.scheduler.node_full(attempt.placement.decode_id)
                self.run_again(item)
            case "failed":
                self.scheduler.pair_failed(attempt.placement, self.now)
                item.avoid = {attempt.placement.prefill_id}
                self.run_again(item)
            case "worked":
                self.scheduler.pair_worked(attempt.placement)

    @precondition(lambda self: self.running or self.waiting)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        self.end_of(data.draw(st.sampled_from(sorted(self.running | self.waiting, key=lambda x: x.number))))

    @rule()
    def moves_are_planned(self) -> None:
        """Off nodes that drain, to nodes that take new work and have room."""
        while (move := self.scheduler.next_move(self.now)) is not None:
            source, target = self.scheduler.node(move.source_id), self.scheduler.node(move.target_id)
            assert source is not None
            assert target is not None
            assert move.target_id in self.available
            assert move.source_id != move.target_id
            assert target.free_tokens >= move.item.num_known_tokens + move.num_headroom_tokens
            assert source.status.draining or move.reason is not MoveReason.DRAIN
            self.begin(move)

    @precondition(lambda self: any(item.decodes_on for item in self.running))
    @rule(data=st.data(), goal=st.sampled_from(sorted(NODES)))
    def move_anywhere(self, data: st.DataObject, goal: str) -> None:
        item = data.draw(st.sampled_from(sorted((x for x in self.running if x.decodes_on), key=lambda x: x.number)))
        if item.decodes_on != goal:
            self.begin(Planned(item, item.decodes_on, goal, MoveReason.BALANCE, 16))

    def begin(self, move: Planned[Item]) -> None:
        assert move.item.decodes_on == move.source_id
        self.scheduler.begin_move(move, self.now)
        self.moving[move.item], move.item.decodes_on = move.target_id, ""

    @precondition(lambda self: self.moving)
    @rule(data=st.data(), what=st.sampled_from(["confirmed", "moved", "stays"]))
    def move_goes_on(self, data: st.DataObject, what: str) -> None:
        item = data.draw(st.sampled_from(sorted(self.moving, key=lambda x: x.number)))
        attempt = self.scheduler.attempt(item)
        assert attempt is not None
        if what == "confirmed":
            self.scheduler.confirmed(attempt.sequence_id)
            return
        target = self.moving.pop(item)
        if what == "moved":
            self.scheduler.moved(item)
            item.decodes_on = target
            assert self.nodes_of(item) == (target,)
        else:
            self.scheduler.move_ended(item)
            item.decodes_on = attempt.placement.decode_id

    def end_of(self, item: Item) -> None:
        self.scheduler.release(item, self.now)
        self.moving.pop(item, None)
        item.decodes_on = ""
        self.scheduler.depart(item, self.now)
        self.running.discard(item)
        self.waiting.discard(item)
        self.behind.pop(item, None)
        for behind in self.behind.values():
            behind.discard(item)

    @rule(client=st.sampled_from(CLIENTS), is_passing=st.booleans())
    def make_room(self, client: str, is_passing: bool) -> None:
        aside = self.scheduler.crowding(client, is_passing=is_passing)
        assert len(set(aside)) == len(aside)
        assert all(x in self.running and x.client != client for x in aside)
        for item in aside:
            self.run_again(item)

    @rule(seconds=st.floats(0, 3))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def books_balance(self) -> None:
        self.scheduler.check()
        assert {x for x in NODES if self.scheduler.prefix_index.num_blocks_of(x)} <= self.up
        assert set(self.scheduler.waiting) == self.waiting
        assert set(self.scheduler.in_flight) == self.waiting | self.running
        assert self.scheduler.num_in_flight <= Limits.max_active + Limits.max_active // 2
        assert self.scheduler.is_available == bool(self.available)

    def teardown(self) -> None:
        """When all is over that runs, everything that waits gets its turn."""
        self.scheduler.prefix_index.check()
        self.now += Limits.client_alone_s
        for item in list(self.running):
            self.end_of(item)
        while (item := self.scheduler.next(self.now)) is not None:
            self.end_of(item)
        assert not self.waiting, "forgotten"
        self.books_balance()


Cluster.TestCase.settings = settings(max_examples=100, stateful_step_count=40)
TestScheduler = Cluster.TestCase


def test_a_planner_drives_the_same_scheduler_without_a_loop_or_a_clock() -> None:
    scheduler: Scheduler[Item] = Scheduler(Limits(), PolicyConfig(), 0.0)
    for node_id in ("p0", "d0"):
        scheduler.node_up(description(node_id), NodeStatus(NODES[node_id], free_blocks=NUM_BLOCKS), True, 0.0)
    items = [Item("a", i, PROMPTS[0]) for i in range(4)]
    for each in items:
        scheduler.arrive(each, 0.0)
    placed = []
    while (item := scheduler.next(1.0)) is not None:
        decision = scheduler.decide(item, 1.0)
        if isinstance(decision, Obstacle):
            break
        scheduler.assign(item, decision, item.num_known_tokens, 1.0)
        placed.append(item)
    assert placed == items[:2], "three blocks each, of eight"
    assert decision is Obstacle.NO_ROOM
    scheduler.release(items[0], 2.0)
    scheduler.depart(items[0], 2.0)
    assert scheduler.next(2.0) is items[2]
    assert isinstance(scheduler.decide(items[2], 2.0), Decision)
