"""The prefix cache changes no bit: tokens and logits of random conversations are those of the same ones without it.

Conversations have 2 to 8 turns and branch, their turns have several choices, salts, penalties and seeds. They run on
one node and split over two, in pools that are too small, and with sequences that begin anew in the middle. What a
cache may do wrong is done wrong here on purpose as well: the comparison has to fail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import NamedTuple

import pytest
import torch

from baton.prefix import PrefixScheme
from engine.blocks import BlockPool
from engine.config import EngineConfig
from engine.runner import Runner
from tests.support.conversation_engine import Colocated, Node, Service, Split, scheme_of
from tests.support.conversation_player import Player
from tests.support.conversations import Book, Conversation, Key, Shape
from tests.support.engine_driver import Run
from tests.support.models import ORACLE_CASES, VOCAB_SIZE, ModelCase

BLOCK_TOKENS = 16
NUM_BLOCKS = 640
# Of one prefill node or decode node: 8 sequences want more, and are preempted or refused.
FEW_BLOCKS = 44
DTYPES = ("float32", "bfloat16")
# In every run; all by `make test-long`. A window, frequencies by the prompt's length in both ways, every family.
EVERYDAY = ("mistral-window-40", "llama-dynamic", "qwen3-longrope", "qwen2-window")
NUM_EVERYDAY, NUM_LONG = 8, 16

# Two runners of one model: each has an arena of its own.
Loader = Callable[[ModelCase, str], tuple[Runner, Runner]]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Loader:
    kept: dict[tuple[str, str], tuple[Runner, Runner]] = {}

    def loader(case: ModelCase, dtype: str) -> tuple[Runner, Runner]:
        key = (case.name, dtype)
        if key not in kept:
            # The arenas of all kinds together would be gigabytes.
            kept.clear()
            folder = case.save(tmp_path_factory.mktemp("model"))
            config = EngineConfig(dtype=dtype, num_blocks=NUM_BLOCKS, block_tokens=BLOCK_TOKENS)
            kept[key] = (Runner.load(folder, config), Runner.load(folder, config))
        return kept[key]

    return loader


def conversations(count: int, seed: str, shape: Shape | None = None) -> list[Conversation]:
    return Book(shape or Shape(VOCAB_SIZE), Random(seed)).conversations(count)


def without_cache(runner: Runner, talks: Sequence[Conversation]) -> dict[Key, Run]:
    node = Node(runner, None, BlockPool(NUM_BLOCKS))
    answers = Player(Colocated(node), talks, Random("without")).play()
    assert node.num_found == 0
    return answers


def assert_same(found: dict[Key, Run], expected: dict[Key, Run]) -> None:
    assert found.keys() == expected.keys()
    for key, run in expected.items():
        other = found[key]
        assert other.token_ids == run.token_ids, f"tokens of {key} are not those without a cache"
        assert other.sampled == run.sampled, f"log-probabilities of {key} are not those without a cache"
        assert len(other.logits) == len(run.logits)
        assert all(map(torch.equal, other.logits, run.logits)), f"logits of {key} are not those without a cache"


def split(runners: tuple[Runner, Runner], scheme: PrefixScheme, num_blocks: int, seed: str) -> Split:
    prefill, decode = (Node(runner, scheme, BlockPool(num_blocks)) for runner in runners)
    return Split(prefill, decode, Random(seed))


def compared(runners: tuple[Runner, Runner], talks: Sequence[Conversation], seed: str) -> None:
    """On one node and on two, with room and without; each beside the same conversations without a cache."""
    expected = without_cache(runners[0], talks)
    scheme = scheme_of(runners[0])

    def play(service: Service, **disturbed: float) -> Player:
        player = Player(service, talks, Random(seed), **disturbed)
        assert_same(player.play(), expected)
        # Of a split pair, the node of the prompts: the other one finds what came over the wire as well.
        assert service.nodes[0].num_found > 0, "the cache was of no use: nothing was tested"
        return player

    whole = Colocated(Node(runners[0], scheme, BlockPool(NUM_BLOCKS)))
    play(whole)
    assert whole.node.num_found > 0.3 * whole.node.num_asked
    pair = split(runners, scheme, NUM_BLOCKS, seed)
    player = play(pair, restarts=0.05, strays=0.2)
    assert player.num_restarted > 0
    assert 0 < pair.num_moved_blocks < 0.8 * pair.num_needed_blocks
    crowded = Colocated(Node(runners[0], scheme, BlockPool(FEW_BLOCKS), max_batch_tokens=64))
    play(crowded, strays=0.2)
    assert crowded.node.scheduler.num_preempted > 0
    play(split(runners, scheme, FEW_BLOCKS, seed), restarts=0.02)


@pytest.mark.parametrize("name", EVERYDAY)
def test_conversations_are_the_same_with_the_cache(name: str, load: Loader) -> None:
    case = next(case for case in ORACLE_CASES if case.name == name)
    dtype = DTYPES[EVERYDAY.index(name) % 2]
    compared(load(case, dtype), conversations(NUM_EVERYDAY, name), name)


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ORACLE_CASES, ids=lambda case: case.name)
def test_conversations_of_every_model_are_the_same_with_the_cache(case: ModelCase, dtype: str, load: Loader) -> None:
    seed = f"{case.name}/{dtype}"
    compared(load(case, dtype), conversations(NUM_LONG, seed), seed)


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", ["llama-gqa2-d32", "qwen3-longrope"])
def test_two_hundred_conversations_are_the_same_with_the_cache(name: str, load: Loader) -> None:
    case = next(case for case in ORACLE_CASES if case.name == name)
    compared(load(case, "bfloat16"), conversations(200, name), name)


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_other_kernels_and_blocks_of_another_length(quantization: str, tmp_path: Path) -> None:
    """The reference kernels, and int8 weights; phases kept apart, as on kernels whose phases disagree."""
    kernels = "reference" if quantization == "none" else "cpu"
    config = EngineConfig(dtype="float32", num_blocks=160, block_tokens=32, kernels=kernels, quantization=quantization)
    folder = ORACLE_CASES[1].save(tmp_path)
    runners = (Runner.load(folder, config), Runner.load(folder, config))
    shape = Shape(VOCAB_SIZE, system_lengths=(70, 100), turns=(2, 3), said=(1, 40), num_choices=(1, 2), longest=300)
    talks = conversations(4, "other", shape)
    expected = Player(Colocated(Node(runners[0], None, BlockPool(160))), talks, Random(1)).play()
    scheme = scheme_of(runners[0], phases_agree=False)
    for service in (Colocated(Node(runners[0], scheme, BlockPool(160))), split(runners, scheme, 160, "other")):
        assert_same(Player(service, talks, Random(2)).play(), expected)
        assert service.nodes[0].num_found > 0


# ── Faults: what a cache may do wrong ───────────────────────────────────────────────────────────────────────────────


class WithoutSalt(PrefixScheme):
    """Gives tenants the same hashes."""

    def seed(self, num_prompt_tokens: int, salt: bytes = b"") -> bytes:
        return super().seed(num_prompt_tokens)


class WithoutChain(PrefixScheme):
    """A block's hash says nothing about what is before it."""

    def block_hashes(
        self,
        token_ids: Sequence[int],
        num_prompt_tokens: int,
        *,
        salt: bytes = b"",
        known: Sequence[bytes] = (),
    ) -> list[bytes]:
        size = self.layout.block_tokens
        starts = range(0, len(token_ids) // size * size, size)
        return [super(WithoutChain, self).block_hashes(token_ids[i : i + size], size, salt=salt)[0] for i in starts]


class WithoutLastToken(PrefixScheme):
    """Two blocks that differ in their last token alone have one hash."""

    def block_hashes(
        self,
        token_ids: Sequence[int],
        num_prompt_tokens: int,
        *,
        salt: bytes = b"",
        known: Sequence[bytes] = (),
    ) -> list[bytes]:
        size = self.layout.block_tokens
        blurred = [0 if i % size == size - 1 else token_id for i, token_id in enumerate(token_ids)]
        return super().block_hashes(blurred, num_prompt_tokens, salt=salt)


class WithoutRope(PrefixScheme):
    """Prompts of all lengths share, whatever their rotary frequencies."""

    def seed(self, num_prompt_tokens: int, salt: bytes = b"") -> bytes:
        return super().seed(1, salt)


class SwappedPool(BlockPool):
    """Finds the right blocks in the wrong order."""

    def lookup(self, content_hashes: Iterable[bytes]) -> list[int]:
        found = super().lookup(content_hashes)
        return [*found[:-2], *found[-2:][::-1]]


def twins(num_tokens: int = 96) -> list[Conversation]:
    """Conversations whose prompts are of the same tokens, or differ in the last token of a block, or are two times the
    same block: what is told apart by one part of the hash alone."""
    shape = Shape(VOCAB_SIZE, system_lengths=(num_tokens,), turns=(2, 2), said=(BLOCK_TOKENS, 40), salts=(b"", b"a"))
    talks = conversations(6, "twins", shape)
    system = talks[0].system
    assert len({talk.salt for talk in talks}) == 2
    changed = (*system[: BLOCK_TOKENS - 1], (system[BLOCK_TOKENS - 1] + 1) % VOCAB_SIZE, *system[BLOCK_TOKENS:])
    other = [replace(talk, number=6 + i, system=changed) for i, talk in enumerate(talks)]
    repeated = [replace(talk, number=12 + i, system=system[16:32] * 2 + system[:64]) for i, talk in enumerate(talks)]
    return talks + other + repeated


class Fault(NamedTuple):
    scheme: type[PrefixScheme] = PrefixScheme
    pool: type[BlockPool] = BlockPool
    model: str = "llama-gqa2-d32"
    # Of the system prompt; frequencies change at 256 tokens of a prompt and at 400.
    num_tokens: int = 96
    # No token and no logit shows it: only what is known of who wrote which block.
    is_secret: bool = False


FAULTS = {
    "salt left out": Fault(WithoutSalt, is_secret=True),
    "chain left out": Fault(WithoutChain),
    "last token left out": Fault(WithoutLastToken),
    "frequencies left out, dynamic": Fault(WithoutRope, model="llama-dynamic", num_tokens=370),
    "frequencies left out, longrope": Fault(WithoutRope, model="qwen3-longrope", num_tokens=220),
    "blocks swapped": Fault(pool=SwappedPool),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_cache_with_a_fault_is_found_out(name: str, load: Loader) -> None:
    fault = FAULTS[name]
    runners = load(next(case for case in ORACLE_CASES if case.name == fault.model), "float32")
    right = scheme_of(runners[0])
    wrong = fault.scheme(right.fingerprint, right.kernels, right.layout, right.caching)
    talks = twins(fault.num_tokens)
    expected = without_cache(runners[0], talks)

    def play(scheme: PrefixScheme, pool: BlockPool, *, is_noted: bool) -> None:
        service = Colocated(Node(runners[0], scheme, pool, is_noted=is_noted))
        assert_same(Player(service, talks, Random(name)).play(), expected)

    play(right, BlockPool(NUM_BLOCKS), is_noted=True)
    shown = "hold something else" if fault.is_secret else "are not those without a cache"
    with pytest.raises(AssertionError, match=shown):
        play(wrong, fault.pool(NUM_BLOCKS), is_noted=fault.is_secret)
