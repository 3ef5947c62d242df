"""Placement of a cluster's sequences: the waiting line, the nodes' load, the breakers, and what each client may have.

Pure: the dispatcher drives it with a clock and sends what it decides; a planner can drive it without either. A sequence
arrives, waits until `next` returns it and `decide` finds nodes for it, is assigned, and is released when its attempt is
over; then it departs, or waits again.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain
from types import MappingProxyType
from typing import Generic, Protocol, TypeVar

from baton import errors
from baton.node_messages import CacheChanged
from baton.prefix import PrefixScheme
from baton.types import NodeDescription, NodeStatus, Role, Slo
from router.cluster.admission import Correction, Pace, Prediction, TokenPace, retry_after_s
from router.cluster.breakers import PairBreakers
from router.cluster.config import PolicyConfig
from router.cluster.costs import Costs
from router.cluster.load import Attempt, Loads, NodeLoad, Placement
from router.cluster.policy import Decision, Demand, Keyed, Obstacle, choose
from router.cluster.pools import Pools
from router.cluster.prefix_index import Hit, PrefixIndex
from router.cluster.rates import Rates
from router.cluster.rebalance import Planned, Rebalance
from router.cluster.repurpose import Change, Repurpose
from router.cluster.shares import Work
from router.cluster.siblings import Siblings
from router.cluster.waiting import Waiting

# The pace of the cluster is that of so many newest ends.
_NUM_ENDS = 64


class Limits(Protocol):
    """What clients may have here; `router.config.LimitsConfig` says what each is for."""

    @property
    def max_queued(self) -> int: ...
    @property
    def max_active(self) -> int: ...
    @property
    def max_client_share(self) -> float: ...
    @property
    def max_client_running(self) -> int: ...
    @property
    def client_alone_s(self) -> float: ...
    @property
    def refuse_after_s(self) -> float: ...


class Item(Protocol):
    """A sequence, as far as placement is concerned; compared by identity."""

    @property
    def client(self) -> str: ...

    @property
    def sequence_id(self) -> str:
        """Of its present attempt."""

    @property
    def has_tokens(self) -> bool: ...

    def can_move_from(self, node_id: str) -> bool:
        """It decodes there and may go on elsewhere."""

    def demand(self, now: float) -> Demand: ...


ItemT = TypeVar("ItemT", bound=Item)


class Scheduler(Generic[ItemT]):
    """Invariant: an item in flight waits, or has one attempt on the nodes, or neither (it backs off)."""

    def __init__(
        self, limits: Limits, policy: PolicyConfig, now: float, weights: Mapping[str, float] = MappingProxyType({})
    ) -> None:
        """``weights`` of clients in the waiting line; 1 for all others."""
        self._limits = limits
        self._policy = policy
        self._pools = Pools()
        self.rates = Rates(policy)
        self._loads = Loads(self.rates)
        self._breakers = PairBreakers(policy)
        self._repurpose = Repurpose(policy)
        self.prefix_index = PrefixIndex(policy.max_known_blocks)
        # Of the nodes that keep blocks, which are all of one model; None if no node does.
        self.prefix_scheme: PrefixScheme | None = None
        self._line: Waiting[ItemT] = Waiting(
            alone_s=limits.client_alone_s, max_priority_wait_s=policy.max_priority_wait_s, weights=weights
        )
        # Of items in flight that have been on nodes.
        self._work: dict[ItemT, Work] = {}
        self._siblings: Siblings[ItemT] = Siblings()
        self._pace = Pace()
        self._correction = Correction()
        self._in_flight: dict[ItemT, None] = {}
        self._num_in_flight_of: Counter[str] = Counter()
        # Attempts on the nodes, oldest first.
        self._attempts: dict[ItemT, Attempt] = {}
        self._by_sequence: dict[str, ItemT] = {}
        self._on_node: dict[str, dict[ItemT, None]] = {}
        # Where sequences are to move.
        self._moves: dict[ItemT, str] = {}
        self._rebalance: Rebalance[ItemT] = Rebalance(policy, self.rates)
        # Sequences on the nodes whose priority is better than 0.
        self._preferred: dict[ItemT, None] = {}
        # What the next of the line needs, if no node had room for it.
        self._num_wanted_tokens = 0
        self._ended_at_s: deque[float] = deque(maxlen=_NUM_ENDS)
        self._down_since_s: float | None = now
        # Something has changed since this was last reset that can make room for a waiting sequence.
        self.has_news = False

    # ── Nodes ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def node_up(self, node: NodeDescription, status: NodeStatus, is_available: bool, now: float) -> None:
        self._loads.add_node(node, status)
        scheme, known = PrefixScheme.of(node), self.prefix_scheme
        # Prompts keep the keys of one scheme: it changes only with the model, not with every node's number of blocks.
        if scheme is not None and (known is None or known.seed(1) != scheme.seed(1)):
            self.prefix_scheme = scheme
        self.node_changed(node.node_id, is_available, now)

    def node_changed(self, node_id: str, is_available: bool, now: float) -> None:
        """``is_available``: whether it gets new work."""
        node = self._loads.node(node_id)
        if node is not None and is_available:
            self._pools.put(node)
        else:
            self._pools.remove(node_id)
        self.has_news = True
        self._note_availability(now)

    def node_status(self, node_id: str, status: NodeStatus) -> None:
        node = self._loads.node(node_id)
        if node is None:
            return
        roles = node.role, node.home_role
        before = node.pending_prompt_tokens, node.pending_decode_tokens, node.free_tokens
        self._loads.status(node_id, status)
        counts = node.pending_prompt_tokens, node.pending_decode_tokens, node.free_tokens
        if before != counts or node.role is not roles[0]:
            self.has_news = True
        if roles != (node.role, node.home_role) and node_id in self._pools:
            self._pools.put(node)

    def cache_changed(self, node_id: str, change: CacheChanged) -> None:
        """What the node's prefix cache holds from now on."""
        if self._loads.node(node_id) is not None:
            self.prefix_index.change(node_id, change)

    def node_down(self, node_id: str, now: float) -> list[str]:
        """The node is lost or has left; returns the sequence ids of the attempts that it had."""
        self._loads.remove_node(node_id)
        self._breakers.forget(node_id)
        self.prefix_index.forget(node_id)
        self.rates.forget(node_id)
        self.node_changed(node_id, False, now)
        return [self._attempts[item].sequence_id for item in self._on_node.get(node_id, ())]

    def node(self, node_id: str) -> NodeLoad | None:
        return self._loads.node(node_id)

    def role_change(self, now: float) -> Change | None:
        """What to ask of a node because the load has shifted for long. Call it regularly."""
        return self._repurpose.look(self._pools, self.rates.num_output_tokens, now)

    def _note_availability(self, now: float) -> None:
        if len(self._pools):
            self._down_since_s = None
        elif self._down_since_s is None:
            self._down_since_s = now

    @property
    def is_available(self) -> bool:
        """Whether a node takes new work; as roles are policy, one node is enough."""
        return len(self._pools) > 0

    # ── The waiting line ────────────────────────────────────────────────────────────────────────────────────────────

    def check_capacity(self, num_sequences: int, client: str, now: float) -> None:
        """Raises the error that so many sequences of this client are refused with."""
        limits = self._limits
        if self._down_since_s is not None and now - self._down_since_s > limits.refuse_after_s:
            raise errors.Unavailable("no node is available; try again later", retry_after_s=2.0)
        for total, own, limit, what in (
            (self.num_waiting, self._num_waiting_of(client), limits.max_queued, "waiting"),
            (len(self._in_flight), self._num_in_flight_of[client], limits.max_active, "in flight"),
        ):
            share = max(1, int(limit * limits.max_client_share))
            # Room that others left is free for all; what is beyond the limit is for clients that have little here.
            is_little = own + num_sequences <= share
            has_room = total + num_sequences <= limit and (is_little or self._line.is_alone(client, now))
            has_share = is_little and total + num_sequences <= limit + share
            if not has_room and not has_share and (own or what == "in flight"):
                raise errors.Overloaded(
                    f"{total} sequences are {what} (limit {limit}), {own} of them of this client (limit {share} beside "
                    "others); try again later",
                    retry_after_s=self._retry_after_s(now),
                )

    def _retry_after_s(self, now: float) -> float:
        """How long the present line takes at the present pace."""
        return retry_after_s(len(self._line) * self._seconds_per_end(now))

    def _seconds_per_end(self, now: float) -> float:
        """Of late, between two sequences that end; 0 if too few have ended."""
        num_ended = len(self._ended_at_s)
        return 0.0 if num_ended < 2 else max(now - self._ended_at_s[0], 1e-3) / num_ended

    def predict(
        self, prompts: Sequence[Demand], slo: Slo, client: str, arrived_s: float, now: float
    ) -> Prediction | None:
        """The time to the first token of a new request of these prompts; None if it has no objective for it. Raises
        TooLate if it would miss an objective, unless a node has nothing to do: so a wrong prediction is found out."""
        longest = max(prompts, key=lambda prompt: prompt.num_known_tokens)
        is_sheddable = longest.priority > 0
        if slo.tbt_s is not None and not longest.is_single_token:
            nodes = (*self._pools[Role.DECODE], *self._pools[Role.MIXED]) or tuple(self._pools[Role.PREFILL])
            predicted = TokenPace.of(nodes, longest.num_known_tokens)
            next_end_s = self._seconds_per_end(now)
            predicted.check(slo.tbt_s, next_end_s, is_sheddable=is_sheddable, config=self._policy)
        if slo.ttft_s is None:
            return None
        line_s = self._pace.wait_s(self._line.num_ahead(client, longest.priority), now)
        found = self._correction.prediction(now - arrived_s + line_s + self.predicted_ttft_s(longest, now))
        if not self._has_idle_node:
            found.check(slo.ttft_s, is_sheddable=is_sheddable, config=self._policy)
        return found

    def turned_out(self, prediction: Prediction, ttft_s: float) -> None:
        self._correction.turned_out(prediction, ttft_s)

    @property
    def _has_idle_node(self) -> bool:
        """A prompt would begin at once, whatever is predicted."""
        return not len(self._line) and any(not node.pending_prompt_tokens for node in self._for_prompts)

    @property
    def _for_prompts(self) -> Sequence[NodeLoad]:
        return (*self._pools[Role.PREFILL], *self._pools[Role.MIXED]) or tuple(self._pools[Role.DECODE])

    def was_here(self, client: str, now: float) -> bool:
        """The client has something here, or had lately."""
        return self._line.was_here(client, now)

    def _num_waiting_of(self, client: str) -> int:
        return self._line.num_waiting_of(client) + self._siblings.num_waiting_of(client)

    def arrive(self, item: ItemT, now: float, prompt: Keyed | None = None) -> None:
        """It is in flight from now on, and waits. ``prompt``: there are more items of this one; the first of them goes
        ahead if that spares the others the prompt's computation."""
        self._in_flight[item] = None
        self._num_in_flight_of[item.client] += 1
        scheme = self.prefix_scheme
        has_blocks = prompt is not None and scheme is not None and any(True for _ in prompt.keys(scheme))
        if prompt is None or not has_blocks or not self._siblings.arrive(item, prompt):
            self._put(item, now)

    def has_shared(self, item: ItemT, now: float) -> None:
        """The nodes have the blocks of its prompt: those that waited for that are next."""
        for sibling in self._siblings.let_go(item):
            self._put(sibling, now)

    def _put(self, item: ItemT, now: float) -> None:
        self._line.put(item, item.demand(now).priority, now)
        self.has_news = True

    def waits_for_sibling(self, item: ItemT, decision: Decision, now: float) -> bool:
        """Whether the waiting item leaves the line, as another choice of its prompt brings the blocks that it lacks to
        the same decode node."""
        scheme = self.prefix_scheme
        # All that a node could hold of a prompt that it runs: its last token is computed in any case.
        num_before_last = item.demand(now).num_known_tokens - 1
        if scheme is None or decision.num_decode_hit > num_before_last - scheme.layout.block_tokens:
            return False
        waits = self._siblings.sets_out(item, decision.placement.decode_id)
        if waits:
            self._line.remove(item)
            self._pace.left(len(self._line))
        return waits

    def rerun(self, item: ItemT, now: float) -> None:
        """It waits again, before all that its client has in the line."""
        self._line.put_first(item, now)
        self.has_news = True

    def depart(self, item: ItemT, now: float) -> None:
        """It is over. Its attempt has been released."""
        if item in self._line:
            self._line.remove(item)
            self._pace.left(len(self._line))
            self.has_news = True
        elif item in self._siblings:
            self._siblings.remove(item)
        self.has_shared(item, now)
        self._rebalance.forget(item)
        del self._in_flight[item]
        self._work.pop(item, None)
        self._num_in_flight_of[item.client] -= 1
        if not self._num_in_flight_of[item.client]:
            del self._num_in_flight_of[item.client]
        self._ended_at_s.append(now)

    def next(self, now: float) -> ItemT | None:
        """The waiting sequence whose turn it is; None if none may start. What is bounded is what one client has on the
        nodes that generate."""
        return self._line.next(self._max_client_running, now)

    def decide(self, item: ItemT, now: float) -> Decision | Obstacle:
        demand = item.demand(now)
        decision = self._choose(demand, self._costs(demand), now)
        self._num_wanted_tokens = demand.num_known_tokens + 1 if decision is Obstacle.NO_ROOM else 0
        return decision

    def predicted_ttft_s(self, demand: Demand, now: float) -> float:
        """From now to its first token, if it were placed at once: the line is not counted. Infinite without a node."""
        costs = self._costs(demand)
        decision = self._choose(demand, costs, now)
        if isinstance(decision, Decision):
            node = self._loads.node(decision.placement.prefill_id)
            assert node is not None
            return costs.ttft_s(node, decision.num_prefill_hit)
        # It waits for the node that has room first, most likely the one with the least to do.
        return min((costs.ttft_s(node, 0) for node in self._for_prompts), default=math.inf)

    def _choose(self, demand: Demand, costs: Costs, now: float) -> Decision | Obstacle:
        return choose(self._pools, demand, self._breakers, now, self._policy, costs)

    def _costs(self, demand: Demand) -> Costs:
        scheme = self.prefix_scheme
        hits: list[Hit] = []
        if demand.prompt is not None and scheme is not None and self.prefix_index:
            hits = self.prefix_index.hits(demand.prompt.keys(scheme))
        block_tokens = 1 if scheme is None else scheme.layout.block_tokens
        return Costs(
            self.rates, demand.num_known_tokens, is_single_token=demand.is_single_token, hits=hits,
            block_tokens=block_tokens,
        )  # fmt: skip

    @property
    def _max_client_running(self) -> int:
        return self._limits.max_client_running * max(1, self._pools.num_generating)

    # ── Attempts ────────────────────────────────────────────────────────────────────────────────────────────────────

    def assign(self, item: ItemT, decision: Decision, num_known_tokens: int, now: float) -> None:
        """The waiting sequence runs on these nodes."""
        placement = decision.placement
        self._line.started(item, self._expect(item, num_known_tokens - decision.num_prefill_hit, now))
        self._pace.started(len(self._line), now)
        self._by_sequence[item.sequence_id] = item
        if item.demand(now).priority < 0:
            self._preferred[item] = None
        for node_id in placement.node_ids:
            self._on_node.setdefault(node_id, {})[item] = None
        self._attempts[item] = self._loads.assign(
            item.sequence_id, placement, num_known_tokens,
            num_prefill_hit=decision.num_prefill_hit, num_decode_hit=decision.num_decode_hit,
        )  # fmt: skip
        self._breakers.used(placement.prefill_id, placement.decode_id, now)

    def release(self, item: ItemT, now: float) -> None:
        """Its attempt is over. Harmless if it has none."""
        self.move_ended(item)
        attempt = self._attempts.pop(item, None)
        if attempt is None:
            return
        del self._by_sequence[attempt.sequence_id]
        self._preferred.pop(item, None)
        self._leave(item, attempt.placement.node_ids)
        self._line.ended(item.client, now)
        self._settle(item, now)
        self._loads.release(attempt.sequence_id)
        for sibling in self._siblings.turned_back(item):
            self._line.put_first(sibling, now)
        self.has_news = True

    def _expect(self, item: ItemT, num_prompt_tokens: int, now: float) -> float:
        """Work that its client is charged for: the prompt once, whatever fails, and the tokens that will come."""
        demand = item.demand(now)
        if item not in self._work:
            self._work[item] = Work(num_prompt_tokens, demand.num_known_tokens)
        num_output_tokens = min(self.rates.num_output_tokens, demand.max_new_tokens)
        work = self._work[item]
        return work.charge(demand.num_known_tokens + num_output_tokens, self._policy.output_token_work)

    def _settle(self, item: ItemT, now: float) -> None:
        """Its attempt is over: what counts is what it has generated, not what was expected."""
        charge = self._work[item].charge(item.demand(now).num_known_tokens, self._policy.output_token_work)
        self._line.got(item.client, charge)

    def _leave(self, item: ItemT, node_ids: Collection[str]) -> None:
        for node_id in node_ids:
            there = self._on_node[node_id]
            del there[item]
            if not there:
                del self._on_node[node_id]

    # ── Moves ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def next_move(self, now: float) -> Planned[ItemT] | None:
        """A running sequence that is to go on at another node; the caller begins the move, or asks no more."""
        if not self._policy.migrates:
            return None
        return self._rebalance.next(
            self._loads.nodes, self._pools, self._on_node, now,
            num_wanted_tokens=self._num_wanted_tokens if len(self._line) else 0,
            preferred={item: self._attempts[item].placement.decode_id for item in self._preferred},
        )  # fmt: skip

    def begin_move(self, move: Planned[ItemT], now: float) -> None:
        """Its target is asked. It counts for both nodes until `moved` or `move_ended`, or its release."""
        item, num_tokens = move.item, move.item.demand(now).num_known_tokens
        self._moves[item] = move.target_id
        self._on_node.setdefault(move.target_id, {})[item] = None
        self._loads.begin_move(
            self._attempts[item].sequence_id, move.target_id, num_tokens, num_tokens + move.num_headroom_tokens
        )
        self._rebalance.began(move, now)

    def moved(self, item: ItemT) -> None:
        """It is at the target alone."""
        target_id = self._moves.pop(item)
        self._rebalance.ended(item)
        left = [node_id for node_id in self._attempts[item].placement.node_ids if node_id != target_id]
        self._leave(item, left)
        self._attempts[item] = self._loads.moved(self._attempts[item].sequence_id)
        self.has_news = True

    def move_ended(self, item: ItemT) -> None:
        """It stays where it is. Harmless if it does not move."""
        target_id = self._moves.pop(item, None)
        if target_id is None:
            return
        attempt = self._attempts[item]
        self._rebalance.ended(item)
        self._loads.end_move(attempt.sequence_id)
        # A node that its prompt ran on may be the target.
        if target_id not in attempt.placement.node_ids:
            self._leave(item, [target_id])

    def confirmed(self, sequence_id: str) -> None:
        """The decode node has granted the blocks."""
        self._loads.confirm(sequence_id)

    def prefilled(self, sequence_id: str) -> None:
        self._loads.prefilled(sequence_id)
        self.has_news = True

    def generated(self, node_id: str, num_tokens: int, token_s: float) -> None:
        """A sequence has ended that this node generated, with so long between two tokens."""
        node = self._loads.node(node_id)
        if node is not None:
            num_beside = max(node.status.running_tokens, node.pending_decode_tokens)
            self.rates.generated(node_id, num_tokens, token_s, num_beside)

    def node_full(self, node_id: str) -> None:
        """It refused a reservation, whatever its last status said."""
        self._loads.full(node_id)

    def pair_failed(self, placement: Placement, now: float) -> None:
        self._breakers.failed(placement.prefill_id, placement.decode_id, now)

    def pair_worked(self, placement: Placement) -> None:
        self._breakers.worked(placement.prefill_id, placement.decode_id)

    def crowding(self, newcomer: str, *, is_passing: bool) -> list[ItemT]:
        """The sequences to take off the nodes and put into the line again because another client has come.

        A client that was alone has all nodes. What it may not have beside others is set aside, the youngest first:
        waiting for their ends could take minutes. Sequences without a token lose nothing; the others are computed
        again, so a client that is only passing sets but a few of these aside.
        """
        client, num = self._line.crowding(newcomer, self._max_client_running)
        if not num:
            return []
        running = [item for item in reversed(self._attempts) if item.client == client]
        fresh = [item for item in running if not item.has_tokens][:num]
        begun = [item for item in running if item.has_tokens][: num - len(fresh)]
        return fresh + (begun[: self._limits.max_client_running] if is_passing else begun)

    # ── What is known ───────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def in_flight(self) -> Collection[ItemT]:
        return self._in_flight.keys()

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def waiting(self) -> Iterator[ItemT]:
        return chain(self._line, self._siblings)

    @property
    def num_waiting(self) -> int:
        return len(self._line) + len(self._siblings)

    def num_in_flight_of(self, client: str) -> int:
        return self._num_in_flight_of[client]

    def num_running_of(self, client: str) -> int:
        return self._line.num_running_of(client)

    def attempt(self, item: ItemT) -> Attempt | None:
        return self._attempts.get(item)

    def item(self, sequence_id: str) -> ItemT | None:
        """The item whose present attempt on the nodes has this id."""
        return self._by_sequence.get(sequence_id)

    def check(self) -> None:
        """The books balance; for tests."""
        self._loads.check()
        self._line.check()
        self._siblings.check()
        assert self._loads.num_assigned == len(self._attempts) == len(self._by_sequence)
        assert set(self.waiting) <= set(self._in_flight)
        assert not set(self._line) & set(self._siblings)
        assert set(self._attempts) <= set(self._in_flight)
        assert not set(self.waiting) & set(self._attempts)
        assert set(self._attempts) <= set(self._work) <= set(self._in_flight)
        running = Counter(item.client for item in self._attempts)
        assert all(self._line.num_running_of(client) == num for client, num in running.items())
        for client in self._num_in_flight_of:
            assert self._line.num_running_of(client) == running[client], "a client's share is held by nothing"
        assert sum(self._num_in_flight_of.values()) == len(self._in_flight)
        on_nodes = {(n, i) for n, items in self._on_node.items() for i in items}
        placed = {(n, i) for i, a in self._attempts.items() for n in a.placement.node_ids}
        assert on_nodes == placed | {(n, i) for i, n in self._moves.items()}
        assert set(self._moves) <= set(self._attempts)
        assert set(self._preferred) <= set(self._attempts)
        self._rebalance.check(self._moves)
