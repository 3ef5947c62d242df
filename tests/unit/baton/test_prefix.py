"""Known answers, so that router and worker of different versions name a prefix alike; and what must not match."""

import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from baton.prefix import HASH_BYTES, PrefixScheme
from baton.types import KvLayout, PrefixCaching, RopeRegimes
from engine.model_config import RopeConfig
from engine.rope import RopeTable

LAYOUT = KvLayout(2, 100, 2, 8, 16, "float32")
SCHEME = PrefixScheme("f" * 8, "cpu-avx2", LAYOUT, PrefixCaching(phases_agree=True))
APART = replace(SCHEME, caching=PrefixCaching(phases_agree=False))
TOKENS = tuple(range(1000, 1040))


def test_known_answers() -> None:
    assert [h.hex() for h in SCHEME.block_hashes(TOKENS, 40)] == [
        "ce045b18b3febfecec750624b0dc42d7",
        "b413d3535064e9aa22af81436a892bf9",
    ]
    assert APART.block_hashes(TOKENS, 20)[1].hex() == "2ff0204233cc3e857359767c354b87bb"
    assert SCHEME.seed(40, b"tenant").hex() == "8a37b543076858b0cda794eb02e37f44"


def test_only_full_blocks_have_a_hash() -> None:
    for num_tokens in (0, 1, 15, 16, 17, 31, 32):
        hashes = SCHEME.block_hashes(TOKENS[:num_tokens], num_tokens)
        assert hashes == SCHEME.block_hashes(TOKENS, 40)[: num_tokens // 16]
        assert all(len(h) == HASH_BYTES for h in hashes)


@given(st.lists(st.integers(0, 2**31 - 1), max_size=80), st.integers(0, 80), st.integers(0, 5), st.booleans())
def test_a_chain_is_continued_from_any_block(tokens: list[int], num_prompt: int, known: int, agree: bool) -> None:
    scheme = SCHEME if agree else APART
    whole = scheme.block_hashes(tokens, num_prompt)
    assert scheme.block_hashes(tokens, num_prompt, known=whole[:known]) == whole


@given(st.integers(0, 39), st.integers(0, 2**31 - 1))
def test_a_token_changes_its_block_and_all_behind_it(at: int, token: int) -> None:
    tokens = [*TOKENS]
    tokens[at] = token
    pairs = zip(SCHEME.block_hashes(TOKENS, 40), SCHEME.block_hashes(tokens, 40), strict=True)
    expected = [block < at // 16 or token == TOKENS[at] for block in range(2)]
    assert [a == b for a, b in pairs] == expected


@pytest.mark.parametrize(
    "other",
    [
        replace(SCHEME, fingerprint="f" * 9),
        replace(SCHEME, kernels="cpu-avx512"),
        APART,
        *(replace(SCHEME, layout=replace(LAYOUT, **{name: 1})) for name in ("num_layers", "num_kv_heads", "head_dim")),
        replace(SCHEME, layout=replace(LAYOUT, dtype="bfloat16")),
        # The same characters, one field further.
        replace(SCHEME, fingerprint="f" * 8 + "c", kernels="pu-avx2"),
    ],
)
def test_whatever_changes_the_bits_changes_the_seed(other: PrefixScheme) -> None:
    assert other.seed(40) != SCHEME.seed(40)
    assert SCHEME.seed(40) != SCHEME.seed(40, b"tenant")


def test_the_number_of_blocks_changes_nothing() -> None:
    assert replace(SCHEME, layout=replace(LAYOUT, num_blocks=7)).seed(40) == SCHEME.seed(40)


def test_generated_tokens_are_no_prefix_of_a_prompt_where_phases_differ() -> None:
    """The second turn of a chat: its prompt is the first one, the answer, and more."""
    turn = APART.block_hashes(TOKENS, 20)
    prompt = APART.block_hashes(TOKENS, 40)
    assert turn[0] == prompt[0]
    assert turn[1] != prompt[1]
    # The same answer to the same prompt, computed again elsewhere.
    assert APART.block_hashes(TOKENS, 20) == turn
    assert APART.block_hashes(TOKENS, 32)[1] == prompt[1]
    assert SCHEME.block_hashes(TOKENS, 20) == SCHEME.block_hashes(TOKENS, 40)


def test_a_prefix_is_of_one_rope_regime() -> None:
    dynamic = replace(SCHEME, caching=PrefixCaching(True, RopeRegimes(32, is_each_its_own=True)))
    longrope = replace(SCHEME, caching=PrefixCaching(True, RopeRegimes(32, is_each_its_own=False)))
    lengths = (1, 32, 33, 40)
    assert len({dynamic.seed(n) for n in lengths}) == 3
    assert len({longrope.seed(n) for n in lengths}) == 2
    assert len({SCHEME.seed(n) for n in lengths}) == 1


@pytest.mark.parametrize("rope_type", ["default", "linear", "dynamic", "yarn", "longrope", "llama3"])
def test_regimes_are_those_of_the_frequencies(rope_type: str) -> None:
    rope = RopeConfig(
        rope_type,
        factor=2.0,
        max_position_embeddings=64,
        original_max_position_embeddings=32,
        short_factor=(1.0,) * 4,
        long_factor=(3.0,) * 4,
    )
    table = RopeTable(rope, 8)
    lengths = [1, 31, 32, 33, 63, 64, 65, 100]

    def first_rows(length: int) -> bytes:
        positions = torch.arange(1, 2)
        cos, sin = table.rows(positions, torch.full((1,), length))
        return torch.stack((cos, sin)).numpy().tobytes()

    regimes = [0 if rope.regimes is None else rope.regimes.of(n) for n in lengths]
    for i, one in enumerate(lengths):
        for j, other in enumerate(lengths):
            if regimes[i] == regimes[j]:
                assert first_rows(one) == first_rows(other)
    assert (len(set(regimes)) > 1) == (len({first_rows(n) for n in lengths}) > 1)


def test_a_long_prompt_is_hashed_in_little_time() -> None:
    scheme = replace(SCHEME, layout=replace(LAYOUT, block_tokens=64))
    tokens = tuple(range(8192))
    best_s = float("inf")
    for _ in range(20):
        began_s = time.perf_counter()
        scheme.block_hashes(tokens, len(tokens))
        best_s = min(best_s, time.perf_counter() - began_s)
    # 0.25 ms where it was measured; a test machine may be many times slower.
    assert best_s < 0.005


def test_a_client_can_load_it() -> None:
    """As the router does: without torch."""
    code = "import sys, baton.prefix; assert not {'torch', 'numpy', 'xxhash'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
