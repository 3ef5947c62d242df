"""What a request costs on a node: seconds of predicted work, its own and what it adds to that of others. Pure.

A cost is a sum of figures that each node keeps ready (`load`), times what the request needs of them (`Work`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

from router.cluster.load import NodeLoad
from router.cluster.prefix_index import Hit
from router.cluster.rates import Rates


class Work(NamedTuple):
    """How often a node's figures count for a phase of a request."""

    num_waits: int
    num_computed_tokens: int
    num_output_tokens: float
    # Tokens of KV times the steps that read them.
    num_read_tokens: float

    def seconds(self, node: NodeLoad) -> float:
        return (
            self.num_waits * node.prompt_wait_s
            + self.num_computed_tokens * node.prompt_cost_s
            + self.num_output_tokens * node.token_s
            + self.num_read_tokens * node.token_kv_s
        )

    def least(
        self, nodes: Collection[NodeLoad], num_room_tokens: int, max_wait_s: float, blocked: Collection[str]
    ) -> tuple[NodeLoad, float] | None:
        """The node that takes least, and how long, of those that have room and whose prompts take less than
        ``max_wait_s``."""
        if not nodes:
            return None
        waits, computed, output, read = self
        least: NodeLoad | None = None
        least_s = math.inf
        for node in nodes:
            # As `seconds`; a call for each of a thousand nodes takes as long as the sum.
            seconds = (
                waits * node.prompt_wait_s + computed * node.prompt_cost_s
                + output * node.token_s + read * node.token_kv_s
            )  # fmt: skip
            if seconds > least_s or node.free_tokens < num_room_tokens:
                continue
            if node.prompt_wait_s >= max_wait_s or node.node_id in blocked:
                continue
            if least is None or seconds < least_s or node.rank < least.rank:
                least, least_s = node, seconds
        return None if least is None else (least, least_s)


class Costs:
    """Of one request."""

    def __init__(
        self,
        rates: Rates,
        num_known_tokens: int,
        *,
        is_single_token: bool = False,
        hits: Sequence[Hit] = (),
        block_tokens: int = 1,
    ) -> None:
        """``hits`` of a sequence of which so many tokens are known."""
        self.hits = hits
        self.num_output_tokens = 0.0 if is_single_token else rates.num_output_tokens
        self._rates = rates
        self._num_known_tokens = num_known_tokens
        self._block_tokens = block_tokens
        # The last known token is computed in any case: its logits are needed.
        self._max_prompt_hit = (num_known_tokens - 1) // block_tokens * block_tokens

    def num_hit(self, node_id: str) -> int:
        """Leading tokens that the node holds."""
        return next((self.tokens_of(hit) for hit in self.hits if node_id in hit.node_ids), 0)

    def tokens_of(self, hit: Hit) -> int:
        return min(hit.num_blocks * self._block_tokens, self._num_known_tokens)

    def prompt_hit(self, num_hit: int) -> int:
        """Of these the tokens that need not be computed where the prompt runs."""
        return min(num_hit, self._max_prompt_hit)

    def num_computed(self, num_hit: int) -> int:
        return self._num_known_tokens - self.prompt_hit(num_hit)

    def prompt(self, num_hit: int) -> Work:
        """From now to the first token, and what waits for that elsewhere."""
        return Work(1, self.num_computed(num_hit), 0.0, 0.0)

    def tokens(self, num_hit: int) -> Work:
        """All tokens behind the first, of a prompt that another node computes."""
        return Work(1, 0, self.num_output_tokens, self.num_output_tokens * self._num_known_tokens)

    def whole(self, num_hit: int) -> Work:
        """Both on one node."""
        num_read = self.num_output_tokens * self._num_known_tokens
        return Work(1, self.num_computed(num_hit), self.num_output_tokens, num_read)

    def move_s(self, node: NodeLoad, num_hit: int) -> float:
        """What moving the KV to this node adds before the second token."""
        return (self._num_known_tokens - num_hit) * node.token_bytes * self._rates.move_byte_s

    def ttft_s(self, node: NodeLoad, num_hit: int) -> float:
        """From now to the first token, if the node computes the prompt."""
        return node.prompt_wait_s + self.num_computed(num_hit) * node.prompt_token_s

    def least_s(self, prefill: NodeLoad, decode: NodeLoad) -> float:
        """Of the request on nodes like the better one of these that have nothing else to do."""
        token_s = min(prefill.times.prompt_token_s, decode.times.prompt_token_s)
        output_s = self.num_output_tokens * min(prefill.times.base_s, decode.times.base_s)
        return self._num_known_tokens * token_s + output_s
