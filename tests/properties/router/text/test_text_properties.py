"""Text in pieces is the text of the whole: every kind of decoder, any ids, any chunks, after any prompt."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby

import pytest
import tokenizers
from hypothesis import assume, given
from hypothesis import strategies as st

from router.text.detokenizer import TextStream
from router.text.tokenizer import Tokenizer
from tests.support.text_tokenizers import KINDS

BYTE = re.compile("<0x[0-9A-F]{2}>")
# An id above every vocabulary here.
NUM_IDS = 340


def reference(inner: tokenizers.Tokenizer, ids: Sequence[int], *, skip_special: bool) -> str:
    """`tokenizers` on all ids at once; where its ByteFallback would spoil a run for one byte, UTF-8 with U+FFFD."""
    if not (inner.decoder is not None and "ByteFallback" in repr(inner.decoder)):
        return str(inner.decode(list(ids), skip_special_tokens=skip_special))
    specials = {i for i, t in inner.get_added_tokens_decoder().items() if t.special} if skip_special else set()
    pieces = [p for i in ids if i not in specials and (p := inner.id_to_token(i)) is not None]
    merged: list[str] = []
    for is_byte, group in groupby(pieces, lambda p: bool(BYTE.fullmatch(p))):
        run = list(group)
        merged += list(bytes(int(p[3:5], 16) for p in run).decode("utf-8", "replace")) if is_byte else run
    return str(inner.decoder.decode(merged))


@pytest.fixture(scope="module", params=KINDS)
def inner(request: pytest.FixtureRequest) -> tokenizers.Tokenizer:
    return KINDS[request.param]()


@pytest.fixture(scope="module")
def tokenizer(inner: tokenizers.Tokenizer) -> Tokenizer:
    return Tokenizer(inner)


# Bytes of characters come together more often than by chance.
CHARACTERS = st.sampled_from(["😀", "Ж", "€", "é"]).map(lambda c: list(c.encode()))
CUT = CHARACTERS.map(lambda ids: ids[:-1])
IDS = st.lists(st.one_of(CHARACTERS, CUT, st.lists(st.integers(0, NUM_IDS), max_size=3)), max_size=12).map(
    lambda parts: [i for part in parts for i in part]
)
SIZES = st.lists(st.integers(1, 5), max_size=30)


def streamed(stream: TextStream, ids: Sequence[int], sizes: Sequence[int]) -> tuple[str, list[str]]:
    """The whole text, and what each token added to it."""
    texts, added, at = [], [], 0
    for size in [*sizes, len(ids)]:
        part = stream.push(ids[at : at + size])
        texts.append(part.text)
        added += part.token_texts
        at += size
    rest = stream.flush()
    return "".join([*texts, rest.text]), [*added, *rest.token_texts]


@given(ids=IDS, sizes=SIZES, skip=st.booleans())
def test_pieces_make_the_whole(
    inner: tokenizers.Tokenizer, tokenizer: Tokenizer, ids: list[int], sizes: list[int], skip: bool
) -> None:
    expected = reference(inner, ids, skip_special=skip)
    assert streamed(TextStream(tokenizer, skip_special_tokens=skip), ids, sizes)[0] == expected
    assert tokenizer.decode(ids, skip_special_tokens=skip) == expected


@given(prompt=IDS, ids=IDS, sizes=SIZES, skip=st.booleans())
def test_output_goes_on_from_the_prompt(
    inner: tokenizers.Tokenizer, tokenizer: Tokenizer, prompt: list[int], ids: list[int], sizes: list[int], skip: bool
) -> None:
    before = reference(inner, prompt, skip_special=skip)
    # A prompt that ends inside a character is followed up where bytes are known, not through a chain of decoders.
    assume(not (tokenizer.has_partial_pieces and before.endswith("\ufffd")))
    whole = reference(inner, [*prompt, *ids], skip_special=skip)
    stream = TextStream(tokenizer, prompt_token_ids=prompt, skip_special_tokens=skip, wants_token_texts=True)
    text, added = streamed(stream, ids, sizes)
    if whole.startswith(before):
        assert text == whole.removeprefix(before)
    else:  # the output ends a character that the prompt has left incomplete
        assert text == whole.removeprefix(before.removesuffix("\ufffd"))
    assert "".join(added) == text


@given(ids=IDS)
def test_one_by_one_as_in_portions(tokenizer: Tokenizer, ids: list[int]) -> None:
    prompt = [1, 2, 3]
    one_by_one = streamed(TextStream(tokenizer, prompt_token_ids=prompt), ids, [1] * len(ids))
    assert one_by_one == streamed(TextStream(tokenizer, prompt_token_ids=prompt), ids, [])
