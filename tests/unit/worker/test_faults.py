"""A node's sessions under a schedule of faults, and its engine."""

from __future__ import annotations

import grpc
import pytest

from engine.fake import expected_tokens
from tests.support.faults import Striking
from tests.support.node import LAYOUT, VOCAB, running_node, session, spec
from worker.worker import _before_steps


def schedule(fault: str, kind: str, *, nth: str = "2", more: str = "") -> Striking:
    return Striking(f'[[fault]]\nlayer = "session"\nkind = "{kind}"\nfault = "{fault}"\nnth = {nth}\n{more}\n')


@pytest.mark.parametrize(("fault", "more"), [("delay", "seconds = 0.01"), ("stall", "seconds = 0.05")])
async def test_tokens_come_late_and_all(fault: str, more: str) -> None:
    faults = schedule(fault, "tokens", more=more)
    async with running_node(faults=faults) as node, session(node.address) as router:
        await router.hello()
        await router.run(spec("a", max_tokens=6))
        found: dict[int, int] = {}
        while len(found) < 6:
            item = await router.until("tokens")
            found |= dict(enumerate(item.token_ids, item.index))
        assert [found[i] for i in range(6)] == expected_tokens(spec("a", max_tokens=6), LAYOUT, VOCAB)
    assert len(faults.strikes) == 1


async def test_a_lost_token_is_lost_and_one_that_comes_twice_comes_twice() -> None:
    for fault, count in (("drop", 5), ("duplicate", 7)):
        faults = schedule(fault, "tokens")
        async with running_node(faults=faults) as node, session(node.address) as router:
            await router.hello()
            await router.run(spec("a", max_tokens=6))
            assert len(await router.tokens()) == count


async def test_a_session_that_stands_still_says_nothing_and_then_all() -> None:
    faults = schedule("stall", "prefill_done", nth="1", more="seconds = 0.6")
    async with running_node(faults=faults) as node, session(node.address) as router:
        await router.hello()
        await router.run(spec("a", max_tokens=6))
        assert len(await router.tokens()) == 6
        # Status comes every 0.2 s, and did not meanwhile.
        gaps = [b - a for a, b in zip(router.statuses, router.statuses[1:], strict=False)]
        assert max(gaps) > 0.5


async def test_a_session_is_cut_and_what_ran_in_it_ends() -> None:
    faults = schedule("disconnect", "tokens")
    async with running_node(faults=faults, step_delay_s=0.001) as node, session(node.address) as router:
        await router.hello()
        await router.run(spec("a", max_tokens=150))
        code, details, _ = await router.ended()
        assert code is grpc.StatusCode.UNAVAILABLE
        assert details == "a fault of the schedule cut the connection: tokens was to be sent"
        await node.until(lambda: node.num_used == 0)
        async with session(node.address) as again:
            await again.hello()
            await again.run(spec("b", max_tokens=1))
            assert len(await again.tokens()) == 1


def test_steps_are_slow_as_the_schedule_says() -> None:
    pauses: list[float] = []
    faults = Striking('[[fault]]\nlayer = "engine"\nfault = "slow"\nnth = [2, 3]\nseconds = 0.05\n')
    faults._sleep = pauses.append
    before = _before_steps(None, faults)
    assert before is not None
    for _ in range(4):
        before(None)  # type: ignore[arg-type]
    assert pauses == [0.05, 0.05]
    assert _before_steps(None, None) is None


async def test_without_a_schedule_messages_go_straight_to_the_outbox() -> None:
    async with running_node() as node, session(node.address) as router:
        await router.hello()
        await node.until(lambda: len(node.service.sessions.numbers) == 1)
        (one,) = node.service.sessions._sessions.values()
        assert one.line is None
