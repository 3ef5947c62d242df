"""`baton bench serve`: sends load to a running server and reports latency and goodput."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli import loads, preflight
from cli.environment import trust
from cli.options import finite, path
from cli.show import wide_console
from cli.usage import Commands

app = typer.Typer(cls=Commands, help="Measure a running server.")

_MAX_ROUNDS = 1000


@app.callback()
def _bench() -> None:
    """Typer would take the only command for the whole app."""


@app.command()
def serve(
    url: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]URL", help="A server to measure; repeat it to measure several in turn."),
    ] = None,
    cluster: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]SHAPE [OPTIONS]",
            help="A cluster to start and measure: 1+2 is 1 prefill and 2 decode workers, 2 is 2 mixed ones; then "
            "options of `baton up`.",
        ),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            "--model", "-m", help="What --cluster serves; of a --url the name, by default the first it lists."
        ),
    ] = "",
    trace: loads.Trace = "",
    trace_from: loads.TraceFrom = 0.0,
    prompt_scale: loads.PromptScale = 1.0,
    output_scale: loads.OutputScale = 1.0,
    max_prompt: loads.MaxPrompt = loads.ANY_LENGTH,
    max_output: loads.MaxOutput = loads.ANY_LENGTH,
    prompt_tokens: loads.PromptTokens = 512,
    output_tokens: loads.OutputTokens = 64,
    rate: loads.Rates = None,
    streams: Annotated[
        list[int] | None, typer.Option(help="Closed loop: requests in flight. Repeat it for several loads.")
    ] = None,
    poisson: loads.Poisson = False,
    requests: loads.Requests = 100,
    seconds: loads.Seconds = None,
    limit: loads.Limit = 300.0,
    rounds: Annotated[int, typer.Option(min=1, max=_MAX_ROUNDS, help="Times that every load is run.")] = 1,
    minutes: Annotated[
        float | None, typer.Option(min=0.01, callback=finite, help="Begin no run that would end later than this.")
    ] = None,
    seed: loads.Seed = "0",
    slo_ttft_ms: Annotated[
        float | None, typer.Option(min=0.0, callback=finite, help="Goodput counts requests whose TTFT is within it.")
    ] = None,
    slo_tbt_ms: Annotated[
        float | None, typer.Option(min=0.0, callback=finite, help="And whose mean time between tokens is within it.")
    ] = None,
    alone: Annotated[bool, typer.Option(help="Measure single requests first; the nine SLOs compare with them.")] = True,
    header: Annotated[
        list[str] | None, typer.Option(metavar="NAME:VALUE", help="Of every request, such as x-slo-ttft-ms:500.")
    ] = None,
    extra: Annotated[
        str, typer.Option(metavar="JSON", help="Fields of every request's body; null takes out one of ours.")
    ] = "{}",
    api_key: Annotated[str, typer.Option(envvar="BATON_API_KEY", show_envvar=True, help="A key of the servers'.")] = "",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", parser=path, metavar="FILE", help="JSON: figures and every request."),
    ] = None,
    csv: Annotated[Path | None, typer.Option(parser=path, metavar="FILE", help="CSV: a line for each request.")] = None,
    picture: Annotated[
        Path | None, typer.Option(parser=path, metavar="FILE", help="SVG: latency and goodput against rate.")
    ] = None,
) -> None:
    """Send requests to OpenAI-compatible servers by a trace, at a rate or in a closed loop; report latency."""
    for file, option in ((output, "--output"), (csv, "--csv"), (picture, "--picture")):
        if file is not None:
            preflight.writable_file(file, option)
    from loadgen.clusters import Shape
    from loadgen.job import Job, extra_of, headers_of, perform
    from loadgen.objectives import Limits
    from loadgen.plan import Plan
    from loadgen.traces import Scale

    scale = Scale(prompt_scale, output_scale, max_prompt, max_output)
    plan = Plan(
        trace=trace, trace_from_s=trace_from, scale=scale, prompt_tokens=prompt_tokens, output_tokens=output_tokens,
        rates=tuple(rate or ()), streams=tuple(streams or ()), is_poisson=poisson, num_requests=requests,
        seconds=seconds, limit_s=limit, seed=seed,
    )  # fmt: skip
    limits = Limits(*(None if ms is None else ms / 1e3 for ms in (slo_ttft_ms, slo_tbt_ms)))
    job = Job(
        urls=tuple(url or ()), shapes=tuple(map(Shape.parse, cluster or ())), plan=plan, model=model,
        headers=headers_of(header or (), api_key), extra=extra_of(extra), rounds=rounds, minutes=minutes,
        limits=limits, has_alone=alone, **trust(),
    )  # fmt: skip
    perform(job, wide_console(), output, csv, picture)
