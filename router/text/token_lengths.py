"""Computes an upper bound on the text of one token from a tokenizer's parts, to refuse long prompts before
tokenizing."""

from __future__ import annotations

import json
from typing import Any

import tokenizers
from tokenizers import models

# Unicode composition makes one character of at most four (U+1F82).
_MAX_COMPOSED = 4
_SHRINK = {
    "NFC": _MAX_COMPOSED,
    "NFKC": _MAX_COMPOSED,
    "NFD": 1,
    "NFKD": 1,
    "Lowercase": 1,
    "Prepend": 1,
    "ByteLevel": 1,
}
_KEEPING = ("ByteLevel", "Metaspace", "Digits", "UnicodeScripts")
_SPLITTING = ("Split", "Punctuation")


def max_chars_per_token(inner: tokenizers.Tokenizer) -> int | None:
    """None if a token may stand for any length: text that is dropped, or unknown words as one token."""
    shrink = _shrink(_state(inner.normalizer))
    splitter = _state(inner.pre_tokenizer)
    if shrink is None or not _keeps_text(splitter) or not _knows_all_text(inner, splitter):
        return None
    if any(token.lstrip or token.rstrip for token in inner.get_added_tokens_decoder().values()):
        return None  # they absorb the spaces beside them
    return shrink * max(map(len, inner.get_vocab(with_added_tokens=True)), default=1)


def _state(part: Any) -> dict[str, Any]:
    """A part's own JSON; empty without the part."""
    return {} if part is None else dict(json.loads(part.__getstate__()))


def _shrink(normalizer: dict[str, Any]) -> int | None:
    """The maximum number of characters that become one; None if some are dropped, or if the normalizer is unknown."""
    if not normalizer:
        return 1
    if normalizer["type"] == "Sequence":
        product = 1
        for part in normalizer["normalizers"]:
            factor = _shrink(part)
            if factor is None:
                return None
            product *= factor
        return product
    if normalizer["type"] == "Replace":
        pattern, content = normalizer["pattern"].get("String"), normalizer["content"]
        return None if not pattern or not content else -(-len(pattern) // len(content))
    return _SHRINK.get(normalizer["type"])


def _keeps_text(splitter: dict[str, Any]) -> bool:
    if not splitter:
        return True
    if splitter["type"] == "Sequence":
        return all(map(_keeps_text, splitter["pretokenizers"]))
    return splitter["type"] in _KEEPING or (splitter["type"] in _SPLITTING and splitter["behavior"] != "Removed")


def _knows_all_text(inner: tokenizers.Tokenizer, splitter: dict[str, Any]) -> bool:
    """Whether every character has tokens of its own, at least by its bytes."""
    model = inner.model
    if not isinstance(model, models.BPE):
        return False
    if model.byte_fallback:
        return all(inner.token_to_id(f"<0x{byte:02X}>") is not None for byte in range(256))
    parts = [splitter, *splitter.get("pretokenizers", ()), _state(inner.normalizer)]
    parts += parts[-1].get("normalizers", ())
    is_byte_level = any(part.get("type") == "ByteLevel" for part in parts)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    return is_byte_level and all(inner.token_to_id(character) is not None for character in alphabet)
