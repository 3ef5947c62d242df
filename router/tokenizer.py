"""Text to token ids and back, from a model folder's files, without transformers.

It loads tokenizer.json through the `tokenizers` package and reads special tokens, the chat template and the
end-of-sequence ids beside it. It keeps no state of any request.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders

from baton.errors import BadConfig, InvalidRequest
from router.token_lengths import max_chars_per_token

# Longer texts are encoded as a batch of one. `tokenizers.Tokenizer.encode` keeps Python's lock (0.23: 1.4 s for a
# megabyte of random letters), `encode_batch_fast` gives it back (2 ms) and leaves out what nobody asks for (offsets).
_BATCH_CHARS = 4096
# Long texts are counted in pieces of so many characters: what an encoding holds is 100 bytes and more a token.
_PIECE_CHARS = 65_536


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the folder's JSON files say of the model; empty where they say nothing."""

    eos_token_ids: tuple[int, ...] = ()
    max_model_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    bos_token: str = ""
    eos_token: str = ""
    unk_token: str = ""
    pad_token: str = ""


class Tokenizer:
    """Thread-safe for reading, as `tokenizers.Tokenizer` is."""

    def __init__(self, inner: tokenizers.Tokenizer, special: SpecialTokens, chat_template: str | None) -> None:
        self._inner = inner
        # Truncation and padding settings saved with a tokenizer are for training.
        inner.no_truncation()
        inner.no_padding()
        self.special = special
        self.chat_template = chat_template
        self.vocab_size: int = inner.get_vocab_size(with_added_tokens=True)
        self.special_ids = frozenset(i for i, t in inner.get_added_tokens_decoder().items() if t.special)
        # Characters of text that one token can stand for at most; None where nothing proves it.
        self.max_chars_per_token = max_chars_per_token(inner)
        self._bytes = _token_bytes(inner) if _is_byte_level(inner) else None

    @classmethod
    def load(cls, folder: Path) -> Tokenizer | None:
        """None if the folder has no tokenizer.json: then only token ids can be served."""
        path = folder / "tokenizer.json"
        if not path.exists():
            return None
        try:
            inner = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises bare Exception
            raise BadConfig(f"{path} cannot be loaded: {error}", param="model_folder") from error
        config = _read_json(folder / "tokenizer_config.json")
        special = SpecialTokens(**{
            name: _token_text(config.get(name)) for name in ("bos_token", "eos_token", "unk_token", "pad_token")
        })  # fmt: skip
        return cls(inner, special, _chat_template(folder, config))

    def encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        if len(text) <= _BATCH_CHARS:
            return tuple(self._inner.encode(text, add_special_tokens=add_special_tokens).ids)
        return tuple(self._inner.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)

    def has_more_than(self, num_tokens: int, text: str) -> bool:
        """Whether the text's pieces have more tokens together: nearly so many as the whole, at a cost that is bounded.

        A cut costs a token or two, so that a caller who is to be right leaves some room.
        """
        found = 0
        for start in range(0, len(text), _PIECE_CHARS):
            piece = text[start : start + _PIECE_CHARS]
            found += len(self._inner.encode_batch_fast([piece], add_special_tokens=False)[0])
            if found > num_tokens:
                return True
        return False

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        # A batch, as for `encode`: for one token as for many it costs the same.
        return str(self._inner.decode_batch([list(token_ids)], skip_special_tokens=skip_special_tokens)[0])

    @property
    def byte_table(self) -> Sequence[bytes] | None:
        """Bytes of every token id for byte-level tokenizers, where text is the concatenation; None for others."""
        return self._bytes

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for on its own, for log-probabilities."""
        if self._bytes is not None:
            return self._bytes[token_id] if token_id < len(self._bytes) else b""
        piece = self._inner.id_to_token(token_id)
        if piece is None:
            return b""
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return str(piece).replace("▁", " ").encode()

    def token_text(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode("utf-8", "replace")


def load_facts(folder: Path) -> ModelFacts:
    """End-of-sequence ids (generation_config.json before config.json) and context length."""
    config = _read_json(folder / "config.json")
    text_config = config.get("text_config") or config
    generation = _read_json(folder / "generation_config.json")
    eos = generation.get("eos_token_id", text_config.get("eos_token_id"))
    if eos is None:
        ids: tuple[int, ...] = ()
    elif isinstance(eos, list):
        ids = tuple(int(i) for i in eos)
    else:
        ids = (int(eos),)
    max_tokens = text_config.get("max_position_embeddings")
    return ModelFacts(ids, int(max_tokens) if max_tokens is not None else None)


def require(tokenizer: Tokenizer | None, param: str) -> Tokenizer:
    """The tokenizer, or the error for what cannot be done without."""
    if tokenizer is None:
        raise InvalidRequest(
            f"{param} needs a tokenizer and the served model folder has no tokenizer.json; send token ids", param=param
        )
    return tokenizer


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise BadConfig(f"{path} is not JSON: {error}", param="model_folder") from error
    if not isinstance(content, dict):
        raise BadConfig(f"{path} holds {type(content).__name__}, expected an object", param="model_folder")
    return content


def _token_text(token: object) -> str:
    """tokenizer_config.json has special tokens as strings or as objects with their content."""
    if isinstance(token, dict):
        return str(token.get("content", ""))
    return token if isinstance(token, str) else ""


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.exists():
        return path.read_text("utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several named ones; "default" is for chat
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _is_byte_level(inner: tokenizers.Tokenizer) -> bool:
    return isinstance(inner.decoder, decoders.ByteLevel)


def _byte_alphabet() -> dict[str, int]:
    """The printable stand-ins that byte-level BPE uses for the 256 bytes (GPT-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {chr(b): b for b in printable}
    others = [b for b in range(256) if b not in set(printable)]
    alphabet.update({chr(256 + i): b for i, b in enumerate(others)})
    return alphabet


def _token_bytes(inner: tokenizers.Tokenizer) -> list[bytes]:
    alphabet = _byte_alphabet()
    vocab: dict[str, int] = inner.get_vocab(with_added_tokens=True)
    table = [b""] * (max(vocab.values(), default=-1) + 1)
    for piece, token_id in vocab.items():
        is_alphabet = all(c in alphabet for c in piece)
        table[token_id] = bytes(alphabet[c] for c in piece) if is_alphabet else piece.encode()
    return table
