"""Who counts as there: the pure machine, by hand-turned time."""

from __future__ import annotations

import itertools
from dataclasses import replace

from router.cluster import membership as m
from tests.support.descriptions import NODE, STATUS

OTHER = replace(NODE, node_id="n1")


def membership() -> m.Membership:
    machine = m.Membership(["a:1", "b:1"], m.MembershipConfig())
    assert machine.start() == [m.Dial("a:1"), m.Dial("b:1")]
    assert machine.handle(m.Welcomed("a:1", NODE, STATUS), 0.0) == [m.NodeUp(NODE, STATUS)]
    return machine


def test_silence_makes_suspect_then_lost_then_redialled() -> None:
    machine = membership()
    assert machine.handle(m.Tick(), 0.9) == []
    assert machine.handle(m.Tick(), 1.1) == [m.NodeChanged("n0")]
    assert machine.members["a:1"].state is m.State.SUSPECT
    assert machine.handle(m.Heard("a:1", None), 1.2) == [m.NodeChanged("n0")]
    assert machine.members["a:1"].state is m.State.READY
    hang_up, down = machine.handle(m.Tick(), 3.3)
    assert hang_up == m.HangUp("a:1")
    assert isinstance(down, m.NodeDown)
    assert machine.handle(m.Tick(), 3.5) == [m.Dial("a:1")]


def test_a_lost_node_says_why_it_was_lost_and_what_came_of_dialling_it() -> None:
    machine = membership()
    machine.handle(m.Broken("a:1", "reset by peer"), 1.0)
    assert machine.members["a:1"].reason == "reset by peer"
    for now in (2.0, 3.0):
        assert machine.handle(m.Tick(), now) == [m.Dial("a:1")]
        machine.handle(m.Broken("a:1", "refused"), now)
        assert machine.members["a:1"].reason == "reset by peer; since then: refused"
    machine.handle(m.Tick(), 6.0)
    machine.handle(m.Welcomed("a:1", NODE, STATUS), 6.0)
    assert machine.members["a:1"].reason == ""
    machine.handle(m.Broken("a:1", "again"), 7.0)
    assert machine.members["a:1"].reason == "again"


def test_a_router_that_was_late_itself_counts_that_time_as_no_nodes_silence() -> None:
    machine = membership()
    assert machine.handle(m.Tick(late_s=2.9), 3.0) == []
    assert machine.is_available(machine.members["a:1"])
    # From then on it listens: 0.1 s were silent before, and 1.0 more make it suspect, 2.0 lost.
    assert machine.handle(m.Tick(), 3.8) == []
    assert machine.handle(m.Tick(), 4.0) == [m.NodeChanged("n0")]
    hang_up, down = machine.handle(m.Tick(), 5.0)
    assert hang_up == m.HangUp("a:1")
    assert isinstance(down, m.NodeDown)


def test_break_is_told_once_and_backs_off() -> None:
    machine = membership()
    assert machine.handle(m.Broken("a:1", "reset"), 1.0) == [m.NodeDown("n0", "reset")]
    times, now = [], 1.0
    for _ in range(8):
        while not machine.handle(m.Tick(), now):
            now += 0.05
        times.append(now)
        assert machine.handle(m.Broken("a:1", "refused"), now) == [], "down already"
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert gaps[-1] <= 2.1
    assert gaps[0] < gaps[3]
    again = replace(NODE, incarnation=2)
    machine.handle(m.Tick(), now + 3)
    assert machine.handle(m.Welcomed("a:1", again, STATUS), now + 3) == [m.NodeUp(again, STATUS)]


def test_an_address_where_no_node_ever_answered_is_told_once() -> None:
    machine = membership()
    told = [machine.handle(m.Broken("b:1", "refused"), 1.0 + i) for i in range(6)]
    assert [action for actions in told for action in actions] == [m.NodeUnreachable("b:1", "refused")]
    assert told[2], "a worker may start a little later than its router"


def test_mismatches_are_refused_with_both_values_and_asked_again() -> None:
    wrong = {
        "fingerprint": replace(OTHER, model=replace(OTHER.model, fingerprint="g")),
        "block_tokens": replace(OTHER, kv_layout=replace(OTHER.kv_layout, block_tokens=32)),
        "dtype": replace(OTHER, kv_layout=replace(OTHER.kv_layout, dtype="bfloat16")),
        "kernels": replace(OTHER, kernels="cpu-avx2"),
        "protocol": replace(OTHER, protocol_version=99),
        "already taken": NODE,
    }
    for word, node in wrong.items():
        machine = membership()
        hang_up, refused = machine.handle(m.Welcomed("b:1", node, STATUS), 1.0)
        assert hang_up == m.HangUp("b:1")
        assert isinstance(refused, m.NodeRefused)
        assert word in refused.reason
        assert m.Dial("b:1") not in machine.handle(m.Tick(), 1.5)
        assert m.Dial("b:1") in machine.handle(m.Tick(), 7.0)


def test_another_model_is_welcome_once_the_old_one_is_gone() -> None:
    machine = membership()
    machine.handle(m.Broken("a:1", "gone"), 1.0)
    new = replace(OTHER, model=replace(OTHER.model, fingerprint="g"))
    assert machine.handle(m.Welcomed("b:1", new, STATUS), 1.0) == [m.NodeUp(new, STATUS)]


def test_draining_and_wedged_nodes() -> None:
    machine = membership()
    machine.handle(m.Heard("a:1", replace(STATUS, draining=True)), 0.1)
    assert machine.members["a:1"].state is m.State.DRAINING
    machine.handle(m.Heard("a:1", replace(STATUS, stalled_s=11.0)), 0.2)
    assert machine.members["a:1"].state is m.State.SUSPECT
    machine.handle(m.Heard("a:1", STATUS), 0.3)
    assert machine.is_available(machine.members["a:1"])
    hang_up, down = machine.handle(m.Heard("a:1", replace(STATUS, stalled_s=31.0)), 0.4)
    assert hang_up == m.HangUp("a:1")
    assert isinstance(down, m.NodeDown)


def test_a_node_that_drained_has_left_until_something_else_is_known() -> None:
    machine = membership()
    machine.handle(m.Heard("a:1", replace(STATUS, draining=True, num_running=1)), 0.1)
    (down,) = machine.handle(m.Broken("a:1", "the node left", is_orderly=True), 0.2)
    assert down == m.NodeDown("n0", "it drained and left in good order", has_left=True)
    member = machine.members["a:1"]
    for now in (1.0, 5.0, 9.0):
        assert machine.handle(m.Tick(), now) == [m.Dial("a:1")]
        assert machine.handle(m.Broken("a:1", "UNAVAILABLE: failed to connect to all addresses"), now) == []
        assert (member.state, member.reason) == (m.State.LEFT, "it drained and left in good order")
    machine.handle(m.Tick(), 20.0)
    back = replace(NODE, incarnation=2)
    assert machine.handle(m.Welcomed("a:1", back, STATUS), 20.0) == [m.NodeUp(back, STATUS)]
    assert (member.state, member.reason) == (m.State.READY, "")
    # And a death afterwards is a loss again.
    machine.handle(m.Broken("a:1", "reset"), 21.0)
    assert (member.state, member.reason) == (m.State.LOST, "reset")


def test_a_node_that_dies_while_it_drains_is_lost() -> None:
    machine = membership()
    machine.handle(m.Heard("a:1", replace(STATUS, draining=True, num_running=1)), 0.1)
    assert machine.handle(m.Broken("a:1", "reset"), 0.2) == [m.NodeDown("n0", "reset")]
    assert machine.members["a:1"].state is m.State.LOST


def listed(**incarnations: int) -> m.Listed:
    return m.Listed({f"{name}:1": incarnation for name, incarnation in incarnations.items()})


def test_listed_nodes_are_dialled_and_unlisted_ones_forgotten_once_they_are_down() -> None:
    machine = m.Membership([], m.MembershipConfig())
    assert machine.start() == []
    assert machine.handle(listed(a=1, b=7), 0.0) == [m.Dial("a:1"), m.Dial("b:1")]
    assert machine.handle(listed(a=1, b=7), 0.1) == []
    machine.handle(m.Welcomed("a:1", NODE, STATUS), 0.2)
    # b never answered: it goes at once. a speaks for itself, whatever the registry says.
    assert machine.handle(listed(), 1.0) == [m.Forget("b:1")]
    assert machine.is_available(machine.members["a:1"])
    assert machine.handle(m.Heard("b:1", None), 1.0) == [], "a late event of an address that was forgotten"
    assert machine.handle(m.Broken("a:1", "left"), 1.1) == [m.NodeDown("n0", "left"), m.Forget("a:1")]
    assert machine.members == {}


def test_a_listed_node_that_is_down_is_dialled_again_and_again() -> None:
    machine = m.Membership([], m.MembershipConfig())
    machine.handle(listed(a=1), 0.0)
    assert machine.handle(m.Broken("a:1", "refused"), 0.1) == []
    assert machine.handle(m.Tick(), 0.3) == [m.Dial("a:1")]


def test_a_new_life_at_an_address_ends_the_session_of_the_old_one() -> None:
    machine = m.Membership([], m.MembershipConfig())
    machine.handle(listed(a=1), 0.0)
    machine.handle(m.Welcomed("a:1", NODE, STATUS), 0.1)
    hang_up, down, dial = machine.handle(listed(a=2), 0.2)
    assert (hang_up, dial) == (m.HangUp("a:1"), m.Dial("a:1"))
    assert isinstance(down, m.NodeDown)
    new = replace(NODE, incarnation=2)
    assert machine.handle(m.Welcomed("a:1", new, STATUS), 0.3) == [m.NodeUp(new, STATUS)]
    assert machine.handle(listed(a=2), 0.4) == []


def test_a_new_life_that_was_met_before_it_was_listed_stays() -> None:
    machine = m.Membership([], m.MembershipConfig())
    machine.handle(listed(a=1), 0.0)
    machine.handle(m.Welcomed("a:1", NODE, STATUS), 0.1)
    machine.handle(m.Broken("a:1", "died"), 0.2)
    assert machine.handle(m.Tick(), 0.4) == [m.Dial("a:1")]
    new = replace(NODE, incarnation=2)
    machine.handle(m.Welcomed("a:1", new, STATUS), 0.5)
    assert machine.handle(listed(a=1), 0.6) == [], "an old view"
    assert machine.handle(listed(a=2), 0.7) == []
    assert machine.is_available(machine.members["a:1"])


def test_a_listing_shortens_the_wait_before_the_next_dial() -> None:
    machine = m.Membership([], m.MembershipConfig())
    machine.handle(listed(a=1), 0.0)
    now = 0.0
    for _ in range(6):
        machine.handle(m.Broken("a:1", "refused"), now)
        now += 10.0
        assert machine.handle(m.Tick(), now) == [m.Dial("a:1")]
    machine.handle(m.Broken("a:1", "refused"), now)
    assert machine.handle(m.Tick(), now + 1.0) == []
    machine.handle(listed(a=2), now + 1.0)
    assert machine.handle(m.Tick(), now + 1.1) == [m.Dial("a:1")]


def test_a_fixed_address_stays_whatever_is_listed() -> None:
    machine = membership()
    machine.handle(listed(a=1, c=3), 0.1)
    assert machine.handle(listed(), 0.2) == [m.Forget("c:1")]
    assert machine.handle(m.Broken("a:1", "died"), 0.3) == [m.NodeDown("n0", "died")]
    assert m.Dial("a:1") in machine.handle(m.Tick(), 1.0)
    assert sorted(machine.members) == ["a:1", "b:1"]
