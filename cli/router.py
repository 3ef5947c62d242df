"""`baton router`: the router, by its options and its file."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from baton.address import join_address, parse_address
from baton.settings import Given, build, setting
from cli import preflight
from cli.launch import model_source
from cli.launch.process import die_with, end_on_sigterm, log_to_stderr
from cli.options import Options
from router.config import GRPC_PORT, HTTP_PORT, RouterConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterOptions:
    """Of the command alone."""

    model: str = field(metadata=setting("--model", "A Hugging Face folder or hub id.", short="-m"))
    revision: str = field(default="", metadata=model_source.REVISION)
    http: str = field(default=f"127.0.0.1:{HTTP_PORT}", metadata=setting("--http", "host:port of the OpenAI API."))
    grpc: str = field(default=f"127.0.0.1:{GRPC_PORT}", metadata=setting("--grpc", "host:port of the gRPC API."))
    die_with_parent: int = field(
        default=0, metadata=setting("--die-with-parent", least=0, is_key=False, is_hidden=True)
    )


OPTIONS = Options(("", RouterOptions), ("", RouterConfig))


@OPTIONS.taken
def router(given: Mapping[str, Given]) -> None:
    """Run the router: picks the pair of nodes for each request and answers the clients."""
    end_on_sigterm()
    options = build(RouterOptions, given)
    if options.die_with_parent:
        die_with(options.die_with_parent)
    from router.serve import serve

    log_to_stderr()
    http_host, http_port = parse_address(options.http, "--http")
    grpc_host, grpc_port = parse_address(options.grpc, "--grpc")
    config = build(RouterConfig, given)
    config.faults.plan()  # Read again when the router is built; one that is wrong is refused now.
    config = replace(
        config,
        tokenizer=model_source.tokenizer_folder(config.tokenizer),
        http_host=http_host,
        http_port=http_port,
        grpc_host=join_address(grpc_host, 0).removesuffix(":0"),
        grpc_port=grpc_port,
        model_folder=model_source.resolve(options.model, options.revision),
    )
    preflight.certificates(config.access)
    if not config.model_names:
        config = replace(config, model_names=(model_source.name_of(options.model),))

    async def run() -> None:
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await serve(config, stop)

    with preflight.reserved_ports([("--http", http_host, http_port), ("--grpc", grpc_host, grpc_port)]):
        asyncio.run(run())
