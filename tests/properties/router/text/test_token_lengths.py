"""No text is longer than its tokens times the bound, for every kind of tokenizer that has one; others have none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, normalizers, pre_tokenizers, trainers

from router.text.token_lengths import max_chars_per_token

CORPUS = [
    "the quick brown fox jumps over the lazy dog    and so on",
    "Grüße aus Köln, 東京 and मुंबई 🎽",
    "\n\n\t  x" * 3,
]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


# What normalizers compose, what merges to long tokens, and anything.
PARTS = st.sampled_from(
    ["the ", " " * 20, "a" * 9, "\n", "é", "ᄀ", "ᅡ", "ᆨ", "\u0345", "α", "🎽", "東京", "\x00"]
) | st.text(max_size=8)


def byte_level(normalizer: normalizers.Normalizer | None = None) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer  # type: ignore[assignment]
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def byte_fallback(normalizer: normalizers.Normalizer | None = None, *, has_bytes: bool = True) -> tokenizers.Tokenizer:
    """As Llama 2 and Mistral have it."""
    pieces = ["<unk>", *(BYTES if has_bytes else BYTES[:100]), "▁", "t", "h", "e", "▁t", "he", "▁the", "▁▁", "▁▁▁▁"]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "▁"), ("▁▁", "▁▁")]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    model = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(model)
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence([*([normalizer] if normalizer else []), *steps])  # type: ignore[assignment]
    return tokenizer


BOUNDED: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "byte-level": byte_level,
    "byte-level NFC": lambda: byte_level(normalizers.NFC()),
    "byte-level lowercase": lambda: byte_level(normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])),
    "byte-level halving": lambda: byte_level(normalizers.Replace("aa", "a")),
    "byte fallback": byte_fallback,
}


@pytest.mark.parametrize("kind", BOUNDED)
def test_no_text_is_longer_than_its_tokens_allow(kind: str) -> None:
    tokenizer = BOUNDED[kind]()
    bound = max_chars_per_token(tokenizer)
    assert bound is not None

    @settings(max_examples=100, deadline=None)
    @given(st.lists(PARTS, max_size=30).map("".join))
    def check(text: str) -> None:
        num_tokens = len(tokenizer.encode(text, add_special_tokens=False).ids)
        assert len(text) <= bound * num_tokens

    check()


def with_token(token: AddedToken) -> tokenizers.Tokenizer:
    tokenizer = byte_level()
    tokenizer.add_special_tokens([token])
    return tokenizer


def word_level() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.WordLevel({"[UNK]": 0, "the": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    return tokenizer


def splitting_off_spaces() -> tokenizers.Tokenizer:
    tokenizer = byte_level()
    steps = [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)  # type: ignore[assignment]
    return tokenizer


UNBOUNDED: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "words": word_level,
    "word pieces": lambda: tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]")),
    "stripped": lambda: byte_level(normalizers.Strip()),
    "without accents": lambda: byte_level(normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])),
    "deleted": lambda: byte_level(normalizers.Replace("x", "")),
    "any spaces": lambda: byte_level(normalizers.Replace(tokenizers.Regex(r"\s+"), " ")),
    "spaces beside a token": lambda: with_token(AddedToken("<mask>", lstrip=True)),
    "bytes missing": lambda: byte_fallback(has_bytes=False),
    "spaces removed": splitting_off_spaces,
}


@pytest.mark.parametrize("kind", UNBOUNDED)
def test_where_one_token_may_be_any_text_there_is_no_bound(kind: str) -> None:
    assert max_chars_per_token(UNBOUNDED[kind]()) is None
