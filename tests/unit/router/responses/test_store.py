"""Responses that are kept: found by the client that has them, and no more than the settings say."""

from __future__ import annotations

import pytest

from baton.chat import ChatMessage, ToolCall
from baton.errors import UnknownResponse
from router.config import StoreConfig
from router.responses.store import StoredResponses, item_id


class SteppedClock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def now(self) -> float:
        return self.now_s


def turn(text: str) -> ChatMessage:
    return ChatMessage("user", text)


def store(clock: SteppedClock | None = None, *, has_clients: bool = True, **settings: float) -> StoredResponses:
    config = StoreConfig(**settings)  # type: ignore[arg-type]
    return StoredResponses(config, clock or SteppedClock(), has_clients=has_clients)


def put(kept: StoredResponses, name: str, previous: str | None = None, *, client: str = "c", size: int = 0) -> None:
    kept.put(client, name, previous, [turn(name)], "x" * size)


def has(kept: StoredResponses, name: str, client: str = "c") -> bool:
    try:
        kept.content(client, name)
    except UnknownResponse:
        return False
    return True


def test_a_conversation_is_that_of_all_responses_before() -> None:
    kept = store()
    put(kept, "r1")
    put(kept, "r2", "r1")
    put(kept, "other", "r1")
    put(kept, "r3", "r2")
    assert kept.history("c", "r3") == [turn("r1"), turn("r2"), turn("r3")]
    assert kept.history("c", "other") == [turn("r1"), turn("other")]
    assert kept.history("c", None) == []
    kept.delete("c", "r2")
    assert kept.history("c", "r1") == [turn("r1")]
    for gone in ("r2", "r3", "never"):
        with pytest.raises(UnknownResponse) as refused:
            kept.history("c", gone)
        assert refused.value.param == "previous_response_id"
    with pytest.raises(UnknownResponse):
        kept.delete("c", "r2")


def test_a_response_belongs_to_its_client() -> None:
    mine = store()
    put(mine, "r1", client="a")
    assert has(mine, "r1", "a")
    assert not has(mine, "r1", "b")
    with pytest.raises(UnknownResponse):
        mine.delete("b", "r1")
    shared = store(has_clients=False)
    put(shared, "r1", client="a")
    assert has(shared, "r1", "b")


def test_an_item_is_found_by_its_own_id() -> None:
    kept = store()
    said = [ChatMessage("assistant", ("a",)), ChatMessage("assistant", None, tool_calls=(ToolCall("c1", "f", "{}"),))]
    kept.put("c", "resp_a_1", None, [turn("u")], "", said)
    assert [kept.item("c", item_id(prefix, "a_1", i), "p") for i, prefix in enumerate(("msg", "fc"))] == said
    for unknown in ("fc_a_1_2", "msg_b_1_0", "msg_a_1", "msg", "", "a_1_0", "msg_a_1_" + "9" * 5000, "msg_a_1_-1"):
        with pytest.raises(UnknownResponse) as refused:
            kept.item("c", unknown, "input.0.id")
        assert refused.value.param == "input.0.id"
    with pytest.raises(UnknownResponse):
        kept.item("other", "msg_a_1_0", "p")


def test_the_one_unused_for_longest_makes_room() -> None:
    kept = store(max_responses=3)
    for name in ("r1", "r2", "r3"):
        put(kept, name)
    assert has(kept, "r1")
    put(kept, "r4")
    assert [has(kept, name) for name in ("r1", "r2", "r3", "r4")] == [True, False, True, True]


def test_bytes_are_bounded_and_the_client_with_most_of_them_gives_room() -> None:
    kept = store(max_bytes=100_000)
    put(kept, "small", client="a", size=1000)
    for i in range(50):
        put(kept, f"r{i}", client="b", size=10_000)
        assert kept.num_bytes <= 100_000
    assert has(kept, "small", "a")
    assert has(kept, "r49", "b")
    assert not has(kept, "r0", "b")
    put(kept, "huge", client="a", size=200_000)
    assert not has(kept, "huge", "a")


def test_turns_count_with_all_that_they_hold() -> None:
    kept = store()
    kept.put("c", "r1", None, [turn("a")], "")
    before = kept.num_bytes
    long = "y" * 5000
    turns = [
        ChatMessage("user", (long, long)), ChatMessage("assistant", None, reasoning=long),
        ChatMessage("assistant", None, tool_calls=(ToolCall("c", "f", long),)),
    ]  # fmt: skip
    kept.put("c", "r2", None, turns, long)
    assert kept.num_bytes - before > 25_000
    kept.delete("c", "r2")
    assert kept.num_bytes == before
    kept.delete("c", "r1")
    assert kept.num_bytes == 0


def test_age_counts_from_the_last_use() -> None:
    clock = SteppedClock()
    kept = store(clock, max_age_s=10)
    put(kept, "used")
    put(kept, "idle")
    clock.now_s += 6
    assert has(kept, "used")
    clock.now_s += 6
    assert has(kept, "used")
    assert not has(kept, "idle")
    num_bytes = kept.num_bytes
    put(kept, "next", client="d")
    assert kept.num_bytes == num_bytes  # "idle" has gone


def test_none_are_kept() -> None:
    kept = store(max_responses=0)
    assert not kept.keeps
    put(kept, "r1")
    assert (has(kept, "r1"), kept.num_bytes) == (False, 0)
