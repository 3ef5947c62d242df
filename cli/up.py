"""`baton up`: a local cluster, by its options and its file, until Ctrl-C."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import typer
from rich.console import Console

from baton.errors import BadConfig
from baton.settings import Given, build
from cli import preflight
from cli.launch import cluster
from cli.launch.options import ClusterOptions
from cli.options import Options, under
from cli.usage import UsageError, explain, program
from router.config import RouterConfig
from worker.config import WorkerConfig

OPTIONS = Options(("", ClusterOptions), ("worker.", WorkerConfig), ("router.", RouterConfig), positional="model")


def options_of(given: Mapping[str, Given]) -> ClusterOptions:
    options = build(ClusterOptions, given)
    return replace(options, worker=under("worker.", given), router=under("router.", given))


def parsed(words: Sequence[str]) -> ClusterOptions:
    """What `baton up` takes these options for; nothing is started. Raises BadConfig."""
    found: list[Mapping[str, Given]] = []
    app = typer.Typer(add_completion=False)
    app.command()(OPTIONS.taken(found.append))
    try:
        app(list(words), prog_name="baton up", standalone_mode=False)
    except UsageError as error:
        raise BadConfig(f"options of the cluster: {explain(error)}", param="--cluster") from error
    return options_of(found[0])


@OPTIONS.taken
def up(given: Mapping[str, Given]) -> None:
    """Run a cluster on this machine until Ctrl-C or SIGTERM."""
    preflight.worker_packages()
    options = options_of(given)
    console = Console(stderr=True, soft_wrap=True)
    has_keys = "api_keys" in options.router
    is_first = True

    def on_ready(routers: Sequence[cluster.Endpoints], stop: Callable[[], None]) -> None:
        nonlocal is_first
        if is_first:
            is_first = False
            endpoints, *others = routers
            console.print(f"ready: OpenAI API at {endpoints.http}/v1, gRPC at {endpoints.grpc}; Ctrl-C stops it")
            for other in others:
                console.print(f"another router: OpenAI API at {other.http}/v1, gRPC at {other.grpc}")
            console.print(f"status page: {endpoints.http}/status", highlight=False)
            key = "--api-key KEY " if has_keys else ""
            where = ", where KEY is one of those given with --api-key" if has_keys else ""
            command = f'{program()} generate --router {endpoints.grpc} {key}--relay "Once upon a time"'
            trusts = f"BATON_TLS_CA={options.access.tls_ca} " if options.access.tls_ca is not None else ""
            console.print(f"try: {trusts}{command}{where}", highlight=False, markup=False)

    def on_start() -> None:
        workers = ", ".join(node_id for node_id, _ in options.worker_roles())
        routers = "the router" if options.num_routers == 1 else f"{options.num_routers} routers"
        console.print(f"starting {routers} and {workers} with {options.model}", markup=False)

    asyncio.run(cluster.up(options, lambda message: console.print(message, markup=False), on_ready, on_start))
