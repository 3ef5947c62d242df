"""Tables of a comparison, and progress while it runs, on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from loadgen.compare import Comparison, Measured, Target
from loadgen.figures import Figures
from loadgen.load import Load
from loadgen.run import Event, Watch
from loadgen.samples import Percentiles

_HEAD = (
    ("load", "server", "whole", "refused", "errors", "cut", "tokens/s"),
    ("TTFT p50 / p90 / p99 s", "gap p50 / p90 / p99 / max ms", "E2E p50 / p90 / p99 s", "goodput/s", "nine SLOs"),
)


def table(comparison: Comparison) -> Table:
    """A row for each load and server, over all rounds."""
    made = Table(*_HEAD[0], *_HEAD[1])
    for (target, load), figures in sorted(comparison.pooled().items(), key=lambda cell: cell[0][1]):
        made.add_row(load, target, *cells(figures))
    return made


def cells(figures: Figures) -> tuple[str, ...]:
    """The columns of a row behind load and server."""
    goodput = figures.tolerable_requests_s if figures.goodput_requests_s is None else figures.goodput_requests_s
    return (
        f"{figures.whole}/{figures.requests}", str(figures.refused), str(figures.errors), str(figures.cut),
        f"{figures.tokens_s:.1f}", _spread(figures.ttft_s), _spread(figures.gap_s, 1e3, with_max=True),
        _spread(figures.e2e_s), "-" if goodput is None else f"{goodput:.2f}", verdict(figures),
    )  # fmt: skip


def verdict(figures: Figures) -> str:
    """``met``, or which of the nine are not, or ``-`` if they were not looked at."""
    if figures.meets_nine is None:
        return "-"
    missed = [f"{v.figure} p{v.percentile * 100:.0f} {v.found:.2f}x" for v in figures.nine if not v.is_met]
    return "met" if figures.meets_nine else ", ".join(missed) or "requests are missing"


def _spread(of: Percentiles, factor: float = 1.0, *, with_max: bool = False) -> str:
    values = (of.p50, of.p90, of.p99, *((of.max,) if with_max else ()))
    digits = 2 if factor == 1.0 else 0
    return " / ".join("-" if value is None else f"{value * factor:.{digits}f}" for value in values)


class Shown:
    """A bar for the run at hand, and a line for each that is done; without a terminal, lines alone."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TextColumn("{task.fields[open]} in flight"), TimeElapsedColumn(),
            console=console, transient=True, disable=not console.is_terminal,
        )  # fmt: skip

    def __enter__(self) -> Shown:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def watching(self, target: Target, load: Load) -> Watch:
        for old in self._bar.task_ids:
            self._bar.remove_task(old)
        task = self._bar.add_task(f"{target.name}: {load.name}", total=len(load.requests), open=0)
        num_open = 0

        def watch(event: Event) -> None:
            nonlocal num_open
            num_open += 1 if event is Event.SENT else -1
            self._bar.update(task, advance=int(event is Event.ANSWERED), open=num_open)

        return watch

    def told(self, figures: Callable[[Measured], Figures]) -> Callable[[Measured], None]:
        def tell(run: Measured) -> None:
            found = figures(run)
            lost = f", {found.errors} errors ({found.first_error})" if found.errors else ""
            self._console.print(
                f"round {run.round}  {run.load}  {run.target}: {found.whole} of {found.requests} requests, "
                f"{found.tokens_s:.1f} tokens/s, TTFT p50 / p90 / p99 {_spread(found.ttft_s)} s, "
                f"gap p50 / p99 / max {_gaps(found.gap_s)} ms, {found.refused} refused, {found.cut} cut off{lost}",
                markup=False, highlight=False, soft_wrap=True,
            )  # fmt: skip

        return tell


def _gaps(of: Percentiles) -> str:
    return " / ".join("-" if value is None else f"{value * 1e3:.0f}" for value in (of.p50, of.p99, of.max))


def counters_table(comparison: Comparison, names: Mapping[str, str]) -> Table:
    """Sums over all rounds of the counters whose names begin with a key of ``names``, which gives their headings."""
    made = Table("load", "server", *names.values())
    sums: dict[tuple[str, str], dict[str, float]] = {}
    for run in comparison.runs:
        cell = sums.setdefault((run.load, run.target), {})
        for name in names:
            cell[name] = cell.get(name, 0.0) + sum(v for key, v in run.counted.items() if key.startswith(name))
    for (load, target), found in sorted(sums.items()):
        made.add_row(load, target, *(f"{found[name]:,.0f}" for name in names))
    return made
