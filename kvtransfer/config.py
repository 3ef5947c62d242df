"""Settings of the transfer: one frozen value for the sender and the receiver of a node, validated on load."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace

from baton.errors import BadConfig, quoted
from kvtransfer.protocol.receiver import ReceiverConfig
from kvtransfer.protocol.sender import SenderConfig
from kvtransfer.transports.fake import Mischief

# Best first.
TRANSPORTS = ("cuda_ipc", "shm", "tcp")
# Those that end in the processor's memory, and those that end in a device's.
_OVER_HOST = frozenset({"shm", "tcp"})
_OVER_DEVICE = frozenset({"cuda_ipc", "tcp"})


def _default_threads(at_least: int) -> int:
    return min(4, max(at_least, (os.cpu_count() or 2) // 2))


@dataclass(frozen=True, slots=True)
class TransferConfig:
    """``transports`` is what the node offers, best first: "cuda_ipc", "shm", "tcp", or a fake over one of them such as
    "fake:corrupt=1,seed=7,over=shm" (see transports/fake.py), which misbehaves on the sending side.
    """

    transports: tuple[str, ...] = TRANSPORTS
    # Both ends must agree; without digests a damaged block goes unnoticed and is decoded from.
    digest: bool = True
    connect_timeout_s: float = 5.0
    # Copying threads of a sender for all its shm peers (copy and digest in one pass: 8 ms for 134 MB), and digesting
    # threads of a receiver (6 ms, behind the copies).
    copy_threads: int = field(default_factory=lambda: _default_threads(2))
    verify_threads: int = field(default_factory=lambda: _default_threads(2))
    tcp_streams: int = 2
    # Interface the receiver's data sockets listen on; empty: the host of the node's address.
    tcp_listen_host: str = ""
    # Transfers of at least this many bytes are pushed layer by layer, smaller ones in one go at commit. Measured by
    # bench/transfer.py (see docs/decisions/0003-transfer.md).
    layerwise_from_bytes: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(TRANSPORTS, 1 << 20))
    sender: SenderConfig = field(default_factory=SenderConfig)
    receiver: ReceiverConfig = field(default_factory=ReceiverConfig)

    def __post_init__(self) -> None:
        if not self.transports:
            raise BadConfig(f"transports is empty, expected some of {', '.join(TRANSPORTS)}")
        for spec in self.transports:
            if transport_name(spec) not in TRANSPORTS:
                raise BadConfig(
                    f"transport {quoted(spec)} is unknown, expected {', '.join(TRANSPORTS)} or fake:...,over=one"
                )
        for name in ("copy_threads", "verify_threads", "tcp_streams"):
            if not 1 <= getattr(self, name) <= 64:
                raise BadConfig(f"{name} is {getattr(self, name)}, expected 1 to 64")
        if not (math.isfinite(self.connect_timeout_s) and self.connect_timeout_s > 0):
            raise BadConfig(f"connect_timeout_s is {self.connect_timeout_s}, expected a positive number of seconds")
        for part in (self.sender, self.receiver):
            for item in fields(part):
                value = getattr(part, item.name)
                if not (math.isfinite(value) and value > 0):
                    raise BadConfig(f"{item.name} is {value}, expected a positive number")

    def over(self, *, on_device: bool) -> TransferConfig:
        """What is left of it for a cache that lies on a device, or does not. Raises BadConfig if no transport is."""
        able = _OVER_DEVICE if on_device else _OVER_HOST
        left = tuple(spec for spec in self.transports if transport_name(spec) in able)
        if not left:
            where = "on a device" if on_device else "in host memory"
            raise BadConfig(
                f"transports {', '.join(self.transports)} do not reach a KV cache {where}; "
                f"expected {' or '.join(sorted(able))}",
                param="transports",
            )
        return replace(self, transports=left)

    @property
    def transport_names(self) -> tuple[str, ...]:
        """What is offered to a peer: a fake goes by the name of what it misbehaves over."""
        return tuple(dict.fromkeys(transport_name(spec) for spec in self.transports))

    def mischief(self, name: str) -> Mischief | None:
        """How the transport of this name is to misbehave."""
        for spec in self.transports:
            if transport_name(spec) == name and spec.startswith("fake"):
                return Mischief.parse(spec)
        return None


def transport_name(spec: str) -> str:
    return Mischief.parse(spec).over if spec.startswith("fake") else spec
