"""A small tokenizer of every decoder kind that models have, for the tests of text."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

BYTES = [f"<0x{b:02X}>" for b in range(256)]
WORDS = ["▁the", "▁jam", "▁", "▁▁", "é", "😀", "x", "a", ".", ",", "'s", "n't", "▁a▁b"]


def _with_specials(inner: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    inner.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<s>", "</s>", "<｜end｜>")])
    inner.add_tokens(["[added]", "ünder"])
    return inner


def _bpe(pieces: list[str], decoder: decoders.Decoder | None, **settings: object) -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[], **settings))
    if decoder is not None:
        inner.decoder = decoder
    return _with_specials(inner)


def llama() -> tokenizers.Tokenizer:
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    inner = _bpe([*BYTES, *WORDS], decoders.Sequence(parts), byte_fallback=True)
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return inner


def _gemma() -> tokenizers.Tokenizer:
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return _bpe([*BYTES, *WORDS], decoders.Sequence(parts), byte_fallback=True)


def _byte_level_pieces() -> list[str]:
    """The stand-ins of the 256 bytes in order, so that an id below 256 is a byte, and some longer ones."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    return [*(chr(b if b in printable else next(others)) for b in range(256)), "Ġthe", "ĠðŁ", "ðŁĺ", "Ģx", "Ã©"]


def _word_piece() -> tokenizers.Tokenizer:
    pieces = ["[UNK]", "the", "##s", "##é", "jam", ".", ",", "'", "s", "n't", "##.", "😀", "do"]
    inner = tokenizers.Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    inner.decoder = decoders.WordPiece()
    return _with_specials(inner)


def _unigram() -> tokenizers.Tokenizer:
    pieces = [("<unk>", 0.0), *((p, -1.0 - i) for i, p in enumerate([*BYTES, *WORDS]))]
    inner = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace("▁", "always")])
    return _with_specials(inner)


SUFFIXED = ["the</w>", "jam</w>", "é", "é</w>", "x", "😀</w>", ".</w>", "a"]
KINDS: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "byte-level": lambda: _bpe(_byte_level_pieces(), decoders.ByteLevel()),
    "byte-level in a sequence": lambda: _bpe(_byte_level_pieces(), decoders.Sequence([decoders.ByteLevel()])),
    "byte-level, then another": lambda: _bpe(
        _byte_level_pieces(), decoders.Sequence([decoders.ByteLevel(), decoders.Replace("q", "Q")])
    ),
    "llama": llama,
    "gemma": _gemma,
    "metaspace": lambda: _bpe(WORDS, decoders.Metaspace("▁", "always")),
    "metaspace, first only": lambda: _bpe(WORDS, decoders.Metaspace("▁", "first")),
    "metaspace, never": lambda: _bpe(WORDS, decoders.Metaspace("▁", "never")),
    "suffix": lambda: _bpe(SUFFIXED, decoders.BPEDecoder("</w>")),
    "wordpiece": _word_piece,
    "unigram": _unigram,
    "none": lambda: _bpe(WORDS, None),
    "strip of two": lambda: _bpe(
        WORDS, decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 2, 0)])
    ),
    "byte tokens without fallback": lambda: _bpe([*BYTES, *WORDS], decoders.Metaspace("▁", "always")),
}


def trained_sentence_piece(corpus: Sequence[str], decoder: decoders.Decoder) -> tokenizers.Tokenizer:
    """A BPE tokenizer as Llama 2 has it, trained on the corpus: spaces are parts of pieces, what it has no piece for is
    written in bytes."""
    inner = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace("▁", "always")
    specials = ["<unk>", "<s>", "</s>"]
    inner.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=300, special_tokens=specials, show_progress=False))
    inner.decoder = decoder
    saved = json.loads(inner.to_str())
    vocab = saved["model"]["vocab"]
    for number, piece in enumerate([p for p in BYTES if p not in vocab], start=len(vocab)):
        vocab[piece] = number
    saved["model"]["byte_fallback"] = True
    return tokenizers.Tokenizer.from_str(json.dumps(saved))
