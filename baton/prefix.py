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

from baton.types import KvLayout

HASH_BYTES = 16
# Changed with anything below that changes a hash.
_VERSION = 1


@dataclass(frozen=True, slots=True)
class RopeRegimes:
    """Rotary frequencies that depend on the prompt's length: equal for all lengths up to ``limit``.

    Beyond it every length has its own (dynamic scaling), or all have the same (longrope).
    """

    limit: int
    is_each_its_own: bool

    def of(self, num_prompt_tokens: int) -> int:
        """Equal numbers mean equal frequencies."""
        if num_prompt_tokens <= self.limit:
            return 0
        return num_prompt_tokens if self.is_each_its_own else 1


@dataclass(frozen=True, slots=True)
class PrefixScheme:
    """What a node's hashes depend on besides the tokens. Nodes with equal schemes give equal hashes.

    ``phases_agree``: the kernels compute a token's KV with the same bits in a prompt and as a generated token. Where
    they do not, a block that holds the KV of generated tokens never serves as a block of a prompt.
    """

    fingerprint: str
    kernels: str
    layout: KvLayout
    phases_agree: bool
    # None: frequencies do not depend on the prompt's length.
    rope: RopeRegimes | None = None

    def seed(self, num_prompt_tokens: int, salt: bytes = b"") -> bytes:
        """What the chain of a prompt of this length begins with; see ``block_hashes``."""
        layout, regime = self.layout, 0 if self.rope is None else self.rope.of(num_prompt_tokens)
        fields = (
            *(_VERSION, self.fingerprint, self.kernels, layout.num_layers, layout.num_kv_heads, layout.head_dim),
            *(layout.block_tokens, layout.dtype, self.phases_agree, regime, salt),
        )
        digest = blake2b(digest_size=HASH_BYTES)
        for field in fields:
            data = field if isinstance(field, bytes) else str(field).encode()
            # With its length, so that no two lists of fields give the same bytes.
            digest.update(len(data).to_bytes(8, "little") + data)
        return digest.digest()

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
            num_prompt = size if self.phases_agree else min(max(num_prompt_tokens - start, 0), size)
            at = 4 * (start - first)
            digest = blake2b(parent, digest_size=HASH_BYTES)
            digest.update(num_prompt.to_bytes(4, "little"))
            digest.update(data[at : at + 4 * size])
            parent = digest.digest()
            hashes.append(parent)
        return hashes


def _as_uint32(token_ids: Sequence[int]) -> array[int]:
    """Little-endian, 4 bytes each."""
    values = array("I", token_ids)
    assert values.itemsize == 4, "C's unsigned int has 4 bytes"
    if sys.byteorder == "big":
        values.byteswap()
    return values
