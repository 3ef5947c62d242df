"""A plan as an overlay for `deploy/kubernetes`: how many pods each pool has, and between which numbers it scales. Pure.

A pool's pods are a scaler's: a Deployment has no number of its own, which each apply would set back.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baton.errors import BadConfig, quoted
from baton.types import Role
from planner.design import Design, Group
from planner.machines import Machine
from planner.search.question import Limits, Range

# Deployments of `deploy/kubernetes/base`. Mixed workers take the place of the second, whose grace time fits them.
_PREFILL, _DECODE = "prefill", "decode"
_ROLE_ARGUMENT = "/spec/template/spec/containers/0/args/1"
_LABEL_VALUE = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")


@dataclass(frozen=True, slots=True)
class Planned:
    """What is to be exported, and what it may never pass. ``tensor_parallel``: GPUs of a pod; None: the machine's."""

    design: Design
    about: str
    tensor_parallel: int | None = None
    limits: Limits | None = None


@dataclass(frozen=True, slots=True)
class Pool:
    """One Deployment. ``machines`` of the plan have ``pods_each`` pods each."""

    name: str
    group: Group
    machines: Range
    num_gpus: int

    @property
    def pods_each(self) -> int:
        return self.group.machine.num_gpus // self.num_gpus

    @property
    def min_pods(self) -> int:
        return self.machines.low * self.pods_each

    @property
    def max_pods(self) -> int:
        return self.machines.high * self.pods_each


def read(path: Path, known: Mapping[str, Machine], kind: str = "") -> Planned:
    """The best design of a `plan.json`, or that of the ``kind`` with this name. Raises BadConfig."""
    where = f"the plan {quoted(str(path))}"
    try:
        found = json.loads(path.read_text())
        kinds = {str(answer["kind"]): answer["best"] for answer in found["answers"]}
        best = kinds.get(name := str(kind or found["best"]))
        if best is None:
            having = ", ".join(each for each, trial in kinds.items() if trial) or "none"
            raise BadConfig(
                f"{where} has no design of the kind {quoted(name)} that meets the objectives; expected one of: "
                f"{having}",
                param="kind",
            )
        about = f"{best['design']}, for {best['rate']:g} requests/s of {found['workload']} (profile {found['profile']})"
        groups = tuple(_group(each, known, where) for each in best["groups"])
        return Planned(Design(groups), about, int(found["tensor_parallel"]), _limits(found["limits"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadConfig(
            f"{where} cannot be read ({type(error).__name__}: {quoted(str(error))}); expected the plan.json that "
            "`baton plan search --out` writes",
            param="plan",
        ) from error


def _group(written: Any, known: Mapping[str, Machine], where: str) -> Group:
    role, name, count = written
    if name not in known:
        raise BadConfig(
            f"{where} has the machine {quoted(str(name))}, expected one of {', '.join(known)}; give the file of your "
            "own machines by --machines",
            param="machines",
        )
    return Group(Role(role), known[name], int(count))


def _limits(written: Mapping[str, Any]) -> Limits:
    return Limits(
        written["dollars_per_hour"],
        written["power_units"],
        *(Range(*written[name]) for name in ("machines", "prompt", "token")),
    )


def pools(planned: Planned, bounds: Mapping[Role, Range]) -> tuple[Pool, ...]:
    """``bounds`` of pools in machines; a pool without has as many as the design, and does not scale. Raises BadConfig:
    the manifests have no such pools, or the bounds pass the plan's limits."""
    by_role = {role: [group for group in planned.design if group.role is role] for role in Role}
    if any(len(groups) > 1 for groups in by_role.values()):
        raise BadConfig(
            f"the design {planned.design.name} has several machine types in one pool; a Deployment has one kind of "
            "pod: expected one type for each pool",
            param="design",
        )
    if by_role[Role.MIXED] and len(planned.design.groups) > 1:
        raise BadConfig(
            f"the design {planned.design.name} has mixed machines beside pools; the manifests have two pools, or one "
            "of mixed workers",
            param="design",
        )
    for role, wanted in bounds.items():
        count = planned.design.count(role)
        if not (count and 1 <= wanted.low <= count <= wanted.high):
            raise BadConfig(
                f"the {role.value} pool is to have {wanted.low} to {wanted.high} machines, expected bounds around "
                f"those of the design, {count}, and at least 1",
                param=role.value,
            )
    found = tuple(_pool(planned, group, bounds) for group in planned.design)
    _check(planned, found)
    return found


def _pool(planned: Planned, group: Group, bounds: Mapping[Role, Range]) -> Pool:
    num_gpus = planned.tensor_parallel or group.machine.num_gpus
    if group.machine.num_gpus % num_gpus:
        raise BadConfig(
            f"tensor parallelism is {num_gpus}, and {group.machine.name} has {group.machine.num_gpus} GPUs; expected a "
            "divisor: a pod has the GPUs of one model",
            param="tp",
        )
    name = _PREFILL if group.role is Role.PREFILL else _DECODE
    return Pool(name, group, bounds.get(group.role, Range(group.count, group.count)), num_gpus)


def _check(planned: Planned, found: tuple[Pool, ...]) -> None:
    """Scalers do not know of each other: all of them may be at their maximum."""
    limits = planned.limits
    if limits is None:
        return
    largest = Design(tuple(Group(pool.group.role, pool.group.machine, pool.machines.high) for pool in found))
    whole = limits.machines.high
    highest = {Role.PREFILL: limits.prompt.high, Role.DECODE: limits.token.high, Role.MIXED: whole}
    passed = [
        f"{largest.count(role)} {role.value} machines, at most {most}"
        for role, most in highest.items()
        if largest.count(role) > most
    ]
    if largest.num_machines > whole:
        passed.append(f"{largest.num_machines} machines, at most {whole}")
    if not limits.can_pay(largest):
        passed.append(f"${largest.dollars_per_hour:,.2f} an hour and {largest.power_units:,.1f} power units, at most "
                      f"{_budget(limits.dollars_per_hour)} and {_budget(limits.power_units)}")  # fmt: skip
    if passed:
        raise BadConfig(
            f"with all pools at their maximum there are {'; '.join(passed)}: the plan's limits. Expected smaller "
            "maxima",
            param="bounds",
        )


def _budget(limit: float | None) -> str:
    return "any" if limit is None else f"{limit:,.2f}"


def warnings(found: tuple[Pool, ...], machine_label: str) -> Iterator[str]:
    for pool in found:
        if pool.min_pods < 2:
            yield f"the pool {pool.name} may have one pod, and none while that is replaced: two are safer"
    if len({pool.group.machine.name for pool in found}) > 1 and not machine_label:
        yield (
            "the pools run on different machines, and the pods go to any: label the nodes by machine type and give the "
            "label by --machine-label"
        )
    if (most := max(pool.num_gpus for pool in found)) > 1:
        yield f"pods ask for {most} GPUs, as planned; workers of this version run a model on one GPU"


def overlay(planned: Planned, found: tuple[Pool, ...], base: str, machine_label: str = "") -> str:
    """A `kustomization.yaml` over the overlay at ``base``. ``machine_label``: of the Kubernetes nodes; its value is the
    machine type."""
    lines = [
        f"# Written by `baton plan export --kubernetes`: {' '.join(planned.about.split())}.",
        "apiVersion: kustomize.config.k8s.io/v1beta1",
        "kind: Kustomization",
        "resources:",
        f"  - {json.dumps(base)}",
        "patches:",
    ]
    for pool in found:
        lines += [
            f"  - target: {{kind: HorizontalPodAutoscaler, name: {pool.name}}}",
            "    patch: |",
            f"      - {{op: replace, path: /spec/minReplicas, value: {pool.min_pods}}}",
            f"      - {{op: replace, path: /spec/maxReplicas, value: {pool.max_pods}}}",
            *_pod(pool, machine_label),
        ]
        if pool.group.role is Role.MIXED:
            lines += _all_mixed(pool)
    return "\n".join(lines) + "\n"


def _pod(pool: Pool, machine_label: str) -> list[str]:
    """What its pods ask for."""
    wanted = []
    if machine_label:
        if not _LABEL_VALUE.fullmatch(pool.group.machine.name):
            raise BadConfig(
                f"the machine {quoted(pool.group.machine.name)} cannot be the value of a label of Kubernetes: expected "
                "up to 63 letters, digits, '-', '_' and '.', the first and the last a letter or digit",
                param="machine_label",
            )
        wanted.append(f"nodeSelector: {{{json.dumps(machine_label)}: {json.dumps(pool.group.machine.name)}}}")
    if pool.num_gpus > 1:
        gpus = f'{{nvidia.com/gpu: "{pool.num_gpus}"}}'
        wanted.append(f"containers: [{{name: worker, resources: {{requests: {gpus}, limits: {gpus}}}}}]")
    if not wanted:
        return []
    head = f"metadata: {{name: {pool.name}, namespace: baton}}"
    lines = ["apiVersion: apps/v1", "kind: Deployment", head, "spec:", "  template:", "    spec:"]
    return ["  - patch: |", *(f"      {line}" for line in (*lines, *(f"      {each}" for each in wanted)))]


def _all_mixed(pool: Pool) -> list[str]:
    lines = [
        "  # All workers are mixed; there is no pool for prompts alone.",
        f"  - target: {{kind: Deployment, name: {pool.name}}}",
        "    patch: |",
        f"      - {{op: test, path: {_ROLE_ARGUMENT}, value: --role={pool.name}}}",
        f"      - {{op: replace, path: {_ROLE_ARGUMENT}, value: --role={Role.MIXED.value}}}",
    ]
    for version, kind in (
        ("apps/v1", "Deployment"), ("autoscaling/v2", "HorizontalPodAutoscaler"), ("policy/v1", "PodDisruptionBudget"),
    ):  # fmt: skip
        lines += [
            "  - patch: |",
            f"      apiVersion: {version}",
            f"      kind: {kind}",
            f"      metadata: {{name: {_PREFILL}, namespace: baton}}",
            "      $patch: delete",
        ]
    return lines
