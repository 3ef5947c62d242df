"""Two whole workers and a router's two sessions: the relay, and everything that can go wrong with it."""

from pathlib import Path

import pytest
from node_harness import spec
from relay_harness import LAYOUT, pair

from engine.fake import expected_tokens


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("num_prompt", [1, 15, 16, 17, 31, 32, 33, 200])
async def test_the_relay_gives_the_tokens_of_one_node(tmp_path: Path, transport: str, num_prompt: int) -> None:
    async with pair(tmp_path, transports=(transport,)) as relay:
        for number in range(3):
            sequence = spec(f"r{number}/0/1", num_prompt, max_tokens=20)
            assert await relay.relay(sequence) == expected_tokens(sequence, LAYOUT, 1000)
        await relay.settled()
