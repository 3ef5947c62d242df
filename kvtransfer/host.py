"""Names the memory domain a process lives in: two processes with equal ids can pass a memfd to each other."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_NETWORK_NAMESPACE = Path("/proc/self/ns/net")


def host_id() -> str:
    """Boot id, user id and network namespace: what a shared abstract unix socket with an authenticated peer needs.

    Where the kernel does not tell, the id is random, so that nobody is taken for a neighbour by mistake.
    """
    try:
        boot = _BOOT_ID.read_text().strip()
        namespace = os.readlink(_NETWORK_NAMESPACE)
    except OSError:
        return f"unknown-{uuid.uuid4().hex}"
    return f"{boot}/{os.getuid()}/{namespace}"
