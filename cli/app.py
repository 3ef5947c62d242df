"""The commands and their options. Each one gathers its options and hands over to the module that does the work."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
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
from baton.address import join_address, parse_address
from baton.client import Client, Options
from baton.errors import BadConfig, DeadlineExceeded, InvalidRequest, Unavailable
from cli import ask, preflight
from cli.launch import cores, model_source
from cli.launch.process import die_with
from cli.show import wide_console
from cli.usage import Commands

app = typer.Typer(
    cls=Commands,
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


class Quantization(StrEnum):
    none = "none"
    int8 = "int8"


class GenerationConfig(StrEnum):
    auto = "auto"
    none = "none"


class RoleName(StrEnum):
    prefill = "prefill"
    decode = "decode"
    mixed = "mixed"


def _finite(value: float | None) -> float | None:
    """Ranges let NaN through."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number.")
    return value


def _path(text: str) -> Path:
    """An empty one would be the current folder."""
    if not str(text):
        raise typer.BadParameter("it is empty, expected a path.")
    return Path(text)


_DAY_S = 86_400.0
_MAX_INT32 = 2**31 - 1
_MAX_WORKERS = 256
# Columns: more than any table has.

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
QuantizationName = Annotated[
    Quantization,
    typer.Option(
        help="int8: weights become 8-bit integers at load, activations in every step; half of bfloat16's bytes, "
        "slightly other tokens. Not on a GPU. The same for all workers."
    ),
]
KvMib = Annotated[
    int,
    typer.Option(
        min=0,
        max=_MAX_INT32,
        help="KV cache of a worker in MiB. 0: what --gpu-memory-utilization leaves on a GPU, on a processor half of "
        "what the weights leave of the free memory.",
    ),
]
GpuMemoryUtilization = Annotated[
    float,
    typer.Option(
        min=0.01,
        max=1.0,
        callback=_finite,
        help="Share of a GPU's memory that all workers on it may take together, what others have of it included.",
    ),
]
NumBlocks = Annotated[
    int, typer.Option(min=0, max=_MAX_INT32, help="KV cache of a worker in blocks, instead of --kv-mib. 0: by that.")
]
BlockTokens = Annotated[
    int, typer.Option(help="Tokens in a KV block, a power of two from 16 to 256; the same in a whole cluster.")
]
MaxBatchTokens = Annotated[int, typer.Option(min=1, max=1 << 24, help="Prompt tokens computed in one engine step.")]
MaxNumSeqs = Annotated[int, typer.Option(min=1, max=1 << 16, help="Sequences that run at once on a worker.")]
MaxGraphSeqs = Annotated[
    int,
    typer.Option(
        min=0, max=1 << 16, help="GPUs record decode steps of up to so many sequences at the start. 0 = none."
    ),
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
    int,
    typer.Option(
        min=-1,
        max=_MAX_INT32,
        help="Push KV of at least this size layer by layer. -1: as measured for the transport.",
    ),
]
Threads = Annotated[
    int, typer.Option(min=0, max=1024, help="Threads of a worker. 0: the cores divided by the workers.")
]
Relay = Annotated[bool, typer.Option("--relay", help="Print which nodes ran the request and how long each stage took.")]
Temperature = Annotated[float, typer.Option(min=0.0, callback=_finite, help="0 always takes the likeliest token.")]
_MODELS_OWN = "Not given: the model's default."
TopP = Annotated[float | None, typer.Option(callback=_finite, help=_MODELS_OWN)]
TopK = Annotated[int | None, typer.Option(min=0, max=_MAX_INT32, help=_MODELS_OWN)]
Seed = Annotated[int | None, typer.Option(min=0, max=2**64 - 1)]
MaxTokens = Annotated[int, typer.Option("--max-tokens", "-n", min=1, max=_MAX_INT32)]
Grace = Annotated[
    float,
    typer.Option(
        min=0.1, max=_DAY_S, callback=_finite, help="Seconds that running work may take to end after SIGTERM."
    ),
]
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
    float,
    typer.Option(
        min=0.0, callback=_finite, help="What the hardware computes at --dtype, for utilisation. 0: not known."
    ),
]
PeakGbps = Annotated[
    float, typer.Option(min=0.0, callback=_finite, help="Its memory bandwidth in GB/s, for the same. 0: not known.")
]
Otel = Annotated[
    bool,
    typer.Option(
        "--otel",
        envvar="BATON_OTEL",
        show_envvar=True,
        help="Make OpenTelemetry spans of requests; the OTEL_* variables say where they go.",
    ),
]
GenerationConfigChoice = Annotated[
    GenerationConfig,
    typer.Option(
        help="auto: temperature, top_p, top_k, min_p, repetition_penalty and max_new_tokens of the model's "
        "generation_config.json hold where a request says nothing. none: the API's own defaults."
    ),
]
Cpus = Annotated[
    str,
    typer.Option(
        help="CPUs to compute on, such as 0-3,8. up divides those it may use among workers without a GPU, whole cores "
        "of one NUMA node where that is possible; all: nobody is bound to any.",
        metavar="auto|all|LIST",
    ),
]
DieWithParent = Annotated[int, typer.Option(hidden=True)]
HttpPort = Annotated[int, typer.Option(min=0, max=65535, help="Port of the OpenAI API; 0 = any free one.")]
GrpcPort = Annotated[int, typer.Option(min=0, max=65535, help="Port of the gRPC API; 0 = any free one.")]


@app.command()
def up(
    model: Model,
    prefill: Annotated[
        int | None, typer.Option(min=0, max=_MAX_WORKERS, help="Prefill workers. Default 1, or 0 with --mixed.")
    ] = None,
    decode: Annotated[
        int | None, typer.Option(min=0, max=_MAX_WORKERS, help="Decode workers. Default 1, or 0 with --mixed.")
    ] = None,
    mixed: Annotated[int, typer.Option(min=0, max=_MAX_WORKERS, help="Workers that do both.")] = 0,
    transport: Transport = "auto",
    dtype: Annotated[DType, typer.Option(help="auto is what the model was saved in.")] = DType.auto,
    http_port: HttpPort = 8000,
    grpc_port: GrpcPort = 50051,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    ready_file: Annotated[
        Path | None, typer.Option(parser=_path, metavar="PATH", help="Written as JSON when all is ready.")
    ] = None,
    log_dir: Annotated[
        Path | None, typer.Option(parser=_path, metavar="PATH", help="Where children log. Default: a temporary one.")
    ] = None,
    model_name: ModelName = "",
    kernels: KernelsName = Kernels.auto,
    quantization: QuantizationName = Quantization.none,
    gpus: Annotated[
        str,
        typer.Option(
            help="GPUs of the workers, round robin, by torch's indices (CUDA_VISIBLE_DEVICES counts). auto: all that "
            "the kernels can use.",
            metavar="auto|none|0,1,...",
        ),
    ] = "auto",
    gpu_memory_utilization: GpuMemoryUtilization = 0.9,
    kv_mib: KvMib = 0,
    num_blocks: NumBlocks = 0,
    block_tokens: BlockTokens = 64,
    max_batch_tokens: MaxBatchTokens = 2048,
    max_num_seqs: MaxNumSeqs = 256,
    max_graph_seqs: MaxGraphSeqs = 256,
    batch_invariant: BatchInvariant = OnOff.on,
    threads: Threads = 0,
    cpus: Cpus = "auto",
    layerwise_from_kib: LayerwiseFromKib = -1,
    registry: Registry = "",
    cluster_name: ClusterName = "default",
    api_key: ApiKeys = None,
    digest: Digest = OnOff.on,
    generation_config: GenerationConfigChoice = GenerationConfig.auto,
    otel: Otel = False,
    peak_tflops: PeakTflops = 0.0,
    peak_gbps: PeakGbps = 0.0,
) -> None:
    """Run a cluster on this machine until Ctrl-C or SIGTERM."""
    preflight.worker_packages()
    from cli.launch import cluster
    from engine.config import EngineConfig
    from worker.metrics import Peaks

    console = Console(stderr=True, soft_wrap=True)
    # What a worker would refuse is told here, before anything starts.
    preflight.hardware(kernels.value, _transports(transport))
    _one_kv_size(kv_mib, num_blocks)
    Peaks(peak_tflops * 1e12, peak_gbps * 1e9)
    engine = EngineConfig(
        dtype=dtype.value,
        kernels=kernels.value,
        quantization=quantization.value,
        block_tokens=block_tokens,
        num_blocks=num_blocks or None,
        kv_bytes=kv_mib << 20 or None,
        gpu_memory_utilization=gpu_memory_utilization,
        max_batch_tokens=max_batch_tokens,
        max_num_seqs=max_num_seqs,
        max_graph_seqs=max_graph_seqs,
        num_threads=threads,
    )
    default = 0 if mixed else 1
    options = cluster.ClusterOptions(
        model=model,
        num_prefill=default if prefill is None else prefill,
        num_decode=default if decode is None else decode,
        num_mixed=mixed,
        host=host.removeprefix("[").removesuffix("]"),
        http_port=http_port,
        grpc_port=grpc_port,
        model_name=model_name,
        ready_file=ready_file,
        log_dir=log_dir,
        engine=engine,
        gpus=gpus,
        cpus=cpus,
        threads=threads,
        registry=registry,
        cluster_name=cluster_name,
        api_keys=tuple(api_key or ()),
        otel=otel,
        generation_config=generation_config.value,
        worker_arguments=(
            *("--transport", transport, "--dtype", dtype.value, "--kernels", kernels.value),
            *("--quantization", quantization.value),
            *("--block-tokens", str(block_tokens)),
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
            key = "--api-key KEY " if api_key else ""
            where = ", where KEY is one of those given with --api-key" if api_key else ""
            command = f'baton generate --router {endpoints.grpc} {key}--relay "Once upon a time"'
            console.print(f"try: {command}{where}", highlight=False)

    def on_start() -> None:
        workers = ", ".join(node_id for node_id, _ in options.worker_roles())
        console.print(f"starting the router and {workers} with {model}", markup=False)

    asyncio.run(cluster.up(options, lambda message: console.print(message, markup=False), on_ready, on_start))


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
    quantization: QuantizationName = Quantization.none,
    device: Annotated[
        str,
        typer.Option(
            help="Where it computes, by torch's names (CUDA_VISIBLE_DEVICES counts). auto: the first GPU where the "
            "kernels can use it.",
            metavar="auto|cpu|cuda:N",
        ),
    ] = "auto",
    gpu_memory_utilization: GpuMemoryUtilization = 0.9,
    gpu_workers: Annotated[
        int,
        typer.Option(min=1, max=_MAX_WORKERS, help="Workers that share its GPU, which have equal parts of the memory."),
    ] = 1,
    kv_mib: KvMib = 0,
    num_blocks: NumBlocks = 0,
    block_tokens: BlockTokens = 64,
    max_batch_tokens: MaxBatchTokens = 2048,
    max_num_seqs: MaxNumSeqs = 256,
    max_graph_seqs: MaxGraphSeqs = 256,
    batch_invariant: BatchInvariant = OnOff.on,
    threads: Threads = 0,
    cpus: Cpus = "all",
    layerwise_from_kib: LayerwiseFromKib = -1,
    registry: Registry = "",
    cluster_name: ClusterName = "default",
    registry_lease: Annotated[
        float, typer.Option(callback=_finite, help="Seconds a registration lives without being renewed.")
    ] = 10.0,
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
    _end_on_sigterm()
    if die_with_parent:
        die_with(die_with_parent)
    preflight.worker_packages()
    from baton.registry import RegistryConfig
    from baton.types import Role
    from worker.config import WorkerConfig, engine_config
    from worker.metrics import Peaks
    from worker.registration import LeaseConfig
    from worker.worker import serve

    _log_to_stderr()
    _one_kv_size(kv_mib, num_blocks)
    if cpus not in ("auto", "all"):
        # Before torch is loaded, whose threads are as many as it finds CPUs.
        cores.bind(cores.parse(cpus, "--cpus"), "--cpus")
    host, port = parse_address(listen, "--listen")
    folder = model_source.resolve(model)
    preflight.model_files(folder)
    preflight.hardware(kernels.value, _transports(transport))
    config = WorkerConfig(
        model=folder,
        role=Role(role.value),
        node_id=node_id,
        listen=listen,
        advertise_host=_advertised(advertise),
        model_name=model_name or model_source.name_of(model),
        dtype=dtype.value,
        kernels=kernels.value,
        quantization=quantization.value,
        kv_bytes=kv_mib << 20 or None,
        device=device,
        gpu_memory_utilization=gpu_memory_utilization,
        gpu_workers=gpu_workers,
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
    if device == "cpu" or not preflight.has_gpu():
        preflight.host_cache(folder, engine_config(config), 1)
    wanted = [("--listen", host, port)]
    if metrics_port >= 0:
        wanted.append(("--metrics-port", host, metrics_port))
    # Held from now on: loading takes long, and a port that somebody else has is worth knowing before.
    with preflight.reserved_ports(wanted):
        has_ended = asyncio.run(serve(config))
    if not has_ended:
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
    generation_config: GenerationConfigChoice = GenerationConfig.auto,
    vllm_metrics: Annotated[
        bool, typer.Option("--vllm-metrics/--no-vllm-metrics", help="Show a subset under vLLM's names as well.")
    ] = True,
    otel: Otel = False,
    die_with_parent: DieWithParent = 0,
) -> None:
    """Run the router: picks the pair of nodes for each request and answers the clients."""
    _end_on_sigterm()
    if die_with_parent:
        die_with(die_with_parent)
    from baton.registry import RegistryConfig
    from router.config import LimitsConfig, RouterConfig
    from router.serve import serve

    _log_to_stderr()
    http_host, http_port = parse_address(http, "--http")
    grpc_host, grpc_port = parse_address(grpc, "--grpc")
    config = RouterConfig(
        nodes=_nodes(node or [], registry),
        registry=RegistryConfig(registry, cluster_name) if registry else None,
        cluster=cluster_name,
        http_host=http_host,
        http_port=http_port,
        grpc_host=join_address(grpc_host, 0).removesuffix(":0"),
        grpc_port=grpc_port,
        model_folder=model_source.resolve(model),
        model_name=model_name or model_source.name_of(model),
        api_keys=tuple(api_key or ()),
        limits=LimitsConfig(drain_s=grace),
        generation_config=generation_config.value,
        vllm_metrics=vllm_metrics,
        otel=otel,
    )

    async def run() -> None:
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await serve(config, stop)

    with preflight.reserved_ports([("--http", http_host, http_port), ("--grpc", grpc_host, grpc_port)]):
        asyncio.run(run())


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The text to continue; - reads it from standard input.")],
    router: Router = "127.0.0.1:50051",
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    stop: Annotated[list[str] | None, typer.Option(help="Ends the text; may be given more than once.")] = None,
    ignore_eos: Annotated[bool, typer.Option(help="Go on to --max-tokens.")] = False,
    relay: Relay = False,
    api_key: ApiKey = "",
) -> None:
    """Continue a text, as it comes."""
    console = Console()
    text = _standard_input() if prompt == "-" else prompt
    with _client(router, api_key) as client:
        finished = ask.generate(
            client, text, Options(stop=tuple(stop or ())), lambda part: ask.write_raw(console, part),
            temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, max_tokens=max_tokens, ignore_eos=ignore_eos,
        )  # fmt: skip
    console.print()
    if relay:
        ask.print_relay(Console(stderr=True), finished)


@app.command()
def chat(
    router: Router = "127.0.0.1:50051",
    system: Annotated[str, typer.Option(help="The system message.")] = "",
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", "-n", min=1, max=_MAX_INT32, help=_MODELS_OWN)
    ] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, callback=_finite, help=_MODELS_OWN)] = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    relay: Relay = False,
    api_key: ApiKey = "",
) -> None:
    """Talk to the model; an empty line is ignored, Ctrl-C ends an answer, Ctrl-D ends the talk."""
    with _client(router, api_key) as client:
        ask.chat(
            client, Console(), system=system, show_relay=relay,
            temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, max_tokens=max_tokens,
        )  # fmt: skip


@app.command()
def status(
    router: Router = "127.0.0.1:50051",
    ledger: Annotated[bool, typer.Option("--ledger", help="Also every block owner of every node.")] = False,
    watch: Annotated[
        float | None, typer.Option(min=0.1, max=_DAY_S, callback=_finite, help="Again every so many seconds.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    api_key: ApiKey = "",
) -> None:
    """Show nodes, roles, queues and blocks of a running cluster."""
    with _client(router, api_key) as client, contextlib.suppress(KeyboardInterrupt):
        ask.show_status(client, wide_console(), with_ledger=ledger, as_json=as_json, watch_s=watch)


@app.command()
def trace(
    output: Annotated[
        Path, typer.Option("--output", "-o", parser=_path, metavar="PATH", help="Where to write it.")
    ] = Path("baton-trace.json"),
    last: Annotated[
        float,
        typer.Option(min=0.0, max=_DAY_S, callback=_finite, help="Seconds back from now. 0: all that nodes keep."),
    ] = 10.0,
    router: Router = "127.0.0.1:50051",
    api_key: ApiKey = "",
) -> None:
    """Write what router and nodes did in the last seconds as a Chrome trace: steps, transfers, writes, requests."""
    from cli.trace import write

    preflight.writable_file(output, "--output")
    with _client(router, api_key) as client:
        write(client, last, output, Console())


@app.command("drain")
def drain_node(
    node: Annotated[str, typer.Argument(help="Node id or host:port.")],
    router: Router = "127.0.0.1:50051",
    grace: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=_DAY_S,
            callback=_finite,
            help="Seconds until what still runs is cut off. 0: the node's own --grace.",
        ),
    ] = 0.0,
    direct: Annotated[bool, typer.Option("--direct", help="Ask the worker at host:port itself, not a router.")] = False,
    wait: Annotated[bool, typer.Option(help="Return only when the node has left.")] = True,
    api_key: ApiKey = "",
) -> None:
    """Let a worker finish what it has and leave; it gets nothing new, and no request fails."""
    from cli import draining

    console = Console(soft_wrap=True)
    if direct:
        parse_address(node, "NODE", lowest_port=1)
        draining.drain_directly(node, grace, console, waits=wait)
        return
    with _client(router, api_key) as client:
        draining.drain(client, node, grace, console, waits=wait)


@app.command()
def health(
    address: Annotated[str, typer.Argument(help="host:port of a worker or router (gRPC).")],
    live: Annotated[bool, typer.Option("--live", help="Whether it is well, rather than ready for work.")] = False,
    timeout: Annotated[float, typer.Option(min=0.1, max=_DAY_S, callback=_finite, help="Seconds.")] = 3.0,
) -> None:
    """Exit code 0 if a process is healthy, 1 if not: for containers and scripts."""
    from cli.draining import check_health

    parse_address(address, "ADDRESS", lowest_port=1)
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

    raise typer.Exit(report(examine(model, registry, cluster_name), wide_console()))


@app.command("try-kernels", hidden=True)
def try_kernels(device: Annotated[str, typer.Option()] = "auto") -> None:
    """`doctor`'s child: one small kernel, compiled and run."""
    from cli.trial import run

    typer.echo(run(device))


@app.command()
def demo(
    model: Annotated[str, typer.Option("--model", "-m", help="Your own model instead of the demo's.")] = "",
) -> None:
    """Start 1 router, 2 prefill and 2 decode workers, send prompts through both APIs, show the relay, stop."""
    preflight.worker_packages()
    from cli.demo import run

    raise typer.Exit(run(model, Console()))


def _transports(name: str) -> tuple[str, ...]:
    """Best first. Tests may also name one that misbehaves; see kvtransfer/transports/fake.py."""
    from kvtransfer.config import TransferConfig

    return TransferConfig().transports if name == "auto" else TransferConfig(transports=(name,)).transports


def _nodes(addresses: list[str], registry: str) -> tuple[str, ...]:
    if not addresses and not registry:
        raise BadConfig("no workers are named: give --node HOST:PORT once for each, or --registry redis://HOST:PORT")
    for address in addresses:
        parse_address(address, "--node", lowest_port=1)
        if addresses.count(address) > 1:
            raise BadConfig(f"--node {address} is given {addresses.count(address)} times, expected once", param="node")
    return tuple(addresses)


def _advertised(host: str) -> str:
    """A host alone: the port is that of --listen."""
    if host:
        parse_address(f"{host}:1", "--advertise HOST:PORT")
    return host


def _standard_input() -> str:
    if sys.stdin is None:
        raise InvalidRequest("standard input is closed, expected the prompt there")
    try:
        return typer.get_text_stream("stdin").read()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"standard input is no text in {error.encoding}: {error.reason}") from error


def _end_on_sigterm() -> None:
    """Until the event loop takes over nothing is worth ending in good order, and what SIGTERM ends has ended well.

    Not by an exception: one that strikes while Python imports may be ignored, and the process would start after all.
    """
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))


def _one_kv_size(kv_mib: int, num_blocks: int) -> None:
    if kv_mib and num_blocks:
        raise BadConfig(
            f"--kv-mib {kv_mib} and --num-blocks {num_blocks} both say how large the KV cache is; expected one of them",
            param="num_blocks",
        )


def _log_to_stderr() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")


# What gRPC says when it reaches nobody.
_NO_ANSWER_IN_TIME = "Deadline Exceeded"
_NOBODY_THERE = ("failed to connect", "DNS resolution failed", "errors resolving")


@contextlib.contextmanager
def _client(address: str, api_keys: str) -> Iterator[Client]:
    parse_address(address, "--router", lowest_port=1)
    # The variable may hold all the keys of a router that was started with it.
    with Client(address, api_key=next(iter(api_keys.split()), "")) as client:
        try:
            yield client
        except Unavailable as error:
            if not any(reason in error.message for reason in _NOBODY_THERE):
                raise
            hint = f"no answer from a router at {address} ({error.message}); `baton up` starts one"
            raise Unavailable(hint) from error
        except DeadlineExceeded as error:
            if error.message != _NO_ANSWER_IN_TIME:
                raise
            message = f"{address} takes connections and does not answer in time; is it the gRPC port of a router?"
            raise DeadlineExceeded(message) from error


def _version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"baton {__version__}")
        raise typer.Exit


@app.callback()
def _root(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False) -> None:
    pass
