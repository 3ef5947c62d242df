"""`baton plan`: what a cluster that does not exist would do with a workload."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from baton.errors import BadConfig
from cli import preflight
from cli.options import finite, path
from cli.plan_advise import advise
from cli.plan_export import export
from cli.plan_search import search
from cli.plan_validate import validate
from cli.planning import DAY_S, MAX_RATE, AskedProfile, model_of, warn, workload_of
from cli.show import wide_console
from cli.usage import Commands

if TYPE_CHECKING:
    from planner.energy import Bill
    from planner.results import Run
    from planner.summary import Summary

app = typer.Typer(cls=Commands, help="Size a cluster: simulate it before it exists.")
app.command()(search)
app.command()(advise)
app.command()(export)
app.command()(validate)

_UNITS = {"_s": ("s", 3), "_slowdown": ("x", 2)}


@app.command()
def simulate(
    profile: Annotated[
        AskedProfile,
        typer.Option(
            help="Whose rules: honest runs Baton's own router and engine; compat follows the Splitwise paper's public "
            "simulator, its errors included."
        ),
    ],
    trace: Annotated[
        str,
        typer.Option(
            metavar="code|conv|FILE",
            help="The requests: Azure's coding or conversation service, or a CSV file of their form or of the public "
            "simulator's (arrival_timestamp, prompt_size, token_size); .gz too.",
        ),
    ],
    model: Annotated[
        str,
        typer.Option(
            "--model", "-m", help="bloom-176b, llama2-70b, or the folder of a Hugging Face config.json (honest)."
        ),
    ] = "bloom-176b",
    tp: Annotated[int, typer.Option(min=1, max=1024, help="Tensor parallelism: GPUs that share a model.")] = 8,
    prompt: Annotated[
        list[str] | None, typer.Option(metavar="MACHINE:COUNT", help="Machines for prompts, such as h100-80gb:25.")
    ] = None,
    token: Annotated[
        list[str] | None, typer.Option(metavar="MACHINE:COUNT", help="Machines for tokens, such as a100-80gb:26.")
    ] = None,
    mixed: Annotated[
        list[str] | None, typer.Option(metavar="MACHINE:COUNT", help="Machines for both, such as h100-80gb:40.")
    ] = None,
    machines: Annotated[
        Path | None, typer.Option(parser=path, metavar="FILE", help="Machine types of your own, in TOML.")
    ] = None,
    times: Annotated[
        Path | None,
        typer.Option(
            parser=path, metavar="FILE", help="A profile of `baton profile` instead of a model and machines (honest)."
        ),
    ] = None,
    cluster: Annotated[
        str,
        typer.Option(
            metavar="SHAPE [OPTIONS]",
            help="With --times: 1+2 is 1 prefill and 2 decode workers, 2 is 2 mixed ones; then options of `baton up`.",
        ),
    ] = "",
    rate: Annotated[
        float | None,
        typer.Option(min=1e-6, max=MAX_RATE, callback=finite, help="Stretch the arrivals to so many a second."),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(min=1e-3, max=DAY_S, callback=finite, help="Only what arrives in the first so many seconds."),
    ] = None,
    poisson: Annotated[
        bool,
        typer.Option(
            "--poisson", help="Draw lengths from the trace, and Poisson arrivals at --rate for --seconds, by --seed."
        ),
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of --poisson.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", parser=path, metavar="DIR", help="For summary.json, requests.csv and run.svg."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Run a workload on a design in simulated time; report latency, slowdowns and the nine objectives."""
    if out is not None:
        preflight.writable_folder(out, "--out")
    from cli.planned import planned
    from loadgen.clusters import Shape
    from planner import design
    from planner import machines as catalogue
    from planner.measured import read
    from planner.profiles import simulated, simulated_as
    from planner.results import Profile
    from planner.summary import as_json as flat
    from planner.summary import summarize, write

    work = workload_of(trace, rate, seconds, seed if poisson else None)
    if times is not None or cluster:
        given = [bool(each) for each in (prompt, token, mixed, machines)]
        if times is None or not cluster or any(given) or profile is not AskedProfile.HONEST:
            raise BadConfig(
                "--times has one kind of node in clusters of Baton's own: expected --times and --cluster together, "
                "--profile honest, and no --prompt, --token, --mixed or --machines",
                param="--times",
            )
        measured = read(times)
        about, twin = f"profile {times} of {measured.model}", planned(Shape.parse(cluster).options, measured)
        begin = time.perf_counter()
        run, alone = simulated_as(measured, work, twin.design, twin.config)
    else:
        known = catalogue.catalogue(machines)
        asked = design.parse(known, prompt=prompt or (), token=token or (), mixed=mixed or ())
        about, begin = f"{model} with TP {tp}", time.perf_counter()
        run, alone = simulated(Profile(profile.value), work, asked, model_of(model), tp, known)
    wall_s = time.perf_counter() - begin
    summary = summarize(run, alone)
    if out is not None:
        write(out, run, summary)
    if as_json:
        typer.echo(json.dumps(flat(run, summary), indent=2))
        return
    console = wide_console()
    _show(console, run, summary, about)
    console.print(
        f"simulated in {wall_s:.2f} s, {1e3 * wall_s / len(run.served):.3f} ms a request"
        + ("" if out is None else f"; wrote summary.json, requests.csv and run.svg to {out}"),
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip


def _show(console: Console, run: Run, summary: Summary, model: str) -> None:
    from planner.energy import bill

    work = run.workload
    for line in (
        f"profile {run.profile.value} · {model} · {run.design.name}",
        f"{summary.num_requests} requests of {work.name}, {work.rate:.3g} a second; {summary.num_served} served",
        f"${run.design.dollars_per_hour:,.2f} an hour, {run.design.power_units:,.1f} power units",
    ):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    table = Table("", *("mean", "p50", "p90", "p99"))
    for name, figures in summary.metrics.items():
        unit, digits = next(found for ending, found in _UNITS.items() if name.endswith(ending))
        values = (getattr(figures, part) for part in ("mean", "p50", "p90", "p99"))
        table.add_row(name, *("-" if value is None else f"{value:.{digits}f} {unit}" for value in values))
    console.print(table)
    missed = [f"{v.figure} p{v.percentile * 100:g}" for v in summary.verdicts if not v.is_met]
    verdict = (
        "all nine objectives met" if summary.meets_all_nine else f"objectives missed: {', '.join(missed) or 'all'}"
    )
    console.print(_paid(bill(run)), markup=False, highlight=False, soft_wrap=True)
    counters = ", ".join(f"{name} {value:g}" for name, value in run.counters.items())
    console.print(f"{verdict}; {counters}", markup=False, highlight=False, soft_wrap=True)
    for warning in run.warnings:
        warn(warning)


def _paid(of: Bill) -> str:
    money = (
        f"${of.dollars_per_million_tokens:.2f} per million tokens, ${of.dollars_per_million_output_tokens:.2f} per "
        "million output tokens"
    )
    if not of.has_energy:
        return f"{money}; this profile has no energy"
    return (
        f"{money}; {of.joules_per_request:,.0f} J a request (GPUs, idle ones too), {of.joules_per_prompt_token:.2f} J "
        f"a prompt token, {of.joules_per_output_token:.2f} J an output token"
    )
