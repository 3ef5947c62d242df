"""Names the memory domain of a process: two processes with equal ids can pass a memfd to each other."""

from __future__ import annotations

import contextlib
import os
import uuid
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_NETWORK_NAMESPACE = Path("/proc/self/ns/net")


def host_id() -> str:
    """Boot id, user id and network namespace: what a shared abstract unix socket with an authenticated peer needs.

    Where the kernel does not tell, the id is random, so that no process counts as local by mistake.
    """
    try:
        boot = _BOOT_ID.read_text().strip()
        namespace = os.readlink(_NETWORK_NAMESPACE)
    except OSError:
        return f"unknown-{uuid.uuid4().hex}"
    return f"{boot}/{os.getuid()}/{namespace}"


def keep_apart(number: int) -> None:
    """Let the calling thread run on a share of the process's CPUs only; successive numbers get different shares.

    Threads that sleep between short bursts get woken on one and the same CPU; a scheduler that packs light loads left
    both lanes of a push there for all of its 30 ms. A quarter of the CPUs each (one CPU each of up to four)
    still leaves the scheduler a choice on larger hosts.
    """
    allowed = sorted(os.sched_getaffinity(0))
    num_shares = min(4, len(allowed))
    with contextlib.suppress(OSError):  # A sandbox may forbid it; it is only about speed.
        os.sched_setaffinity(0, allowed[number % num_shares :: num_shares])
