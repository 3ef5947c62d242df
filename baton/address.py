"""host:port: how it is read and written, what others make of one, and why nothing can listen on it. Opens nothing."""

from __future__ import annotations

import errno
import re
import socket

from baton.errors import BadConfig, quoted

_MAX_PORT = 65535
# As long as a name may be.
_MAX_HOST_CHARS = 253
_NO_HOST = re.compile(r"[\s/@?#,;\"'\\]")
_HOST_IS = f"the host is an address or a name of up to {_MAX_HOST_CHARS} characters"
# Hosts that mean every interface of whoever listens: to anybody else they say nothing, or mean himself.
_ANYWHERE = frozenset({"", "0.0.0.0", "::", "[::]", "*"})  # noqa: S104 - not to bind


def parse_address(text: str, name: str, *, lowest_port: int = 0) -> tuple[str, int]:
    """Host (of IPv6 without its brackets) and port. Raises BadConfig that begins with ``name``, the option's."""
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
    """What binding raised, as the setting ``name`` that has to change and how."""
    at = join_address(host, port)
    if isinstance(error, socket.gaierror):
        reason = f"{quoted(host)} does not resolve ({error.strerror}); expected an address or a name of this machine"
    elif error.errno == errno.EADDRINUSE:
        reason = "another process listens there; stop it, or give another port (0: any free one)"
    elif error.errno == errno.EADDRNOTAVAIL:
        reason = f"{host} is no address of this machine; expected one of its own, or 0.0.0.0 for all"
    elif error.errno == errno.EACCES:
        reason = "this user may not; ports below 1024 need the right to (CAP_NET_BIND_SERVICE), take a higher one"
    else:
        reason = str(error)
    return BadConfig(f"{name}: cannot listen on {at}: {reason}", param=name)


def host_of(address: str) -> str:
    """The host of host:port, with the brackets of IPv6."""
    return address.rpartition(":")[0]


def is_anywhere(host: str) -> bool:
    return host in _ANYWHERE


def as_dialled(told: str, dialled: str) -> str:
    """Where to reach what somebody told us listens at ``told``, given that he was reached at ``dialled``."""
    host, colon, port = told.rpartition(":")
    return f"{host_of(dialled)}:{port}" if colon and is_anywhere(host) else told
