"""The commands and their options. Each one gathers its options and hands over to the module that does the work."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from baton import __version__
from baton.client import Client, Options
from baton.errors import BadConfig, Unavailable
from baton.types import SamplingParams
from cli import ask, model_source
from cli import host as host_facts
from cli.process import die_with

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Serve a language model on two pools: prefill nodes run prompts, decode nodes generate tokens.",
)


class OnOff(StrEnum):
    on = "on"
    off = "off"


class DType(StrEnum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Kernels(StrEnum):
    auto = "auto"
    cpu = "cpu"
    triton = "triton"
    reference = "reference"


class RoleName(StrEnum):
    prefill = "prefill"
    decode = "decode"
    mixed = "mixed"


Model = Annotated[str, typer.Option("--model", "-m", help="A Hugging Face folder or hub id.")]
ModelName = Annotated[str, typer.Option(help="What the API calls the model. Default: the folder's name or the hub id.")]
Router = Annotated[
    str, typer.Option("--router", "-r", envvar="BATON_ROUTER", help="host:port of the router's gRPC service.")
]
KernelsName = Annotated[
    Kernels,
    typer.Option(
        help="cpu, triton (for GPUs), reference (plain torch, slow), or auto: triton with an NVIDIA GPU from sm_80 on, "
        "else cpu."
    ),
]
KvMib = Annotated[int, typer.Option(min=0, help="KV cache of a worker in MiB. 0: a share of the free memory.")]
NumBlocks = Annotated[int, typer.Option(min=0, help="KV cache of a worker in blocks, instead of --kv-mib.")]
BlockTokens = Annotated[int, typer.Option(min=1, help="Tokens in a KV block; the same in a whole cluster.")]
MaxBatchTokens = Annotated[int, typer.Option(min=1, help="Prompt tokens computed in one engine step.")]
MaxNumSeqs = Annotated[int, typer.Option(min=1, help="Sequences that run at once on a worker.")]
MaxGraphSeqs = Annotated[
    int, typer.Option(min=0, help="GPUs record decode steps of up to so many sequences at the start. 0 = none.")
]
BatchInvariant = Annotated[
    OnOff,
    typer.Option(
        help="A request's tokens depend on nothing it is batched with. off lets GPUs use cuBLAS where it is faster: "
        "tokens then vary with the load, and after a failure."
    ),
]
Transport = Annotated[
    str,
    typer.Option(
        help="How KV moves: auto takes cuda_ipc between GPUs of one host, shm on one host without GPUs, else tcp.",
        metavar="auto|cuda_ipc|shm|tcp",
    ),
]
Digest = Annotated[
    OnOff,
    typer.Option(help="Check KV that arrives against a digest. off gives up the check: damaged KV goes unnoticed."),
]
LayerwiseFromKib = Annotated[
    int, typer.Option(min=-1, help="Push KV of at least this size layer by layer. -1: as measured for the transport.")
]
Threads = Annotated[int, typer.Option(min=0, help="Threads of a worker. 0: the cores divided by the workers.")]
Relay = Annotated[bool, typer.Option("--relay", help="Print which nodes ran the request and how long each stage took.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")]
TopP = Annotated[float, typer.Option()]
TopK = Annotated[int, typer.Option(min=0)]
Seed = Annotated[int | None, typer.Option(min=0)]
MaxTokens = Annotated[int, typer.Option("--max-tokens", "-n", min=1)]
Grace = Annotated[float, typer.Option(min=0.1, help="Seconds that running work may take to end after SIGTERM.")]
Registry = Annotated[
    str,
    typer.Option(
        envvar="BATON_REGISTRY",
        show_envvar=True,
        help="redis://[user:password@]host:port/db, rediss:// for TLS: where workers register and routers find them.",
    ),
]
ClusterName = Annotated[
    str, typer.Option("--cluster", envvar="BATON_CLUSTER", help="Clusters of other names in one Redis do not meet.")
]
ApiKeys = Annotated[
    list[str] | None,
    typer.Option(
        "--api-key",
        envvar="BATON_API_KEY",
        show_envvar=True,
        help="Clients must give one of these as `Authorization: Bearer KEY`; may be given more than once.",
    ),
]
ApiKey = Annotated[str, typer.Option(envvar="BATON_API_KEY", show_envvar=True, help="A key of the router's, if any.")]
PeakTflops = Annotated[
    float, typer.Option(min=0.0, help="What the hardware computes at --dtype, for utilisation. 0: not known.")
]
PeakGbps = Annotated[float, typer.Option(min=0.0, help="Its memory bandwidth in GB/s, for the same. 0: not known.")]
Otel = Annotated[
    bool,
    typer.Option(
        "--otel",
        envvar="BATON_OTEL",
        show_envvar=True,
        help="Make OpenTelemetry spans of requests; the OTEL_* variables say where they go.",
    ),
]
DieWithParent = Annotated[int, typer.Option(hidden=True)]
HttpPort = Annotated[int, typer.Option(min=0, max=65535, help="Port of the OpenAI API; 0 = any free one.")]
GrpcPort = Annotated[int, typer.Option(min=0, max=65535, help="Port of the gRPC API; 0 = any free one.")]


@app.command()
def up(
    model: Model,
    prefill: Annotated[int | None, typer.Option(help="Prefill workers. Default 1, or 0 with --mixed.")] = None,
    decode: Annotated[int | None, typer.Option(help="Decode workers. Default 1, or 0 with --mixed.")] = None,
    mixed: Annotated[int, typer.Option(help="Workers that do both.")] = 0,
    transport: Transport = "auto",
    dtype: Annotated[DType, typer.Option(help="auto is what the model was saved in.")] = DType.auto,
    http_port: HttpPort = 8000,
    grpc_port: GrpcPort = 50051,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    ready_file: Annotated[Path | None, typer.Option(help="Written as JSON when all is ready.")] = None,
    log_dir: Annotated[Path | None, typer.Option(help="Where children log. Default: a temporary one.")] = None,
    model_name: ModelName = "",
    kernels: KernelsName = Kernels.auto,
    kv_mib: KvMib = 0,
    num_blocks: NumBlocks = 0,
    block_tokens: BlockTokens = 64,
    max_batch_tokens: MaxBatchTokens = 2048,
    max_num_seqs: MaxNumSeqs = 256,
    max_graph_seqs: MaxGraphSeqs = 256,
    batch_invariant: BatchInvariant = OnOff.on,
    threads: Threads = 0,
    layerwise_from_kib: LayerwiseFromKib = -1,
    registry: Registry = "",
    cluster_name: ClusterName = "default",
    api_key: ApiKeys = None,
    digest: Digest = OnOff.on,
    otel: Otel = False,
    peak_tflops: PeakTflops = 0.0,
    peak_gbps: PeakGbps = 0.0,
) -> None:
    """Run a cluster on this machine until Ctrl-C or SIGTERM."""
    from baton.registry import RegistryConfig
    from cli import cluster

    console = Console(stderr=True, soft_wrap=True)
    _transports(transport)  # a typing error is told here, not by a worker that does not start
    if registry:
        RegistryConfig(registry, cluster_name)  # the same
    default = 0 if mixed else 1
    options = cluster.ClusterOptions(
        model=model,
        num_prefill=default if prefill is None else prefill,
        num_decode=default if decode is None else decode,
        num_mixed=mixed,
        host=host,
        http_port=http_port,
        grpc_port=grpc_port,
        model_name=model_name,
        ready_file=ready_file,
        log_dir=log_dir,
        kv_mib=kv_mib,
        threads=threads,
        registry=registry,
        cluster_name=cluster_name,
        api_keys=tuple(api_key or ()),
        router_arguments=("--otel",) if otel else (),
        worker_arguments=(
            *("--transport", transport, "--dtype", dtype.value, "--kernels", kernels.value),
            *("--num-blocks", str(num_blocks), "--block-tokens", str(block_tokens)),
            *("--max-batch-tokens", str(max_batch_tokens), "--max-num-seqs", str(max_num_seqs)),
            *("--max-graph-seqs", str(max_graph_seqs), "--batch-invariant", batch_invariant.value),
            *("--layerwise-from-kib", str(layerwise_from_kib), "--digest", digest.value),
            *("--peak-tflops", str(peak_tflops), "--peak-gbps", str(peak_gbps)),
        ),
    )
    is_first = True

    def on_ready(endpoints: cluster.Endpoints, stop: Callable[[], None]) -> None:
        nonlocal is_first
        if is_first:
            is_first = False
            console.print(f"ready: OpenAI API at {endpoints.http}/v1, gRPC at {endpoints.grpc}; Ctrl-C stops it")
            console.print(f"status page: {endpoints.http}/status", highlight=False)
            console.print(f'try: baton generate --router {endpoints.grpc} --relay "Once upon a time"', highlight=False)

    workers = ", ".join(node_id for node_id, _ in options.worker_roles())
    console.print(f"starting the router and {workers} with {model}")
    asyncio.run(cluster.up(options, lambda message: console.print(message, markup=False), on_ready))


@app.command()
def worker(
    model: Model,
    role: Annotated[RoleName, typer.Option(help="prefill, decode, or mixed: what the worker is used for.")],
    listen: Annotated[str, typer.Option(help="host:port; port 0 = any free one.")] = "127.0.0.1:0",
    node_id: Annotated[str, typer.Option(help="Unique in the cluster. Default: made from role, host and port.")] = "",
    advertise: Annotated[str, typer.Option(help="Host that others reach this worker at, if not --listen's.")] = "",
    transport: Transport = "auto",
    dtype: Annotated[DType, typer.Option()] = DType.auto,
    model_name: ModelName = "",
    kernels: KernelsName = Kernels.auto,
    kv_mib: KvMib = 0,
    num_blocks: NumBlocks = 0,
    block_tokens: BlockTokens = 64,
    max_batch_tokens: MaxBatchTokens = 2048,
    max_num_seqs: MaxNumSeqs = 256,
    max_graph_seqs: MaxGraphSeqs = 256,
    batch_invariant: BatchInvariant = OnOff.on,
    threads: Threads = 0,
    layerwise_from_kib: LayerwiseFromKib = -1,
    registry: Registry = "",
    cluster_name: ClusterName = "default",
    registry_lease: Annotated[float, typer.Option(help="Seconds a registration lives without being renewed.")] = 10.0,
    grace: Grace = 10.0,
    digest: Digest = OnOff.on,
    metrics_port: Annotated[
        int,
        typer.Option(min=-1, max=65535, help="Port of GET /metrics on --listen's host; 0 = any free one, -1 = none."),
    ] = 0,
    peak_tflops: PeakTflops = 0.0,
    peak_gbps: PeakGbps = 0.0,
    die_with_parent: DieWithParent = 0,
) -> None:
    """Run one worker: a model replica that computes prompts, generates tokens, or both.

    SIGTERM drains it: nothing new, what runs may end, exit code 0. A second one stops it at once.
    """
    # Until the event loop takes over nothing is worth ending in good order.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    if die_with_parent:
        die_with(die_with_parent)
    from baton.registry import RegistryConfig
    from baton.types import Role
    from cli.registration import LeaseConfig
    from cli.worker import WorkerConfig, serve
    from cli.worker_metrics import Peaks

    _log_to_stderr()
    config = WorkerConfig(
        model=model_source.resolve(model),
        role=Role(role.value),
        node_id=node_id,
        listen=listen,
        advertise_host=advertise,
        model_name=model_name or model_source.name_of(model),
        dtype=dtype.value,
        kernels=kernels.value,
        kv_bytes=(kv_mib or host_facts.default_kv_mib(1)) << 20,
        num_blocks=num_blocks or None,
        block_tokens=block_tokens,
        max_batch_tokens=max_batch_tokens,
        max_num_seqs=max_num_seqs,
        max_graph_seqs=max_graph_seqs,
        is_batch_invariant=batch_invariant is OnOff.on,
        num_threads=threads,
        transports=_transports(transport),
        digest=digest is OnOff.on,
        layerwise_from_bytes=None if layerwise_from_kib < 0 else layerwise_from_kib << 10,
        registry=RegistryConfig(registry, cluster_name) if registry else None,
        cluster=cluster_name,
        registry_lease=LeaseConfig(registry_lease),
        grace_s=grace,
        metrics_port=None if metrics_port < 0 else metrics_port,
        peaks=Peaks(peak_tflops * 1e12, peak_gbps * 1e9),
        # One line of JSON with the address, for whoever asked for any port.
        ready_fd=None if die_with_parent else os.dup(1),
    )
    if not asyncio.run(serve(config)):
        # A thread of the model still computes; at exit Python would wait for it, or torch crash under it.
        logging.shutdown()
        os._exit(0)


@app.command()
def router(
    model: Model,
    node: Annotated[list[str] | None, typer.Option(help="host:port of a worker; once for each.")] = None,
    registry: Registry = "",
    cluster_name: ClusterName = "default",
    http: Annotated[str, typer.Option(help="host:port of the OpenAI API.")] = "127.0.0.1:8000",
    grpc: Annotated[str, typer.Option(help="host:port of the gRPC API.")] = "127.0.0.1:50051",
    model_name: ModelName = "",
    api_key: ApiKeys = None,
    grace: Grace = 5.0,
    vllm_metrics: Annotated[
        bool, typer.Option("--vllm-metrics/--no-vllm-metrics", help="Show a subset under vLLM's names as well.")
    ] = True,
    otel: Otel = False,
    die_with_parent: DieWithParent = 0,
) -> None:
    """Run the router: picks the pair of nodes for each request and answers the clients."""
    if die_with_parent:
        die_with(die_with_parent)
    from baton.registry import RegistryConfig
    from router.config import LimitsConfig, RouterConfig
    from router.serve import serve

    _log_to_stderr()
    http_host, http_port = _address(http, "--http")
    grpc_host, grpc_port = _address(grpc, "--grpc")
    config = RouterConfig(
        nodes=tuple(node or ()),
        registry=RegistryConfig(registry, cluster_name) if registry else None,
        cluster=cluster_name,
        http_host=http_host,
        http_port=http_port,
        grpc_host=grpc_host,
        grpc_port=grpc_port,
        model_folder=model_source.resolve(model),
        model_name=model_name or model_source.name_of(model),
        api_keys=tuple(api_key or ()),
        limits=LimitsConfig(drain_s=grace),
        vllm_metrics=vllm_metrics,
        otel=otel,
    )

    async def run() -> None:
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await serve(config, stop)

    asyncio.run(run())


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The text to continue; - reads it from standard input.")],
    router: Router = "127.0.0.1:50051",
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
    stop: Annotated[list[str] | None, typer.Option(help="Ends the text; may be given more than once.")] = None,
    ignore_eos: Annotated[bool, typer.Option(help="Go on to --max-tokens.")] = False,
    relay: Relay = False,
    api_key: ApiKey = "",
) -> None:
    """Continue a text, as it comes."""
    console = Console()
    text = typer.get_text_stream("stdin").read() if prompt == "-" else prompt
    sampling = SamplingParams(
        temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, max_tokens=max_tokens, ignore_eos=ignore_eos
    )
    with _client(router, api_key) as client:
        finished = ask.generate(
            client, text, Options(sampling, tuple(stop or ())), lambda part: ask.write_raw(console, part)
        )
    console.print()
    if relay:
        ask.print_relay(Console(stderr=True), finished)


@app.command()
def chat(
    router: Router = "127.0.0.1:50051",
    system: Annotated[str, typer.Option(help="The system message.")] = "",
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.7,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
    relay: Relay = False,
    api_key: ApiKey = "",
) -> None:
    """Talk to the model; an empty line is ignored, Ctrl-C ends an answer, Ctrl-D ends the talk."""
    sampling = SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, max_tokens=max_tokens)
    with _client(router, api_key) as client:
        ask.chat(client, Console(), Options(sampling), system=system, show_relay=relay)


@app.command()
def status(
    router: Router = "127.0.0.1:50051",
    ledger: Annotated[bool, typer.Option("--ledger", help="Also every block owner of every node.")] = False,
    watch: Annotated[float | None, typer.Option(min=0.1, help="Again every so many seconds.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    api_key: ApiKey = "",
) -> None:
    """Show nodes, roles, queues and blocks of a running cluster."""
    with _client(router, api_key) as client, contextlib.suppress(KeyboardInterrupt):
        ask.show_status(client, Console(), with_ledger=ledger, as_json=as_json, watch_s=watch)


@app.command()
def trace(
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write it.")] = Path("baton-trace.json"),
    last: Annotated[float, typer.Option(min=0.0, help="Seconds back from now. 0: all that nodes keep.")] = 10.0,
    router: Router = "127.0.0.1:50051",
    api_key: ApiKey = "",
) -> None:
    """Write what router and nodes did in the last seconds as a Chrome trace: steps, transfers, writes, requests."""
    from cli.trace import write

    with _client(router, api_key) as client:
        write(client, last, output, Console())


@app.command("drain")
def drain_node(
    node: Annotated[str, typer.Argument(help="Node id or host:port.")],
    router: Router = "127.0.0.1:50051",
    grace: Annotated[
        float, typer.Option(min=0.0, help="Seconds until what still runs is cut off. 0: the node's own --grace.")
    ] = 0.0,
    direct: Annotated[bool, typer.Option("--direct", help="Ask the worker at host:port itself, not a router.")] = False,
    wait: Annotated[bool, typer.Option(help="Return only when the node has left.")] = True,
    api_key: ApiKey = "",
) -> None:
    """Let a worker finish what it has and leave; it gets nothing new, and no request fails."""
    from cli import draining

    console = Console(soft_wrap=True)
    if direct:
        draining.drain_directly(node, grace, console, waits=wait)
        return
    with _client(router, api_key) as client:
        draining.drain(client, node, grace, console, waits=wait)


@app.command()
def health(
    address: Annotated[str, typer.Argument(help="host:port of a worker or router (gRPC).")],
    live: Annotated[bool, typer.Option("--live", help="Whether it is well, rather than ready for work.")] = False,
    timeout: Annotated[float, typer.Option(min=0.1)] = 3.0,
) -> None:
    """Exit code 0 if a process is healthy, 1 if not: for containers and scripts."""
    from cli.draining import check_health

    answer = check_health(address, live=live, timeout_s=timeout)
    Console(soft_wrap=True).print(answer or "healthy", markup=False, highlight=False)
    raise typer.Exit(1 if answer else 0)


@app.command()
def doctor(
    model: Annotated[str, typer.Option("--model", "-m", help="Also look at this model.")] = "",
    registry: Registry = "",
    cluster_name: ClusterName = "default",
) -> None:
    """Say what is installed, what will be used, and what is missing; exit code 1 if this machine cannot serve."""
    from cli.doctor import examine, report

    raise typer.Exit(report(examine(model, registry, cluster_name), Console()))


@app.command()
def demo(
    model: Annotated[str, typer.Option("--model", "-m", help="Your own model instead of the demo's.")] = "",
) -> None:
    """Start 1 router, 2 prefill and 2 decode workers, send prompts through both APIs, show the relay, stop."""
    from cli.demo import run

    raise typer.Exit(run(model, Console()))


def _transports(name: str) -> tuple[str, ...]:
    """Best first. Tests may also name one that misbehaves; see kvtransfer/transports/fake.py."""
    from kvtransfer.config import TransferConfig

    return TransferConfig().transports if name == "auto" else TransferConfig(transports=(name,)).transports


def _address(text: str, option: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not (colon and host and port.isdigit()):
        raise BadConfig(f"{option} is {text!r}, expected host:port")
    return host, int(port)


def _log_to_stderr() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")


@contextlib.contextmanager
def _client(address: str, api_keys: str) -> Iterator[Client]:
    # The variable may hold all the keys of a router that was started with it.
    with Client(address, api_key=next(iter(api_keys.split()), "")) as client:
        try:
            yield client
        except Unavailable as error:
            if "failed to connect" not in error.message:
                raise
            hint = f"no answer from a router at {address} ({error.message}); `baton up` starts one"
            raise Unavailable(hint) from error


def _version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"baton {__version__}")
        raise typer.Exit


@app.callback()
def _root(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False) -> None:
    pass
