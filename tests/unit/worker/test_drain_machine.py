"""How a worker leaves, by hand-turned time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker import departure as d

CONFIG = d.DrainConfig(grace_s=10.0, linger_s=0.25)


def serving() -> d.Departure:
    machine = d.Departure(CONFIG)
    assert machine.handle(d.Loaded(), 0.0) == []
    assert machine.phase is d.Phase.SERVING
    return machine


@pytest.mark.parametrize("ask", [d.Signalled(), d.DrainAsked()])
def test_it_drains_lingers_and_closes(ask: d.Event) -> None:
    machine = serving()
    assert machine.handle(ask, 1.0) == [d.RefuseNew()]
    assert (machine.wake_at_s, machine.grace_left_s(4.0)) == (11.0, 7.0)
    assert machine.handle(d.Emptied(), 5.0) == []
    assert machine.wake_at_s == 5.25
    assert machine.handle(d.Tick(), 5.2) == []
    assert machine.handle(d.Tick(), 5.25) == [d.Close()]
    assert machine.phase is d.Phase.CLOSED
    assert machine.handle(d.Signalled(), 6.0) == []


def test_the_end_of_the_grace_time_cuts_off() -> None:
    machine = serving()
    machine.handle(d.Signalled(), 1.0)
    assert machine.handle(d.Tick(), 10.9) == []
    assert machine.handle(d.Tick(), 11.0) == [d.Close("the grace time is over")]


def test_the_second_signal_cuts_off_but_not_the_first_after_a_request() -> None:
    machine = serving()
    machine.handle(d.DrainAsked(30.0), 1.0)
    # An orchestrator asks first and sends SIGTERM later: that is no second thought.
    assert machine.handle(d.Signalled(), 2.0) == []
    assert machine.wake_at_s == 12.0
    assert machine.handle(d.Signalled(), 3.0) == [d.Close("told twice to stop")]


def test_asking_again_only_shortens() -> None:
    machine = serving()
    assert machine.handle(d.DrainAsked(5.0), 0.0) == [d.RefuseNew()]
    assert machine.handle(d.DrainAsked(50.0), 1.0) == []
    assert machine.wake_at_s == 5.0
    assert machine.handle(d.DrainAsked(1.0), 2.0) == []
    assert machine.wake_at_s == 3.0


def test_while_loading_there_is_nothing_to_drain() -> None:
    machine = d.Departure(CONFIG)
    assert machine.handle(d.Signalled(), 0.0) == [d.Close("it was still loading")]


def test_a_dead_engine_closes() -> None:
    assert serving().handle(d.EngineDied(), 0.0) == [d.Close("the engine died")]


events = st.sampled_from([d.Signalled(), d.DrainAsked(), d.DrainAsked(2.0), d.Emptied(), d.EngineDied(), d.Tick()])


@given(st.lists(st.tuples(events, st.floats(0.0, 3.0)), max_size=30))
def test_it_refuses_once_and_closes_once_whatever_comes(script: list[tuple[d.Event, float]]) -> None:
    machine, now, seen = serving(), 0.0, list[d.Action]()
    for event, gap_s in script:
        now += gap_s
        if isinstance(event, d.Emptied) and d.RefuseNew() not in seen:
            continue
        seen += machine.handle(event, now)
        assert (machine.wake_at_s is None) == (machine.phase in (d.Phase.SERVING, d.Phase.CLOSED))
    assert seen.count(d.RefuseNew()) <= 1
    assert sum(isinstance(action, d.Close) for action in seen) <= 1
    if d.Close() in seen:
        assert seen == [d.RefuseNew(), d.Close()]
    now += CONFIG.grace_s
    if machine.wake_at_s is not None:
        assert machine.handle(d.Tick(), now), "a drain always ends"
