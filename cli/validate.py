"""What `baton plan validate` does: sends loads to a cluster, simulates the same requests, compares."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from baton.client import AsyncClient
from baton.errors import BadConfig, Unavailable
from baton.types import Role
from cli import profile, up
from cli.environment import trust
from cli.observe import Live, live
from cli.planned import Planned, planned
from cli.processors import Processors, Taken
from loadgen.client import Asking, model_of
from loadgen.clusters import Shape, started
from loadgen.compare import Measured as Replayed
from loadgen.compare import Target
from loadgen.compare import measured as replay
from loadgen.job import headers_of
from loadgen.load import Load, closed, same_size
from loadgen.plan import Plan
from loadgen.report import Shown
from loadgen.run import run
from planner.measured import Measured
from planner.observed import Observed
from planner.profiles import simulated_as
from planner.refit import Change, refitted
from planner.validation import Limits, Report, compared, workload_of

# Before the first load: code is loaded, connections are there, nodes and router know their rates.
_WARM_REQUESTS, _WARM_TOKENS, _WARM_STREAMS, _WARM_LIMIT_S = 16, 256, 4, 300.0
# From the warm-up's last record to the load's first: what is asked for begins a little earlier than the load.
_QUIET_S = 0.3
# Of a host's processors: other work that takes more of them disturbs what is measured.
_QUIET_SHARE = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """``shape`` is started with ``model``, or describes the cluster of ``router``, whose own counts hold if it has no
    name."""

    shape: Shape | None
    plan: Plan
    limits: Limits
    model: str = ""
    router: str = ""
    api_key: str = ""
    # None: the cluster is measured first.
    measured: Measured | None = None

    def __post_init__(self) -> None:
        if bool(self.router) == bool(self.model):
            raise BadConfig(
                "nothing to validate: give --cluster and --model, to start a cluster here, or --router, for one that "
                "runs",
                param="--router",
            )
        if self.model and self.shape is None:
            raise BadConfig("--model is started as which cluster? Give --cluster, such as 1+1", param="--cluster")
        if self.plan.streams or not self.plan.rates:
            raise BadConfig("the requests need a time to arrive at: give --rate", param="--rate")


@dataclass(frozen=True, slots=True)
class Sent:
    """One load, and what the cluster recorded of it."""

    load: Load
    replayed: Replayed
    observed: Observed
    # None: a process does not say.
    took: Taken | None = None


@dataclass(frozen=True, slots=True)
class Validated:
    """``words``: the cluster's options."""

    words: tuple[str, ...]
    measured: Measured
    sent: tuple[Sent, ...]
    reports: tuple[Report, ...]

    @property
    def is_met(self) -> bool:
        return all(report.is_met for report in self.reports)

    @property
    def mean_error(self) -> float:
        return sum(report.mean_error for report in self.reports) / len(self.reports)


async def validated(asked: Asked, console: Console) -> Validated:
    """Raises BadConfig for a profile of other nodes or a cluster that is not as described, and Unavailable."""
    loads = asked.plan.loads()
    headers = headers_of((), asked.api_key)
    async with _standing(asked) as address, AsyncClient(address, api_key=asked.api_key, **trust()) as client:
        cluster = await live(client, address)
        words = _words(asked.shape, cluster)
        measured = _of(asked.measured, cluster)
        if measured is None:
            measured = await profile.measure(cluster, headers, profile.Shapes(), console)
        # Before anything is sent: what it would refuse is refused now.
        twin = planned(words, measured)
        _check_target(twin, cluster)
        sent = [each async for each in _send(cluster, headers, loads, asked, console)]
    reports = predicted(words, measured, sent, asked.limits)
    return Validated(words, measured, tuple(sent), reports)


def predicted(
    words: tuple[str, ...], measured: Measured, sent: list[Sent] | tuple[Sent, ...], limits: Limits
) -> tuple[Report, ...]:
    twin = planned(words, measured)
    found = []
    for each in sent:
        ours = simulated_as(measured, workload_of(each.replayed.outcome), twin.design, twin.config).run
        theirs = each.replayed
        name = theirs.target
        report = compared(name, ours, theirs.outcome, each.observed, theirs.counted, limits)
        found.append(replace(report, warnings=(*report.warnings, *_disturbed(measured, each.took))))
    return tuple(found)


def _disturbed(measured: Measured, took: Taken | None) -> Iterator[str]:
    """Other work on the processors is no part of the model: what it took is told, of the profile and of the load."""
    cores = measured.overhead.num_cores
    now = took.other_cores if took is not None else 0.0
    if cores and max(now, measured.other_cores) > _QUIET_SHARE * cores:
        yield (
            f"other work took {now:.2f} of {cores:g} processors during this load, and {measured.other_cores:.2f} while "
            "the profile was measured: the errors are not those of the model"
        )


def improved(before: Validated, limits: Limits) -> tuple[Validated, tuple[Change, ...]]:
    """With a profile refitted to the run, if that predicts it better; else as before."""
    runs = [(each.observed, each.replayed.outcome.answers) for each in before.sent]
    measured, changes = refitted(before.measured, runs)
    after = replace(before, measured=measured, reports=predicted(before.words, measured, before.sent, limits))
    return (after if after.mean_error < before.mean_error else before), changes


@asynccontextmanager
async def _standing(asked: Asked) -> AsyncIterator[str]:
    """The address of the router."""
    if asked.router or asked.shape is None:
        yield asked.router
        return
    with TemporaryDirectory(prefix="baton-validate-") as folder:
        async with started(asked.shape, asked.model, Path(folder)) as cluster:
            yield cluster.grpc


def _words(shape: Shape | None, cluster: Live) -> tuple[str, ...]:
    """Options of the cluster. Raises BadConfig if it has other nodes than described."""
    roles = [status.home or status.role for status in cluster.statuses]
    counts = tuple(roles.count(role) for role in (Role.PREFILL, Role.DECODE, Role.MIXED))
    if shape is not None:
        described = up.parsed(("--model", ".", *shape.options)).counts
        if described != counts:
            raise BadConfig(
                f"the cluster has {counts[0]} prefill, {counts[1]} decode and {counts[2]} mixed nodes that are ready, "
                f"expected {described[0]}, {described[1]} and {described[2]}, as --cluster says",
                param="--cluster",
            )
        return shape.options
    target_s = cluster.nodes[0].tbt_target_s
    words = [word for role, count in zip(("--prefill", "--decode", "--mixed"), counts, strict=True)
             for word in (role, str(count))]  # fmt: skip
    return (*words, *(() if target_s is None else ("--tbt-target-ms", f"{1e3 * target_s:g}")))


def _of(measured: Measured | None, cluster: Live) -> Measured | None:
    """With as many blocks as the nodes have. Raises BadConfig if it is of other nodes."""
    if measured is None:
        return None
    node = cluster.nodes[0]
    layout = replace(measured.kv_layout, num_blocks=node.kv_layout.num_blocks)
    for name, ours, theirs in (
        ("model", measured.model, node.model.name), ("device", measured.device, node.device),
        ("KV layout", layout, node.kv_layout),
    ):  # fmt: skip
        if ours != theirs:
            raise BadConfig(
                f"the profile is of the {name} {ours}, and the cluster has {theirs}: expected a profile of its nodes; "
                "write one with `baton profile`",
                param="--times",
            )
    return replace(measured, kv_layout=layout)


def _check_target(twin: Planned, cluster: Live) -> None:
    ours, theirs = twin.config.scheduler.tbt_target_s, cluster.nodes[0].tbt_target_s
    if (ours or 0.0) != (theirs or 0.0):
        raise BadConfig(
            f"the nodes have a target of {1e3 * (theirs or 0.0):g} ms for the time between tokens, and the options of "
            f"--cluster say {1e3 * (ours or 0.0):g}; give the options that the cluster runs with",
            param="--cluster",
        )


async def _send(
    cluster: Live, headers: Mapping[str, str], loads: tuple[Load, ...], asked: Asked, console: Console
) -> AsyncIterator[Sent]:
    asking = Asking(await model_of(cluster.server, headers), headers, {})
    name = asked.shape.name if asked.shape is not None else asked.router
    target = Target(name, cluster.server, asking)
    room = cluster.nodes[0].model.max_model_tokens // 2
    sizes = same_size(_WARM_REQUESTS, min(_WARM_TOKENS, room), min(_WARM_TOKENS // 16, room))
    warm = await run(closed("warm-up", sizes, _WARM_STREAMS, _WARM_LIMIT_S), cluster.server, asking, f"{time.time()}")
    if len(warm.whole) < _WARM_REQUESTS:
        reasons = [answer.error for answer in warm.answers if answer.error]
        raise Unavailable(f"the first requests failed: {reasons[0] if reasons else 'no answer in time'}")
    processors = Processors(cluster)
    with Shown(console) as shown:
        for load in loads:
            await asyncio.sleep(_QUIET_S)
            await processors.begin()
            replayed = await replay(target, load, 0, asked.plan.seed, shown.watching(target, load))
            took = await processors.end()
            yield Sent(load, replayed, await cluster.since(processors.began_s), took)
