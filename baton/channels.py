"""The one place that makes gRPC channels and the credentials of gRPC ports: plain, or TLS with the files of
AccessConfig. They are read anew for every channel, and by a port when they change.

The key of a cluster is no part of a channel: calls to peers have ``AccessConfig.metadata``.
"""

from __future__ import annotations

from collections.abc import Sequence

import grpc
from grpc import aio

from baton.access import OPEN, AccessConfig
from baton.tls import ListenerFiles, Pem, face_files, peer_files, read

ChannelOptions = Sequence[tuple[str, str | int]]


def dial(address: str, access: AccessConfig = OPEN, options: ChannelOptions = ()) -> aio.Channel:
    """Raises BadConfig for files that cannot be read; connects with the first call."""
    credentials = _credentials(access)
    if credentials is None:
        return aio.insecure_channel(address, options)
    return aio.secure_channel(address, credentials, _named(access, options))


def dial_blocking(address: str, access: AccessConfig = OPEN, options: ChannelOptions = ()) -> grpc.Channel:
    """As `dial`, for threads."""
    credentials = _credentials(access)
    if credentials is None:
        return grpc.insecure_channel(address, options)
    return grpc.secure_channel(address, credentials, _named(access, options))


def peer_credentials(access: AccessConfig) -> grpc.ServerCredentials | None:
    """Of a port for the processes of the cluster; None: it is plain. Raises BadConfig."""
    return _port(peer_files(access), needs_theirs=True)


def face_credentials(access: AccessConfig) -> grpc.ServerCredentials | None:
    """Of a port for clients, who show no certificate; None: it is plain. Raises BadConfig."""
    return _port(face_files(access), needs_theirs=False)


def _credentials(access: AccessConfig) -> grpc.ChannelCredentials | None:
    if access.tls_ca is None:
        return None
    key = None if access.tls_key is None else read(access.tls_key)
    cert = None if access.tls_cert is None else read(access.tls_cert)
    return grpc.ssl_channel_credentials(read(access.tls_ca), key, cert)


def _named(access: AccessConfig, options: ChannelOptions) -> ChannelOptions:
    return [*options, ("grpc.ssl_target_name_override", access.tls_name)] if access.tls_name else options


def _port(files: ListenerFiles | None, *, needs_theirs: bool) -> grpc.ServerCredentials | None:
    if files is None:
        return None

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        """Called for every connection, before its handshake."""
        pem = files.newer()
        return None if pem is None else _configuration(pem)

    return grpc.dynamic_ssl_server_credentials(
        _configuration(files.first),
        fetch,  # type: ignore[arg-type]  # None means no change
        needs_theirs,
    )


def _configuration(pem: Pem) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(pem.key, pem.cert)], pem.ca)
