"""Draws a schedule of faults for a cluster: about one in every second, of every kind, as rules with times. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

from baton.faults.kinds import FaultKind, Layer, has_length
from baton.faults.plan import Plan, Rule

# A message that meets a rule may be long in coming; a rule that met none by then is over.
_OPEN_S = 8.0
# Deaths and freezes in one pool are so far apart that a node is back before the next one leaves.
_SPACING_S = 20.0
# The first fault comes so long after the load.
_LEAD_S = 1.0


@dataclass(frozen=True, slots=True)
class _Choice:
    """One kind of fault. ``roles``: which nodes it strikes."""

    weight: int
    layer: Layer
    fault: FaultKind
    roles: tuple[str, ...]
    kind: str = "*"
    seconds: tuple[float, float] = (0.0, 0.0)
    times: int = 1


_SENDERS = ("prefill", "mixed")
_TAKERS = ("decode", "mixed")
_NODES = ("prefill", "decode", "mixed")
_ALL = (*_NODES, "router")
_F, _L = FaultKind, Layer

# A session is a stream over TCP: it does not lose messages by itself, so only those are lost here whose answer the
# router waits for, and the others come late, twice, in another order, or not at all because the session is cut.
_CHOICES = (
    _Choice(8, _L.PROCESS, _F.DIE, _NODES),
    _Choice(8, _L.PROCESS, _F.FREEZE, _NODES, seconds=(0.2, 4.0)),
    _Choice(3, _L.PROCESS, _F.DIE, ("router",)),
    _Choice(3, _L.PROCESS, _F.FREEZE, ("router",), seconds=(0.1, 1.0)),
    _Choice(4, _L.ENGINE, _F.STALL, _NODES, seconds=(0.2, 2.0)),
    _Choice(3, _L.ENGINE, _F.SLOW, _NODES, seconds=(0.01, 0.05), times=20),
    _Choice(8, _L.DATA, _F.CORRUPT, _SENDERS),
    _Choice(4, _L.DATA, _F.DROP, _SENDERS),
    _Choice(2, _L.DATA, _F.DUPLICATE, _SENDERS),
    _Choice(3, _L.DATA, _F.DELAY, _SENDERS, seconds=(0.05, 1.0)),
    _Choice(3, _L.DATA, _F.DISCONNECT, _SENDERS),
    _Choice(3, _L.CONTROL, _F.DROP, _SENDERS, kind="[bc]*"),
    _Choice(3, _L.CONTROL, _F.DROP, _TAKERS, kind="[abn]*"),
    _Choice(3, _L.CONTROL, _F.CORRUPT, _SENDERS, kind="commit"),
    _Choice(3, _L.CONTROL, _F.DELAY, _NODES, kind="[!h]*", seconds=(0.05, 1.0)),
    _Choice(2, _L.CONTROL, _F.DUPLICATE, _NODES, kind="[!h]*"),
    _Choice(2, _L.CONTROL, _F.REORDER, _NODES, kind="[!h]*", seconds=(0.1, 0.5)),
    _Choice(2, _L.CONTROL, _F.STALL, _NODES, seconds=(0.2, 2.0)),
    _Choice(2, _L.CONTROL, _F.DISCONNECT, _NODES),
    _Choice(3, _L.SESSION, _F.DROP, _NODES, kind="reserved"),
    _Choice(3, _L.SESSION, _F.DROP, ("router",), kind="reserve"),
    _Choice(4, _L.SESSION, _F.DELAY, _ALL, seconds=(0.05, 1.0)),
    _Choice(4, _L.SESSION, _F.DUPLICATE, _ALL),
    _Choice(4, _L.SESSION, _F.REORDER, _ALL, seconds=(0.1, 0.5)),
    _Choice(4, _L.SESSION, _F.STALL, _ALL, seconds=(0.2, 1.5)),
    _Choice(4, _L.SESSION, _F.DISCONNECT, _ALL),
)
_OF_REGISTRY = (
    _Choice(4, _L.REGISTRY, _F.DISCONNECT, _ALL, seconds=(1.0, 8.0)),
    _Choice(2, _L.REGISTRY, _F.DROP, _ALL, times=3),
    _Choice(2, _L.REGISTRY, _F.DELAY, _ALL, seconds=(0.1, 1.0), times=3),
)


def drawn(seed: int, nodes: Mapping[str, str], seconds: float, *, rate: float = 1.0, has_registry: bool) -> Plan:
    """``nodes``: role by node id, routers among them. ``rate``: faults a second, with deviations by chance."""
    rng = Random(f"chaos {seed}")
    roles = set(nodes.values())
    choices = [c for c in (*_CHOICES, *(_OF_REGISTRY if has_registry else ())) if roles & set(c.roles)]
    rules: list[Rule] = []
    # By pool, when a node of it may next be taken away.
    free_at: dict[str, float] = {}
    at_s = _LEAD_S
    while True:
        at_s += rng.expovariate(rate)
        if at_s >= seconds:
            return Plan(seed, tuple(rules))
        rule = _rule(rng, choices, nodes, at_s, free_at)
        if rule is not None:
            rules.append(rule)


def _rule(
    rng: Random, choices: Sequence[_Choice], nodes: Mapping[str, str], at_s: float, free_at: dict[str, float]
) -> Rule | None:
    """None if a process was to be taken away and may not be yet."""
    choice = rng.choices(choices, [choice.weight for choice in choices])[0]
    node = rng.choice([name for name, role in nodes.items() if role in choice.roles])
    role, least, most = nodes[node], *choice.seconds
    length = round(rng.uniform(least, most), 3) if has_length(choice.layer, choice.fault) else 0.0
    at_s, seconds = round(at_s, 3), (length, length)
    if choice.layer is Layer.PROCESS:
        # Without the last node of a pool requests could do nothing but wait; a router's clients wait for it anyway.
        count = sum(other == role for other in nodes.values())
        if at_s < free_at.get(role, 0.0) or (role != "router" and count < 2):
            return None
        free_at[role] = at_s + _SPACING_S
        return Rule(choice.layer, choice.fault, node=node, at_s=at_s, seconds=seconds)
    return Rule(
        choice.layer, choice.fault, kind=choice.kind, node=node, after_s=at_s, until_s=round(at_s + _OPEN_S, 3),
        probability=1.0, times=choice.times, seconds=seconds,
    )  # fmt: skip
