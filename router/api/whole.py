"""The body of an answer that is not streamed, sent in pieces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

# Bytes per write.
_PIECE_BYTES = 64 * 1024

# Texts are escaped to ASCII, so their length is their size.
Json = list[str | bytearray]


class WholeAnswer:
    """The bytes of the body: their number, and the pieces in order."""

    __slots__ = ("_pieces", "num_bytes")

    def __init__(self, head: str, choices: Sequence[Json], tail: str) -> None:
        self._pieces: Json = [head]
        for number, choice in enumerate(choices):
            self._pieces += [","] * bool(number)
            self._pieces += choice
        self._pieces.append(tail)
        self.num_bytes = sum(map(len, self._pieces))

    def pieces(self) -> Iterator[bytes]:
        found = bytearray()
        for piece in self._pieces:
            for at in range(0, len(piece), _PIECE_BYTES):
                part = piece[at : at + _PIECE_BYTES]
                found += part.encode() if isinstance(part, str) else part
                if len(found) >= _PIECE_BYTES:
                    yield bytes(found)
                    found.clear()
        if found:
            yield bytes(found)
