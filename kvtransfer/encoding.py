"""How KV bytes are written down on their way, named in the handshake. So far in one way: as they lie in the cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from baton.errors import Incompatible, quoted


@dataclass(frozen=True, slots=True)
class Encoding:
    name: str
    # The bytes that digests are over: what two ends compare must be the same bytes.
    digest_covers: str

    def __str__(self) -> str:
        return f"{self.name} (digest over {self.digest_covers})"


IDENTITY = Encoding("identity", "cache bytes")
# Best first.
ENCODINGS = (IDENTITY,)


def choose_encoding(receiver: str, sender: str, offered: Sequence[Encoding]) -> Encoding:
    """The first of the encodings of node ``sender`` that this one, ``receiver``, has too. Raises Incompatible."""
    for encoding in offered:
        if encoding in ENCODINGS:
            return encoding
    theirs = ", ".join(quoted(str(encoding)) for encoding in offered[:8]) or "none"
    mine = ", ".join(str(encoding) for encoding in ENCODINGS)
    raise Incompatible(f"{receiver} and {sender} have no encoding of KV in common: {mine} here, {theirs} there")
