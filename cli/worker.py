"""`baton worker`: one worker, by its options and its file."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from baton.address import parse_address
from baton.settings import Given, build, setting
from cli import preflight
from cli.launch import cores, model_source
from cli.launch.process import die_with, end_on_sigterm, log_to_stderr
from cli.options import Options
from worker.config import WorkerConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOptions:
    """Of the command alone."""

    model: str = field(metadata=setting("--model", "A Hugging Face folder or hub id.", short="-m"))
    revision: str = field(default="", metadata=model_source.REVISION)
    cpus: str = field(
        default="all",
        metadata=setting("--cpus", "CPUs to compute on, such as 0-3,8. all: no binding.", metavar="all|LIST"),
    )
    die_with_parent: int = field(
        default=0, metadata=setting("--die-with-parent", least=0, is_key=False, is_hidden=True)
    )


OPTIONS = Options(("", WorkerOptions), ("", WorkerConfig))


@OPTIONS.taken
def worker(given: Mapping[str, Given]) -> None:
    """Run one worker: a model replica that computes prompts, generates tokens, or both.

    SIGTERM drains it: nothing new, what runs may end, exit code 0. A second one stops it at once.
    """
    end_on_sigterm()
    options = build(WorkerOptions, given)
    if options.die_with_parent:
        die_with(options.die_with_parent)
    preflight.worker_packages()
    from worker.worker import serve

    log_to_stderr()
    if options.cpus not in ("auto", "all"):
        # Before torch is loaded, whose threads are as many as it finds CPUs.
        cores.bind(cores.parse(options.cpus, "--cpus"), "--cpus")
    preflight.one_kv_size(given)
    folder = model_source.resolve(options.model, options.revision)
    preflight.model_files(folder)
    # One line of JSON with the address on standard output, which a process that asked for any port reads.
    ready_fd = None if options.die_with_parent else os.dup(1)
    own = {"model": Given(folder, "--model"), "ready_fd": Given(ready_fd, "")}
    config = build(WorkerConfig, {**given, **own})
    config.faults.plan()  # Read again when the node's name is known; one that is wrong is refused now.
    config = replace(config, tokenizer=model_source.tokenizer_folder(config.tokenizer))
    if not config.model_name:
        config = replace(config, model_name=model_source.name_of(options.model))
    preflight.certificates(config.access)
    preflight.hardware(config.engine.kernels, config.transfer)
    if config.engine.device == "cpu" or not preflight.has_gpu():
        preflight.host_cache(folder, config.engine, 1)
    host, port = parse_address(config.listen, "--listen")
    wanted = [("--listen", host, port)]
    if config.metrics_port is not None:
        wanted.append(("--metrics-port", host, config.metrics_port))
    # Held from now on: loading takes long, and a port that another process has is worth knowing before.
    with preflight.reserved_ports(wanted):
        has_ended = asyncio.run(serve(config))
    if not has_ended:
        # A thread of the model still computes; at exit Python would wait for it, or torch crash under it.
        logging.shutdown()
        os._exit(0)
