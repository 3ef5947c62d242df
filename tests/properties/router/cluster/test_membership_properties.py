"""Sessions and registry report in any order: no node goes up twice, no address is dialled twice, and none is stuck."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from router.cluster import membership as m
from tests.support.descriptions import NODE, STATUS

CONFIG = m.MembershipConfig()
ADDRESSES = ["a:1", "b:1", "c:1"]
addresses = st.sampled_from(ADDRESSES)


class Cluster(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.machine = m.Membership(ADDRESSES[:1], m.MembershipConfig())
        self.now = 0.0
        # What a driver would hold: a link per address, dialled or not; nodes by id.
        self.dialled: dict[str, bool] = {}
        self.up: dict[str, str] = {}
        self.listed: dict[str, int] = {}
        # By address, how long it could have been heard since it was.
        self.silence: dict[str, float] = {}
        self.act(self.machine.start())

    def act(self, actions: list[m.Action]) -> None:
        for action in actions:
            match action:
                case m.Dial(address):
                    assert not self.dialled.get(address), f"{address} is dialled twice"
                    self.dialled[address] = True
                case m.HangUp(address):
                    self.dialled[address] = False
                case m.Forget(address):
                    assert address not in self.machine.members
                    self.dialled.pop(address)
                case m.NodeUp(node):
                    assert node.node_id not in self.up
                    self.up[node.node_id] = node.address
                case m.NodeDown(node_id):
                    del self.up[node_id]

    def feed(self, event: m.Event) -> None:
        self.act(self.machine.handle(event, self.now))

    @rule(address=addresses, incarnation=st.integers(1, 3))
    def welcome(self, address: str, incarnation: int) -> None:
        if self.dialled.get(address):
            node = replace(NODE, node_id=address, address=address, incarnation=incarnation)
            if not self.machine.members[address].is_up:
                self.silence[address] = 0.0
            self.feed(m.Welcomed(address, node, STATUS))

    @rule(address=addresses)
    def break_(self, address: str) -> None:
        if self.dialled.get(address):
            self.dialled[address] = False
            self.feed(m.Broken(address, "test"))

    @rule(address=addresses, draining=st.booleans())
    def hear(self, address: str, draining: bool) -> None:
        self.silence[address] = 0.0
        self.feed(m.Heard(address, replace(STATUS, draining=draining)))

    @rule(view=st.dictionaries(addresses, st.integers(1, 3)))
    def list_(self, view: dict[str, int]) -> None:
        self.listed = view
        self.feed(m.Listed(view))

    @rule(seconds=st.floats(0.0, 3.0), share_late=st.sampled_from([0.0, 0.0, 0.5, 1.0]))
    def wait(self, seconds: float, share_late: float) -> None:
        """For a share of the time the event loop did not turn."""
        self.now += seconds
        before = {a: x.state for a, x in self.machine.members.items()}
        for address in self.up.values():
            self.silence[address] = self.silence.get(address, 0.0) + seconds * (1.0 - share_late)
        self.feed(m.Tick(late_s=seconds * share_late))
        for address, state in before.items():
            if state in (m.State.READY, m.State.SUSPECT, m.State.DRAINING):
                is_lost = (
                    self.machine.members[address].state is m.State.LOST if address in self.machine.members else True
                )
                counted = self.silence[address]
                # Lost for what could have been heard and was not, and for nothing else.
                assert is_lost == (counted > CONFIG.lost_s) or abs(counted - CONFIG.lost_s) < 1e-6, (address, counted)

    @invariant()
    def books_agree(self) -> None:
        members = self.machine.members
        assert set(self.up.values()) == {a for a, x in members.items() if x.is_up}
        assert ADDRESSES[0] in members
        assert set(self.listed) <= set(members)
        for address, member in members.items():
            # Either a connection is there or being made, or a time is set for the next.
            assert bool(self.dialled.get(address)) != (member.redial_s is not None), address
            assert member.is_fixed or member.is_listed or member.is_up


TestCluster = Cluster.TestCase
TestCluster.settings = settings(max_examples=150, stateful_step_count=40)
