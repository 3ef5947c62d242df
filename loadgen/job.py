"""One call of `baton bench serve`: which servers, which loads; measures, shows, writes."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console

from baton.api_keys import secret_of
from baton.errors import BadConfig, Unavailable, quoted
from loadgen import machine, report
from loadgen.client import Asking, Server, model_of
from loadgen.clusters import Shape, all_started
from loadgen.compare import Comparison, Measured, Schedule, Target, alone_load, compare, uncontended
from loadgen.figures import Figures, write_csv
from loadgen.objectives import Limits
from loadgen.pictures import against_load
from loadgen.plan import Plan

_NAMED = re.compile(r"(?:([^=/]+)=)?(https?://.*)", re.DOTALL)
_CALL_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """``urls``: ``URL`` or ``NAME=URL`` of running servers. ``shapes``: clusters to start with the model ``model``;
    without any, ``model`` is the name that requests carry, empty for the first that a server lists."""

    plan: Plan
    headers: Mapping[str, str]
    extra: Mapping[str, Any]
    limits: Limits
    urls: tuple[str, ...] = ()
    shapes: tuple[Shape, ...] = ()
    model: str = ""
    rounds: int = 1
    # The time for all rounds, from when the servers stand; None: as long as it takes.
    minutes: float | None = None
    # Whether single requests are measured first, for the nine objectives.
    has_alone: bool = True
    # Of https:// servers, as in Server.
    tls_ca: Path | None = None
    tls_name: str = ""

    def __post_init__(self) -> None:
        if not self.urls and not self.shapes:
            raise BadConfig("nothing to measure: give --url http://HOST:PORT, or --cluster and --model", param="--url")
        if self.shapes and not self.model:
            raise BadConfig("--cluster needs --model, a Hugging Face folder or hub id", param="--model")
        names = [*named_servers(self.urls), *(shape.name for shape in self.shapes)]
        if twice := [name for name in names if names.count(name) > 1]:
            raise BadConfig(f"two servers are called {quoted(twice[0])}, expected different names", param="--cluster")

    async def run(self, console: Console) -> Comparison:
        """Raises BadConfig for what cannot be sent, before anything is, and Unavailable."""
        self.plan.loads()
        named = named_servers(self.urls, self.tls_ca, self.tls_name)
        async with AsyncExitStack() as stack:
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="baton-bench-")))
            for shape in self.shapes:
                console.print(f"starting {shape.name}: {shlex.join(shape.options)}", markup=False, highlight=False)
            clusters = await stack.enter_async_context(all_started(self.shapes, self.model, folder))
            targets = [await self._target(name, server, {}) for name, server in named.items()]
            for cluster in clusters:
                about = {"options": shlex.join(cluster.shape.options)}
                server = Server.parse(cluster.http, self.tls_ca, self.tls_name)
                targets.append(await self._target(cluster.shape.name, server, about))
            return await self.measure(tuple(targets), console)

    async def measure(self, targets: tuple[Target, ...], console: Console) -> Comparison:
        """All rounds on servers that stand. Raises Unavailable."""
        until_s = None if self.minutes is None else time.monotonic() + self.minutes * 60
        with report.Shown(console) as shown:
            alone = None
            if self.has_alone:
                load = alone_load([request for load in self.plan.loads() for request in load.requests])
                alone = await uncontended(targets[0], load, self.plan.seed, shown.watching(targets[0], load))

            def figures(run: Measured) -> Figures:
                return Figures.of(run.outcome, alone, self.limits)

            schedule = Schedule(self.plan.loads, self.rounds, self.plan.seed, until_s)
            runs = await compare(targets, schedule, shown.told(figures), shown.watching)
        return Comparison(targets, alone, self.limits, runs)

    async def _target(self, name: str, server: Server, about: Mapping[str, str]) -> Target:
        try:
            async with asyncio.timeout(_CALL_S):
                own = "" if self.shapes else self.model
                model = own or await model_of(server, self.headers)
        except (OSError, TimeoutError) as error:
            raise Unavailable(f"{name}: no answer to GET /v1/models: {str(error) or 'it took too long'}") from error
        return Target(name, server, Asking(model, self.headers, self.extra), about)


def named_servers(urls: Sequence[str], tls_ca: Path | None = None, tls_name: str = "") -> dict[str, Server]:
    """Raises BadConfig."""
    named: dict[str, Server] = {}
    for text in urls:
        if (found := _NAMED.fullmatch(text)) is None:
            expected = "expected http://HOST:PORT or NAME=http://HOST:PORT"
            raise BadConfig(f"--url is {quoted(text)}, {expected}", param="--url")
        name = found[1] or found[2]
        if name in named:
            raise BadConfig(f"--url: two servers are called {quoted(name)}, expected different names", param="--url")
        named[name] = Server.parse(found[2], tls_ca, tls_name)
    return named


def headers_of(given: Sequence[str], api_key: str) -> dict[str, str]:
    """From ``NAME:VALUE``; with the first of the keys, if any, as a bearer token. Raises BadConfig."""
    secret = secret_of(api_key)
    headers = {"Authorization": f"Bearer {secret}"} if secret else {}
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


def perform(job: Job, console: Console, output: Path | None, csv: Path | None, picture: Path | None) -> None:
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
    if picture is not None:
        picture.write_text(against_load(comparison, "Latency and goodput against load"))
