"""Searches in several processes: the same answers, and no process is left, however the search ends."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterator
from dataclasses import replace

import pytest

from baton.errors import BadConfig, InternalError
from planner.machines import catalogue
from planner.models import BUILT_IN
from planner.results import Profile
from planner.search import report
from planner.search.plan import num_parts, search
from planner.search.question import Kind, Limits, Question, Range
from planner.search.source import Redrawn
from tests.support.designs import LENGTHS, Raising

pytestmark = pytest.mark.timeout(120)

KNOWN = catalogue()
A, H = KNOWN["a100-80gb"], KNOWN["h100-80gb"]
ASKED = Question(
    Redrawn(LENGTHS, 8.0, 1), Profile.COMPAT, BUILT_IN["bloom-176b"], 8, KNOWN,
    (Kind(H, A), Kind(A, A), Kind(H, None)), limits=Limits(machines=Range(1, 2)), max_rate=6.0, has_fronts=True,
)  # fmt: skip


@pytest.fixture(autouse=True)
def none_is_left() -> Iterator[None]:
    yield
    assert not multiprocessing.active_children()


def test_answers_do_not_depend_on_the_number_of_processes() -> None:
    alone = search(ASKED)
    assert any(answer.best for answer in alone.answers)
    for workers in (2, 9):
        parts: list[int] = []
        found = search(ASKED, workers, parts.append)
        assert found.answers == alone.answers
        assert json.dumps(report.as_json(found)) == json.dumps(report.as_json(alone))
        assert sum(parts) == num_parts(ASKED)


def test_an_error_of_a_process_is_raised_as_it_is() -> None:
    wrong = BadConfig("no such workload", param="seconds")
    with pytest.raises(BadConfig, match="no such workload") as raised:
        search(replace(ASKED, source=Raising(wrong)), 2)
    assert raised.value.param == "seconds"


def test_a_defect_names_the_kind_and_has_the_traceback_of_its_process() -> None:
    with pytest.raises(InternalError, match=r"the search of .* failed: ZeroDivisionError: by 0") as raised:
        search(replace(ASKED, source=Raising(ZeroDivisionError("by 0"))), 2)
    assert "in at" in str(raised.value.__cause__)


def test_a_process_that_is_killed_is_told() -> None:
    with pytest.raises(InternalError, match=r"the process that searched .* ended with code -9"):
        search(replace(ASKED, source=Raising(None)), 2)


def test_the_other_processes_end_when_the_search_is_left() -> None:
    class Left(Exception):
        pass

    def leave(parts: int) -> None:
        assert multiprocessing.active_children()
        raise Left

    with pytest.raises(Left):
        search(replace(ASKED, limits=Limits(machines=Range(1, 40)), max_rate=1000.0), 2, leave)
