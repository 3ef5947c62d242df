"""`baton plan search`: which cluster for a workload."""

from __future__ import annotations

import json
import os
import time
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from baton.errors import BadConfig, quoted
from cli import preflight
from cli.options import finite, path
from cli.planning import DAY_S, MAX_COUNT, MAX_RATE, AskedProfile, model_of, range_of, warn
from cli.show import wide_console

if TYPE_CHECKING:
    from collections.abc import Mapping

    from planner.machines import Machine
    from planner.search.plan import Plan
    from planner.search.question import Limits, Question
    from planner.search.source import Source

# What is drawn if no time is given, as the public simulator's runs.
_DRAWN_S = 60.0
# `baton plan search` without --machine.
_MACHINES = ("a100-80gb", "h100-80gb")


class AskedGoal(Enum):
    THROUGHPUT = "throughput"
    COST = "cost"
    POWER = "power"


def search(
    profile: Annotated[AskedProfile, typer.Option(help="Whose rules, as of `baton plan simulate`.")],
    goal: Annotated[
        AskedGoal,
        typer.Option(help="The highest rate within the limits, or the least cost or power that carries --rate."),
    ] = AskedGoal.THROUGHPUT,
    trace: Annotated[
        str | None, typer.Option(metavar="code|conv|FILE", help="The requests, as of `baton plan simulate`.")
    ] = None,
    prompt_tokens: Annotated[
        str | None,
        typer.Option(
            metavar="N|LOW-HIGH|lognormal:MEDIAN:SIGMA",
            help="In place of --trace: Poisson arrivals with prompts of such lengths; with --output-tokens.",
        ),
    ] = None,
    output_tokens: Annotated[
        str | None, typer.Option(metavar="N|LOW-HIGH|lognormal:MEDIAN:SIGMA", help="Lengths of the outputs.")
    ] = None,
    poisson: Annotated[
        bool, typer.Option("--poisson", help="Draw lengths from the trace, and Poisson arrivals, by --seed.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of what is drawn.")] = 0,
    seconds: Annotated[
        float | None,
        typer.Option(
            min=1e-3,
            max=DAY_S,
            callback=finite,
            help="Only what arrives in so many seconds; without it a trace is run whole, and 60 s are drawn.",
        ),
    ] = None,
    model: Annotated[str, typer.Option("--model", "-m", help="As of `baton plan simulate`.")] = "bloom-176b",
    tp: Annotated[int, typer.Option(min=1, max=1024, help="Tensor parallelism: GPUs that share a model.")] = 8,
    machine: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MACHINE",
            help="Types to choose from: every pair of them, and each by itself with mixed machines; without it "
            f"{' and '.join(_MACHINES)}.",
        ),
    ] = None,
    pair: Annotated[
        list[str] | None,
        typer.Option(metavar="PROMPT:TOKEN", help="Only these pairs, such as h100-80gb:a100-80gb, and mixed ones."),
    ] = None,
    machines: Annotated[
        Path | None, typer.Option(parser=path, metavar="FILE", help="Machine types of your own, in TOML.")
    ] = None,
    max_cost: Annotated[
        str | None, typer.Option(metavar="DOLLARS|MACHINE:COUNT", help="An hour, or what so many machines cost.")
    ] = None,
    max_power: Annotated[
        str | None, typer.Option(metavar="UNITS|MACHINE:COUNT", help="In power units, or what so many machines draw.")
    ] = None,
    count: Annotated[str, typer.Option(metavar="MIN-MAX", help="Machines of a design.")] = "1-200",
    prompt_count: Annotated[str, typer.Option(metavar="MIN-MAX", help="Prompt machines of a split one.")] = "1-200",
    prompt_step: Annotated[
        int, typer.Option(min=1, max=MAX_COUNT, help="Try only multiples of it as prompt machines: faster.")
    ] = 1,
    tokens_count: Annotated[
        str, typer.Option("--token-count", metavar="MIN-MAX", help="Token machines of a split one.")
    ] = "1-200",
    rate: Annotated[
        float | None,
        typer.Option(min=1e-6, max=MAX_RATE, callback=finite, help="Requests a second, of the goals cost and power."),
    ] = None,
    rate_step: Annotated[
        float, typer.Option(min=1e-3, max=MAX_RATE, callback=finite, help="Rates are multiples of it.")
    ] = 1.0,
    max_rate: Annotated[
        float, typer.Option(min=1e-3, max=MAX_RATE, callback=finite, help="No higher one is tried.")
    ] = 10_000.0,
    slo: Annotated[
        list[str] | None,
        typer.Option(
            metavar="METRIC:PART:LIMIT",
            help="Objectives in place of the nine of Splitwise, such as TTFT_s:p99:2 or TBT_slowdown:p90:1.5.",
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Processes; without it, one for each core.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            parser=path,
            metavar="DIR",
            help="Write plan.json and pictures there: designs that meet the objectives, fronts, latency by rate.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Find the best design within budgets; compare kinds of machines, split and mixed."""
    if out is not None:
        preflight.writable_folder(out, "--out")
    from planner import machines as catalogue
    from planner.results import Profile
    from planner.search import pictures, report, slos
    from planner.search import question as asked

    known = catalogue.catalogue(machines)
    pairs = [_pair(text, known) for text in pair or ()]
    named = machine or (() if pairs else _MACHINES)
    question = asked.Question(
        _source(trace, prompt_tokens, output_tokens, seconds, seed, is_drawn=poisson),
        Profile(profile.value),
        model_of(model),
        tp,
        known,
        asked.kinds((_known(name, "--machine", known) for name in named), pairs),
        asked.Goal(goal.value),
        rate,
        _limits(known, max_cost, max_power, (count, prompt_count, tokens_count), prompt_step),
        tuple(map(slos.slo, slo)) if slo else slos.NINE_SLOS,
        rate_step,
        max_rate,
        has_fronts=out is not None,
    )
    begin = time.perf_counter()
    plan = _searched(question, workers or os.cpu_count() or 1)
    wall_s = time.perf_counter() - begin
    told = json.dumps(report.as_json(plan), indent=2)
    if out is not None:
        pictures.write(out, plan)
        (out / "plan.json").write_text(told + "\n")
    if as_json:
        typer.echo(told)
        return
    wrote = "" if out is None else f"; wrote plan.json and pictures to {out}"
    _show_plan(plan, f"searched in {wall_s:.1f} s{wrote}")


def _source(
    trace: str | None, prompts: str | None, outputs: str | None, seconds: float | None, seed: int, *, is_drawn: bool
) -> Source:
    from planner.search.source import Distributed, Redrawn, Stretched, lengths
    from planner.workload import named

    if trace is None and prompts is not None and outputs is not None:
        drawn = lengths(prompts, "--prompt-tokens"), lengths(outputs, "--output-tokens")
        return Distributed(*drawn, seconds or _DRAWN_S, seed)
    if trace is None or prompts is not None or outputs is not None:
        raise BadConfig(
            "expected the requests by --trace, or by both --prompt-tokens and --output-tokens", param="--trace"
        )
    work = named(trace)
    return Redrawn(work, seconds or _DRAWN_S, seed) if is_drawn else Stretched(work, seconds)


def _known(name: str, option: str, known: Mapping[str, Machine]) -> Machine:
    if name not in known:
        raise BadConfig(f"{option} names the machine {quoted(name)}, expected one of {', '.join(known)}", param=option)
    return known[name]


def _pair(text: str, known: Mapping[str, Machine]) -> tuple[Machine, Machine]:
    prompt, _, token = text.partition(":")
    return _known(prompt, "--pair", known), _known(token, "--pair", known)


def _limits(
    known: Mapping[str, Machine],
    max_cost: str | None,
    max_power: str | None,
    counts: tuple[str, str, str],
    prompt_step: int,
) -> Limits:
    from planner.search.question import Limits

    machines, prompts, tokens = map(range_of, counts, ("--count", "--prompt-count", "--token-count"))
    return Limits(
        _budget(max_cost, "--max-cost", {name: each.machine_dollars_per_hour for name, each in known.items()}),
        _budget(max_power, "--max-power", {name: each.power_units for name, each in known.items()}),
        machines,
        prompts,
        tokens,
        prompt_step=prompt_step,
    )


def _budget(text: str | None, option: str, prices: Mapping[str, float]) -> float | None:
    """A number, or the price of so many machines."""
    if text is None:
        return None
    name, _, number = text.rpartition(":")
    try:
        budget = float(number) * prices[name] if name else float(number)
    except (KeyError, ValueError):
        budget = 0.0
    if not 0 < budget < float("inf"):
        raise BadConfig(
            f"{option} is {quoted(text)}, expected a number above 0, or a machine and a number of them, such as "
            f"h100-80gb:40, of {', '.join(prices)}",
            param=option,
        )
    return budget


def _searched(question: Question, workers: int) -> Plan:
    """With a bar on a terminal."""
    from planner.search import plan as planning

    console = Console(stderr=True)
    with Progress(
        TextColumn("columns of the grid"), BarColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        console=console, transient=True, disable=not console.is_terminal,
    ) as bar:  # fmt: skip
        task = bar.add_task("", total=planning.num_parts(question))
        return planning.search(question, workers, lambda parts: bar.advance(task, parts))


def _show_plan(plan: Plan, end: str) -> None:
    from planner.search import report

    console, question, best = wide_console(), plan.question, plan.best
    head = f"profile {question.profile.value} · {question.model.name} with TP {question.tensor_parallel} · "
    asked = "highest rate" if question.rate is None else f"least {question.goal.value} at {question.rate:g} a second"
    console.print(head + question.source.name, markup=False, highlight=False, soft_wrap=True)
    table = Table(*report.COLUMNS, title=f"{asked}, by kind of design", title_justify="left")
    for answer, row in zip(plan.answers, report.rows(plan), strict=True):
        table.add_row(*row, style="bold" if answer is best else None)
    console.print(table)
    console.print(plan.verdict, markup=False, highlight=False, soft_wrap=True)
    for warning in report.warnings(plan):
        warn(warning)
    console.print(end, markup=False, highlight=False, soft_wrap=True)
