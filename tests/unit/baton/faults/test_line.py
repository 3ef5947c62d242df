"""Messages on a line: each fault does to them what it is called, and the others come through in order."""

from __future__ import annotations

import asyncio

import pytest

from baton.errors import NodeLost
from baton.faults.kinds import Layer
from baton.faults.line import Line
from tests.support.faults import Striking


class Sent:
    """A line, and what came out of it."""

    def __init__(self, fault: str, *, nth: str = "2", more: str = "") -> None:
        text = f'[[fault]]\nlayer = "control"\nfault = "{fault}"\nnth = {nth}\n{more}\n'
        self.out: list[str] = []
        self.cuts: list[str] = []
        self.error: Exception | None = None
        self.faults = Striking(text)
        self.line: Line[str] = Line(
            self.faults, Layer.CONTROL, "p", self._deliver, on_cut=self.cuts.append, corrupt=lambda m, i: f"{m}?{i}"
        )

    def _deliver(self, message: str) -> None:
        if self.error is not None:
            raise self.error
        self.out.append(message)

    def put(self, messages: str) -> list[str]:
        for message in messages:
            self.line.put(message, "commit", "a")
        return self.out

    async def until(self, count: int) -> list[str]:
        async with asyncio.timeout(5):
            while len(self.out) < count:  # noqa: ASYNC110 - a line says nothing
                await asyncio.sleep(0.001)
        return self.out


@pytest.mark.parametrize(
    ("fault", "more", "out"),
    [
        ("drop", "", "a c d"),
        ("duplicate", "", "a b b c d"),
        ("reorder", "", "a c b d"),
        ("corrupt", "position = 7", "a b?7 c d"),
    ],
)
async def test_a_message_meets_its_fault_at_once(fault: str, more: str, out: str) -> None:
    assert Sent(fault, more=more).put("abcd") == out.split()


async def test_two_that_are_swapped_come_after_the_next() -> None:
    assert Sent("reorder", nth="[1, 2]").put("abcd") == ["c", "a", "b", "d"]


async def test_a_message_that_no_other_follows_comes_late() -> None:
    sent = Sent("reorder", more="seconds = 0.01")
    assert sent.put("ab") == ["a"]
    assert await sent.until(2) == ["a", "b"]


async def test_a_delayed_message_is_overtaken() -> None:
    sent = Sent("delay", more="seconds = 0.01")
    assert sent.put("abcd") == ["a", "c", "d"]
    assert await sent.until(4) == ["a", "c", "d", "b"]


async def test_a_line_stands_still_and_goes_on_in_order() -> None:
    sent = Sent("stall", more="seconds = 0.01")
    await sent.line.open()
    assert sent.put("abcd") == ["a"]
    await sent.line.open()
    assert await sent.until(4) == ["a", "b", "c", "d"]


async def test_a_connection_is_cut_once_and_nothing_follows() -> None:
    sent = Sent("disconnect", nth="[2, 3]")
    assert sent.put("abcd") == ["a"]
    assert await sent.line.cut == "a fault of the schedule cut the connection: commit was to be sent"
    assert sent.cuts == [sent.line.cut.result()]


@pytest.mark.parametrize("fault", ["delay", "stall", "reorder"])
async def test_nothing_comes_out_of_a_line_that_is_over(fault: str) -> None:
    sent = Sent(fault, more="seconds = 0.001")
    assert sent.put("ab") == ["a"]
    sent.line.close()
    sent.put("c")
    await sent.line.open()
    await asyncio.sleep(0.01)
    assert sent.out == ["a"]
    assert not sent.cuts


async def test_what_cannot_be_delivered_reaches_the_caller_or_cuts_the_line() -> None:
    sent = Sent("delay", more="seconds = 0.001")
    sent.put("ab")
    sent.error = NodeLost("8192 messages unsent")
    with pytest.raises(NodeLost):
        sent.put("c")
    assert "8192 messages unsent" in await sent.line.cut


async def test_what_is_held_back_is_bounded() -> None:
    sent = Sent("stall", nth="1", more="seconds = 60")
    sent.put("a" * 5000)
    assert "4096 messages were held back" in await sent.line.cut
    sent.line.close()


async def test_a_line_without_faults_changes_nothing() -> None:
    sent = Sent("drop", nth="999")
    assert sent.put("abcd") == ["a", "b", "c", "d"]
