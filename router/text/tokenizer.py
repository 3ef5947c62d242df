"""Text to token ids and back, from a model folder's files, without transformers.

It loads tokenizer.json through the `tokenizers` package and keeps no state of requests. transformers' own clean-up of
decoded text (clean_up_tokenization_spaces) is not done, as in vLLM.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from baton.errors import BadConfig, InvalidRequest
from baton.files import check_readable, is_there
from router.text.model_files import TokenizerFacts, load_tokenizer_facts
from router.text.token_lengths import max_chars_per_token

TOKENIZER_FILE = "tokenizer.json"
# Longer texts are encoded as a batch of one. `tokenizers.Tokenizer.encode` keeps Python's lock (0.23: 1.4 s for a
# megabyte of random letters); `encode_batch_fast` releases it (2 ms) and omits the unused offsets.
_BATCH_CHARS = 4096
# Long texts are counted in pieces of this many characters: an encoding takes 100 bytes and more a token.
_PIECE_CHARS = 65_536
_BYTE_PIECE = re.compile("<0x([0-9A-Fa-f]{2})>")
# Stands for earlier text: decoders treat the first piece of a text differently from all others.
CONTEXT = "x"


class Tokenizer:
    """Thread-safe for reading, as `tokenizers.Tokenizer` is."""

    def __init__(self, inner: tokenizers.Tokenizer, facts: TokenizerFacts | None = None) -> None:
        self._inner = inner
        # Truncation and padding settings saved with a tokenizer are for training.
        inner.no_truncation()
        inner.no_padding()
        self.facts = facts or TokenizerFacts()
        self.vocab_size: int = inner.get_vocab_size(with_added_tokens=True)
        self.special_ids = frozenset(i for i, t in inner.get_added_tokens_decoder().items() if t.special)
        # Upper bound on the characters of one token; None if it cannot be proved.
        self.max_chars_per_token = max_chars_per_token(inner)
        kinds = _decoder_kinds(inner)
        self._bytes = _token_bytes(inner) if set(kinds) - {"Fuse"} == {"ByteLevel"} else None
        self.has_byte_fallback = "ByteFallback" in kinds
        # Pieces may be parts of characters, which only the decoder can combine.
        self.has_partial_pieces = self._bytes is None and "ByteLevel" in kinds
        eos_token = self.facts.special_tokens.get("eos_token")
        self.eos_token_id: int | None = None if eos_token is None else inner.token_to_id(eos_token)

    @classmethod
    def load(cls, folder: Path, chat_template: str = "") -> Tokenizer | None:
        """None if the folder has no tokenizer.json: then only token ids can be served. ``chat_template``: as for
        `load_tokenizer_facts`."""
        path = folder / TOKENIZER_FILE
        if not is_there(path):
            return None
        check_readable(path)
        try:
            inner = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises bare Exception
            raise BadConfig(f"{path} cannot be loaded: {error}", param="model_folder") from error
        return cls(inner, load_tokenizer_facts(folder, chat_template))

    def encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        if len(text) <= _BATCH_CHARS:
            return tuple(self._inner.encode(text, add_special_tokens=add_special_tokens).ids)
        return tuple(self._inner.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)

    def has_more_than(self, num_tokens: int, text: str) -> bool:
        """Whether the text's pieces together have more tokens: nearly as many as the whole text, at a bounded cost.

        A cut adds a token or two, so an exact caller leaves some room.
        """
        found = 0
        for start in range(0, len(text), _PIECE_CHARS):
            piece = text[start : start + _PIECE_CHARS]
            found += len(self._inner.encode_batch_fast([piece], add_special_tokens=False)[0])
            if found > num_tokens:
                return True
        return False

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of all tokens at once; `router.text.detokenizer` gives the same in pieces."""
        # A batch, as for `encode`: the cost per call is constant.
        text = str(self._inner.decode_batch([list(token_ids)], skip_special_tokens=skip_special_tokens)[0])
        if not self.has_byte_fallback or "\ufffd" not in text:
            return text
        reader = PieceReader(self, self.special_ids if skip_special_tokens else ())
        return self.join([*reader.push(token_ids), *reader.flush()])

    def join(self, pieces: Sequence[str]) -> str:
        """The text of vocabulary entries, as `tokenizers` makes it."""
        return " ".join(pieces) if self._inner.decoder is None else str(self._inner.decoder.decode(list(pieces)))

    def piece(self, token_id: int) -> str | None:
        """The vocabulary's entry; None for ids beyond it, which models with a padded head can produce."""
        piece: str | None = self._inner.id_to_token(token_id)
        return piece

    def token_id(self, piece: str) -> int | None:
        """The id of a vocabulary entry; None if there is none."""
        found: int | None = self._inner.token_to_id(piece)
        return found

    @property
    def byte_table(self) -> Sequence[bytes] | None:
        """Bytes of every token id for byte-level tokenizers, where text is the concatenation; None for others."""
        return self._bytes

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds inside a text, for log-probabilities."""
        if self._bytes is not None:
            return self._bytes[token_id] if token_id < len(self._bytes) else b""
        piece = self.piece(token_id)
        if piece is None:
            return b""
        byte = _fallback_byte(piece) if self.has_byte_fallback else None
        if byte is not None:
            return byte
        return self.join([CONTEXT, piece]).removeprefix(CONTEXT).encode()

    def token_name(self, token_id: int) -> str:
        """Its text; for a part of a character its bytes in OpenAI's notation."""
        raw = self.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{b:02x}" for b in raw)


class Utf8:
    """Decodes bytes in portions: each incomplete character is one U+FFFD, as in Python and in `tokenizers`'
    ByteLevel."""

    __slots__ = ("_decoder", "_is_foreign")

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        # Bytes of an incomplete character that do not belong to the output.
        self._is_foreign = False

    def begin_output(self) -> None:
        """The bytes so far were the prompt. A character that it left incomplete is output if it is completed."""
        self._is_foreign = bool(self._decoder.getstate()[0])

    def decode(self, data: bytes, *, final: bool = False) -> str:
        text = self._decoder.decode(data, final)
        if self._is_foreign and text:
            self._is_foreign = False
            text = text.removeprefix("\ufffd")
        return text


class PieceReader:
    """Vocabulary entries of tokens that come in portions, for a decoder: hidden and unknown ones are omitted.

    Runs of byte tokens become characters here. The ByteFallback of `tokenizers` replaces a whole run if one byte of it
    is invalid, including valid characters that the client already has.
    """

    __slots__ = ("_skip", "_tokenizer", "_utf8")

    def __init__(self, tokenizer: Tokenizer, skip: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._skip = skip
        self._utf8 = Utf8() if tokenizer.has_byte_fallback else None

    def begin_output(self) -> None:
        if self._utf8 is not None:
            self._utf8.begin_output()

    def push(self, token_ids: Sequence[int]) -> list[str]:
        pieces: list[str] = []
        for token_id in token_ids:
            if token_id in self._skip or (piece := self._tokenizer.piece(token_id)) is None:
                continue
            if self._utf8 is None:
                pieces.append(piece)
            elif (byte := _fallback_byte(piece)) is not None:
                pieces += self._utf8.decode(byte)
            else:
                pieces += self._utf8.decode(b"", final=True)
                pieces.append(piece)
        return pieces

    def flush(self) -> list[str]:
        """At the end, an incomplete character is U+FFFD."""
        return [] if self._utf8 is None else list(self._utf8.decode(b"", final=True))


def require(tokenizer: Tokenizer | None, param: str) -> Tokenizer:
    """The tokenizer, or an error that names what needs one."""
    if tokenizer is None:
        raise InvalidRequest(
            f"{param} needs a tokenizer and the served model folder has no tokenizer.json; send token ids", param=param
        )
    return tokenizer


def _decoder_kinds(inner: tokenizers.Tokenizer) -> tuple[str, ...]:
    """The types of its decoder's parts, in order."""

    def kinds(decoder: dict[str, Any]) -> list[str]:
        if decoder["type"] != "Sequence":
            return [str(decoder["type"])]
        return [kind for part in decoder["decoders"] for kind in kinds(part)]

    return () if inner.decoder is None else tuple(kinds(json.loads(inner.decoder.__getstate__())))


def _fallback_byte(piece: str) -> bytes | None:
    """The byte that a byte token (`<0xE2>`) stands for."""
    found = _BYTE_PIECE.fullmatch(piece)
    return bytes.fromhex(found[1]) if found else None


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
