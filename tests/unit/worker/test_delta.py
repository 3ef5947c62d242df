"""Two whole workers, each of which holds some first blocks of a prompt: what is computed, what is moved, and the bytes
that lie on the decode node in the end.

Row 23 of docs/failures.md: a prefix hit shifts the block mapping.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from baton.types import Lease, SamplingParams, SequenceSpec
from engine.config import EngineConfig
from engine.fake import FakeRunner, expected_tokens
from engine.schedule import SchedulerConfig
from engine.step import StepPlan
from tests.support.relay import LAYOUT, Pair, pair
from worker.config import WorkerConfig
from worker.loading import Allocate, LoadedModel

NUM_FULL = 5
HITS = [0, 1, 2, NUM_FULL - 1, NUM_FULL]
NODE_LAYOUT = replace(LAYOUT, num_blocks=96)
SIZE = NODE_LAYOUT.block_tokens


class Watched(FakeRunner):
    """Keeps the KV of each sequence's known tokens as it lies there when the sequence is first computed with it."""

    def __init__(self, buffer: memoryview) -> None:
        super().__init__(NODE_LAYOUT, buffer=buffer, vocab_size=1000, max_model_tokens=600)
        self.buffer = buffer.cast("B")
        self.found: dict[str, list[bytes]] = {}

    def launch(self, plan: StepPlan, on_layer: Callable[[int], None] | None = None) -> Any:
        for piece in plan.pieces:
            seq = piece.sequence
            if seq.sequence_id not in self.found:
                self.found[seq.sequence_id] = self.kv(seq.block_ids, piece.start)
        return super().launch(plan, on_layer)

    def kv(self, block_ids: Any, num_tokens: int) -> list[bytes]:
        """By layer and token."""
        cells = [
            self.layout.offset(layer, block_ids[i // SIZE]) + i % SIZE * 4
            for layer, i in itertools.product(range(self.layout.num_layers), range(num_tokens))
        ]
        return [bytes(self.buffer[cell : cell + 4]) for cell in cells]


class Nodes:
    """A pair, and the runners behind it."""

    def __init__(self, relay: Pair, prefill: Watched, decode: Watched) -> None:
        self.relay, self.prefill, self.decode = relay, prefill, decode


async def nodes(stack: AsyncExitStack, tmp_path: Path, *, has_cache: bool, **settings: Any) -> Nodes:
    made: dict[str, Watched] = {}

    def load(config: WorkerConfig, allocate: Allocate) -> LoadedModel:
        runner = made[config.node_id] = Watched(allocate(NODE_LAYOUT.total_bytes))
        return runner

    limits = SchedulerConfig(max_batch_tokens=32, max_num_seqs=16, has_prefix_cache=has_cache)
    engine = EngineConfig(scheduler=limits)
    relay = await stack.enter_async_context(pair(tmp_path, load=load, engine=engine, **settings))
    return Nodes(relay, made["p0"], made["d0"])


def sequence(name: str, num_tokens: int, salt: bytes, max_tokens: int = 4) -> SequenceSpec:
    # Blocks that differ: a mapping that is shifted shows.
    prompt = tuple((7 * i * i + 3 * i + 11) % 997 for i in range(num_tokens))
    sampling = SamplingParams(temperature=0.0, seed=0, max_tokens=max_tokens)
    return SequenceSpec(name, prompt, sampling, cache_salt=salt)


async def warm(router: Any, name: str, num_blocks: int, salt: bytes) -> None:
    """Have a node compute a prompt's first blocks by itself."""
    if num_blocks:
        await router.run(sequence(name, num_blocks * SIZE + 1, salt, max_tokens=1))
        assert (await router.until("tokens")).finish_reason
        await router.until("prefills")


async def handed_over(at: Nodes, spec: SequenceSpec) -> tuple[list[int], Lease, Any, Any, set[int]]:
    """Tokens, lease, what prefill and transfer report, and the blocks of the decode node that a byte changed in from
    the lease on until it joined."""
    relay = at.relay
    lease = await relay.reserve(spec)
    before = bytes(at.decode.buffer)
    await relay.prefill.run(spec, lease)
    tokens = list((await relay.prefill.until("tokens")).token_ids)
    done = await relay.prefill.until("prefills")
    report = (await relay.prefill.until("handed_off")).report
    await relay.decode.until("joined")
    tokens += await relay.decode.tokens()
    after, size = bytes(at.decode.buffer), NODE_LAYOUT.block_bytes
    places = itertools.product(range(NODE_LAYOUT.num_layers), range(NODE_LAYOUT.num_blocks))
    at_of = {(layer, block): NODE_LAYOUT.offset(layer, block) for layer, block in places}
    changed = {block for (_, block), at in at_of.items() if before[at : at + size] != after[at : at + size]}
    return tokens, lease, done, report, changed


@pytest.mark.parametrize("layerwise_from_bytes", [0, 1 << 40])
@pytest.mark.parametrize("transport", ["shm", "tcp", "fake:reorder=1,delay_s=0.001,over=shm"])
async def test_23_whatever_either_node_holds_the_kv_is_that_of_a_run_without_a_cache(
    tmp_path_factory: pytest.TempPathFactory, transport: str, layerwise_from_bytes: int
) -> None:
    """Every pair of hits, for a prompt that ends with a block and for one that ends within the next; each pair has a
    salt, so that it finds its own blocks alone."""
    name = transport.rsplit("=", 1)[-1]
    settings = {"transports": (transport,), "layerwise_from_bytes": {name: layerwise_from_bytes}}
    async with AsyncExitStack() as stack:
        plain = await nodes(stack, tmp_path_factory.mktemp("plain"), has_cache=False, **settings)
        cached = await nodes(stack, tmp_path_factory.mktemp("cached"), has_cache=True, **settings)
        for tail in (0, 3):
            num_tokens = NUM_FULL * SIZE + tail
            num_blocks = NODE_LAYOUT.blocks_for(num_tokens)
            spec = sequence(f"plain/{tail}", num_tokens, b"")
            tokens, *_ = await handed_over(plain, spec)
            assert tokens == expected_tokens(spec, NODE_LAYOUT, 1000)
            wanted = plain.decode.found[spec.sequence_id]
            assert len(wanted) == NODE_LAYOUT.num_layers * num_tokens
            for at_prefill, at_decode in itertools.product(HITS, HITS):
                salt = bytes([tail, at_prefill, at_decode])
                await warm(cached.relay.prefill, f"p/{salt.hex()}", at_prefill, salt)
                await warm(cached.relay.decode, f"d/{salt.hex()}", at_decode, salt)
                spec = sequence(f"r/{salt.hex()}", num_tokens, salt)
                tokens, lease, done, report, changed = await handed_over(cached, spec)
                assert tokens == expected_tokens(spec, NODE_LAYOUT, 1000)
                assert cached.decode.found[spec.sequence_id] == wanted, salt
                assert lease.num_cached_blocks == at_decode
                missing = num_blocks - at_decode
                assert report.num_blocks == missing
                assert report.num_bytes == missing * NODE_LAYOUT.block_bytes * NODE_LAYOUT.num_layers
                assert changed <= {*lease.block_ids}, "a block that was held already was written"
                # At least the last token is computed: its logits are needed.
                num_cached = min(at_prefill, (num_tokens - 1) // SIZE) * SIZE
                assert (done.num_cached_tokens, done.num_computed_tokens) == (num_cached, num_tokens - num_cached)
        await cached.relay.unharmed()


async def test_a_lease_that_ends_without_arrival_gives_shared_blocks_back_as_they_were(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        at = await nodes(stack, tmp_path, has_cache=True)
        relay = at.relay
        await warm(relay.decode, "d", 2, b"")
        spec = sequence("r", 3 * SIZE, b"")
        lease = await relay.reserve(spec)
        assert lease.num_cached_blocks == 2
        before = bytes(at.decode.buffer)
        await relay.decode.cancel("r")
        await relay.settled()
        again = await relay.reserve(replace(spec, sequence_id="again"))
        assert again.num_cached_blocks == 2, "they are found once more"
        assert bytes(at.decode.buffer) == before
        await relay.decode.cancel("again")


async def test_blocks_that_came_over_the_wire_are_found_by_the_next_turn(tmp_path: Path) -> None:
    """What was verified is held for others: of the next prompt, which begins with it and the answer, the rest moves."""
    async with AsyncExitStack() as stack:
        at = await nodes(stack, tmp_path, has_cache=True)
        first = sequence("turn1", 4 * SIZE + 2, b"", max_tokens=2 * SIZE)
        tokens, lease, *_ = await handed_over(at, first)
        assert lease.num_cached_blocks == 0
        prompt = (*first.prompt_token_ids, *tokens, 5, 6, 7)
        second = SequenceSpec("turn2", prompt, first.sampling)
        # The last token's KV was never computed.
        known = (len(first.prompt_token_ids) + len(tokens) - 1) // SIZE
        tokens, lease, done, report, _ = await handed_over(at, second)
        assert tokens == expected_tokens(second, NODE_LAYOUT, 1000)
        assert lease.num_cached_blocks == known
        assert report.num_blocks == NODE_LAYOUT.blocks_for(len(prompt)) - known
        assert done.num_cached_tokens == 4 * SIZE, "the answer's blocks were never on the prefill node"


async def test_a_lease_counts_no_blocks_of_another_salt(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        at = await nodes(stack, tmp_path, has_cache=True)
        await warm(at.relay.decode, "d", 2, b"tenant a")
        for salt, num_cached in ((b"tenant b", 0), (b"", 0), (b"tenant a", 2)):
            lease = await at.relay.reserve(sequence(f"r/{salt.hex()}", 3 * SIZE, salt))
            assert lease.num_cached_blocks == num_cached
            await at.relay.decode.cancel(lease.sequence_id)
