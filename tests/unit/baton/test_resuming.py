"""The request that goes on with a lost stream, and how long a client looks for a router."""

from __future__ import annotations

import pytest

from baton import errors
from baton.resuming import Loss, ResumableStream
from baton.v1 import router_pb2

GONE, BUSY, REFUSED = Loss(True, True), Loss(False, True), Loss(False, False)


def accepted(*prompt: int) -> router_pb2.GenerateResponse:
    said = router_pb2.GenerateResponse.Accepted(request_id="r", model="m", prompt_token_ids=prompt, seed=7)
    return router_pb2.GenerateResponse(accepted=said)


def delta(*ids: int, is_last: bool = False) -> router_pb2.GenerateResponse:
    said = router_pb2.GenerateResponse.Delta(token_ids=ids, has_whole_text=is_last)
    return router_pb2.GenerateResponse(delta=said)


def stream(num_routers: int = 1, patience_s: float = 10.0, timeout_s: float = 0.0) -> ResumableStream:
    request = router_pb2.GenerateRequest(prompt="x", timeout_s=timeout_s)
    return ResumableStream(request, num_routers, patience_s, now=100.0)


def test_what_has_come_is_told_the_next_router() -> None:
    lost = stream(timeout_s=60.0)
    assert not lost.request(100.0).HasField("resume")
    assert lost.take(accepted(1, 2))
    assert lost.take(delta(5, 6))
    assert lost.take(delta(7, is_last=True))
    assert lost.wait_s(GONE, 120.0) is not None
    request = lost.request(120.0)
    assert (request.prompt, request.request_id, request.timeout_s) == ("x", "r", 40.0)
    resume = request.resume
    assert (resume.seed, list(resume.token_ids), resume.has_whole_text) == (7, [5, 6, 7], True)
    assert not lost.take(accepted(1, 2)), "the caller has heard that it is accepted"


def test_another_prompt_is_no_continuation() -> None:
    lost = stream()
    lost.take(accepted(1, 2))
    with pytest.raises(errors.Incompatible, match="another prompt"):
        lost.take(accepted(1, 3))


def test_one_router_is_waited_for_as_long_as_the_caller_has_patience() -> None:
    lost, now, waits = stream(), 100.0, []
    lost.take(accepted(1))
    while (wait_s := lost.wait_s(GONE, now)) is not None:
        waits.append(wait_s)
        now += wait_s
    assert waits[:5] == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.0])
    assert now == pytest.approx(110.0)


def test_progress_renews_the_patience() -> None:
    lost = stream()
    lost.take(accepted(1))
    assert lost.wait_s(GONE, 109.0) == pytest.approx(0.1)
    lost.take(delta(5))
    assert lost.wait_s(GONE, 118.9) == pytest.approx(0.1)


def test_the_next_router_is_asked_at_once_and_in_turn() -> None:
    lost = stream(num_routers=3)
    lost.take(accepted(1))
    assert [(lost.wait_s(GONE, 101.0), lost.router) for _ in range(4)] == [
        (0.0, 1), (0.0, 2), (pytest.approx(0.1), 0), (pytest.approx(0.2), 1),
    ]  # fmt: skip


def test_before_it_is_accepted_one_router_is_asked_once_and_several_are_as_one_is_back() -> None:
    assert stream().wait_s(GONE, 101.0) is None
    lost = stream(num_routers=2)
    assert (lost.wait_s(GONE, 101.0), lost.router) == (0.0, 1)
    assert (lost.wait_s(GONE, 101.0), lost.router) == (pytest.approx(0.1), 0)
    assert lost.wait_s(GONE, 111.1) is None


def test_a_router_that_answers_is_not_asked_again_unless_the_stream_was_lost() -> None:
    lost = stream()
    lost.take(accepted(1))
    assert lost.wait_s(BUSY, 101.0) is None
    assert lost.wait_s(GONE, 101.0) is not None
    assert lost.wait_s(BUSY, 102.0) is not None, "it is back, and has no nodes yet"
    assert lost.wait_s(REFUSED, 103.0) is None


def test_no_patience_and_no_time_left_end_the_stream() -> None:
    lost = stream(patience_s=0.0)
    lost.take(accepted(1))
    assert lost.wait_s(GONE, 101.0) is None
    lost = stream(timeout_s=5.0)
    lost.take(accepted(1))
    assert lost.wait_s(GONE, 105.0) is None
