"""The roles of a node under any work, operators and schedulers.

What holds: it acts in its home role or as mixed; as mixed only with work of the other pool, or for the dwell after it;
it is borrowed at most once per dwell; schedulers move it at most once per minimum time and never when it is pinned.
"""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from baton.errors import BatonError
from baton.machine import Tick
from baton.types import Role
from worker.roles import Event, Reason, Roles, RolesConfig, SetRole, Work

CONFIG = RolesConfig(dwell_s=2.0, min_home_s=30.0)
ROLES = st.sampled_from(Role)
WORK = st.builds(Work, has_prompts=st.booleans(), has_decodes=st.booleans())
SET = st.builds(SetRole, st.none() | ROLES, st.none() | ROLES)
STEPS = st.lists(st.tuples(st.floats(0.0, 20.0), st.one_of(WORK, WORK, SET)), max_size=60)


def run(roles: Roles, steps: list[tuple[float, Event]]) -> list[tuple[float, Reason]]:
    """As the driver feeds it; when what changed."""
    now, work, changes = 0.0, Work(has_prompts=False, has_decodes=False), []
    for wait_s, event in steps:
        until_s = now + wait_s
        while roles.wake_at_s is not None and roles.wake_at_s <= until_s:
            now = roles.wake_at_s
            changes += [(now, x.reason) for x in roles.handle(Tick(), now)]
        now = until_s
        was_pinned, home = roles.is_pinned, roles.home
        try:
            found = roles.handle(event, now)
        except BatonError:
            assert isinstance(event, SetRole)
            assert event.expected is not None
            assert (roles.is_pinned, roles.home) == (was_pinned, home), "a refusal changes nothing"
            found = []
        assert not (was_pinned and any(x.reason is Reason.SCHEDULER for x in found))
        changes += [(now, x.reason) for x in found]
        if isinstance(event, Work):
            work = event
        is_away = (roles.home is Role.DECODE and work.has_prompts) or (roles.home is Role.PREFILL and work.has_decodes)
        assert roles.acting in (roles.home, Role.MIXED)
        assert not is_away or roles.acting is Role.MIXED
        if roles.acting is not roles.home and not is_away:
            assert roles.wake_at_s is not None
            assert now <= roles.wake_at_s <= now + CONFIG.dwell_s
        else:
            assert roles.wake_at_s is None
    return changes


@given(home=ROLES, steps=STEPS)
def test_roles(home: Role, steps: list[tuple[float, Event]]) -> None:
    changes = run(Roles(home, CONFIG), steps)
    moves = [at_s for at_s, reason in changes if reason is Reason.SCHEDULER]
    assert all(b - a >= CONFIG.min_home_s for a, b in itertools.pairwise(moves))


@given(home=ROLES, steps=st.lists(st.tuples(st.floats(0.0, 5.0), WORK), max_size=60))
def test_a_node_is_borrowed_at_most_once_per_dwell(home: Role, steps: list[tuple[float, Event]]) -> None:
    changes = run(Roles(home, CONFIG), steps)
    assert [reason for _, reason in changes] == [Reason.BORROWED, Reason.RETURNED] * (len(changes) // 2) + [
        Reason.BORROWED
    ] * (len(changes) % 2)
    borrowed = [at_s for at_s, reason in changes if reason is Reason.BORROWED]
    assert all(b - a >= CONFIG.dwell_s for a, b in itertools.pairwise(borrowed))
