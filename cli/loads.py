"""Options of the commands that send a load: sizes and arrivals, by a trace or all the same."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.options import finite

_MAX_TOKENS = 1_000_000

Trace = Annotated[
    str,
    typer.Option(
        metavar="code|conv|FILE",
        help="Sizes and arrivals of a trace: Azure's coding or conversation service, or a CSV file.",
    ),
]
TraceFrom = Annotated[float, typer.Option(min=0.0, callback=finite, help="Begin at this second of the trace.")]
PromptScale = Annotated[
    float, typer.Option(min=1e-4, max=1e3, callback=finite, help="Factor on a trace's prompt lengths.")
]
OutputScale = Annotated[
    float, typer.Option(min=1e-4, max=1e3, callback=finite, help="Factor on a trace's output lengths.")
]
MaxPrompt = Annotated[int, typer.Option(min=1, max=_MAX_TOKENS, help="Longer prompts of a trace are cut to this.")]
MaxOutput = Annotated[int, typer.Option(min=1, max=_MAX_TOKENS, help="Longer outputs of a trace are cut to this.")]
PromptTokens = Annotated[int, typer.Option(min=1, max=_MAX_TOKENS, help="Without a trace: tokens of every prompt.")]
OutputTokens = Annotated[int, typer.Option(min=1, max=_MAX_TOKENS, help="Without a trace: tokens of every output.")]
Rates = Annotated[
    list[float] | None, typer.Option(help="Open loop: mean requests per second. Repeat it for several loads.")
]
Poisson = Annotated[bool, typer.Option("--poisson", help="With a trace: its sizes, but Poisson arrivals.")]
Requests = Annotated[int, typer.Option(min=1, max=_MAX_TOKENS, help="Requests of each load.")]
Seconds = Annotated[float | None, typer.Option(min=0.001, callback=finite, help="Open loops last this long.")]
Limit = Annotated[
    float,
    typer.Option(
        min=0.0, callback=finite, help="Seconds after the last request is due until open requests are cut off."
    ),
]
Seed = Annotated[str, typer.Option(help="Of prompts and Poisson arrivals.")]
ANY_LENGTH = _MAX_TOKENS
