"""`baton plan validate`: a prediction beside the run of a cluster, as a gate."""

from __future__ import annotations

import asyncio
import json
import math
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from baton.address import parse_address
from baton.errors import BadConfig, quoted
from cli import loads, preflight
from cli.options import path
from cli.planning import warn
from cli.show import wide_console

if TYPE_CHECKING:
    from cli.validate import Validated
    from planner.refit import Change
    from planner.validation import Report, Row


def validate(
    cluster: Annotated[
        str,
        typer.Option(
            metavar="SHAPE [OPTIONS]",
            help="1+2 is 1 prefill and 2 decode workers, 2 is 2 mixed ones; then options of `baton up`. Started here "
            "with --model, or what --router has: its options are simulated too.",
        ),
    ] = "",
    model: Annotated[str, typer.Option("--model", "-m", help="What --cluster serves: a folder or hub id.")] = "",
    router: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="A cluster that runs and is idle, by its router's gRPC API.")
    ] = "",
    times: Annotated[
        Path | None,
        typer.Option(parser=path, metavar="FILE", help="Its profile; without one it is measured first."),
    ] = None,
    trace: loads.Trace = "",
    trace_from: loads.TraceFrom = 0.0,
    prompt_scale: loads.PromptScale = 1.0,
    output_scale: loads.OutputScale = 1.0,
    max_prompt: loads.MaxPrompt = loads.ANY_LENGTH,
    max_output: loads.MaxOutput = loads.ANY_LENGTH,
    prompt_tokens: loads.PromptTokens = 512,
    output_tokens: loads.OutputTokens = 64,
    rate: loads.Rates = None,
    poisson: loads.Poisson = False,
    requests: loads.Requests = 100,
    seconds: loads.Seconds = None,
    limit: loads.Limit = 300.0,
    seed: loads.Seed = "0",
    max_error_p50: Annotated[
        str, typer.Option(metavar="PERCENT", help="Largest error of medians and of throughput.")
    ] = "10%",
    max_error_p99: Annotated[str, typer.Option(metavar="PERCENT", help="Largest error of p90 and p99.")] = "20%",
    refit: Annotated[
        bool, typer.Option("--refit", help="Update the profile with what fits this run better; say what.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", parser=path, metavar="FILE", help="JSON: figures, and every request in both."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    api_key: Annotated[str, typer.Option(envvar="BATON_API_KEY", show_envvar=True, help="A key of the router's.")] = "",
    admin_key: Annotated[
        str, typer.Option(envvar="BATON_ADMIN_KEY", show_envvar=True, help="Its admin key, if it has keys.")
    ] = "",
) -> None:
    """Send a load to a cluster and simulate it; exit code 1 if they differ by more than the limits."""
    if out is not None:
        preflight.writable_file(out, "--out")
    if router:
        parse_address(router, "--router", lowest_port=1)
    if refit and times is None:
        raise BadConfig("--refit updates a profile, expected --times FILE with it", param="--refit")
    from cli.validate import Asked, improved, validated
    from loadgen.clusters import Shape
    from loadgen.plan import Plan
    from loadgen.traces import Scale
    from planner.measured import read, write
    from planner.validation import Limits

    plan = Plan(
        trace=trace, trace_from_s=trace_from, scale=Scale(prompt_scale, output_scale, max_prompt, max_output),
        prompt_tokens=prompt_tokens, output_tokens=output_tokens, rates=tuple(rate or ()), is_poisson=poisson,
        num_requests=requests, seconds=seconds, limit_s=limit, seed=seed,
    )  # fmt: skip
    limits = Limits(_share(max_error_p50, "--max-error-p50"), _share(max_error_p99, "--max-error-p99"))
    asked = Asked(
        shape=Shape.parse(cluster) if cluster else None, plan=plan, limits=limits, model=model, router=router,
        api_key=admin_key or api_key, measured=None if times is None else read(times),
    )  # fmt: skip
    console = Console(quiet=True) if as_json else wide_console()
    began = datetime.now(UTC)
    found = asyncio.run(validated(asked, console))
    show(found, console)
    record = {"date": began.isoformat(timespec="seconds"), **record_of(found)}
    if refit and times is not None:
        after, changes = improved(found, limits)
        if after is not found:
            write(times, after.measured)
        _show_refit(found, after, changes, times, console)
        record["refit"] = {
            "is_written": after is not found,
            "parts": [{**asdict(each), "is_taken": each.is_taken and after is not found} for each in changes],
            "reports": [report.as_json(has_requests=False) for report in after.reports],
        }
    if out is not None:
        out.write_text(json.dumps(record, indent=1) + "\n")
    if as_json:
        typer.echo(json.dumps(record, indent=1))
    # Of the prediction, whatever a refit to the same run makes of it.
    raise typer.Exit(0 if found.is_met else 1)


def _share(text: str, option: str) -> float:
    try:
        value = float(text.strip().removesuffix("%")) / 100
    except ValueError:
        value = math.nan
    if not 0 < value <= 100:
        raise BadConfig(f"{option} is {quoted(text)}, expected a percentage above 0, such as 10%", param=option)
    return value


def record_of(found: Validated) -> dict[str, object]:
    from loadgen import machine

    return {
        "machine": machine.machine(),
        "versions": machine.versions(),
        "model": found.measured.model,
        "options": " ".join(found.words),
        "is_met": found.is_met,
        "reports": [report.as_json() for report in found.reports],
    }


def show(found: Validated, console: Console) -> None:
    for report in found.reports:
        title = f"{report.cluster}: {report.load}, {len(report.pairs)} requests"
        console.print(title, markup=False, highlight=False, soft_wrap=True)
        console.print(_table(report))
        for warning in report.warnings:
            warn(warning)
        console.print(_verdict(report), markup=False, highlight=False, soft_wrap=True)


def _table(report: Report) -> Table:
    table = Table("", "predicted", "measured", "error", "limit", "", box=None)
    for row in report.rows:
        limit = "-" if row.limit is None else f"{row.limit:.0%}"
        error = "-" if row.error is None else f"{row.error:+.1%}"
        name = row.name if row.unit in ("", "s") else f"{row.name}, {row.unit}"
        table.add_row(name, _value(row, row.predicted), _value(row, row.measured), error, limit, row.verdict.value)
    return table


def _value(row: Row, value: float | None) -> str:
    if value is None:
        return "-"
    if row.unit == "s":
        return f"{value:.3f} s" if value >= 1 else f"{1e3 * value:.2f} ms"
    return f"{value:,.2f}" if row.unit else f"{value:,.0f}"


def _verdict(report: Report) -> str:
    from planner.validation import Verdict

    missed, absent = report.having(Verdict.MISSED), report.having(Verdict.NOT_MEASURED)
    text = (
        f"{len(report.having(Verdict.MET))} of {sum(1 for row in report.rows if row.limit is not None)} within limits"
    )
    for name, rows in (("beyond", missed), ("not measured", absent)):
        if rows:
            text += f"; {name}: {', '.join(row.name for row in rows)}"
    return text


def _show_refit(
    before: Validated, after: Validated, changes: tuple[Change, ...], file: Path, console: Console
) -> None:  # fmt: skip
    for each in changes:
        verdict = "taken" if each.is_taken and after is not before else "as before"
        console.print(f"refit: {each.part}: {each.before:.1%} of their time not explained, {each.after:.1%} after: "
                      f"{verdict}", highlight=False)  # fmt: skip
    if after is before:
        console.print(f"{file} is as before: no refit predicts this run better", highlight=False, soft_wrap=True)
        return
    console.print(
        f"{file} is updated: mean error {before.mean_error:.1%} before, {after.mean_error:.1%} after",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip
    show(after, console)
