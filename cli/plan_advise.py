"""`baton plan advise`: watches a running cluster and says which change of it would pay."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from baton.address import parse_address
from baton.api_keys import secret_of
from baton.errors import BadConfig, quoted
from cli import preflight
from cli.options import finite, path
from cli.planning import DAY_S, warn
from cli.show import wide_console
from cli.usage import program
from router.config import GRPC_PORT

if TYPE_CHECKING:
    from planner.advise.advice import Advice
    from planner.advise.cluster import PoolUse, Watched
    from planner.machines import Machine
    from planner.search.slos import Slo

_ROUTER = f"127.0.0.1:{GRPC_PORT}"


def advise(
    router: Annotated[
        list[str] | None,
        typer.Option(
            "--router",
            "-r",
            envvar="BATON_ROUTER",
            help="host:port of the router's gRPC service. May be repeated: a router knows its own requests alone.",
        ),
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=1.0, max=DAY_S, callback=finite, help="How long the cluster is watched.")
    ] = 60.0,
    slo: Annotated[
        list[str] | None,
        typer.Option(
            metavar="METRIC:PART:LIMIT",
            help="Objectives, such as TTFT_s:p99:2, of TTFT_s, TBT_s and E2E_s; may be repeated. A change then pays if "
            "it meets them where today does not, or with fewer nodes.",
        ),
    ] = None,
    machine: Annotated[
        str | None,
        typer.Option(help="The machine type that a node is: its price, and its power where no meter is read."),
    ] = None,
    machines: Annotated[
        Path | None, typer.Option(parser=path, metavar="FILE", help="Machine types of your own, in TOML.")
    ] = None,
    requests: Annotated[int, typer.Option(min=100, max=1_000_000, help="Of each simulated run.")] = 2000,
    seed: Annotated[int, typer.Option(min=0, help="Of the simulated requests.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", parser=path, metavar="DIR", help="Write advice.json and advice.svg there."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    api_key: Annotated[
        str, typer.Option(envvar="BATON_API_KEY", show_envvar=True, help="A key of the router's, if any.")
    ] = "",
) -> None:
    """Watch a running cluster; say what other pools, caps or ways of splitting would do, and how to get there."""
    if out is not None:
        preflight.writable_folder(out, "--out")
    addresses = list(dict.fromkeys(router or (_ROUTER,)))
    for address in addresses:
        parse_address(address, "--router", lowest_port=1)
    from cli.watch import watch
    from planner.advise import report
    from planner.advise.advice import AdviceConfig, advised
    from planner.advise.cluster import pool_uses

    slos, price = _slos(slo or ()), _price(machine, machines)
    config = AdviceConfig(num_requests=requests, seed=seed)
    with _bar() as bar:
        watched = asyncio.run(watch(addresses, secret_of(api_key), seconds, _tick(bar, "watching")))
        advice = advised(watched, slos, price, config, _tick(bar, "simulating"))
    pools, steps = tuple(pool_uses(watched)), commands_of(advice, watched, program(), addresses[0])
    told = json.dumps(report.as_json(advice, pools, steps), indent=2)
    if out is not None:
        (out / "advice.json").write_text(told + "\n", encoding="utf-8")
        (out / "advice.svg").write_text(report.picture(advice), encoding="utf-8")
    if as_json:
        typer.echo(told)
    else:
        show(wide_console(), advice, pools, steps)


def _bar() -> Progress:
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(),
        console=console, transient=True, disable=not console.is_terminal,
    )  # fmt: skip


def _tick(bar: Progress, doing: str) -> Callable[[float, float], None]:
    task = bar.add_task(doing, total=None)
    return lambda done, total: bar.update(task, completed=done, total=total)


def _slos(texts: Sequence[str]) -> tuple[Slo, ...]:
    from planner.advise.advice import HISTOGRAMS
    from planner.search.slos import slo

    found = tuple(map(slo, texts))
    if unknown := [each.name for each in found if each.metric not in HISTOGRAMS]:
        raise BadConfig(
            f"--slo is {quoted(unknown[0])}, expected a metric of {', '.join(HISTOGRAMS)}: a running cluster has no "
            "slowdowns",
            param="--slo",
        )
    return found


def _price(name: str | None, file: Path | None) -> Machine | None:
    from planner.machines import catalogue

    known = catalogue(file)
    if name is not None and name not in known:
        raise BadConfig(f"--machine is {quoted(name)}, expected one of {', '.join(known)}", param="--machine")
    return None if name is None else known[name]


def commands_of(advice: Advice, watched: Watched, name: str, router: str) -> list[tuple[str, ...]]:
    """Of the changes that pay, in their order."""
    from planner.advise.commands import commands, place_of

    place = place_of(watched.members)
    return [
        commands(watched.members, advice.setup, option.setup, program=name, router=router, place=place)
        for option in advice.best
    ]


def show(console: Console, advice: Advice, pools: Sequence[PoolUse], commands: Sequence[Sequence[str]]) -> None:
    from planner.advise import report

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    load = advice.load
    say(f"watched {load.seconds:.3g} s: {load.count} requests, {load.rate:.3g} a second; prompts of "
        f"{load.prompts.mean or 0:,.0f} and outputs of {load.outputs.mean or 0:,.0f} tokens on average; "
        f"{load.cached_share:.0%} of prompt tokens from prefix caches")  # fmt: skip
    say(f"today: {advice.setup.name}")
    used = Table("pool", "nodes", "busy", "KV in use", "steps: mean ms x sequences")
    for pool in pools:
        steps = ", ".join(f"{phase} {1e3 * s:.3g} x {n:.3g}" for phase, (_, s, n) in pool.steps.items())
        used.add_row(pool.role.value, f"{pool.num_nodes}", f"{pool.busy_share:.0%}", f"{pool.kv_share:.0%}", steps)
    console.print(used)
    fit = Table("today's cluster", "measured", "simulated", "error", "limit")
    for each in advice.fits:
        values = (f"{value:,.4g}" if "_s" not in each.name else f"{1e3 * value:,.4g} ms"
                  for value in (each.measured, each.predicted))  # fmt: skip
        style = None if each.is_good else "red"
        fit.add_row(each.name.replace("_s ", " "), *values, f"{each.error:+.0%}", f"{each.limit:.0%}", style=style)
    console.print(fit)
    say(advice.verdict)
    table = Table(*report.COLUMNS, title="simulated, one change each", title_justify="left")
    for row in report.rows(advice):
        table.add_row(*row, style="bold" if row[-1].startswith("yes") else None)
    console.print(table)
    mark = "" if advice.does_fit else " (by a model that does not fit)"
    for option, lines in zip(advice.best, commands, strict=True):
        say(f"{option.about}{mark}: {option.reason}")
        for line in lines:
            say(f"    {line}")
    if not advice.best:
        say(f"no change pays{mark}")
    for warning in advice.warnings:
        warn(warning)
