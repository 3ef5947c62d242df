"""Settings of the transfer: one frozen value for the sender and the receiver of a node, validated on load."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from baton.access import OPEN, AccessConfig
from baton.errors import BadConfig, quoted
from baton.settings import check, computed, setting
from kvtransfer.protocol.receiver import ReceiverConfig
from kvtransfer.protocol.sender import SenderConfig
from kvtransfer.transports.table import TRANSPORTS, transport_name, transport_of

if TYPE_CHECKING:
    from kvtransfer.transports.interface import Transport

_MAX_KIB = 2**31 - 1


def _default_threads(at_least: int) -> int:
    return min(4, max(at_least, (os.cpu_count() or 2) // 2))


def _transports(text: str) -> tuple[str, ...]:
    """Best first. Tests may also name one that misbehaves; see kvtransfer/transports/fake.py."""
    return TRANSPORTS if text == "auto" else (text,)


def _layerwise_from(text: str) -> Mapping[str, int]:
    """Of KiB for all transports."""
    kib = int(text) if re.fullmatch(r"-1|[0-9]{1,10}", text) else None
    if kib is None or kib > _MAX_KIB:
        raise ValueError(f"expected -1, or KiB: a whole number up to {_MAX_KIB}")
    return {} if kib < 0 else dict.fromkeys(TRANSPORTS, kib << 10)


@dataclass(frozen=True, slots=True)
class TransferConfig:
    """``transports`` is what the node offers, best first: names of ``transports/table.py``, or a faulty one over one of
    them such as "fake:corrupt=1,seed=7,over=shm" (see transports/fake.py).
    """

    transports: tuple[str, ...] = field(
        default=TRANSPORTS,
        metadata=setting(
            "--transport",
            "How KV moves: auto takes cuda_ipc between GPUs of one host, shm on one host without GPUs, else tcp.",
            parse=_transports,
            shown="auto",
            metavar="auto|cuda_ipc|shm|tcp",
        ),
    )
    # Both ends must agree.
    digest: bool = field(
        default=True,
        metadata=setting(
            "--digest",
            "Check KV that arrives against a digest. off gives up the check: damaged KV goes unnoticed.",
            choices=("on", "off"),
        ),
    )
    connect_timeout_s: float = 5.0
    # Copying threads of a sender for all its shm peers (copy and digest in one pass: 8 ms for 134 MB), and digesting
    # threads of a receiver (6 ms, behind the copies).
    copy_threads: int = field(default_factory=lambda: _default_threads(2), metadata=setting(least=1, most=64))
    verify_threads: int = field(default_factory=lambda: _default_threads(2), metadata=setting(least=1, most=64))
    tcp_streams: int = field(default=2, metadata=setting(least=1, most=64))
    # To a receiver; those that are lost count until their writer is known to be gone. A sender has one.
    max_channels: int = field(default=1024, metadata=setting(least=1))
    # Interface the receiver's data sockets listen on; empty: the host of the node's address.
    tcp_listen_host: str = field(default="", metadata=computed())
    # The node's.
    access: AccessConfig = field(default=OPEN, metadata=computed())
    # By transport, in place of its own: transfers of at least this many bytes are pushed layer by layer, smaller ones
    # in one go at commit.
    layerwise_from_bytes: Mapping[str, int] = field(
        default_factory=dict,
        metadata=setting(
            "--layerwise-from-kib",
            "Push KV of at least this size layer by layer. -1: as measured for the transport.",
            parse=_layerwise_from,
            shown="-1",
            metavar="INTEGER",
        ),
    )
    sender: SenderConfig = field(default_factory=SenderConfig)
    receiver: ReceiverConfig = field(default_factory=ReceiverConfig)

    def __post_init__(self) -> None:
        if not self.transports:
            message = f"transports is empty, expected some of {', '.join(TRANSPORTS)}"
            raise BadConfig(message, param="transports")
        for spec in self.transports:
            transport_name(spec)
        for name, num_bytes in self.layerwise_from_bytes.items():
            if name not in TRANSPORTS or not 0 <= num_bytes < 2**63:
                expected = f"bytes by transport ({', '.join(TRANSPORTS)}), 0 or more and less than 2^63"
                raise BadConfig(
                    f"layerwise_from_bytes has {quoted(name)} = {quoted(num_bytes)}, expected {expected}",
                    param="layerwise_from_bytes",
                )
        check(self)

    def over(self, *, on_device: bool) -> TransferConfig:
        """What is left of it for a cache that lies on a device, or does not. Raises BadConfig if no transport is."""
        left = tuple(spec for spec in self.transports if transport_of(spec).takes(on_device=on_device))
        if not left:
            where = "on a device" if on_device else "in host memory"
            able = [name for name in TRANSPORTS if transport_of(name).takes(on_device=on_device)]
            raise BadConfig(
                f"transports {', '.join(self.transports)} do not reach a KV cache {where}; "
                f"expected {' or '.join(able)}",
                param="transports",
            )
        return replace(self, transports=left)

    @property
    def transport_names(self) -> tuple[str, ...]:
        """What is offered to a peer: a faulty one goes by the name of the one under it."""
        return tuple(dict.fromkeys(transport_name(spec) for spec in self.transports))

    @property
    def by_name(self) -> dict[str, Transport]:
        """Best first."""
        found: dict[str, Transport] = {}
        for spec in self.transports:
            transport = transport_of(spec)
            found.setdefault(transport.name, transport)
        return found
