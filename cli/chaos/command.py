"""`baton chaos`: its options, which are those of `baton up` and its own."""

from __future__ import annotations

from collections.abc import Mapping

import typer

from baton.settings import Given, build
from cli import preflight, up
from cli.chaos.options import ChaosOptions
from cli.launch.options import ClusterOptions
from cli.options import Options
from cli.show import wide_console
from router.config import RouterConfig
from worker.config import WorkerConfig

OPTIONS = Options(
    ("", ChaosOptions), ("", ClusterOptions), ("worker.", WorkerConfig), ("router.", RouterConfig), positional="model"
)
_WORKERS = ("num_prefill", "num_decode", "num_mixed")
_DEMO_KV_BYTES = 256 << 20


@OPTIONS.taken
def chaos(given: Mapping[str, Given]) -> None:
    """Break a cluster on purpose under load, and compare every token with an undisturbed run.

    Exit code 1 if a token was wrong, repeated or lost, a request had no outcome, or a block did not come back.
    """
    preflight.worker_packages()
    from cli import demo
    from cli.chaos import run as experiment

    options = build(ChaosOptions, given)
    default: dict[str, object] = {"http_port": 0, "grpc_port": 0}
    if not any(name in given for name in _WORKERS):
        default |= {"num_prefill": 2, "num_decode": 2}
    if "num_routers" not in given:
        default["num_routers"] = 2
    if not options.model:
        default["model"] = str(demo.default_model())
        if "worker.engine.num_blocks" not in given:
            default["worker.engine.kv_bytes"] = _DEMO_KV_BYTES
    cluster = up.options_of({**{name: Given(value, "") for name, value in default.items()}, **given})
    passed = experiment.run(options, cluster, experiment.folder_of(options), wide_console())
    raise typer.Exit(0 if passed else 1)
