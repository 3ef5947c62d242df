"""The parts of the bench of slow readers: its clients' addresses, what it reads of a stream, and its verdict."""

from __future__ import annotations

from typing import Any

import pytest

from bench.slow import Plan, verdict
from bench.slow_crowd import CrowdJob, address_of, ids_in, outcome, request_of
from loadgen.clusters import Shape

ROW = {"phase": "alone", "wrong": 0, "whole": 9, "requests": 9, "blocks_held_afterwards": 0}


def test_addresses_are_of_loopback_and_differ() -> None:
    found = {address_of(kind, number) for kind in (1, 2, 3) for number in range(1000)}
    assert len(found) == 3000
    parts = [list(map(int, address.split("."))) for address in found]
    assert all(first == 127 and 0 < last < 255 for first, _, _, last in parts)


def test_ids_are_read_from_events_however_they_are_written() -> None:
    events = b'data: {"choices":[{"text":"a","token_ids":[1,2]}]}\n\ndata: {"choices": [{"token_ids": [3]}]}\n\n'
    assert ids_in(events + b'data: {"choices":[{"token_ids":[]}]}\n\ndata: [DONE]\n\n') == [1, 2, 3]


@pytest.mark.parametrize(
    ("ids", "is_whole", "expected"),
    [
        ([1, 2, 3], True, "whole"),
        ([1, 2], True, "short"),
        ([1, 2], False, "cut"),
        ([], False, "cut"),
        ([1, 9, 3], True, "wrong tokens"),
        ([1, 9], False, "wrong tokens"),
        ([1, 2, 3, 4], True, "wrong tokens"),
    ],
)
def test_an_answer_that_was_cut_is_the_beginning_of_the_right_one(
    ids: list[int], is_whole: bool, expected: str
) -> None:
    assert outcome(ids, (1, 2, 3), is_whole=is_whole) == expected


def test_a_job_reaches_the_child_as_it_was() -> None:
    job = CrowdJob("127.0.0.1", 80, 10, 2, 0, 500, ("a", "b\n"), ((1, 2), ()))
    line = job.line()
    assert line.count("\n") == 1
    assert line.endswith("\n")
    assert CrowdJob.parse(line) == job


def test_a_request_says_its_length() -> None:
    head, _, body = request_of({"prompt": "Köln"}).partition(b"\r\n\r\n")
    assert f"Content-Length: {len(body)}".encode() in head.split(b"\r\n")


def test_there_is_room_for_every_stream() -> None:
    options = Shape.parse(f"1+1 {Plan(1000, 50, 0, 60.0, 3.0).options}").options
    assert int(options[options.index("--max-num-seqs") + 1]) > 1050


@pytest.mark.parametrize(
    ("row", "ended", "said"),
    [
        ({}, {"whole": 3, "cut": 5}, "passed"),
        ({"wrong": 1, "whole": 8}, {}, "alone: 1 wrong answers; alone: 8 of 9 whole"),
        ({"blocks_held_afterwards": 4}, {}, "alone: 4 blocks held"),
        ({}, {"wrong tokens": 2}, "alone: 2 streams: wrong tokens"),
    ],
)
def test_the_verdict_names_what_was_wrong(row: dict[str, Any], ended: dict[str, int], said: str) -> None:
    assert verdict([{**ROW, **row}], {"alone": {"ended": ended}}) == said
