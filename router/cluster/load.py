"""How loaded each node is: its last status plus what this router has sent since. Pure.

The router knows its own sequences exactly; a status adds what other routers put there. So the load of a node is the
router's own count plus what the last status showed beyond the own count at that moment, and a burst between two
statuses spreads. What the counts mean in seconds follows from the node's step times.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from baton.types import NodeDescription, NodeStatus, Role
from router.cluster.rates import Rates

# Of a node's time that its prompts get at least, while it keeps the gaps of what decodes within its target.
_LEAST_PROMPT_SHARE = 0.2
# How fast the share of statuses in which a node had prompts follows: over about 25 s.
_BUSY_STEP = 0.01
_MOST_BUSY_SHARE = 0.9


@dataclass(frozen=True, slots=True)
class Placement:
    """The nodes of an attempt. Equal ids mean colocated: the node keeps the sequence and no byte moves."""

    prefill_id: str
    decode_id: str

    @property
    def is_colocated(self) -> bool:
        return self.prefill_id == self.decode_id

    @property
    def node_ids(self) -> tuple[str, ...]:
        return (self.prefill_id,) if self.is_colocated else (self.prefill_id, self.decode_id)


@dataclass(slots=True, eq=False)
class Attempt:
    """One run of a sequence on its nodes, and what it counts for there."""

    sequence_id: str
    placement: Placement
    # Where it counts: a node that was lost and is up again knows nothing of it. None: the node was lost before.
    prefill: NodeLoad | None
    decode: NodeLoad | None
    # To be computed for it, and known when it began.
    num_prompt_tokens: int
    num_tokens: int
    # Still in the prompt phase.
    is_prompt: bool = True
    # Blocks promised by us that a status may not show yet.
    num_promised_blocks: int = 0
    is_confirmed: bool = False


class NodeLoad:
    """One node. What `policy` reads is kept ready, as it is read far more often than it changes; `update` after every
    change of a count."""

    __slots__ = (
        "_rates",
        "busy_share",
        "cached_tokens",
        "confirmed",
        "decode_tokens",
        "foreign_decode",
        "foreign_prompt",
        "foreign_prompts",
        "foreign_sequences",
        "free_tokens",
        "is_crowded",
        "is_full",
        "is_measured",
        "node",
        "node_id",
        "num_decoding",
        "num_prompts",
        "num_sequences",
        "pending_decode_tokens",
        "pending_prompt_tokens",
        "promised_blocks",
        "prompt_cost_s",
        "prompt_token_s",
        "prompt_tokens",
        "prompt_wait_s",
        "rank",
        "status",
        "times",
        "token_bytes",
        "token_kv_s",
        "token_s",
    )

    def __init__(self, node: NodeDescription, status: NodeStatus, rates: Rates) -> None:
        self.node = node
        self.node_id = node.node_id
        self._rates = rates
        layout = node.kv_layout
        # KV of one token.
        self.token_bytes = layout.num_layers * layout.block_bytes // layout.block_tokens
        # Tokens of our own sequences: those to be computed, of so many prompts, and those known of all that will be
        # decoded here.
        self.prompt_tokens = 0
        self.num_prompts = 0
        self.decode_tokens = 0
        # Our own sequences that will be decoded here, and those of them whose prompt is computed.
        self.num_sequences = 0
        self.num_decoding = 0
        # Of its time, with prompts to compute.
        self.busy_share = 0.0
        self.promised_blocks = 0
        # Promises that the node has acknowledged and that the next status will show as used blocks.
        self.confirmed: list[Attempt] = []
        self.hear(status)

    def hear(self, status: NodeStatus) -> None:
        """Its newest status."""
        self.status = status
        self.times = self._rates.step_times(self.node_id, status.step_times)
        self.is_measured = status.step_times is not None or self._rates.has_seen(self.node_id)
        self.busy_share += ((status.queued_prompt_tokens > 0) - self.busy_share) * _BUSY_STEP
        # What is there beyond our own.
        # Less what is computed of the prompt whose turn it is, if all are there: one that is still on its way is not.
        has_all = 0 < self.num_prompts <= status.num_waiting
        begun_tokens = self.prompt_tokens // self.num_prompts if has_all else 0
        self.foreign_prompt = max(-begun_tokens, status.queued_prompt_tokens - self.prompt_tokens)
        self.foreign_prompts = max(0, status.num_waiting - self.num_prompts)
        self.foreign_decode = max(0, status.running_tokens - self.decode_tokens)
        self.foreign_sequences = max(0, status.num_running - self.num_decoding)
        # It refused a reservation; nothing more is asked until its next status.
        self.is_full = False
        self.update()

    def update(self) -> None:
        self.pending_prompt_tokens = max(0, self.prompt_tokens + self.foreign_prompt)
        self.pending_decode_tokens = self.decode_tokens + self.foreign_decode
        self._update_seconds()
        # Of two nodes that take equally long the one with the smaller rank is taken.
        self.rank = (-self.free_blocks, self.node_id)
        # Tokens of a new sequence for which there is room.
        block_tokens = self.node.kv_layout.block_tokens
        self.free_tokens = self.free_blocks * block_tokens
        # Of these, tokens whose KV is kept while no sequence holds it: a new one that begins with it takes its room.
        self.cached_tokens = self.status.cached_blocks * block_tokens

    def _update_seconds(self) -> None:
        times, target_s, config = self.times, self.node.tbt_target_s, self._rates.config
        base_s, sequence_s, kv_token_s = times.base_s, times.sequence_s, times.kv_token_s
        num_running = self.num_decoding + self.foreign_sequences
        num_sequences = self.num_sequences + self.foreign_sequences
        # A step with all that is and will be here, and with what decodes now.
        kv_s = self.pending_decode_tokens * kv_token_s
        step_s = base_s + num_sequences * sequence_s + kv_s
        decode_s = base_s + num_running * sequence_s + kv_s * num_running / max(1, num_running, num_sequences)
        self.is_crowded = 0 < base_s * config.crowded_factor < decode_s
        # Beside prompts, tokens come at the target's pace or not at all.
        free_share = 1 - min(self.busy_share, _MOST_BUSY_SHARE)
        # Beside decodes, a node with a target computes prompts in what they leave of it.
        share, gap_weight = 1.0, 1.0
        if target_s is not None:
            free_share += (1 - free_share) * min(1.0, step_s / target_s)
            gap_weight = config.bounded_gap_weight
            if num_running:
                share = max(_LEAST_PROMPT_SHARE, 1 - decode_s / target_s)
        # Each token of a new sequence takes a step, and makes it longer for the others: so much whatever it is, and so
        # much for each token of its KV.
        self.token_s = step_s / free_share + (num_sequences + 1) * sequence_s
        self.token_kv_s = (num_sequences + 1) * kv_token_s
        # Until a further prompt begins; for each of its tokens, alone and with what those that decode wait for it.
        self.prompt_token_s = times.prompt_token_s / share
        self.prompt_wait_s = self.pending_prompt_tokens * self.prompt_token_s
        if not num_running:  # else the steps are those of the decodes
            self.prompt_wait_s += (self.num_prompts + self.foreign_prompts) * base_s
        self.prompt_cost_s = self.prompt_token_s + gap_weight * num_running * times.prompt_token_s

    def surely_has_room(self, num_tokens: int, num_hit: int) -> bool:
        """For a new sequence whose first ``num_hit`` tokens are here, even if no other sequence has these in use."""
        return self.free_tokens >= num_tokens - max(0, num_hit - self.cached_tokens)

    @property
    def role(self) -> Role:
        """What it acts as: mixed while it also has the other pool's work."""
        return self.status.role

    @property
    def home_role(self) -> Role:
        """The pool that it belongs to."""
        return self.status.home_role

    @property
    def free_blocks(self) -> int:
        """Less what is on its way to the node."""
        return 0 if self.is_full else self.status.free_blocks - self.promised_blocks


class Loads:
    """Invariant: with no sequence assigned, every own count and promise is zero."""

    def __init__(self, rates: Rates) -> None:
        self._rates = rates
        self._nodes: dict[str, NodeLoad] = {}
        self._attempts: dict[str, Attempt] = {}
        # What sequences that move count for at their targets.
        self._moves: dict[str, Attempt] = {}

    def add_node(self, node: NodeDescription, status: NodeStatus) -> NodeLoad:
        load = self._nodes[node.node_id] = NodeLoad(node, status, self._rates)
        return load

    def remove_node(self, node_id: str) -> NodeLoad | None:
        """Forget a lost node; its sequences are released one by one by their flows."""
        return self._nodes.pop(node_id, None)

    def node(self, node_id: str) -> NodeLoad | None:
        return self._nodes.get(node_id)

    @property
    def nodes(self) -> Collection[NodeLoad]:
        return self._nodes.values()

    def status(self, node_id: str, status: NodeStatus) -> None:
        load = self._nodes.get(node_id)
        if load is None:
            return
        for attempt in load.confirmed:
            load.promised_blocks -= attempt.num_promised_blocks
            attempt.num_promised_blocks = 0
        load.confirmed.clear()
        load.hear(status)

    def full(self, node_id: str) -> None:
        if load := self._nodes.get(node_id):
            load.is_full = True
            load.update()

    def assign(
        self,
        sequence_id: str,
        placement: Placement,
        num_known_tokens: int,
        *,
        num_prefill_hit: int = 0,
        num_decode_hit: int = 0,
    ) -> Attempt:
        """``num_prefill_hit``, ``num_decode_hit``: known tokens whose KV the nodes hold, to be neither computed nor
        given room."""
        prefill, decode = self._nodes.get(placement.prefill_id), self._nodes.get(placement.decode_id)
        num_prompt_tokens = num_known_tokens - num_prefill_hit
        attempt = Attempt(sequence_id, placement, prefill, decode, num_prompt_tokens, num_known_tokens)
        self._attempts[sequence_id] = attempt
        if prefill is not None:
            prefill.prompt_tokens += attempt.num_prompt_tokens
            prefill.num_prompts += 1
            prefill.update()
        self._count(attempt, num_known_tokens + 1 - num_decode_hit)
        return attempt

    def begin_move(self, sequence_id: str, target_id: str, num_known_tokens: int, num_room_tokens: int) -> None:
        """It is to go on at another node, and counts for both until it is known which one it is on."""
        there = Placement(target_id, target_id)
        move = Attempt(sequence_id, there, None, self._nodes.get(target_id), 0, num_known_tokens, is_prompt=False)
        self._moves[sequence_id] = move
        self._count(move, num_room_tokens)

    def moved(self, sequence_id: str) -> Attempt:
        """It is at the target of its move alone."""
        self.prefilled(sequence_id)
        self._uncount(self._attempts[sequence_id])
        move = self._attempts[sequence_id] = self._moves.pop(sequence_id)
        return move

    def end_move(self, sequence_id: str) -> None:
        """It stays where it is. Harmless if it does not move."""
        if move := self._moves.pop(sequence_id, None):
            self._uncount(move)

    def _count(self, attempt: Attempt, num_room_tokens: int) -> None:
        """Where it will be decoded."""
        if load := attempt.decode:
            load.decode_tokens += attempt.num_tokens
            load.num_sequences += 1
            load.num_decoding += not attempt.is_prompt
            attempt.num_promised_blocks = load.node.kv_layout.blocks_for(num_room_tokens)
            load.promised_blocks += attempt.num_promised_blocks
            load.update()

    def _uncount(self, attempt: Attempt) -> None:
        if load := attempt.decode:
            load.decode_tokens = max(0, load.decode_tokens - attempt.num_tokens)
            load.num_sequences -= 1
            load.num_decoding -= 1
            load.promised_blocks = max(0, load.promised_blocks - attempt.num_promised_blocks)
            if attempt in load.confirmed:
                load.confirmed.remove(attempt)
            load.update()

    def confirm(self, sequence_id: str) -> None:
        """The decode node, or the target of a move, holds the blocks now: its next status shows them."""
        attempt = self._moves.get(sequence_id) or self._attempts.get(sequence_id)
        if attempt is None or attempt.is_confirmed:
            return
        attempt.is_confirmed = True
        if load := attempt.decode:
            load.confirmed.append(attempt)

    def prefilled(self, sequence_id: str) -> None:
        """The prompt phase is over."""
        attempt = self._attempts.get(sequence_id)
        if attempt is None or not attempt.is_prompt:
            return
        attempt.is_prompt = False
        if load := attempt.prefill:
            load.prompt_tokens = max(0, load.prompt_tokens - attempt.num_prompt_tokens)
            load.num_prompts -= 1
            load.foreign_prompt = max(0, load.foreign_prompt)
            load.update()
        if load := attempt.decode:
            load.num_decoding += 1
            load.update()

    def release(self, sequence_id: str) -> None:
        """The attempt is over on all of its nodes."""
        self.end_move(sequence_id)
        self.prefilled(sequence_id)
        attempt = self._attempts.pop(sequence_id, None)
        if attempt is not None:
            self._uncount(attempt)

    @property
    def num_assigned(self) -> int:
        return len(self._attempts)

    def check(self) -> None:
        """Conservation: own counts are the sums over the assigned sequences and the moves."""
        assert self._moves.keys() <= self._attempts.keys()
        for node_id, load in self._nodes.items():
            mine = [a for a in (*self._attempts.values(), *self._moves.values()) if a.decode is load]
            assert load.promised_blocks == sum(a.num_promised_blocks for a in mine), node_id
            assert load.decode_tokens == sum(a.num_tokens for a in mine), node_id
            prompts = [a for a in self._attempts.values() if a.is_prompt and a.prefill is load]
            assert load.prompt_tokens == sum(a.num_prompt_tokens for a in prompts), node_id
            assert load.num_sequences == len(mine), node_id
            assert load.num_decoding == sum(not a.is_prompt for a in mine), node_id
            assert load.num_prompts == len(prompts), node_id
            ready = load.prompt_wait_s, load.token_s, load.rank, load.free_tokens
            load.update()
            assert ready == (load.prompt_wait_s, load.token_s, load.rank, load.free_tokens), node_id
