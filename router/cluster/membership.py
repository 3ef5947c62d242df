"""The nodes of the cluster and their states: a pure machine over the sessions to fixed and to listed addresses.

It decides when to dial, which nodes fit into the cluster and when a node counts as lost. The health of a node is judged
by that node's own messages and silence alone: a listing in the registry only adds addresses to dial, and a node that is
up stays when it is no longer listed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from baton import PROTOCOL_VERSION
from baton.types import NodeDescription, NodeStatus, Role


@dataclass(frozen=True, slots=True)
class MembershipConfig:
    # A node says something every 0.25 s. Silence makes it suspect (no new work), then lost (its work runs elsewhere).
    suspect_s: float = 1.0
    lost_s: float = 2.0
    # An engine that had work and finished no step for so long gets no new work, then counts as lost.
    stall_suspect_s: float = 10.0
    stall_lost_s: float = 30.0
    redial_base_s: float = 0.1
    redial_max_s: float = 2.0
    # A node that is refused is asked again after this time: it may have been replaced by the right one.
    refused_redial_s: float = 5.0


class State(Enum):
    CONNECTING = "connecting"
    READY = "ready"
    SUSPECT = "suspect"
    LOST = "lost"
    # It drained and went in good order; until it, or another node, is up at the address.
    LEFT = "left"
    DRAINING = "draining"
    REFUSED = "refused"


# ── Events ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Welcomed:
    """Both sessions of the node are open."""

    address: str
    node: NodeDescription
    status: NodeStatus


@dataclass(frozen=True, slots=True)
class Heard:
    """Any message came in; ``status`` if it carried one."""

    address: str
    status: NodeStatus | None


@dataclass(frozen=True, slots=True)
class Broken:
    """A session ended, or could not be opened."""

    address: str
    reason: str
    # The node ended its sessions itself.
    is_orderly: bool = False


@dataclass(frozen=True, slots=True)
class Listed:
    """All addresses the registry knows now, with the incarnation that registered there."""

    incarnations: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Tick:
    """``late_s``: time since the previous tick in which the event loop did not turn and so read no message."""

    late_s: float = 0.0


Event = Welcomed | Heard | Broken | Listed | Tick


# ── Actions ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Dial:
    address: str


@dataclass(frozen=True, slots=True)
class HangUp:
    address: str


@dataclass(frozen=True, slots=True)
class Forget:
    """The address is no longer in the cluster: hang up, and never dial it again."""

    address: str


@dataclass(frozen=True, slots=True)
class NodeUp:
    node: NodeDescription
    status: NodeStatus


@dataclass(frozen=True, slots=True)
class NodeDown:
    node_id: str
    reason: str
    # It had said that it would go.
    has_left: bool = False


@dataclass(frozen=True, slots=True)
class NodeChanged:
    """The state of a node that is up has changed."""

    node_id: str


@dataclass(frozen=True, slots=True)
class NodeRefused:
    address: str
    reason: str


@dataclass(frozen=True, slots=True)
class NodeUnreachable:
    """Dialled several times and never up. Told once; dialling goes on."""

    address: str
    reason: str


Action = Dial | HangUp | Forget | NodeUp | NodeDown | NodeChanged | NodeRefused | NodeUnreachable

# Failed dials in a row after which an operator is told: a worker may start a little later than its router.
_UNREACHABLE_AFTER = 3


class Member:
    """One address."""

    __slots__ = (
        "address", "failures", "heard_s", "incarnation", "is_fixed", "is_listed", "lost_reason", "node", "reason",
        "redial_s", "state", "status",
    )  # fmt: skip

    def __init__(self, address: str, *, is_fixed: bool) -> None:
        self.address = address
        # Fixed ones stay whatever the registry says.
        self.is_fixed = is_fixed
        self.is_listed = False
        # The one that is registered at this address, by the last listing; 0 if none.
        self.incarnation = 0
        self.state = State.CONNECTING
        # The last one that answered here; kept after its loss, for people to read.
        self.node: NodeDescription | None = None
        self.status: NodeStatus | None = None
        # When its last message was read, plus the time since in which the event loop did not turn.
        self.heard_s = 0.0
        self.failures = 0
        # When to dial; None while a connection exists or is being made.
        self.redial_s: float | None = None
        self.reason = ""
        # Why it was lost; what came of dialling it since then stands behind it in `reason`.
        self.lost_reason = ""

    @property
    def home_role(self) -> Role | None:
        """The pool that it belongs to, or did when it was last heard; None if it never was."""
        return None if self.status is None else self.status.home_role

    @property
    def is_up(self) -> bool:
        return self.state in (State.READY, State.SUSPECT, State.DRAINING)


class Membership:
    """Invariant: every NodeUp is followed by at most one NodeDown before the next NodeUp of the same id."""

    def __init__(self, addresses: Sequence[str], config: MembershipConfig) -> None:
        self._config = config
        self.members = {a: Member(a, is_fixed=True) for a in addresses}
        # Members that are up, by node id.
        self._up: dict[str, Member] = {}
        # A node whose model and layout every other one must share; None while no node is up.
        self.reference: NodeDescription | None = None
        # The longest sequence, prompt and output, that fits into a node; None while no node is up.
        self.capacity_tokens: int | None = None

    def start(self) -> list[Action]:
        return [Dial(a) for a in self.members]

    def handle(self, event: Event, now: float) -> list[Action]:
        if not isinstance(event, Listed | Tick) and event.address not in self.members:
            return []  # A late event of an address that was forgotten.
        match event:
            case Heard():
                return self._on_heard(event, now)
            case Welcomed():
                return self._on_welcomed(event, now)
            case Broken():
                return self._on_broken(self.members[event.address], event, now)
            case Listed():
                return self._on_listed(event.incarnations, now)
            case Tick():
                return self._on_tick(event.late_s, now)

    def member_of(self, node_id: str) -> Member | None:
        """The member that is up under this id."""
        return self._up.get(node_id)

    def is_available(self, member: Member) -> bool:
        """Whether it gets new work."""
        return member.state is State.READY

    def _note_up(self) -> None:
        """A node came up or went down."""
        up = [(m.node, m) for m in self.members.values() if m.is_up and m.node is not None]
        self._up = {node.node_id: m for node, m in up}
        self.reference = up[0][0] if up else None
        layouts = (node.kv_layout for node, _ in up)
        self.capacity_tokens = max((x.num_blocks * x.block_tokens for x in layouts), default=None)

    def _on_welcomed(self, event: Welcomed, now: float) -> list[Action]:
        member = self.members[event.address]
        if member.is_up:
            return []
        reason = self._mismatch(event.node)
        member.node, member.status, member.heard_s = event.node, event.status, now
        if reason is not None:
            member.state, member.reason = State.REFUSED, reason
            member.redial_s = now + self._config.refused_redial_s
            return [HangUp(event.address), NodeRefused(event.address, reason)]
        member.reason, member.redial_s, member.failures = "", None, 0
        member.state = self._judge(member, now)
        self._note_up()
        return [NodeUp(event.node, event.status)]

    def _mismatch(self, node: NodeDescription) -> str | None:
        """Why this node cannot be in the cluster, with both values."""
        if node.protocol_version != PROTOCOL_VERSION:
            return f"protocol version is {PROTOCOL_VERSION} here and {node.protocol_version} at {node.node_id}"
        if self.member_of(node.node_id) is not None:
            return f"node id {node.node_id} is already taken by another address"
        reference = self.reference
        if reference is None:
            return None
        for name in ("fingerprint", "dtype", "max_model_tokens", "vocab_size"):
            mine, theirs = getattr(reference.model, name), getattr(node.model, name)
            if mine != theirs:
                return f"model {name} is {mine} at {reference.node_id} and {theirs} at {node.node_id}"
        if reference.kernels != node.kernels:
            # Other kernels round otherwise: a request that moved would not go on with the same tokens.
            return f"kernels are {reference.kernels} at {reference.node_id} and {node.kernels} at {node.node_id}"
        layout = reference.kv_layout.mismatch(node.kv_layout)
        return (
            None if layout is None else f"KV layout of {reference.node_id} (here) and {node.node_id} (there): {layout}"
        )

    def _on_heard(self, event: Heard, now: float) -> list[Action]:
        member = self.members[event.address]
        if not member.is_up:
            return []
        member.heard_s = now
        if event.status is None and member.state is State.READY:
            return []
        if event.status is not None:
            member.status = event.status
        assert member.status is not None
        if member.status.stalled_s > self._config.stall_lost_s:
            wedged = f"its engine has finished no step for {member.status.stalled_s:.1f} s"
            return [HangUp(member.address), *self._down(member, wedged, now)]
        return self._rejudge(member, now)

    def _rejudge(self, member: Member, now: float) -> list[Action]:
        assert member.node is not None
        state = self._judge(member, now)
        if state is member.state:
            return []
        member.state = state
        return [NodeChanged(member.node.node_id)]

    def _judge(self, member: Member, now: float) -> State:
        assert member.status is not None
        if now - member.heard_s > self._config.suspect_s or member.status.stalled_s > self._config.stall_suspect_s:
            return State.SUSPECT
        return State.DRAINING if member.status.draining else State.READY

    def _on_broken(self, member: Member, event: Broken, now: float) -> list[Action]:
        if member.state is State.LEFT:
            # It had said that it would leave: no news.
            return self._down(member, member.reason, now, has_left=True)
        status = member.status
        is_drained = member.is_up and status is not None and status.draining
        # A message that was under way to it may break the connection before its goodbye is read.
        is_empty = is_drained and status is not None and status.num_running == status.num_waiting == 0
        if is_drained and (event.is_orderly or is_empty):
            return self._down(member, "it drained and left in good order", now, has_left=True)
        return self._down(member, event.reason, now)

    def _down(self, member: Member, reason: str, now: float, *, has_left: bool = False) -> list[Action]:
        was_up = member.is_up
        if member.state is State.REFUSED:
            return []  # We hung up ourselves; the redial is set.
        wait_s = min(self._config.redial_base_s * 2.0 ** min(member.failures, 16), self._config.redial_max_s)
        member.failures += 1
        member.state = State.LOST if member.node is not None else State.CONNECTING
        if has_left:
            member.state = State.LEFT
        if was_up:
            member.lost_reason = reason
        is_news = member.state is State.LOST and member.lost_reason not in ("", reason)
        member.reason = f"{member.lost_reason}; since then: {reason}" if is_news else reason
        member.redial_s = now + wait_s
        actions: list[Action] = []
        if was_up:
            assert member.node is not None
            self._note_up()
            actions.append(NodeDown(member.node.node_id, reason, has_left))
        elif member.node is None and member.failures == _UNREACHABLE_AFTER:
            actions.append(NodeUnreachable(member.address, reason))
        if not (member.is_fixed or member.is_listed):
            actions += self._forget(member)
        return actions

    def _forget(self, member: Member) -> list[Action]:
        del self.members[member.address]
        return [Forget(member.address)]

    def _on_listed(self, incarnations: Mapping[str, int], now: float) -> list[Action]:
        actions: list[Action] = []
        for address, incarnation in incarnations.items():
            member = self.members.get(address)
            if member is None:
                member = self.members[address] = Member(address, is_fixed=False)
                actions.append(Dial(address))
            elif incarnation != member.incarnation:
                actions += self._on_new_life(member, now)
            member.is_listed, member.incarnation = True, incarnation
        for member in [x for x in self.members.values() if x.is_listed and x.address not in incarnations]:
            member.is_listed = False
            if not (member.is_up or member.is_fixed):
                actions += self._forget(member)
        return actions

    def _on_new_life(self, member: Member, now: float) -> list[Action]:
        """Another incarnation registered: the one registered before is gone, even if its session looks alive."""
        if member.is_up:
            assert member.node is not None
            if member.node.incarnation != member.incarnation:
                return []  # The new one is up here already, or one that the registry does not know.
            node_id = member.node.node_id
            member.state, member.reason = State.LOST, "another incarnation registered at its address"
            member.lost_reason = member.reason
            member.redial_s, member.failures = None, 0
            self._note_up()
            return [HangUp(member.address), NodeDown(node_id, member.reason), Dial(member.address)]
        if member.redial_s is not None:
            member.redial_s, member.failures = now, 0  # No need to wait: dialled with the next tick.
        return []

    def _on_tick(self, late_s: float, now: float) -> list[Action]:
        actions: list[Action] = []
        for member in list(self.members.values()):
            if member.redial_s is not None and now >= member.redial_s:
                member.redial_s = None
                if member.state is State.REFUSED:
                    member.state = State.CONNECTING
                actions.append(Dial(member.address))
            elif member.is_up:
                # Silence is what could have been heard and was not.
                member.heard_s = min(now, member.heard_s + late_s)
                actions += self._check_silence(member, now)
        return actions

    def _check_silence(self, member: Member, now: float) -> list[Action]:
        silence_s = now - member.heard_s
        if silence_s > self._config.lost_s:
            reason = f"nothing heard for {silence_s:.1f} s"
            return [HangUp(member.address), *self._down(member, reason, now)]
        return self._rejudge(member, now)
