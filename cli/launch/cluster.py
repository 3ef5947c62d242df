"""`baton up`: turns options into the commands and probes of a local cluster, and runs it until told to stop."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import grpc

from baton.address import join_address
from baton.clock import MonotonicClock
from baton.errors import BadConfig
from baton.registry import RegistryConfig
from baton.v1 import node_pb2, node_pb2_grpc, router_pb2, router_pb2_grpc
from cli import preflight
from cli.launch import cores, model_source, placement
from cli.launch.launcher import Launcher, Program, write_json_atomically
from cli.launch.placement import Place
from cli.launch.supervise import SuperviseConfig
from engine.config import EngineConfig
from engine.devices import TorchDevices
from engine.memory import shown
from router import spans
from router.config import RouterConfig

_PROBE_INTERVAL_S = 0.05
_CALL_TIMEOUT_S = 5.0
_API_KEY = "BATON_API_KEY"
# A worker needs seconds to load; the defaults would have us look again only every 1.6, 2.6, ... seconds.
_EAGER_RECONNECT = (
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 200),
)


@dataclass(frozen=True, slots=True)
class ClusterOptions:
    """What was asked for. ``worker_arguments`` go to every worker as they are."""

    model: str
    num_prefill: int = 1
    num_decode: int = 1
    num_mixed: int = 0
    host: str = "127.0.0.1"
    http_port: int = 0
    grpc_port: int = 0
    model_name: str = ""
    ready_file: Path | None = None
    log_dir: Path | None = None
    # What workers are told of their engine: for checks before they start.
    engine: EngineConfig = field(default_factory=EngineConfig)
    # ``auto``, ``none`` or indices; ``auto``, ``all`` or CPUs: see cli/launch/placement.py.
    gpus: str = "auto"
    cpus: str = "auto"
    threads: int = 0
    # Workers register there and the router finds them there. Empty: the router gets a list.
    registry: str = ""
    cluster_name: str = "default"
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    otel: bool = False
    # Of the router: "auto" or "none".
    generation_config: str = "auto"
    worker_arguments: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("num_prefill", "num_decode", "num_mixed"):
            if getattr(self, name) < 0:
                raise BadConfig(f"--{name.removeprefix('num_')} is {getattr(self, name)}, expected 0 or more")
        if not self.host:
            raise BadConfig("--host is empty, expected an address of this machine or a name of it")
        if self.http_port and self.http_port == self.grpc_port:
            raise BadConfig(f"--http-port and --grpc-port are both {self.http_port}, expected two different ports")
        can_prefill, can_decode = self.num_prefill + self.num_mixed, self.num_decode + self.num_mixed
        if can_prefill < 1 or can_decode < 1:
            raise BadConfig(
                f"{self.num_prefill} prefill, {self.num_decode} decode, {self.num_mixed} mixed workers cannot serve: "
                "expected at least one for prompts (--prefill or --mixed) and one for tokens (--decode or --mixed)"
            )

    def worker_roles(self) -> Iterator[tuple[str, str]]:
        """(node id, role) of every worker."""
        for role, count in (("prefill", self.num_prefill), ("decode", self.num_decode), ("mixed", self.num_mixed)):
            for i in range(count):
                yield f"{role}-{i}", role


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


async def up(
    options: ClusterOptions,
    say: Callable[[str], None],
    on_ready: Callable[[Endpoints, Callable[[], None]], None],
    on_start: Callable[[], None] = lambda: None,
) -> None:
    """Runs the cluster until SIGTERM or SIGINT; then nothing of it is left. Raises BadConfig before anything starts
    (``on_start`` is called then), ClusterFailed if it cannot go on.

    ``on_ready`` is called whenever all is ready (again), with the addresses and a function that stops the cluster.
    """
    folder = model_source.resolve(options.model)
    preflight.model_files(folder)
    names = [node_id for node_id, _ in options.worker_roles()]
    places = _places(options, len(names))
    if not places[0].is_gpu:
        # Known now, for all of them: each alone would take what the others find free.
        layout = preflight.host_cache(folder, options.engine, len(names))
        options = replace(options, engine=replace(options.engine, num_blocks=layout.num_blocks))
        facts = [f"each worker: {shown(layout)}"]
    else:
        facts = list(placement.described(names, places, options.engine.gpu_memory_utilization))
    if options.ready_file is not None:
        preflight.replaceable_file(options.ready_file, "--ready-file")
    with ExitStack() as resources:

        def reserved(option: str, port: int = 0) -> int:
            return resources.enter_context(preflight.reserved_port(options.host, port, option))

        http_port, grpc_port = reserved("--http-port", options.http_port), reserved("--grpc-port", options.grpc_port)
        endpoints = Endpoints(f"http://{join_address(options.host, http_port)}", join_address(options.host, grpc_port))
        workers = [
            _worker(options, folder, node_id, role, place, reserved("--host"), reserved("--host"))
            for (node_id, role), place in zip(options.worker_roles(), places, strict=True)
        ]
        await _check_router(options, folder, workers)
        log_dir = resources.enter_context(_run_directory(options.log_dir))
        if options.ready_file is not None:
            options.ready_file.unlink(missing_ok=True)
        on_start()
        for fact in facts:
            say(fact)
        router = _router(options, folder, workers, endpoints)

        def announce(pids: Mapping[str, int]) -> None:
            if options.ready_file is not None:
                write_json_atomically(options.ready_file, _ready_content(endpoints, workers, pids))
            on_ready(endpoints, launcher.stop)

        launcher = Launcher(
            router,
            [worker.program for worker in workers],
            log_dir=log_dir,
            environment=_environment(options),
            clock=MonotonicClock(),
            config=SuperviseConfig(),
            say=say,
            announce=announce,
        )
        try:
            await launcher.run()
        finally:
            if options.ready_file is not None:
                options.ready_file.unlink(missing_ok=True)


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


async def _check_router(options: ClusterOptions, folder: Path, workers: list[_Worker]) -> None:
    """What the router would refuse, and a Redis that it would wait for, before anything starts."""
    registry = RegistryConfig(options.registry, options.cluster_name) if options.registry else None
    nodes = () if registry is not None else tuple(worker.address for worker in workers)
    RouterConfig(
        nodes=nodes,
        registry=registry,
        cluster=options.cluster_name,
        model_folder=folder,
        model_name=options.model_name or model_source.name_of(options.model),
        api_keys=options.api_keys,
    )
    preflight.tokenizer_files(folder, options.generation_config)
    if options.otel:
        spans.check_installed()
    if registry is not None:
        await preflight.registry_answers(registry)


def _places(options: ClusterOptions, num_workers: int) -> tuple[Place, ...]:
    # Torch takes seconds to import, and without a GPU there is nothing to ask it.
    asks_torch = options.gpus != "auto" or preflight.has_gpu()
    gpus = options.gpus if asks_torch else "none"
    places = placement.on_devices(gpus, options.engine.kernels, num_workers, TorchDevices())
    return placement.on_cores(options.cpus, places)


def _kv_size(engine: EngineConfig) -> tuple[str, ...]:
    if engine.num_blocks is not None:
        return "--num-blocks", str(engine.num_blocks)
    return () if engine.kv_bytes is None else ("--kv-mib", str(engine.kv_bytes >> 20))


def where(engine: EngineConfig, place: Place) -> Iterator[str]:
    """The options that tell a worker where it computes."""
    yield from ("--device", place.device)
    if place.is_gpu:
        yield from ("--gpu-memory-utilization", str(engine.gpu_memory_utilization))
        yield from ("--gpu-workers", str(place.gpu_workers))
    elif place.cpus:
        yield from ("--cpus", cores.shown(place.cpus))


def _environment(options: ClusterOptions) -> dict[str, str]:
    """For every child: without the API keys, which the router alone has a use for.

    What is secret or may hold a password goes this way too: arguments are shown to everybody on this machine.
    """
    told = {
        "BATON_REGISTRY": options.registry,
        "BATON_CLUSTER": options.cluster_name,
    }
    ours = {name: value for name, value in os.environ.items() if name != _API_KEY}
    return {**ours, **told, "PYTHONUNBUFFERED": "1"}


def _command(name: str, *arguments: str) -> tuple[str, ...]:
    """By the path of our own file, and with -P: what lies in the current folder is not ours, whatever it is called."""
    program = str(Path(__file__).resolve().parents[1] / "__main__.py")
    return (sys.executable, "-P", program, name, "--die-with-parent", str(os.getpid()), *arguments)


def _worker(
    options: ClusterOptions, folder: Path, node_id: str, role: str, place: Place, port: int, metrics_port: int
) -> _Worker:
    address, threads = join_address(options.host, port), str(options.threads or place.threads)
    command = _command(
        "worker",
        *("--model", str(folder), "--role", role, "--node-id", node_id, "--listen", address),
        *("--model-name", options.model_name or model_source.name_of(options.model)),
        *("--threads", threads),
        *_kv_size(options.engine),
        *where(options.engine, place),
        *("--metrics-port", str(metrics_port)),
        *options.worker_arguments,
    )
    # OpenMP reads it when torch is loaded, before any code of ours could tell it.
    environment = {"OMP_NUM_THREADS": threads}
    program = Program(node_id, command, lambda pid: _worker_answers(address, pid), environment)
    return _Worker(node_id, role, address, join_address(options.host, metrics_port), program)


def _router(options: ClusterOptions, folder: Path, workers: list[_Worker], endpoints: Endpoints) -> Program:
    command = _command(
        "router",
        *("--model", str(folder), "--model-name", options.model_name or model_source.name_of(options.model)),
        *("--http", endpoints.http.removeprefix("http://"), "--grpc", endpoints.grpc),
        *(argument for worker in workers for argument in ("--node", worker.address) if not options.registry),
        *("--generation-config", options.generation_config),
        *(("--otel",) if options.otel else ()),
    )
    return Program(
        "router",
        command,
        lambda pid: _router_sees(endpoints.grpc, len(workers), options.api_keys),
        environment={_API_KEY: " ".join(options.api_keys)},
    )


async def _worker_answers(address: str, pid: int) -> None:
    """Returns when the worker describes itself, which it does once its model is loaded."""
    async with grpc.aio.insecure_channel(address, options=_EAGER_RECONNECT) as channel:
        stub = node_pb2_grpc.NodeStub(channel)
        found = await stub.Describe(node_pb2.DescribeRequest(), wait_for_ready=True)
    if found.node.pid != pid:
        raise BadConfig(f"process {found.node.pid} answers on {address}, expected process {pid}")


async def _router_sees(address: str, num_nodes: int, api_keys: tuple[str, ...]) -> None:
    """Returns when the router answers and every node is ready in its eyes."""
    metadata = (("authorization", f"Bearer {api_keys[0]}"),) if api_keys else ()
    async with grpc.aio.insecure_channel(address, options=_EAGER_RECONNECT) as channel:
        stub = router_pb2_grpc.RouterStub(channel)
        status = await stub.Status(router_pb2.StatusRequest(), wait_for_ready=True, metadata=metadata)
        while sum(node.state == "ready" for node in status.nodes) < num_nodes:
            # The router has no call that waits for this, and the launcher asks for it once in a cluster's life.
            await asyncio.sleep(_PROBE_INTERVAL_S)
            status = await stub.Status(router_pb2.StatusRequest(), timeout=_CALL_TIMEOUT_S, metadata=metadata)


def _ready_content(endpoints: Endpoints, workers: list[_Worker], pids: Mapping[str, int]) -> dict[str, object]:
    return {
        "http": endpoints.http,
        "grpc": endpoints.grpc,
        "router_pid": pids["router"],
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
