"""A worker's settings: frozen, checked on construction, wrong values named."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from baton.access import AccessConfig, is_loopback
from baton.address import host_of, is_anywhere, parse_address
from baton.errors import BadConfig
from baton.faults.config import FaultsConfig
from baton.metrics_server import MetricsServerConfig
from baton.names import check_model_name, check_node_id
from baton.registry import RegistryConfig
from baton.settings import check, computed, setting
from baton.types import Role
from decode_node.machine import DecodeConfig
from engine.config import EngineConfig
from kvtransfer.config import TransferConfig
from worker.departure import DrainConfig
from worker.registration import LeaseConfig
from worker.roles import RolesConfig
from worker.session import SessionConfig


@dataclass(frozen=True, slots=True)
class Peaks:
    """What the hardware can do, as measured (`python -m bench`) or declared by its maker. 0: not known."""

    flops: float = field(
        default=0.0,
        metadata=setting(
            "--peak-tflops",
            "What the hardware computes at --dtype, for utilisation. 0: not known.",
            least=0,
            unit=1e12,
        ),
    )
    bytes_per_s: float = field(
        default=0.0,
        metadata=setting("--peak-gbps", "Its memory bandwidth in GB/s, for the same. 0: not known.", least=0, unit=1e9),
    )

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """Everything a worker can be told."""

    model: Path = field(metadata=computed())
    role: Role = field(
        metadata=setting("--role", "prefill, decode, or mixed: what the worker is used for.", up_file=False)
    )
    listen: str = field(
        default="127.0.0.1:0", metadata=setting("--listen", "host:port; port 0 = any free one.", up_file=False)
    )
    node_id: str = field(
        default="",
        metadata=setting("--node-id", "Unique in the cluster. Default: made from role, host and port.", up_file=False),
    )
    advertise_host: str = field(
        default="",
        metadata=setting("--advertise", "Host that others reach this worker at, if not --listen's.", up_file=False),
    )
    model_name: str = field(
        default="",
        metadata=setting(
            "--model-name",
            "What the API calls the model. Default: the folder's name or the hub id.",
            aliases=("--served-model-name",),
            up_file=False,
        ),
    )
    tokenizer: str = field(
        default="",
        metadata=setting(
            "--tokenizer",
            "A folder or hub id with another tokenizer.json, the router's. Default: the model's folder.",
            up_file=False,
        ),
    )
    # How peers and this worker know each other. One for all processes of a cluster, also of `up`.
    access: AccessConfig = field(default_factory=AccessConfig, metadata=setting(up_file=False))
    engine: EngineConfig = field(default_factory=EngineConfig)
    transfer: TransferConfig = field(default_factory=TransferConfig)
    lease: DecodeConfig = field(default_factory=DecodeConfig)
    session: SessionConfig = field(default_factory=SessionConfig)
    registry: RegistryConfig = field(default_factory=RegistryConfig, metadata=setting(up_file=False))
    registration: LeaseConfig = field(default_factory=LeaseConfig)
    roles: RolesConfig = field(default_factory=RolesConfig)
    drain: DrainConfig = field(default_factory=DrainConfig)
    # How long closing may take after that.
    close_s: float = 3.0
    # Health turns NOT_SERVING when the engine makes no progress for this long.
    stall_limit_s: float = 30.0
    metrics_port: int | None = field(
        default=0,
        metadata=setting(
            "--metrics-port",
            "Port of GET /metrics on --listen's host; 0 = any free one, -1 = none.",
            least=0,
            most=65535,
            none=-1,
            up_file=False,
        ),
    )
    metrics_server: MetricsServerConfig = field(default_factory=MetricsServerConfig)
    peaks: Peaks = field(default_factory=Peaks)
    faults: FaultsConfig = field(default_factory=FaultsConfig, metadata=setting(up_file=False))
    # Gets {node_id, role, pid, address, metrics} once all is served.
    ready_file: Path | None = field(default=None, metadata=setting(up_file=False))
    ready_fd: int | None = field(default=None, metadata=computed())

    def __post_init__(self) -> None:
        check(self)
        parse_address(self.listen, "listen")
        if self.node_id:
            check_node_id(self.node_id)
        if self.model_name:
            check_model_name(self.model_name)
        if self.advertise_host:
            parse_address(f"{self.advertise_host}:1", "advertise_host")
            if is_anywhere(self.advertise_host):
                expected = "a host that others reach this worker at"
                message = f"advertise_host is {self.advertise_host}, which cannot be dialled: expected {expected}"
                raise BadConfig(message, param="advertise_host")
        if self.registry.is_used and is_anywhere(host_of(self.listen)) and not self.advertise_host:
            message = f"listen is {self.listen}, which cannot be dialled: give --advertise with a host to register"
            raise BadConfig(message, param="listen")
        self.access.check_certificate()
        if self.access.tls_cert is not None and not self.access.has_peer_tls:
            expected = "expected --tls-ca beside --tls-cert: only processes of the cluster call a worker"
            raise BadConfig(f"access.tls_ca is none, {expected}", param="access.tls_ca")
        if self.access.is_open and not self.access.allow_open and not is_loopback(host_of(self.listen)):
            raise BadConfig(
                f"listen is {self.listen}, where other machines reach this worker, and peers have nothing to prove: "
                "expected --cluster-key (BATON_CLUSTER_KEY), or --tls-cert, --tls-key and --tls-ca; or --allow-open to "
                "serve every process that reaches it",
                param="listen",
            )

    def transfer_over(self, *, on_device: bool) -> TransferConfig:
        """What the transfer is told of a KV cache that lies on a device, or does not. Raises BadConfig."""
        # Others may reach this worker at a name that is not known here, or at an address that is not its own.
        listen_host = host_of(self.listen).strip("[]")
        return replace(self.transfer, tcp_listen_host=listen_host, access=self.access).over(on_device=on_device)
