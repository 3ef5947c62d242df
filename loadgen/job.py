"""One call of `baton bench serve`: which servers, which loads; measures, shows, writes."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from baton.errors import BadConfig, Unavailable, quoted
from loadgen import machine, report
from loadgen.client import Asking, Server, model_of
from loadgen.compare import Comparison, Measured, Schedule, Target, alone_load, compare, uncontended
from loadgen.figures import Figures, write_csv
from loadgen.objectives import Limits
from loadgen.plan import Plan

_NAMED = re.compile(r"(?:([^=/]+)=)?(https?://.*)", re.DOTALL)
_CALL_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """``urls``: ``URL`` or ``NAME=URL``. ``model``: empty for the first one that a server lists."""

    urls: tuple[str, ...]
    plan: Plan
    model: str = ""
    headers: Mapping[str, str]
    extra: Mapping[str, Any]
    rounds: int = 1
    limits: Limits
    # Whether single requests are measured first, for the nine objectives.
    has_alone: bool = True

    async def run(self, console: Console) -> Comparison:
        """Raises BadConfig for what cannot be sent, before anything is, and Unavailable."""
        loads = self.plan.loads()
        named = named_servers(self.urls)
        targets = tuple([await self._target(name, server) for name, server in named.items()])
        with report.Shown(console) as shown:
            alone = None
            if self.has_alone:
                load = alone_load([request for load in loads for request in load.requests])
                alone = await uncontended(targets[0], load, self.plan.seed, shown.watching(targets[0], load))

            def figures(run: Measured) -> Figures:
                return Figures.of(run.outcome, alone, self.limits)

            schedule = Schedule(self.plan.loads, self.rounds, self.plan.seed)
            runs = await compare(targets, schedule, shown.told(figures), shown.watching)
        return Comparison(targets, alone, self.limits, runs)

    async def _target(self, name: str, server: Server) -> Target:
        try:
            async with asyncio.timeout(_CALL_S):
                model = self.model or await model_of(server, self.headers)
        except (OSError, TimeoutError) as error:
            raise Unavailable(f"{name}: no answer to GET /v1/models: {str(error) or 'it took too long'}") from error
        return Target(name, server, Asking(model, self.headers, self.extra))


def named_servers(urls: Sequence[str]) -> dict[str, Server]:
    """Raises BadConfig."""
    if not urls:
        raise BadConfig("nothing to measure: give --url http://HOST:PORT", param="--url")
    named: dict[str, Server] = {}
    for text in urls:
        if (found := _NAMED.fullmatch(text)) is None:
            expected = "expected http://HOST:PORT or NAME=http://HOST:PORT"
            raise BadConfig(f"--url is {quoted(text)}, {expected}", param="--url")
        name = found[1] or found[2]
        if name in named:
            raise BadConfig(f"--url: two servers are called {quoted(name)}, expected different names", param="--url")
        named[name] = Server.parse(found[2])
    return named


def headers_of(given: Sequence[str], api_key: str) -> dict[str, str]:
    """From ``NAME:VALUE``; with the first of the keys, if any, as a bearer token. Raises BadConfig."""
    keys = api_key.split()
    headers = {"Authorization": f"Bearer {keys[0]}"} if keys else {}
    for text in given:
        name, colon, value = (part.strip() for part in text.partition(":"))
        if not colon or not name or not (name + value).isprintable() or not text.isascii():
            raise BadConfig(f"--header is {quoted(text)}, expected NAME:VALUE in printable ASCII", param="--header")
        headers[name] = value
    return headers


def extra_of(text: str) -> dict[str, Any]:
    """Fields of a request's body, from JSON. Raises BadConfig."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise BadConfig(f"--extra is no JSON: {error}", param="--extra") from error
    if not isinstance(found, dict):
        raise BadConfig(f"--extra is {quoted(text)}, expected a JSON object", param="--extra")
    return found


def perform(job: Job, console: Console, output: Path | None, csv: Path | None) -> None:
    """Runs it, prints its table, and writes its files."""
    began = datetime.now(UTC)
    comparison = asyncio.run(job.run(console))
    console.print(report.table(comparison))
    if output is not None:
        facts = {"date": began.isoformat(timespec="seconds"), "machine": machine.machine()}
        record = {**facts, "versions": machine.versions(), **comparison.as_json()}
        output.write_text(json.dumps(record, indent=1) + "\n")
    if csv is not None:
        write_csv(csv, {f"{run.target}, {run.load}, round {run.round}": run.outcome for run in comparison.runs})
