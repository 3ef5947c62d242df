"""What one request costs on a node, in seconds of predicted work. Pure.

It orders nodes only where some hold a part of the prompt: there what need not be computed or moved is weighed against
what the node has to do already.
"""

from __future__ import annotations

from collections.abc import Sequence

from router.cluster.load import NodeLoad
from router.cluster.prefix_index import Hit
from router.cluster.rates import Rates


class Costs:
    def __init__(self, rates: Rates, hits: Sequence[Hit], num_known_tokens: int, block_tokens: int) -> None:
        """``hits`` of a sequence of which so many tokens are known."""
        self.hits = hits
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

    def prompt_s(self, node: NodeLoad, num_hit: int, *, stays: bool) -> float:
        """From now to the first token. ``stays``: it is decoded there too, beside what the node decodes."""
        token_s = self._rates.prompt_token_s(node.node_id)
        seconds = (node.pending_prompt_tokens + self._num_computed(num_hit)) * token_s
        return seconds + self._beside_s(node) if stays else seconds

    def decode_s(self, node: NodeLoad, num_hit: int) -> float:
        """What moving the KV there adds, and what the node's other sequences add to all of the request's tokens."""
        num_bytes = (self._num_known_tokens - num_hit) * node.token_bytes
        return num_bytes * self._rates.move_byte_s + self._waiting_s(node) + self._beside_s(node)

    def here_s(self, node: NodeLoad, num_hit: int) -> float:
        """Prompt and tokens on a node that decodes: all that run there wait for what is left of the prompt."""
        compute_s = self._num_computed(num_hit) * self._rates.prompt_token_s(node.node_id)
        return compute_s * (1 + node.status.num_running) + self._waiting_s(node) + self._beside_s(node)

    def _num_computed(self, num_hit: int) -> int:
        return self._num_known_tokens - self.prompt_hit(num_hit)

    def _waiting_s(self, node: NodeLoad) -> float:
        return node.pending_prompt_tokens * self._rates.prompt_token_s(node.node_id)

    def _beside_s(self, node: NodeLoad) -> float:
        rates = self._rates
        return node.pending_decode_tokens * rates.kv_token_s(node.node_id) * rates.num_output_tokens
