"""A worker's settings: frozen, checked on construction, wrong values named."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from baton.address import host_of, is_anywhere
from baton.errors import BadConfig
from baton.names import check_cluster, check_model_name, check_node_id
from baton.registry import RegistryConfig
from baton.types import Role
from engine.config import EngineConfig
from kvtransfer.config import TRANSPORTS
from worker.metrics import Peaks
from worker.registration import LeaseConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """Everything a worker can be told. ``transports`` is best first; ``num_blocks`` wins over ``kv_bytes``."""

    model: Path
    role: Role
    # Empty: made from role, host and port.
    node_id: str = ""
    listen: str = "127.0.0.1:0"
    # Host that others reach this worker at, if it is not the one it listens on.
    advertise_host: str = ""
    # Empty: the model folder's name.
    model_name: str = ""
    dtype: str = "auto"
    kernels: str = "auto"
    quantization: str = "none"
    # "auto", or torch's name for it.
    device: str = "auto"
    gpu_memory_utilization: float = 0.9
    # How many workers share that GPU.
    gpu_workers: int = 1
    # Neither: what the device's memory leaves.
    kv_bytes: int | None = None
    num_blocks: int | None = None
    block_tokens: int = 64
    max_batch_tokens: int = 2048
    max_num_seqs: int = 256
    max_graph_seqs: int = 256
    is_batch_invariant: bool = True
    max_waiting: int = 1024
    max_preemptions: int = 3
    watermark: float = 0.01
    # 0: torch's own choice.
    num_threads: int = 0
    transports: tuple[str, ...] = TRANSPORTS
    # Off gives up the check of what arrived; the whole cluster must agree.
    digest: bool = True
    # None: as measured for each transport.
    layerwise_from_bytes: int | None = None
    lease_ttl_s: float = 30.0
    max_lease_ttl_s: float = 600.0
    # Where to register, and for how long at a time; None: routers are told the address by other means.
    registry: RegistryConfig | None = None
    # What the metrics say where no registry names the cluster.
    cluster: str = "default"
    registry_lease: LeaseConfig = field(default_factory=LeaseConfig)
    # How long running sequences may go on after SIGTERM, and how long closing may then take on top.
    grace_s: float = 10.0
    close_s: float = 3.0
    # Health turns NOT_SERVING when the engine makes no progress for this long.
    stall_limit_s: float = 30.0
    # Where GET /metrics is answered, on the host of ``listen``. 0: any free port; None: nowhere.
    metrics_port: int | None = 0
    peaks: Peaks = field(default_factory=Peaks)
    # Gets {node_id, role, pid, address, metrics} once all is served.
    ready_file: Path | None = None
    ready_fd: int | None = None

    def __post_init__(self) -> None:
        for name in ("grace_s", "close_s", "lease_ttl_s", "stall_limit_s"):
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise BadConfig(f"{name} is {value}, expected a positive number of seconds", param=name)
        check_cluster(self.cluster)
        if self.node_id:
            check_node_id(self.node_id)
        if self.model_name:
            check_model_name(self.model_name)
        if self.advertise_host and is_anywhere(self.advertise_host):
            message = f"advertise_host is {self.advertise_host}, which nobody can dial: expected a host to reach it at"
            raise BadConfig(message, param="advertise_host")
        if self.metrics_port is not None and not 0 <= self.metrics_port < 65536:
            raise BadConfig(f"metrics_port is {self.metrics_port}, expected a port, 0 or None", param="metrics_port")
        if self.num_blocks is not None and self.num_blocks < 1:
            raise BadConfig(f"num_blocks is {self.num_blocks}, expected at least 1", param="num_blocks")
        if self.registry is not None and is_anywhere(host_of(self.listen)) and not self.advertise_host:
            message = f"listen is {self.listen}, which nobody can dial: expected --advertise with a host to register"
            raise BadConfig(message, param="advertise_host")

    @property
    def cluster_name(self) -> str:
        return self.cluster if self.registry is None else self.registry.cluster


def engine_config(config: WorkerConfig) -> EngineConfig:
    """What the replica is told. Raises BadConfig."""
    return EngineConfig(
        dtype=config.dtype,
        block_tokens=config.block_tokens,
        num_blocks=config.num_blocks,
        kv_bytes=config.kv_bytes,
        device=config.device,
        gpu_memory_utilization=config.gpu_memory_utilization,
        gpu_workers=config.gpu_workers,
        max_batch_tokens=config.max_batch_tokens,
        max_num_seqs=config.max_num_seqs,
        kernels=config.kernels,
        quantization=config.quantization,
        max_graph_seqs=config.max_graph_seqs,
        is_batch_invariant=config.is_batch_invariant,
        num_threads=config.num_threads,
    )
