"""How the processes of a cluster know each other: one key that all have, certificates of one authority, or neither.

Settings only. `baton/channels.py` dials and listens by them, `baton/guard.py` refuses who does not prove anything.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from baton.errors import BadConfig, Unauthenticated
from baton.settings import setting

# Metadata of every call between two processes of a cluster.
KEY_HEADER = "baton-cluster-key"
CLUSTER_KEY_VARIABLE = "BATON_CLUSTER_KEY"
# 32 hexadecimal digits have 128 bits; below that it may be guessed, or is a word.
_LEAST_KEY_CHARS = 32


@dataclass(frozen=True, slots=True)
class AccessConfig:
    """Raises BadConfig."""

    # Without TLS it travels readably: it keeps out who can reach a port, not who can read the network.
    cluster_key: str = field(
        default="",
        repr=False,
        metadata=setting(
            "--cluster-key",
            "A secret of at least 32 characters that every process of the cluster has: routers and workers refuse "
            "peers without it. Set the variable rather than the option: every user of a machine can read arguments. "
            "`up` makes one for its own processes.",
            variable=CLUSTER_KEY_VARIABLE,
        ),
    )
    tls_cert: Path | None = field(
        default=None,
        metadata=setting(
            "--tls-cert",
            "Certificate of this process, PEM, with those between it and the authority's. It is read again when the "
            "file changes.",
            aliases=("--ssl-certfile",),
            variable="BATON_TLS_CERT",
        ),
    )
    tls_key: Path | None = field(
        default=None,
        metadata=setting("--tls-key", "Its private key, PEM.", aliases=("--ssl-keyfile",), variable="BATON_TLS_KEY"),
    )
    tls_ca: Path | None = field(
        default=None,
        metadata=setting(
            "--tls-ca",
            "Certificate of the authority that signs those of all processes, PEM: they use TLS among each other, and "
            "each has to show its certificate. Without it a router's --tls-cert is for clients alone.",
            variable="BATON_TLS_CA",
        ),
    )
    # Pods have addresses that no certificate can name.
    tls_name: str = field(
        default="",
        metadata=setting(
            "--tls-name",
            "The name in the certificates of peers. Default: the host that is dialled.",
            variable="BATON_TLS_NAME",
        ),
    )
    allow_open: bool = field(
        default=False,
        metadata=setting(
            "--allow-open",
            "Listen on addresses that other machines reach although callers have to prove nothing.",
            variable="BATON_ALLOW_OPEN",
        ),
    )

    def __post_init__(self) -> None:
        key = self.cluster_key
        if key and not (key.isascii() and key.isprintable() and " " not in key and len(key) >= _LEAST_KEY_CHARS):
            expected = f"at least {_LEAST_KEY_CHARS} printable ASCII characters without spaces"
            raise BadConfig(f"cluster_key is '(hidden)', expected {expected}", param="cluster_key")
        if (self.tls_cert is None) != (self.tls_key is None):
            missing = "tls_key" if self.tls_key is None else "tls_cert"
            raise BadConfig(f"{missing} is none, expected --tls-cert and --tls-key together", param=missing)

    @property
    def has_peer_tls(self) -> bool:
        return self.tls_ca is not None

    @property
    def is_open(self) -> bool:
        """Peers prove nothing."""
        return not self.cluster_key and not self.has_peer_tls

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Of every call to a peer."""
        return ((KEY_HEADER, self.cluster_key),) if self.cluster_key else ()

    def check_certificate(self) -> None:
        """Of a process that peers dial. Raises BadConfig unless it has a certificate of its own where peers use TLS,
        and an authority where it has a certificate."""
        if self.tls_ca is not None and self.tls_cert is None:
            raise BadConfig(
                "tls_cert is none, expected --tls-cert and --tls-key beside --tls-ca: each process shows a certificate",
                param="tls_cert",
            )


# Of processes on one machine's loopback, and of tests.
OPEN = AccessConfig()


class PeerKey:
    """Checks the key of a call in a time that does not depend on it."""

    def __init__(self, key: str) -> None:
        self._digest = _digest(key)

    def check(self, method: str, metadata: Mapping[str, str | bytes]) -> None:
        """Raises Unauthenticated."""
        said = metadata.get(KEY_HEADER)
        if said is None:
            raise Unauthenticated(
                f"no cluster key was given, expected the one that this process has (--cluster-key or "
                f"{CLUSTER_KEY_VARIABLE})"
            )
        if not hmac.compare_digest(_digest(said if isinstance(said, str) else said.decode("latin-1")), self._digest):
            raise Unauthenticated(
                f"the cluster key is not the one that this process has (--cluster-key or {CLUSTER_KEY_VARIABLE})"
            )


def _digest(key: str) -> bytes:
    """Of equal length for every key, so that a comparison always takes as long."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def is_loopback(host: str) -> bool:
    """Whether only processes of this machine reach a listener there. A name other than localhost may be any address."""
    host = host.strip("[]")
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
