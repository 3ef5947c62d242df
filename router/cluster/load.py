"""How loaded each node is: its last status plus what this router has sent since. Pure bookkeeping.

The router knows its own sequences exactly; a status adds what other routers put there. So the load of a node is the
router's own count plus what the last status showed beyond the own count at that moment, and a burst between two
statuses spreads.
"""

from __future__ import annotations

from dataclasses import dataclass

from baton.types import NodeDescription, NodeStatus
from router.cluster.policy import NodeView, Placement


@dataclass(slots=True)
class _Assigned:
    # Where it counts: a node that was lost and is there again knows nothing of it. None: that node was lost before.
    prefill: _NodeLoad | None
    decode: _NodeLoad | None
    num_tokens: int
    # Still in the prompt phase.
    is_prompt: bool = True
    # Blocks promised by us that a status may not show yet.
    num_promised_blocks: int = 0
    is_confirmed: bool = False


class _NodeLoad:
    __slots__ = (
        "confirmed",
        "decode_tokens",
        "foreign_decode",
        "foreign_prompt",
        "is_full",
        "node",
        "promised_blocks",
        "prompt_tokens",
        "status",
    )  # fmt: skip

    def __init__(self, node: NodeDescription, status: NodeStatus) -> None:
        self.node = node
        self.status = status
        # Tokens of our own sequences in each phase.
        self.prompt_tokens = 0
        self.decode_tokens = 0
        # Tokens beyond our own in the last status.
        self.foreign_prompt = status.queued_prompt_tokens
        self.foreign_decode = status.running_tokens
        self.promised_blocks = 0
        # Promises that the node has acknowledged and that the next status will show as used blocks.
        self.confirmed: list[_Assigned] = []
        # It refused a reservation; nothing more is asked until its next status.
        self.is_full = False


class Loads:
    """Invariant: with no sequence assigned, every own count and promise is zero."""

    def __init__(self) -> None:
        self._nodes: dict[str, _NodeLoad] = {}
        self._assigned: dict[str, _Assigned] = {}

    def add_node(self, node: NodeDescription, status: NodeStatus) -> None:
        self._nodes[node.node_id] = _NodeLoad(node, status)

    def remove_node(self, node_id: str) -> None:
        """Forget a lost node; its sequences are released one by one by their flows."""
        self._nodes.pop(node_id, None)

    def pool(self, node_id: str) -> str:
        """The home pool of a known node."""
        return self._nodes[node_id].node.home_role.value

    def is_leaving(self, node_id: str) -> bool:
        """Whether a known node has said that it is about to leave."""
        return self._nodes[node_id].status.draining

    def status(self, node_id: str, status: NodeStatus) -> None:
        load = self._nodes.get(node_id)
        if load is None:
            return
        load.status = status
        load.foreign_prompt = max(0, status.queued_prompt_tokens - load.prompt_tokens)
        load.foreign_decode = max(0, status.running_tokens - load.decode_tokens)
        load.is_full = False
        for assigned in load.confirmed:
            load.promised_blocks -= assigned.num_promised_blocks
            assigned.num_promised_blocks = 0
        load.confirmed.clear()

    def full(self, node_id: str) -> None:
        if load := self._nodes.get(node_id):
            load.is_full = True

    def assign(self, sequence_id: str, placement: Placement, num_known_tokens: int) -> None:
        prefill, decode = self._nodes.get(placement.prefill_id), self._nodes.get(placement.decode_id)
        assigned = _Assigned(prefill, decode, num_known_tokens)
        self._assigned[sequence_id] = assigned
        if prefill is not None:
            prefill.prompt_tokens += num_known_tokens
        if decode is not None:
            decode.decode_tokens += num_known_tokens
            assigned.num_promised_blocks = decode.node.kv_layout.blocks_for(num_known_tokens + 1)
            decode.promised_blocks += assigned.num_promised_blocks

    def confirm(self, sequence_id: str) -> None:
        """The decode node holds the blocks now: its next status shows them."""
        assigned = self._assigned.get(sequence_id)
        if assigned is None or assigned.is_confirmed:
            return
        assigned.is_confirmed = True
        if load := assigned.decode:
            load.confirmed.append(assigned)

    def prefilled(self, sequence_id: str) -> None:
        """The prompt phase is over."""
        assigned = self._assigned.get(sequence_id)
        if assigned is None or not assigned.is_prompt:
            return
        assigned.is_prompt = False
        if load := assigned.prefill:
            load.prompt_tokens = max(0, load.prompt_tokens - assigned.num_tokens)

    def release(self, sequence_id: str) -> None:
        """The attempt is over on both nodes."""
        self.prefilled(sequence_id)
        assigned = self._assigned.pop(sequence_id, None)
        if assigned is None:
            return
        if load := assigned.decode:
            load.decode_tokens = max(0, load.decode_tokens - assigned.num_tokens)
            load.promised_blocks = max(0, load.promised_blocks - assigned.num_promised_blocks)
            if assigned in load.confirmed:
                load.confirmed.remove(assigned)

    def view(self, node_id: str, is_available: bool) -> NodeView:
        load = self._nodes[node_id]
        return NodeView(
            node_id=node_id,
            role=load.status.role,
            is_available=is_available,
            pending_prompt_tokens=load.prompt_tokens + load.foreign_prompt,
            pending_decode_tokens=load.decode_tokens + load.foreign_decode,
            free_blocks=0 if load.is_full else load.status.free_blocks - load.promised_blocks,
            block_tokens=load.node.kv_layout.block_tokens,
        )

    @property
    def num_assigned(self) -> int:
        return len(self._assigned)

    def check(self) -> None:
        """Conservation: own counts are the sums over the assigned sequences."""
        for node_id, load in self._nodes.items():
            mine = [a for a in self._assigned.values() if a.decode is load]
            assert load.promised_blocks == sum(a.num_promised_blocks for a in mine), node_id
            assert load.decode_tokens == sum(a.num_tokens for a in mine), node_id
            prompts = [a for a in self._assigned.values() if a.is_prompt and a.prefill is load]
            assert load.prompt_tokens == sum(a.num_tokens for a in prompts), node_id
