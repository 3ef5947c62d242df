"""Two routers beside one, in small: the bench's figures of a few seconds."""

from __future__ import annotations

from bench.routers import run


async def test_two_routers_spread_equal_load_and_change_no_role() -> None:
    found = await run(2, 0.6, 4.0)
    assert found.num_failed == 0
    assert found.num_requests > 8
    assert sum(found.prompts.values()) == sum(found.answers.values()) == found.num_requests
    assert found.spread < 1.6, found.line()
    assert found.num_moves == 0
    assert "2 routers, load 0.60" in found.line()
