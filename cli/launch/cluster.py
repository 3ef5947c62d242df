"""`baton up`: turns options into the commands and probes of a local cluster, and runs it until told to stop."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from baton.access import CLUSTER_KEY_VARIABLE, AccessConfig, is_loopback
from baton.address import join_address
from baton.api_keys import ApiKey
from baton.channels import dial
from baton.clock import MonotonicClock
from baton.errors import BadConfig
from baton.ready import write_json_atomically
from baton.settings import Given, difference, keys
from baton.types import Role
from baton.v1 import node_pb2, node_pb2_grpc, router_pb2, router_pb2_grpc
from cli import preflight
from cli.launch import cores, model_source, placement
from cli.launch.launcher import Launcher, Program
from cli.launch.options import ROUTER, ClusterOptions
from cli.launch.placement import Place
from engine.config import EngineConfig
from engine.devices import TorchDevices
from engine.memory import shown
from router.config import RouterConfig
from worker.config import WorkerConfig

_PROBE_INTERVAL_S = 0.05
_CALL_TIMEOUT_S = 5.0
_MAX_NAMED = 5
_API_KEY = "BATON_API_KEY"
_ADMIN_KEY = "BATON_ADMIN_KEY"
# In the folder of the logs, while the cluster runs.
CLUSTER_KEY_FILE, ADMIN_KEY_FILE = "cluster.key", "admin.key"
# A worker needs seconds to load; the defaults would have us look again only every 1.6, 2.6, ... seconds.
_EAGER_RECONNECT = (
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 200),
)


@dataclass(frozen=True, slots=True)
class _Worker:
    node_id: str
    role: str
    address: str
    metrics: str
    program: Program


@dataclass(frozen=True, slots=True)
class Endpoints:
    http: str
    grpc: str


async def up(  # noqa: C901 - what a cluster is made of, in order
    options: ClusterOptions,
    say: Callable[[str], None],
    on_ready: Callable[[Sequence[Endpoints], Callable[[], None]], None],
    on_start: Callable[[], None] = lambda: None,
) -> None:
    """Runs the cluster until SIGTERM or SIGINT; then nothing of it is left. Raises BadConfig before anything starts
    (``on_start`` is called then), ClusterFailed if it cannot go on.

    ``on_ready`` is called whenever all is ready (again), with each router's addresses and a function that stops the
    cluster.
    """
    options = with_keys(options)
    folder = model_source.resolve(options.model, options.revision)
    # The clock is another's if one was named: then it says when faults begin.
    begins_faults = options.faults.file is not None and options.faults.clock is None
    options = replace(options, faults=options.faults.of_run())
    preflight.one_kv_size(options.worker)
    common = options.worker_config(folder)
    preflight.certificates(common.access)
    preflight.hardware(common.engine.kernels, common.transfer)
    preflight.model_files(folder)
    names = [node_id for node_id, _ in options.worker_roles()]
    places = _places(options, common.engine.kernels, len(names))
    if not places[0].is_gpu:
        # Known now, for all of them: each alone would take what the others find free.
        layout = preflight.host_cache(folder, common.engine, len(names))
        common = replace(common, engine=replace(common.engine, num_blocks=layout.num_blocks, kv_bytes=None))
        facts = [f"each worker: {shown(layout)}"]
    else:
        facts = list(placement.described(names, places, common.engine.gpu_memory_utilization))
    if options.faults.file is not None:
        facts.append(f"faults strike as {options.faults.file} says; they are written to {options.faults.folder}")
        if strangers := options.faults.plan().strangers((*names, *options.router_names)):
            facts.append(f"no process here is called {', '.join(strangers[:_MAX_NAMED])}: such faults strike nothing")
    if options.ready_file is not None:
        preflight.replaceable_file(options.ready_file, "--ready-file")
    with ExitStack() as resources:

        def reserved(option: str, port: int = 0) -> int:
            return resources.enter_context(preflight.reserved_port(options.host, port, option))

        def endpoints(number: int) -> Endpoints:
            asked = {"--http-port": options.http_port, "--grpc-port": options.grpc_port}
            http, grpc_ = (
                join_address(options.host, reserved(option, port and port + number)) for option, port in asked.items()
            )
            return Endpoints(f"{'http' if options.access.tls_cert is None else 'https'}://{http}", grpc_)

        faces = [endpoints(number) for number in range(options.num_routers)]
        workers = [
            _worker(options, common, node_id, role, place, reserved("--host"), reserved("--host"))
            for (node_id, role), place in zip(options.worker_roles(), places, strict=True)
        ]
        router_config = options.router_config(folder, [worker.address for worker in workers])
        await _check_router(router_config, folder)
        log_dir = resources.enter_context(_run_directory(options.log_dir))
        key_files = resources.enter_context(_key_files(log_dir, router_config))
        if options.ready_file is not None:
            options.ready_file.unlink(missing_ok=True)
        on_start()
        for fact in (*facts, *_about_keys(key_files)):
            say(fact)
        routers = [
            _router(name, replace(router_config, router_id=_router_id(router_config, name)), folder, face, len(workers))
            for name, face in zip(options.router_names, faces, strict=True)
        ]

        def announce(pids: Mapping[str, int]) -> None:
            nonlocal begins_faults
            if begins_faults:
                begins_faults = False
                options.faults.begin(clock.now())
            if options.ready_file is not None:
                content = _ready_content(dict(zip(options.router_names, faces, strict=True)), workers, pids, key_files)
                write_json_atomically(options.ready_file, content)
            on_ready(faces, launcher.stop)

        clock = MonotonicClock()
        launcher = Launcher(
            routers,
            [worker.program for worker in workers],
            log_dir=log_dir,
            environment=_environment(options),
            clock=clock,
            config=options.supervise,
            say=say,
            announce=announce,
        )
        try:
            await launcher.run()
        finally:
            if options.ready_file is not None:
                options.ready_file.unlink(missing_ok=True)


def with_keys(options: ClusterOptions) -> ClusterOptions:
    """With a cluster key of its own, unless its processes know each other by what was given; and an admin key where
    clients have keys or come from other machines, unless one was given."""
    if options.access.is_open:
        options = replace(options, access=replace(options.access, cluster_key=secrets.token_hex(32)))
    has_strangers = "api_keys" in options.router or not is_loopback(options.host)
    if has_strangers and "admin_key" not in options.router and not options.access.allow_open:
        made = Given(secrets.token_hex(32), "--admin-key")
        options = replace(options, router={**options.router, "admin_key": made})
    return options


@contextmanager
def kept_secret(file: Path, secret: str) -> Iterator[Path | None]:
    """The secret in a file that no other user can read, for the duration of the block; no file if there is none."""
    if not secret:
        yield None
        return
    # Not what lies there: it may be another user's, or a link.
    file.unlink(missing_ok=True)
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as opened:
        opened.write(f"{secret}\n")
    try:
        yield file
    finally:
        file.unlink(missing_ok=True)


@contextmanager
def _key_files(folder: Path, config: RouterConfig) -> Iterator[Mapping[str, Path | None]]:
    """Where the cluster's and the operators' keys are while it runs, by their names in the ready file."""
    with (
        kept_secret(folder / CLUSTER_KEY_FILE, config.access.cluster_key) as cluster,
        kept_secret(folder / ADMIN_KEY_FILE, config.admin_key) as admin,
    ):
        yield {"cluster_key_file": cluster, "admin_key_file": admin}


def _about_keys(files: Mapping[str, Path | None]) -> list[str]:
    admin = files["admin_key_file"]
    return [] if admin is None else [f"admin key, for BATON_ADMIN_KEY: {admin}"]


@contextmanager
def _run_directory(wanted: Path | None) -> Iterator[Path]:
    """Where children log: the folder asked for, which stays, or a temporary one, which goes."""
    if wanted is not None:
        preflight.writable_folder(wanted, "--log-dir")
        yield wanted
        return
    try:
        folder = Path(tempfile.mkdtemp(prefix="baton-"))
    except OSError as error:
        raise BadConfig(
            f"no folder for logs can be made ({error}); name one with --log-dir", param="log_dir"
        ) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


async def _check_router(config: RouterConfig, folder: Path) -> None:
    """Files that the router would refuse, and a Redis that it would wait for, before anything starts."""
    preflight.tokenizer_files(folder, config)
    if config.otel:
        from router.observe import spans  # with the tokenizer

        spans.check_installed()
    if config.registry.is_used:
        await preflight.registry_answers(config.registry)


def _places(options: ClusterOptions, kernels: str, num_workers: int) -> tuple[Place, ...]:
    # Torch takes seconds to import, and without a GPU there is nothing to ask it.
    asks_torch = options.gpus != "auto" or preflight.has_gpu()
    gpus = options.gpus if asks_torch else "none"
    places = placement.on_devices(gpus, kernels, num_workers, TorchDevices())
    return placement.on_cores(options.cpus, places)


def placed(engine: EngineConfig, place: Place) -> EngineConfig:
    """The engine of a worker that computes there."""
    return replace(
        engine,
        device=place.device,
        gpu_workers=place.gpu_workers,
        num_threads=engine.num_threads or place.threads,
    )


def _environment(options: ClusterOptions) -> dict[str, str]:
    """For every child: without the variables of settings, which hold what an option may have overruled here, and
    without the API keys, which the router alone has a use for. The key of the cluster is for all.

    What is secret or may hold a password goes this way too: every user of this machine can read arguments.
    """
    told = {
        "BATON_REGISTRY": options.registry.url,
        "BATON_CLUSTER": options.registry.cluster,
        CLUSTER_KEY_VARIABLE: options.access.cluster_key,
    }
    decided = {key.about.variable for config in (WorkerConfig, RouterConfig) for key in keys(config)}
    ours = {name: value for name, value in os.environ.items() if name not in decided}
    return {**ours, **told, "PYTHONUNBUFFERED": "1"}


def _command(name: str, config: WorkerConfig | RouterConfig, *arguments: str) -> tuple[str, ...]:
    """By the path of our own file, and with -P: what lies in the current folder is not ours, whatever it is called."""
    program = str(Path(__file__).resolve().parents[1] / "__main__.py")
    settings = json.dumps(difference(config))
    parent = ("--die-with-parent", str(os.getpid()))
    return (sys.executable, "-P", program, name, *parent, *arguments, "--settings", settings)


def _worker(
    options: ClusterOptions, common: WorkerConfig, node_id: str, role: str, place: Place, port: int, metrics_port: int
) -> _Worker:
    address = join_address(options.host, port)
    engine = placed(common.engine, place)
    config = replace(common, role=Role(role), node_id=node_id, listen=address, metrics_port=metrics_port, engine=engine)
    binding = ("--cpus", cores.shown(place.cpus)) if place.cpus else ()
    command = _command("worker", config, "--model", str(config.model), *binding)
    # OpenMP reads it when torch is loaded, before any code of ours could tell it.
    environment = {"OMP_NUM_THREADS": str(engine.num_threads)}
    program = Program(node_id, command, lambda pid: _worker_answers(address, pid, config.access), environment)
    return _Worker(node_id, role, address, join_address(options.host, metrics_port), program)


def _router_id(config: RouterConfig, name: str) -> str:
    """No two live routers may share one; one that is started again has the same."""
    return config.router_id if name == ROUTER else f"{config.router_id}-{name.rpartition('-')[2]}"


def _router(name: str, config: RouterConfig, folder: Path, endpoints: Endpoints, num_workers: int) -> Program:
    faces = ("--http", endpoints.http.partition("://")[2], "--grpc", endpoints.grpc)
    return Program(
        name,
        _command("router", config, "--model", str(folder), *faces),
        lambda pid: _router_sees(endpoints.grpc, num_workers, config.api_keys, config.access),
        environment={_API_KEY: " ".join(config.api_keys), _ADMIN_KEY: config.admin_key},
    )


async def _worker_answers(address: str, pid: int, access: AccessConfig) -> None:
    """Returns when the worker describes itself, which it does once its model is loaded."""
    async with dial(address, access, _EAGER_RECONNECT) as channel:
        stub = node_pb2_grpc.NodeStub(channel)
        found = await stub.Describe(node_pb2.DescribeRequest(), wait_for_ready=True, metadata=access.metadata)
    if found.node.pid != pid:
        raise BadConfig(f"process {found.node.pid} answers on {address}, expected process {pid}")


async def _router_sees(address: str, num_nodes: int, api_keys: tuple[str, ...], access: AccessConfig) -> None:
    """Returns when the router answers and every node is ready in its eyes."""
    metadata = (("authorization", f"Bearer {ApiKey.parse(api_keys[0]).secret}"),) if api_keys else ()
    async with dial(address, access, _EAGER_RECONNECT) as channel:
        stub = router_pb2_grpc.RouterStub(channel)
        status = await stub.Status(router_pb2.StatusRequest(), wait_for_ready=True, metadata=metadata)
        while sum(node.state == "ready" for node in status.nodes) < num_nodes:
            # The router has no call that waits for this, and the launcher asks for it once in a cluster's life.
            await asyncio.sleep(_PROBE_INTERVAL_S)
            status = await stub.Status(router_pb2.StatusRequest(), timeout=_CALL_TIMEOUT_S, metadata=metadata)


def _ready_content(
    routers: Mapping[str, Endpoints],
    workers: list[_Worker],
    pids: Mapping[str, int],
    key_files: Mapping[str, Path | None],
) -> dict[str, object]:
    """The first router's addresses are also those of the cluster."""
    listed = [{"id": name, "http": at.http, "grpc": at.grpc, "pid": pids[name]} for name, at in routers.items()]
    return {
        "http": listed[0]["http"],
        "grpc": listed[0]["grpc"],
        "router_pid": listed[0]["pid"],
        "routers": listed,
        # None where certificates prove who a peer is, or where what is the operators' is open to all.
        **{name: None if file is None else str(file) for name, file in key_files.items()},
        "nodes": [
            {
                "id": worker.node_id,
                "role": worker.role,
                "pid": pids[worker.node_id],
                "address": worker.address,
                "metrics": worker.metrics,
            }
            for worker in workers
        ],
    }
