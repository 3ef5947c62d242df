"""The commands that make one setup of a running cluster another one. Pure."""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from baton.address import host_of
from baton.types import NodeDescription, NodeStatus, Role
from planner.advise.setup import Setup

# As Deployments name their pods: `baton worker --node-id=$(POD_NAME)`.
_POD = re.compile(r"[a-z0-9-]+-[a-z0-9]{6,10}-[a-z0-9]{5}")
_KUBECTL = "kubectl -n baton"


class Place(Enum):
    """How its nodes were started."""

    # By `baton up`.
    HERE = "here"
    # One by one.
    HOSTS = "hosts"
    KUBERNETES = "kubernetes"


@dataclass(frozen=True, slots=True)
class Member:
    description: NodeDescription
    status: NodeStatus

    @property
    def node_id(self) -> str:
        return self.description.node_id

    @property
    def home(self) -> Role:
        return self.status.home or self.status.role


def place_of(members: Sequence[Member]) -> Place:
    if all(_POD.fullmatch(member.node_id) for member in members):
        return Place.KUBERNETES
    hosts = [host_of(member.description.address).strip("[]") for member in members]
    return Place.HERE if all(_is_loopback(host) for host in hosts) else Place.HOSTS


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def commands(
    members: Sequence[Member], before: Setup, after: Setup, *, program: str, router: str, place: Place
) -> tuple[str, ...]:
    """``...`` in one stands for what the process was started with."""
    lines = list(_moves(members, before, after, program, router))
    grown = {role: after.count(role) - before.count(role) for role in Role}
    has_other_total = after.num_nodes != before.num_nodes
    worker, routing = _worker_options(before, after), _router_options(before, after)
    match place:
        case Place.HERE:
            options = [*worker, *routing]
            if has_other_total:
                options += [f"--{role.value} {after.count(role)}" for role in Role if after.count(role)]
            lines += [f"{program} up ... {' '.join(options)}"] if options else []
        case Place.HOSTS:
            if has_other_total:
                lines += _one_by_one(members, grown, program, router)
            lines += [f"{program} worker ... {' '.join(worker)}"] if worker else []
            lines += [f"{program} router ... {' '.join(routing)}"] if routing else []
        case Place.KUBERNETES:
            if has_other_total:
                lines += [line for role in Role if grown[role] for line in _scaled(role, after.count(role))]
            pools = [role.value for role in Role if after.count(role)]
            lines += [_argument(f"deployment/{pool}", option) for pool in pools for option in worker]
            lines += [_argument("deployment/router", option) for option in routing]
    return tuple(lines)


def _moves(members: Sequence[Member], before: Setup, after: Setup, program: str, router: str) -> Iterator[str]:
    """Of nodes that stay, from pools that shrink to those that grow."""
    if after.num_nodes != before.num_nodes:
        return
    givers = [role for role in Role for _ in range(before.count(role) - after.count(role))]
    takers = [role for role in Role for _ in range(after.count(role) - before.count(role))]
    free = {role: _last_first(members, role) for role in Role}
    for giver, taker in zip(givers, takers, strict=True):
        yield f"{program} role {free[giver].pop(0).node_id} {taker.value} --router {router}"


def _last_first(members: Sequence[Member], role: Role) -> list[Member]:
    """Those that an operator has put there are the last to be moved."""
    here = [member for member in reversed(members) if member.home is role]
    return sorted(here, key=lambda member: member.status.is_pinned)


def _worker_options(before: Setup, after: Setup) -> list[str]:
    options = []
    if after.tbt_target_s != before.tbt_target_s:
        options.append(f"--tbt-target-ms {1e3 * (after.tbt_target_s or 0):g}")
    if after.max_batch_tokens != before.max_batch_tokens:
        options.append(f"--max-batch-tokens {after.max_batch_tokens}")
    return options


def _router_options(before: Setup, after: Setup) -> list[str]:
    return [f"--disaggregation {after.disaggregation}"] if after.disaggregation != before.disaggregation else []


def _one_by_one(members: Sequence[Member], grown: dict[Role, int], program: str, router: str) -> Iterator[str]:
    for role in Role:
        for _ in range(grown[role]):
            yield f"{program} worker --role {role.value} ..."
        for member in _last_first(members, role)[: max(0, -grown[role])]:
            yield f"{program} drain {member.node_id} --router {router}"


def _scaled(role: Role, count: int) -> Iterator[str]:
    yield f"{_KUBECTL} scale deployment/{role.value} --replicas={count}"
    # A scaler that owns the pool would set it back.
    bounds = json.dumps({"spec": {"minReplicas": count, "maxReplicas": count}})
    yield f"{_KUBECTL} patch hpa {role.value} --patch '{bounds}'"


def _argument(deployment: str, option: str) -> str:
    """The last one of an option counts."""
    added = [{"op": "add", "path": "/spec/template/spec/containers/0/args/-", "value": option.replace(" ", "=")}]
    return f"{_KUBECTL} patch {deployment} --type=json --patch '{json.dumps(added)}'"
