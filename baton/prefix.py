"""Names for the KV of a prompt's beginning: one hash per full block, each over all tokens up to the block's end.

Two blocks have the same hash only if every bit of their KV is the same. Router and engine compute equal hashes, so
that either can ask which node has a prefix. Pure; no torch.

    seed = H(model, kernels, layout, salt, RoPE regime)
    hash of block i = H(hash of block i - 1, or seed; number of its tokens that count as prompt; its token ids)

H is BLAKE2b of 16 bytes. A hash without cryptographic strength would let a client construct two prompts of one hash,
and read from the answer what another client's prompt holds.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from baton.types import KvLayout, NodeDescription, PrefixCaching

HASH_BYTES = 16
KEY_BYTES = 8
# Changed with anything below that changes a hash.
_VERSION = 1


@dataclass(frozen=True, slots=True)
class PrefixScheme:
    """What a node's hashes depend on besides the tokens. Nodes with equal schemes give equal hashes."""

    fingerprint: str
    kernels: str
    layout: KvLayout
    caching: PrefixCaching

    @classmethod
    def of(cls, node: NodeDescription) -> PrefixScheme | None:
        """None if the node has no prefix cache."""
        caching = node.prefix_cache
        return None if caching is None else cls(node.model.fingerprint, node.kernels, node.kv_layout, caching)

    def seed(self, num_prompt_tokens: int, salt: bytes = b"") -> bytes:
        """What the chain of a prompt of this length begins with; see ``block_hashes``."""
        layout, regime = self.layout, self._regime(num_prompt_tokens)
        fields = (
            *(_VERSION, self.fingerprint, self.kernels, layout.num_layers, layout.num_kv_heads, layout.head_dim),
            *(layout.block_tokens, layout.dtype, self.caching.phases_agree, regime, salt),
        )
        digest = blake2b(digest_size=HASH_BYTES)
        for field in fields:
            data = field if isinstance(field, bytes) else str(field).encode()
            # With its length, so that no two lists of fields give the same bytes.
            digest.update(len(data).to_bytes(8, "little") + data)
        return digest.digest()

    def _regime(self, num_prompt_tokens: int) -> int:
        return 0 if self.caching.rope is None else self.caching.rope.of(num_prompt_tokens)

    def block_hashes(
        self,
        token_ids: Sequence[int],
        num_prompt_tokens: int,
        *,
        salt: bytes = b"",
        known: Sequence[bytes] = (),
    ) -> list[bytes]:
        """One hash per full block of ``token_ids``, of which the first ``num_prompt_tokens`` are the prompt.

        ``salt`` separates requests that must not share, of different tenants say. ``known``: the hashes of the first
        blocks, as this method gave them for fewer tokens of the same sequence.
        """
        size = self.layout.block_tokens
        first, stop = len(known) * size, len(token_ids) // size * size
        parent = known[-1] if known else self.seed(num_prompt_tokens, salt)
        data = memoryview(_as_uint32(token_ids[first:stop])).cast("B")
        hashes = list(known)
        for start in range(first, stop, size):
            num_prompt = size if self.caching.phases_agree else min(max(num_prompt_tokens - start, 0), size)
            at = 4 * (start - first)
            digest = blake2b(parent, digest_size=HASH_BYTES)
            digest.update(num_prompt.to_bytes(4, "little"))
            digest.update(data[at : at + 4 * size])
            parent = digest.digest()
            hashes.append(parent)
        return hashes


def key_of(block_hash: bytes) -> int:
    """A short name for use where a mistake costs time only: routers guess by it which node has a block."""
    return int.from_bytes(block_hash[:KEY_BYTES], "little")


def _as_uint32(token_ids: Sequence[int]) -> array[int]:
    """Little-endian, 4 bytes each."""
    values = array("I", token_ids)
    assert values.itemsize == 4, "C's unsigned int has 4 bytes"
    if sys.byteorder == "big":
        values.byteswap()
    return values
