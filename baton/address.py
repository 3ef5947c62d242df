"""Parses and formats host:port addresses, and explains why binding one failed. Opens no socket."""

from __future__ import annotations

import errno
import re
import socket

from baton.errors import BadConfig, quoted

_MAX_PORT = 65535
# The longest DNS name.
_MAX_HOST_CHARS = 253
_NO_HOST = re.compile(r"[\s/@?#,;\"'\\]")
_HOST_IS = f"the host is an address or a name of up to {_MAX_HOST_CHARS} characters"
# Wildcard hosts: a listener binds all of its interfaces. A peer cannot connect to them.
_ANYWHERE = frozenset({"", "0.0.0.0", "::", "[::]", "*"})  # noqa: S104 - not to bind


def parse_address(text: str, name: str, *, lowest_port: int = 0) -> tuple[str, int]:
    """Host (IPv6 without brackets) and port. Raises BadConfig whose message begins with ``name``, the option."""
    host, colon, port = text.rpartition(":")
    if not (colon and host and port.isascii() and port.isdecimal() and len(port) <= 5):
        raise BadConfig(f"{name} is {quoted(text)}, expected host:port", param=name)
    if not host.isprintable() or _NO_HOST.search(host) or len(host) > _MAX_HOST_CHARS:
        raise BadConfig(f"{name} is {quoted(text)}, expected host:port, where {_HOST_IS}", param=name)
    if not lowest_port <= int(port) <= _MAX_PORT:
        raise BadConfig(f"{name} is {quoted(text)}, expected a port from {lowest_port} to {_MAX_PORT}", param=name)
    if host.startswith("[") and host.endswith("]"):
        return host[1:-1], int(port)
    if ":" in host:
        raise BadConfig(f"{name} is {quoted(text)}, expected an IPv6 address in brackets: [::1]:{port}", param=name)
    return host, int(port)


def join_address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def why_not_listen(host: str, port: int, name: str, error: OSError) -> BadConfig:
    """The error of a failed bind as BadConfig: which setting (``name``) to change, and how."""
    at = join_address(host, port)
    if isinstance(error, socket.gaierror):
        reason = f"{quoted(host)} does not resolve ({error.strerror}); expected an address or a name of this machine"
    elif error.errno == errno.EADDRINUSE:
        reason = "another process listens there; stop it, or give another port (0: any free one)"
    elif error.errno == errno.EADDRNOTAVAIL:
        reason = f"{host} is no address of this machine; expected one of its own, or 0.0.0.0 for all"
    elif error.errno == errno.EACCES:
        reason = "permission denied; ports below 1024 need CAP_NET_BIND_SERVICE, use a higher one"
    else:
        reason = str(error)
    return BadConfig(f"{name}: cannot listen on {at}: {reason}", param=name)


def host_of(address: str) -> str:
    """The host of host:port, with the brackets of IPv6."""
    return address.rpartition(":")[0]


def is_anywhere(host: str) -> bool:
    return host in _ANYWHERE


def as_dialled(told: str, dialled: str) -> str:
    """The advertised address ``told``; its host, if a wildcard, replaced by that of ``dialled``, where the peer was
    reached."""
    host, colon, port = told.rpartition(":")
    return f"{host_of(dialled)}:{port}" if colon and is_anywhere(host) else told
