"""What `baton up` is asked for: a local cluster's options, checked, and the configuration of its processes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from baton.access import AccessConfig
from baton.errors import BadConfig
from baton.faults.config import FaultsConfig
from baton.registry import RegistryConfig
from baton.settings import Given, build, check, computed, setting
from baton.types import Role
from cli.launch import model_source
from cli.launch.supervise import SuperviseConfig
from router.config import GRPC_PORT, HTTP_PORT, RouterConfig
from worker.config import WorkerConfig

_MAX_WORKERS = 256
_MAX_ROUTERS = 16
ROUTER = "router"
_MAX_PORT = 65535


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterOptions:
    """What was asked for. ``worker`` and ``router``: settings of every worker and of the router, by key."""

    model: str = field(metadata=setting("--model", "A Hugging Face folder or hub id.", short="-m"))
    revision: str = field(default="", metadata=model_source.REVISION)
    num_prefill: int | None = field(
        default=None,
        metadata=setting("--prefill", "Prefill workers. Default 1, or 0 with --mixed.", least=0, most=_MAX_WORKERS),
    )
    num_decode: int | None = field(
        default=None,
        metadata=setting("--decode", "Decode workers. Default 1, or 0 with --mixed.", least=0, most=_MAX_WORKERS),
    )
    num_mixed: int = field(default=0, metadata=setting("--mixed", "Workers that do both.", least=0, most=_MAX_WORKERS))
    http_port: int = field(
        default=HTTP_PORT,
        metadata=setting(
            "--http-port", "Port of the OpenAI API; 0 = any free one.", aliases=("--port",), least=0, most=65535
        ),
    )
    grpc_port: int = field(
        default=GRPC_PORT,
        metadata=setting("--grpc-port", "Port of the gRPC API; 0 = any free one.", least=0, most=65535),
    )
    host: str = field(default="127.0.0.1", metadata=setting("--host", "Address to listen on."))
    num_routers: int = field(
        default=1,
        metadata=setting(
            "--routers",
            "Routers of the cluster, each on the next port: a client that has several loses no stream with one.",
            least=1,
            most=_MAX_ROUTERS,
        ),
    )
    ready_file: Path | None = field(
        default=None, metadata=setting("--ready-file", "Written as JSON when all is ready.")
    )
    log_dir: Path | None = field(
        default=None, metadata=setting("--log-dir", "Where children log. Default: a temporary one.")
    )
    model_names: tuple[str, ...] = field(
        default=(),
        metadata=setting(
            "--model-name",
            "What the API calls the model; may be given more than once: a request may have any of the names, answers "
            "and metrics have the first. Default: the folder's name or the hub id.",
            aliases=("--served-model-name",),
        ),
    )
    gpus: str = field(
        default="auto",
        metadata=setting(
            "--gpus",
            "GPUs of the workers, round robin, by torch's indices (CUDA_VISIBLE_DEVICES counts). auto: all that "
            "the kernels can use.",
            metavar="auto|none|0,1,...",
        ),
    )
    cpus: str = field(
        default="auto",
        metadata=setting(
            "--cpus",
            "CPUs to compute on, such as 0-3,8. up divides those it may use among workers without a GPU, whole cores "
            "of one NUMA node where that is possible; all: no worker is bound to any.",
            metavar="auto|all|LIST",
        ),
    )
    # If it is used, workers register there and the router finds them there; else the router gets a list.
    registry: RegistryConfig = field(default_factory=RegistryConfig)
    access: AccessConfig = field(default_factory=AccessConfig)
    supervise: SuperviseConfig = field(default_factory=SuperviseConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig)
    worker: Mapping[str, Given] = field(default_factory=dict, metadata=computed())
    router: Mapping[str, Given] = field(default_factory=dict, repr=False, metadata=computed())

    def __post_init__(self) -> None:
        check(self)
        if not self.host:
            raise BadConfig("--host is empty, expected an address of this machine or a name of it")
        self._check_ports()
        prefill, decode, mixed = self.counts
        if prefill + mixed < 1 or decode + mixed < 1:
            raise BadConfig(
                f"{prefill} prefill, {decode} decode, {mixed} mixed workers cannot serve: "
                "expected at least one for prompts (--prefill or --mixed) and one for tokens (--decode or --mixed)"
            )

    def _check_ports(self) -> None:
        """Those of several routers follow each other."""
        http, grpc_, count = self.http_port, self.grpc_port, self.num_routers
        if http and http == grpc_:
            raise BadConfig(f"--http-port and --grpc-port are both {http}, expected two different ports")
        if http and grpc_ and abs(http - grpc_) < count:
            raise BadConfig(f"--http-port {http} and --grpc-port {grpc_} overlap, expected {count} ports for each")
        for option, port in (("--http-port", http), ("--grpc-port", grpc_)):
            if port > _MAX_PORT + 1 - count:
                raise BadConfig(f"{option} is {port}, expected at most {_MAX_PORT + 1 - count} for {count} routers")

    @property
    def counts(self) -> tuple[int, int, int]:
        """Of prefill, decode and mixed workers."""
        default = 0 if self.num_mixed else 1
        prefill, decode = (default if count is None else count for count in (self.num_prefill, self.num_decode))
        return prefill, decode, self.num_mixed

    def worker_config(self, folder: Path) -> WorkerConfig:
        """What all workers have in common. Raises BadConfig for what a worker would refuse."""
        own = {
            "model_name": Given(self._names()[0], "--model-name"),
            "registry": Given(self.registry, "--registry"),
            "access": Given(self.access, "--cluster-key"),
            "model": Given(folder, "--model"),
            "role": Given(Role.MIXED, "--role"),
            "faults": Given(self.faults, "--faults"),
            "tokenizer": self._tokenizer(),
        }
        return build(WorkerConfig, {**self.worker, **own})

    def router_config(self, folder: Path, nodes: Sequence[str]) -> RouterConfig:
        """Raises BadConfig for what the router would refuse."""
        listed = () if self.registry.is_used else tuple(nodes)
        own = {
            "model_names": Given(self._names(), "--model-name"),
            "registry": Given(self.registry, "--registry"),
            "access": Given(self.access, "--cluster-key"),
            "model_folder": Given(folder, "--model"),
            "nodes": Given(listed, "--node"),
            "faults": Given(self.faults, "--faults"),
        }
        if self.faults.file is not None:
            # Rules name it, and the same rules have to name it in the next run.
            own["router_id"] = Given("router", "--faults")
        return build(RouterConfig, {**self.router, **own, "tokenizer": self._tokenizer()})

    def _tokenizer(self) -> Given:
        """The router's, which is that of grammars on workers too."""
        given = self.router.get("tokenizer", Given("", "--tokenizer"))
        return Given(model_source.tokenizer_folder(str(given.value)), given.source)

    def _names(self) -> tuple[str, ...]:
        return self.model_names or (model_source.name_of(self.model),)

    @property
    def router_names(self) -> tuple[str, ...]:
        """Of processes and their logs."""
        return (ROUTER,) if self.num_routers == 1 else tuple(f"{ROUTER}-{i}" for i in range(self.num_routers))

    def worker_roles(self) -> Iterator[tuple[str, str]]:
        """(node id, role) of every worker."""
        for role, count in zip(("prefill", "decode", "mixed"), self.counts, strict=True):
            for i in range(count):
                yield f"{role}-{i}", role
