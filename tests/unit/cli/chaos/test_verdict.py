"""What is made of a stream beside the undisturbed one, and of a run."""

from __future__ import annotations

import pytest

from cli.chaos.verdict import Heard, Ledger, Outcome, judged, verdict

RIGHT = Heard(tuple(range(10, 20)), "abc", "stop")
FINE = Ledger(4, 0, 0, 0)


def ids(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split()))


@pytest.mark.parametrize(
    ("heard", "outcome"),
    [
        (RIGHT, Outcome.WHOLE),
        (Heard(RIGHT.token_ids, "abd", "stop"), Outcome.WRONG),
        (Heard(RIGHT.token_ids, "abc", "length"), Outcome.WRONG),
        (Heard(ids("10 11 12"), "a", None, has_left=True), Outcome.LEFT),
        (Heard(ids("10 11 13"), "a", None, has_left=True), Outcome.LOST),
        (Heard(ids("10 11 12"), "a", None), Outcome.NONE),
        (Heard(), Outcome.NONE),
        (Heard(ids("10 11 12"), "a", "stop"), Outcome.SHORT),
        (Heard(ids("10 11 12"), "a", None, error="503"), Outcome.FAILED),
        (Heard(error="503"), Outcome.FAILED),
        (Heard(ids("10 11 99 13"), "", None), Outcome.WRONG),
        (Heard(ids("10 11 99 13"), "", None, error="503"), Outcome.WRONG),
        (Heard(ids("10 11 12 12 13 14"), "", "stop"), Outcome.REPEATED),
        (Heard(ids("10 11 12 11 12 13"), "", "stop"), Outcome.REPEATED),
        (Heard((*RIGHT.token_ids, 19), "abc", "stop"), Outcome.REPEATED),
        (Heard((*RIGHT.token_ids, 99), "abc", "stop"), Outcome.WRONG),
        (Heard(ids("10 11 14 15"), "", "stop"), Outcome.LOST),
        (Heard(ids("11 12 13"), "", "stop"), Outcome.LOST),
    ],
)
def test_a_stream_is_judged_by_its_tokens_first(heard: Heard, outcome: Outcome) -> None:
    assert judged(heard, RIGHT) is outcome


@pytest.mark.parametrize(
    ("outcomes", "ledger", "num_struck", "reasons"),
    [
        ({Outcome.WHOLE: 5, Outcome.LEFT: 2, Outcome.FAILED: 1}, FINE, 3, ()),
        ({Outcome.WHOLE: 5, Outcome.WRONG: 2}, FINE, 3, ("2 streams: wrong token",)),
        ({Outcome.WHOLE: 5, Outcome.NONE: 1, Outcome.REPEATED: 1}, FINE, 3,
         ("1 streams: repeated token", "1 streams: no outcome")),
        ({Outcome.WHOLE: 5}, Ledger(3, 1, 0, 0), 3, ("1 nodes did not give their ledger",)),
        ({Outcome.WHOLE: 5}, Ledger(4, 0, 7, 2), 3,
         ("7 blocks are held after all requests have ended", "2 blocks are neither free nor held")),
        ({Outcome.FAILED: 5}, FINE, 3, ("no stream was whole",)),
        ({Outcome.WHOLE: 5}, FINE, 0, ("no fault struck, so nothing was shown",)),
    ],
)  # fmt: skip
def test_a_run_passes_if_nothing_is_wrong(
    outcomes: dict[Outcome, int], ledger: Ledger, num_struck: int, reasons: tuple[str, ...]
) -> None:
    found = verdict(outcomes, ledger, num_struck)
    assert (found.reasons, found.passed) == (reasons, not reasons)
