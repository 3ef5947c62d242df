"""Messages stay short whatever they quote."""

from __future__ import annotations

import pytest

from baton.errors import MAX_MESSAGE_BYTES, InvalidRequest, from_code, quoted

HUGE = [
    "x" * 10**6,
    10**5000,
    -(10**5000),
    [1] * 10**6,
    {"k" * 10**6: "v" * 10**6},
    [["y" * 10**5] * 100],
    b"z" * 10**6,
    {str(i): i for i in range(10**5)},
]


@pytest.mark.parametrize("value", HUGE, ids=lambda v: type(v).__name__)
def test_a_huge_value_is_quoted_in_a_few_characters(value: object) -> None:
    assert 0 < len(quoted(value)) < 200


@pytest.mark.parametrize("value", ["a", 0, -1, 2**64, None, True, 1e300, [1, 2], {"a": "b"}])
def test_a_small_value_is_quoted_whole(value: object) -> None:
    assert quoted(value) == repr(value)


def test_what_is_not_ascii_counts_as_the_bytes_that_a_trailer_carries_and_halves_of_characters_do_no_harm() -> None:
    assert len(InvalidRequest("東" * 10**6).message.encode()) < MAX_MESSAGE_BYTES + 40
    assert InvalidRequest("a\ud800b").message == "a\\ud800b"
    assert len(InvalidRequest("x", param="p" * 10**6).param or "") < 200


def test_no_message_is_longer_than_the_limit_and_it_says_what_is_missing() -> None:
    error = InvalidRequest("x" * 10**6)
    assert len(error.message) < MAX_MESSAGE_BYTES + 40
    assert "(1000000 characters)" in error.message
    assert len(from_code("InvalidRequest", "y" * 10**6).message) < MAX_MESSAGE_BYTES + 40
