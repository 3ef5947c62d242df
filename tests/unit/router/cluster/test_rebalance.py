"""Which running sequence moves where: state in, decision out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain

import pytest

from baton.types import KvLayout, ModelDescription, NodeDescription, NodeStatus, Role, StepTimes
from router.cluster.config import PolicyConfig
from router.cluster.load import NodeLoad
from router.cluster.policy import Demand
from router.cluster.pools import Pools
from router.cluster.rates import Rates
from router.cluster.rebalance import MoveReason, Planned, Rebalance

CONFIG = PolicyConfig()
ROLES = {"p": Role.PREFILL, "d": Role.DECODE, "m": Role.MIXED}
# A prompt's token takes 1 ms; a step 20 ms and more: 1 ms a sequence, 10 ms for 1,000 tokens of KV.
TIMES = StepTimes(0.02, 1e-3, 1e-3, 1e-5)
NUM_BLOCKS, BLOCK_TOKENS = 1000, 16


@dataclass(eq=False)
class Item:
    name: str
    on: str
    num_tokens: int = 100
    priority: int = 0
    can_move: bool = True
    avoid: tuple[str, ...] = ()
    num_looks: int = 0

    def can_move_from(self, node_id: str) -> bool:
        return self.can_move and self.on == node_id

    def demand(self, now: float) -> Demand:
        self.num_looks += 1
        return Demand(self.num_tokens, priority=self.priority, avoid=self.avoid)


def node(
    name: str,
    *items: Item,
    free: int = NUM_BLOCKS,
    drains: bool = False,
    times: StepTimes | None = TIMES,
    prompt_tokens: int = 0,
) -> NodeLoad:
    """With these running; its name says its role."""
    role = ROLES[name[0]]
    status = NodeStatus(
        role, draining=drains, total_blocks=NUM_BLOCKS, free_blocks=free, num_running=len(items),
        running_tokens=sum(item.num_tokens for item in items), step_times=times,
        queued_prompt_tokens=prompt_tokens,
    )  # fmt: skip
    description = NodeDescription(
        name, 1, role, "a:1", ModelDescription("m", "f", "float32", 100, 10),
        KvLayout(1, NUM_BLOCKS, 1, 8, BLOCK_TOKENS, "float32"), 1, 1, "h", (), "cpu", "none", "0",
    )  # fmt: skip
    return NodeLoad(description, status, Rates(CONFIG))


class State:
    def __init__(self, *nodes: NodeLoad, items: list[Item], config: PolicyConfig = CONFIG) -> None:
        self.rebalance: Rebalance[Item] = Rebalance(config, Rates(config))
        self.nodes = nodes
        self.items = items
        self.pools = Pools()
        for each in nodes:
            if not each.status.draining:
                self.pools.put(each)

    def next(self, now: float = 0.0, wanted: int = 0) -> Planned[Item] | None:
        on_node: dict[str, dict[Item, None]] = {}
        for item in self.items:
            on_node.setdefault(item.on, {})[item] = None
        preferred = {item: item.on for item in self.items if item.priority < 0}
        return self.rebalance.next(
            self.nodes, self.pools, on_node, now, num_wanted_tokens=wanted, preferred=preferred
        )  # fmt: skip

    def all(self, now: float = 0.0, wanted: int = 0) -> list[tuple[str, str, str]]:
        """As the dispatcher does: begin one after the other."""
        found = []
        while (move := self.next(now, wanted)) is not None:
            self.rebalance.began(move, now)
            move.item.can_move = False
            found.append((move.item.name, move.target_id, move.reason.value))
        return found


def items(count: int, on: str, num_tokens: int = 100) -> list[Item]:
    return [Item(f"{on}/{i}", on, num_tokens) for i in range(count)]


def test_nothing_is_to_be_done_where_all_is_well() -> None:
    there, here = items(4, "d0"), items(4, "d1")
    assert State(node("d0", *there), node("d1", *here), items=there + here).next() is None
    assert State(node("d0", *there), items=there).next() is None
    assert State(items=[]).next() is None


def test_a_node_that_drains_gives_all_away_a_few_at_a_time() -> None:
    there = items(6, "d0")
    state = State(node("d0", *there, drains=True), node("d1"), items=there)
    assert state.all() == [(f"d0/{i}", "d1", "drain") for i in range(4)], "max_moves"
    for item in there[:2]:
        state.rebalance.ended(item)
        item.on = "d1"
    assert state.all() == [("d0/4", "d1", "drain"), ("d0/5", "d1", "drain")]


@pytest.mark.parametrize(
    ("others", "target"),
    [
        ([node("d1", *items(9, "d1", 1000)), node("d2")], "d2"),
        # A full one of the same pool, then a mixed one, then one that computes prompts.
        ([node("d1", free=3), node("m0"), node("p0")], "m0"),
        ([node("d1", free=3), node("p0")], "p0"),
        ([node("d1", free=3)], None),
        ([node("d1", drains=True)], None),
    ],
)
def test_where_to(others: list[NodeLoad], target: str | None) -> None:
    there = items(1, "d0")
    move = State(node("d0", *there, drains=True), *others, items=there).next()
    assert (None if move is None else move.target_id) == target


def test_one_that_cannot_move_now_does_not_keep_the_others() -> None:
    there = items(2, "d0")
    there[0].can_move = False
    assert State(node("d0", *there, drains=True), node("d1"), items=there).all() == [("d0/1", "d1", "drain")]


@pytest.mark.parametrize("drains", [True, False])
def test_none_moves_to_a_node_that_failed_it(drains: bool) -> None:
    there = items(9, "d0", 1000)
    for item in there:
        item.avoid = ("d1",)
    assert State(node("d0", *there, drains=drains), node("d1"), items=there).all() == []
    there[0].avoid = ()
    move = State(node("d0", *there, drains=drains), node("d1"), items=there).next()
    assert move is not None
    assert move.item is there[0]


def test_a_move_that_failed_is_tried_again_later() -> None:
    there = items(1, "d0")
    state = State(node("d0", *there, drains=True), node("d1"), items=there)
    assert len(state.all(now=5.0)) == 1
    state.rebalance.ended(there[0])
    there[0].can_move = True
    assert state.next(now=5.0 + CONFIG.drain_again_s / 2) is None
    assert state.next(now=5.0 + CONFIG.drain_again_s) is not None
    state.rebalance.forget(there[0])
    assert state.next(now=5.0) is not None


def test_a_target_takes_a_few_at_a_time() -> None:
    there = items(3, "d0") + items(3, "d1")
    nodes = [node("d0", *there[:3], drains=True), node("d1", *there[3:], drains=True), node("d2")]
    assert len(State(*nodes, items=there).all()) == CONFIG.max_moves


def test_a_node_that_runs_out_of_blocks_gives_away_what_it_would_preempt() -> None:
    there = items(8, "d0", 1000)
    there[2].priority = 5
    # 8 sequences, 108 ms a step: 160 tokens last for 2.2 s, 96 for 1.3 s.
    other = node("d1", *items(8, "d1", 1000))
    assert State(node("d0", *there, free=10), other, items=there).next() is None
    state = State(node("d0", *there, free=6), other, items=there)
    move = state.next()
    assert move is not None
    assert (move.item.name, move.target_id, move.reason) == ("d0/2", "d1", MoveReason.ROOM), "the worst priority"
    there[2].can_move = False
    move = state.next()
    assert move is not None
    assert move.item.name == "d0/7", "the youngest"


def test_none_leaves_for_a_node_that_runs_out_as_well_or_if_computing_it_again_is_cheaper() -> None:
    there = items(8, "d0", 1000)
    assert State(node("d0", *there, free=6), node("d1", *items(8, "d1", 1000), free=7), items=there).next() is None
    fast = replace(TIMES, prompt_token_s=1e-5)
    other = node("d1", *items(8, "d1", 1000))
    assert State(node("d0", *there, free=6, times=fast), other, items=there).next() is None, "10 ms"


def test_the_largest_goes_that_leaves_the_new_node_the_faster_one() -> None:
    there = [Item("large", "d0", 4000), Item("middle", "d0", 1500), Item("small", "d0", 100)]
    move = State(node("d0", *there), node("d1"), items=there).next()
    assert move is not None
    assert (move.item.name, move.reason) == ("middle", MoveReason.BALANCE)
    # Steps of 24 and 20 ms: too little to be felt.
    little = items(4, "d0", 10)
    assert State(node("d0", *little), node("d1"), items=little).next() is None
    # 80 and 60 ms: a factor that predictions are too coarse for.
    much, less = items(10, "d0", 500), items(10, "d1", 300)
    assert State(node("d0", *much), node("d1", *less), items=much + less).next() is None


@pytest.mark.parametrize(
    ("others", "target"),
    [
        # Nothing decodes there, and a sequence would wait until its prompts are computed.
        ([("m1", 500)], None),
        ([("m1", 500), ("d0", 0)], "d0"),
        ([("m1", 0)], "m1"),
    ],
)
def test_for_balance_none_goes_to_a_node_that_computes_prompts(
    others: list[tuple[str, int]], target: str | None
) -> None:
    there = items(8, "m0", 500)
    nodes = [node(name, prompt_tokens=num_tokens) for name, num_tokens in others]
    # Prompts of its own keep no sequence.
    move = State(node("m0", *there, prompt_tokens=500), *nodes, items=there).next()
    assert (None if move is None else move.target_id) == target


def test_nodes_that_changed_places_do_not_throw_sequences_to_and_fro() -> None:
    there = items(20, "d0", 1000)
    state = State(node("d0", *there), node("d1"), items=there)
    (name, _, _), *_ = state.all(now=0.0)
    moved = next(item for item in there if item.name == name)
    for item in there[: CONFIG.max_moves]:
        state.rebalance.ended(item)
        item.on, item.can_move = "d1", True
    back = State(node("d0"), node("d1", *there), items=there)
    back.rebalance = state.rebalance
    for item in there:
        item.on = "d1"
    move = back.next(now=1.0)
    assert move is not None
    assert move.item is not moved


def test_headroom_grows_with_what_is_to_be_pushed() -> None:
    found = []
    for num_tokens in (100, 100_000):
        there = items(1, "d0", num_tokens)
        big = replace(node("d1").node, kv_layout=KvLayout(1, 10_000, 8, 128, BLOCK_TOKENS, "float32"))
        status = NodeStatus(Role.DECODE, total_blocks=10_000, free_blocks=10_000)
        source = NodeLoad(replace(big, node_id="d0"), replace(status, draining=True, num_running=1), Rates(CONFIG))
        move = State(source, NodeLoad(big, status, Rates(CONFIG)), items=there).next()
        assert move is not None
        found.append(move.num_headroom_tokens)
    assert 16 <= found[0] < found[1] <= 1024


@pytest.mark.parametrize("drains", [False, True])
def test_where_no_node_has_room_no_sequence_is_looked_at(drains: bool) -> None:
    """Every tick, with a hundred sequences on each of many nodes, looks would take longer than the tick."""
    crowds = [items(20, f"d{i}", 1000) for i in range(5)]
    nodes = [node(f"d{i}", *crowd, free=2, drains=drains) for i, crowd in enumerate(crowds)]
    state = State(*nodes, items=list(chain(*crowds)))
    assert state.next() is None
    assert sum(item.num_looks for item in state.items) == 0


def test_of_many_nodes_without_room_those_with_the_least_time_left_are_looked_at() -> None:
    crowds = [items(20, f"d{i}", 1000) for i in range(100)]
    nodes = [node(f"d{i}", *crowd, free=2 + (i != 50)) for i, crowd in enumerate(crowds)]
    roomy = node("m0", *items(1, "m0"), free=60)
    state = State(roomy, *nodes, items=list(chain(*crowds)))
    assert state.next() is None, "it has not that much room"
    # Those of 16 nodes, and of the slowest one.
    assert sum(item.num_looks for item in state.items) == (16 + 1) * 20
    assert all(item.num_looks for item in crowds[50])


# -- defragmentation: 1,000 tokens are 62.5 blocks


def fragmented(*sizes: int, free: tuple[int, int] = (50, 40)) -> State:
    """Two nodes with so many free blocks; sequences of these sizes run on the first one."""
    there = [Item(f"d0/{i}", "d0", size) for i, size in enumerate(sizes)]
    here = [Item(f"d1/{i}", "d1", 300, can_move=False) for i in range(4)]
    return State(node("d0", *there, free=free[0]), node("d1", *here, free=free[1]), items=there + here)


@pytest.mark.parametrize(
    ("sizes", "wanted", "move"),
    [
        # 50 blocks are 800 tokens: 200 are lacking. The smallest that is enough goes.
        ((100, 400, 250), 1000, ("d0/2", "d1", "defragment")),
        # None is enough: the largest first.
        ((100, 150, 120), 1000, ("d0/1", "d1", "defragment")),
        # There is room: it waits for something else.
        ((100, 400, 250), 800, None),
        # All room together is not enough, or all that could go.
        ((100, 400, 250), 1500, None),
        ((100, 50), 1000, None),
    ],
)
def test_room_is_made_for_a_sequence_that_fits_into_no_node_but_into_the_room_of_all(sizes, wanted, move):
    found = fragmented(*sizes).next(wanted=wanted)
    assert move == (found and (found.item.name, found.target_id, found.reason.value))
    assert fragmented(*sizes).next() is None, "nothing is wanted"


def test_no_more_is_moved_than_makes_room():
    assert fragmented(100, 150, 120, 60).all(wanted=1000) == [
        ("d0/1", "d1", "defragment"), ("d0/3", "d1", "defragment")
    ]  # fmt: skip


def test_no_room_is_made_at_the_expense_of_a_node_that_runs_out_of_it():
    there, here = [Item("d0/0", "d0", 250)], [Item(f"d1/{i}", "d1", 30, can_move=False) for i in range(300)]
    state = State(node("d0", *there, free=50), node("d1", *here, free=40), items=there + here)
    assert state.next(wanted=1000) is None


# -- priority


def test_a_better_priority_moves_for_shorter_steps_that_move_no_other():
    there, here = [*items(3, "d0", 700), Item("d0/asap", "d0", 100, priority=-1)], items(1, "d1", 100)
    state = State(node("d0", *there), node("d1", *here), items=there + here)
    # 0.046 s against 0.024: with its tokens the other node's steps take 0.024 s.
    assert state.next() is not None
    assert state.next().reason is MoveReason.PRIORITY
    assert state.next().item.name == "d0/asap"
    there[-1].priority = 0
    assert (move := state.next()) is None or move.reason is MoveReason.BALANCE


def test_a_better_priority_moves_where_balance_would_move_nothing():
    there, here = [*items(2, "d0", 300), Item("d0/asap", "d0", 100, priority=-1)], []
    state = State(node("d0", *there), node("d1", *here), items=there + here)
    # 0.030 s against 0.022, which is not 1.5 times as much.
    assert (move := state.next()) is not None
    assert (move.item.name, move.target_id, move.reason) == ("d0/asap", "d1", MoveReason.PRIORITY)
    there[-1].priority = 0
    assert state.next() is None


def test_of_several_better_priorities_the_best_goes_first():
    there = [*items(2, "d0", 300), Item("d0/soon", "d0", 100, priority=-1), Item("d0/asap", "d0", 100, priority=-2)]
    state = State(node("d0", *there), node("d1"), items=there)
    assert [name for name, _, _ in state.all()][:1] == ["d0/asap"]


def test_a_better_priority_does_not_move_to_where_prompts_wait_nor_again_at_once():
    there = [*items(2, "d0", 300), Item("d0/asap", "d0", 100, priority=-1)]
    assert State(node("d0", *there), node("d1", prompt_tokens=500), items=there).next() is None
    state = State(node("d0", *there), node("d1"), items=there)
    move = state.next(now=0.0)
    assert move is not None
    state.rebalance.began(move, 0.0)
    state.rebalance.ended(move.item)
    assert state.next(now=CONFIG.move_again_s / 2) is None
    assert state.next(now=CONFIG.move_again_s * 2) is not None
