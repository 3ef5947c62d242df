"""Makes a tokenizer.json readable for llguidance, on router and nodes alike. No dependencies.

The library has to know the bytes of each token. It reads them of byte-level tokenizers, and of SentencePiece's whose
decoder is written in one of several ways.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

_BYTE_TOKEN = re.compile(r'"<0x[0-9A-Fa-f]{2}>"')
# The library takes all tokens that begin so for bytes.
_NO_BYTE = re.compile(r'"<0x(?![0-9A-Fa-f]{2}>")')
# Decoders of SentencePiece. What joins tokens, or strips a space from the beginning of a text, adds nothing to a token.
_SENTENCE_PIECE = {"Replace", "Metaspace", "ByteFallback", "Fuse", "Strip"}


def readable(text: str) -> str:
    """The tokenizer.json with a decoder that the library reads. Raises ValueError for a decoder with which a text is
    not its tokens one after the other."""
    found = json.loads(text)
    decoder = found.get("decoder") if isinstance(found, dict) else None
    parts = _parts(decoder)
    kinds = {str(part.get("type")) for part in parts}
    if "ByteLevel" in kinds and kinds <= {"ByteLevel", "Fuse"}:
        return text
    if not kinds or not kinds <= _SENTENCE_PIECE:
        has = " and ".join(sorted(kinds - {"Fuse"})) or "none"
        raise ValueError(f"its decoder is {has}, expected ByteLevel, or ByteFallback or Metaspace as of SentencePiece")
    spaces = {mark for part in parts if (mark := _space_of(part)) is not None}
    if len(spaces) > 1:
        raise ValueError(f"its decoder has {len(spaces)} characters for a space, expected one")
    if "ByteFallback" not in kinds and _BYTE_TOKEN.search(text):
        raise ValueError(
            "it has tokens of bytes, such as <0x0A>, that its decoder does not read, expected ByteFallback"
        )
    if _NO_BYTE.search(text):
        raise ValueError("it has a token that begins like one of a byte, such as <0x0A>, and is none")
    if "Metaspace" not in kinds and "ByteFallback" in kinds:
        return text
    replaced = [{"type": "Replace", "pattern": {"String": space}, "content": " "} for space in spaces]
    found["decoder"] = {"type": "Sequence", "decoders": [*replaced, {"type": "ByteFallback"}, {"type": "Fuse"}]}
    return json.dumps(found, ensure_ascii=False)


def _parts(decoder: Any) -> list[Mapping[str, Any]]:
    if not isinstance(decoder, dict):
        return []
    if decoder.get("type") != "Sequence":
        return [decoder]
    return [part for inner in decoder.get("decoders") or () for part in _parts(inner)]


def _space_of(part: Mapping[str, Any]) -> str | None:
    """The character that stands for a space; None for a part that has none."""
    match part.get("type"):
        case "Metaspace":
            return str(part.get("replacement", "▁"))
        case "Replace":
            pattern = part.get("pattern")
            mark = pattern.get("String") if isinstance(pattern, dict) else None
            if not isinstance(mark, str) or len(mark) != 1 or part.get("content") != " ":
                raise ValueError(
                    f"its decoder replaces {pattern!r:.80}, expected one character that stands for a space"
                )
            return mark
        case "Strip" if part.get("content") != " " or part.get("stop"):
            raise ValueError("its decoder strips more than spaces from the beginning of a text, expected no more")
    return None
