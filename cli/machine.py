"""Checks this machine for serving: one finding each, with its remedy, for `baton doctor`. Changes nothing."""

from __future__ import annotations

import asyncio
import importlib.metadata
import importlib.util
import os
import resource
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from baton.errors import BadConfig, BatonError
from cli.launch import host
from cli.launch.process import ReservedPort
from cli.usage import program
from router.config import GRPC_PORT, HTTP_PORT

if TYPE_CHECKING:
    from engine.devices import Accelerator

# A router holds a socket for each stream, and asks for more than nodes and files take.
_MIN_OPEN_FILES = 8192
_THP = Path("/sys/kernel/mm/transparent_hugepage")
_DRIVER_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class Finding:
    """``is_ok`` None is neither good nor bad: something to know. ``advice`` is how to mend or better what was found."""

    subject: str
    is_ok: bool | None
    found: str
    advice: str = ""


def auto_kernels(has: Accelerator | None = None) -> Finding:
    """What ``--kernels auto`` takes here; ``has`` is what there is, by default what is found."""
    from engine.devices import TorchDevices
    from engine.kernels import choose

    has = TorchDevices().look(0) if has is None else has
    name, why = choose(has)
    advice = "" if has.gpu is None or name == "triton" else "the GPU is not used"
    if has.gpu is not None and not has.has_triton:
        advice = "install Baton with its extra cuda; until then the GPU is not used"
    return Finding("kernels auto", None if advice else True, f"{name}: {why}", advice)


def kernels() -> Iterator[Finding]:
    """Which kernels a worker of this machine has. The worker extra is installed."""
    try:
        from engine.kernels.cpu.llvm import Isa

        name = Isa.of_host().name
    except Exception as error:  # a broken installation fails in many ways
        advice = "pip install --force-reinstall llvmlite"
        yield Finding("kernels cpu", False, f"llvmlite, which compiles them, fails: {error}", advice)
        return
    advice = {
        "avx512bf16": "",
        "avx512": "no bf16 products: --dtype float32 computes as fast here, at twice the memory",
        "avx2": "half of AVX-512's lanes, no bf16 products; in a virtual machine pass the host's processor through",
        "128bit": "no AVX2: in a virtual machine pass the host's processor through (for example -cpu host)",
    }[name]
    yield Finding("kernels cpu", None if advice else True, f"{name} vectors, compiled at start-up", advice)
    if importlib.util.find_spec("triton") is None:
        # Without a GPU nothing would use it, and where there is one `auto_kernels` says how to get it.
        return
    try:
        import triton  # noqa: F401 - whether it can be is the question
    except Exception as error:  # a broken installation fails in many ways
        yield Finding("kernels triton", None, f"import fails: {error}", "reinstall triton beside this torch")
    else:
        how = " (interpreted, slow: TRITON_INTERPRET is set)" if os.environ.get("TRITON_INTERPRET") == "1" else ""
        yield Finding("kernels triton", True, f"Triton {importlib.metadata.version('triton')}{how}")


def driver() -> Finding:
    command = shutil.which("nvidia-smi")
    if command is None:
        has_card = host.has_card()
        advice = "there is a card, but no nvidia-smi: install the driver's utilities, or give the container them"
        return Finding("nvidia driver", False if has_card else None, "no nvidia-smi", advice if has_card else "")
    query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=_DRIVER_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return Finding(
            "nvidia driver", False, "nvidia-smi does not answer", "the driver hangs: see dmesg for Xid lines"
        )
    versions = sorted(set(done.stdout.split()))
    advice = f"nvidia-smi says: {(done.stderr or done.stdout).strip()[:200]}"
    return Finding("nvidia driver", done.returncode == 0 and bool(versions), ", ".join(versions) or "none", advice)


def limits() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    can_raise = _allows(hard, _MIN_OPEN_FILES)
    raise_it = f"ulimit -n {_MIN_OPEN_FILES}" if can_raise else "raise nofile in limits.conf, the unit or the container"
    enough = _allows(soft, _MIN_OPEN_FILES)
    advice = "" if enough else f"a router of many streams needs {_MIN_OPEN_FILES}: {raise_it}"
    yield Finding("open files", True if enough else None, f"{_shown(soft)} (hard limit {_shown(hard)})", advice)
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    advice = (
        "" if soft == resource.RLIM_INFINITY else "the KV cache reserves its address space at once: ulimit -v unlimited"
    )
    yield Finding("address space", None if advice else True, _shown(soft), advice)
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    locked = _shown(soft if soft == resource.RLIM_INFINITY else soft >> 10, " KiB")
    yield Finding("locked memory", None, f"{locked}; RDMA needs unlimited, nothing else does")


def memory_sharing(huge_pages: Path = _THP) -> Iterator[Finding]:
    """memfd is not bounded by /dev/shm but by memory; a sysctl can forbid or alter it."""
    noexec = Path("/proc/sys/vm/memfd_noexec")
    if noexec.exists() and noexec.read_text().strip() == "2":
        yield Finding("memfd", None, "vm.memfd_noexec is 2: memfd_create without MFD_NOEXEC_SEAL is refused",
                      "sysctl vm.memfd_noexec=1, or run with --transport tcp")  # fmt: skip
    overcommit = Path("/proc/sys/vm/overcommit_memory")
    if overcommit.exists() and overcommit.read_text().strip() == "2":
        yield Finding("overcommit", None, "vm.overcommit_memory is 2: a KV cache counts in full before it is used",
                      "give --kv-mib what is really needed, or sysctl vm.overcommit_memory=0")  # fmt: skip
    # Weights of CPU workers and the KV cache ask for huge pages: the setting that grants what is asked for is enough.
    for name, what, wanted in (("enabled", "weights", "madvise"), ("shmem_enabled", "KV cache", "advise")):
        chosen = _chosen(huge_pages / name)
        if chosen is None:
            yield Finding(f"huge pages {what}", None, "not offered by this kernel")
            continue
        is_on = chosen in (wanted, "always", "within_size", "force")
        advice = "" if is_on else f"CPUs read huge pages faster: echo {wanted} > {huge_pages / name}"
        yield Finding(f"huge pages {what}", True if is_on else None, f"{name} is {chosen}", advice)


def ports(http_port: int = HTTP_PORT, grpc_port: int = GRPC_PORT) -> Iterator[Finding]:
    for name, option, port in (
        ("http and metrics port", "http-port", http_port),
        ("grpc port", "grpc-port", grpc_port),
    ):
        try:
            ReservedPort("127.0.0.1", port).close()
        except OSError:
            yield Finding(name, None, f"{port} is taken", f"`{program()} up --{option} 0` takes any free one")
        else:
            yield Finding(name, True, f"{port} is free")


def registry(url: str, cluster: str) -> Finding:
    """Whether Redis lets us in and what is registered there."""
    from baton.registry import Registry, RegistryConfig

    async def look(config: RegistryConfig) -> str:
        registry = Registry(config)
        try:
            await registry.check_writable()
            nodes, _ = await registry.nodes()
        finally:
            await registry.close()
        return f"{config.shown_url}: reachable, {len(nodes)} nodes in cluster {cluster!r}"

    try:
        return Finding("registry", True, asyncio.run(look(RegistryConfig(url, cluster))))
    except BadConfig as error:
        return Finding("registry", False, error.message, "user, password and ACL: Baton needs keys baton:* and scripts")
    except BatonError as error:
        return Finding("registry", False, error.message, "is redis-server up, its address right, the port open?")


def _allows(limit: int, wanted: int) -> bool:
    return limit == resource.RLIM_INFINITY or limit >= wanted


def _shown(limit: int, unit: str = "") -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else f"{limit}{unit}"


def _chosen(path: Path) -> str | None:
    """Of a file such as ``always [madvise] never``."""
    try:
        words = path.read_text().split()
    except OSError:
        return None
    return next((word.strip("[]") for word in words if word.startswith("[")), None)


def shm_fault() -> str:
    """Does once what two workers on one host do: pass shared memory over a unix socket."""
    if not hasattr(os, "memfd_create"):
        return "no memfd on this platform"
    try:
        fd = os.memfd_create("baton-doctor")
        try:
            left, right = socket.socketpair(socket.AF_UNIX)
            with left, right:
                socket.send_fds(left, [b"x"], [fd])
                for received in socket.recv_fds(right, 1, 1)[1]:
                    os.close(received)
        finally:
            os.close(fd)
    except OSError as error:
        return str(error)
    return ""
