"""Certificates in files, and contexts of the ssl module made of them. Sends and receives nothing."""

from __future__ import annotations

import logging
import ssl
import threading
from dataclasses import dataclass, field
from pathlib import Path

from baton.access import AccessConfig
from baton.errors import BadConfig

_log = logging.getLogger("baton.access")
# Where OpenSSL and the kernel have it, the kernel encrypts what is sent. Python knows the option from 3.12 on.
_KERNEL_TLS = int(getattr(ssl, "OP_ENABLE_KTLS", 0))


@dataclass(frozen=True, slots=True)
class Pem:
    """What the files of a listener hold."""

    cert: bytes
    key: bytes = field(repr=False)
    ca: bytes | None


class ListenerFiles:
    """A listener's certificate, and the authority of its peers if they have to show one too. Thread-safe, as gRPC asks
    in threads of its own."""

    def __init__(self, cert: Path, key: Path, ca: Path | None) -> None:
        """Raises BadConfig for files that cannot be read or do not fit each other."""
        self._cert, self._key, self._ca = cert, key, ca
        self._lock = threading.Lock()
        self._signature = self._sign()
        self.first = self._read()
        self._context = self._made()

    def newer(self) -> Pem | None:
        """What the files hold now, once after they were changed. While they are half written, or do not fit each other,
        the former ones stay in use."""
        with self._lock:
            try:
                signature = self._signature_now()
                if signature == self._signature:
                    return None
                # Whatever they are worth: they are looked at again when they change again.
                self._signature = signature
                pem, context = self._read(), self._made()
            except BadConfig as error:
                _log.warning("the former certificate stays in use: %s", error.message)
                return None
            self._context = context
        _log.info("certificate %s was read again", self._cert)
        return pem

    def context(self) -> ssl.SSLContext:
        """Of the files as they are now."""
        self.newer()
        return self._context

    def _signature_now(self) -> tuple[tuple[int, int, int], ...]:
        """Empty while a file is missing, so that this is said once, not at every connection."""
        try:
            return self._sign()
        except BadConfig:
            return ()

    def _sign(self) -> tuple[tuple[int, int, int], ...]:
        try:
            found = [path.stat() for path in (self._cert, self._key, self._ca) if path is not None]
        except OSError as error:
            raise _unreadable(error) from error
        return tuple((x.st_mtime_ns, x.st_size, x.st_ino) for x in found)

    def _read(self) -> Pem:
        ca = None if self._ca is None else read(self._ca)
        return Pem(read(self._cert), read(self._key), ca)

    def _made(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= _KERNEL_TLS
        load_pair(context, self._cert, self._key)
        if self._ca is not None:
            context.verify_mode = ssl.CERT_REQUIRED
            load_authority(context, self._ca)
            # Peers connect once; and a ticket on a data stream would look as if the receiver said something.
            context.num_tickets = 0
        return context


def peer_files(access: AccessConfig) -> ListenerFiles | None:
    """Of a port for peers; None: it is plain."""
    if access.tls_ca is None:
        return None
    assert access.tls_cert is not None, "checked by the process's settings"
    assert access.tls_key is not None, "checked by AccessConfig"
    return ListenerFiles(access.tls_cert, access.tls_key, access.tls_ca)


def face_files(access: AccessConfig) -> ListenerFiles | None:
    """Of a port for clients, who show no certificate."""
    if access.tls_cert is None or access.tls_key is None:
        return None
    return ListenerFiles(access.tls_cert, access.tls_key, None)


def dialling_context(access: AccessConfig) -> ssl.SSLContext | None:
    """For a data stream to a peer; None: it is plain. Raises BadConfig."""
    if access.tls_ca is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.options |= _KERNEL_TLS
    load_authority(context, access.tls_ca)
    if access.tls_cert is not None and access.tls_key is not None:
        load_pair(context, access.tls_cert, access.tls_key)
    return context


def read(path: Path) -> bytes:
    """Raises BadConfig."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(error) from error


def load_pair(context: ssl.SSLContext, cert: Path, key: Path) -> None:
    """Raises BadConfig."""
    try:
        # The password: without it OpenSSL would ask for one at the terminal.
        context.load_cert_chain(cert, key, password=lambda: "")
    except ssl.SSLError as error:
        expected = "expected a certificate and its private key, in PEM without a password"
        raise BadConfig(f"{cert} and {key} cannot be used ({_reason(error)}), {expected}", param="tls_cert") from error
    except OSError as error:
        raise _unreadable(error, f"{cert} or {key}") from error


def load_authority(context: ssl.SSLContext, ca: Path) -> None:
    """Raises BadConfig."""
    try:
        context.load_verify_locations(ca)
    except ssl.SSLError as error:
        raise BadConfig(f"{ca} holds no certificate in PEM ({_reason(error)})", param="tls_ca") from error
    except OSError as error:
        raise _unreadable(error, str(ca)) from error


def _reason(error: ssl.SSLError) -> str:
    return error.reason or str(error)


def _unreadable(error: OSError, what: str = "") -> BadConfig:
    return BadConfig(f"cannot read {error.filename or what}: {error.strerror}", param="tls_cert")
