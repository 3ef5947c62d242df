"""`baton doctor`: reports what is installed, what will be used, what is missing and how to get it. Changes nothing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from baton import __version__
from baton.errors import BatonError
from cli import machine, preflight, trial
from cli.launch import cores, host, model_source
from cli.machine import Finding
from cli.usage import program

_DISTRIBUTION = "baton-serve"
_WORKER = "extra worker"
# What a machine may well do without, and the package without which nothing of the extra was meant to be there.
_OPTIONAL = {"worker": "torch", "otel": "opentelemetry-sdk"}
_MARKS = {True: "[green]ok[/green]", False: "[red]missing[/red]", None: "[dim]-[/dim]"}


def examine(model: str = "", registry: str = "", cluster: str = "default") -> list[Finding]:
    """``registry``: the URL of a Redis that is to be looked at too."""
    worker = _extra("worker")
    has_torch = worker.is_ok is True
    findings = [
        Finding("baton", True, f"{__version__} in {Path(__file__).resolve().parents[1]}"),
        Finding(
            "python",
            sys.version_info >= (3, 11),
            f"{platform.python_version()} ({sys.executable})",
            "Baton needs Python 3.11 or newer",
        ),
        Finding("machine", None, f"{platform.platform()}, {platform.machine()}"),
        _extra(""),
        _extra("router"),
        worker,
        _extra("otel"),
    ]
    findings += [*_torch(), *_kernels()] if has_torch else []
    findings += [
        machine.driver(),
        *_transports(),
        _cuda_ipc(has_torch),
        *machine.memory_sharing(),
        *_resources(),
        *machine.limits(),
    ]
    findings += machine.ports()
    if registry:
        findings.append(machine.registry(registry, cluster))
    if model:
        findings += _model(model)
    return findings


def report(findings: list[Finding], console: Console) -> int:
    """Prints the findings; 0 if this machine can serve, be it as a router alone, else 1."""
    table = Table("", "what", "found", box=None, pad_edge=False)
    for finding in findings:
        table.add_row(_MARKS[finding.is_ok], finding.subject, escape(finding.found))
    console.print(table)
    for finding in findings:
        if finding.is_ok is not True and finding.advice:
            console.print(f"[bold]{finding.subject}[/bold]: {escape(finding.advice)}", highlight=False)
    faults = [finding for finding in findings if finding.is_ok is False]
    if faults:
        console.print("[red]this machine cannot serve yet[/red]")
    elif any(finding.subject == _WORKER and finding.is_ok is None for finding in findings):
        console.print("this machine can run routers and clients; workers need the extra worker", highlight=False)
    else:
        console.print(f"this machine can serve: try `{program()} demo`", highlight=False)
    return 1 if faults else 0


def _extra(name: str) -> Finding:
    """Whether everything that an extra of ours asks for is installed, in a version it allows."""
    subject = f"extra {name}" if name else "client"
    try:
        requirements = [Requirement(text) for text in importlib.metadata.requires(_DISTRIBUTION) or ()]
    except importlib.metadata.PackageNotFoundError:
        unknown = f"{_DISTRIBUTION} itself is not installed"
        return Finding(subject, False, unknown, "pip install the checkout or the wheel; in a checkout: make setup")
    found, faults, wanted = [], [], []
    for requirement in requirements:
        if requirement.name == _DISTRIBUTION or not _applies(requirement, name):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            faults.append(f"{requirement.name} is missing")
            wanted.append(f"'{requirement.name}{requirement.specifier}'")
            continue
        if requirement.specifier.contains(version, prereleases=True):
            found.append(f"{requirement.name} {version}")
        else:
            faults.append(f"{requirement.name} is {version}, expected {requirement.specifier}")
            wanted.append(f"'{requirement.name}{requirement.specifier}'")
    if not faults:
        return Finding(subject, True, ", ".join(found))
    # By the packages' own names: ours is in no index.
    advice = f"pip install {' '.join(wanted)}; in a checkout: make setup"
    core = _OPTIONAL.get(name)
    if core is not None and f"{core} is missing" in faults:
        return Finding(subject, None, f"not installed ({len(faults)} packages are missing)", advice)
    return Finding(subject, False, "; ".join(faults), advice)


def _applies(requirement: Requirement, extra: str) -> bool:
    if requirement.marker is None:
        return not extra
    without = requirement.marker.evaluate({"extra": ""})
    return without if not extra else not without and requirement.marker.evaluate({"extra": extra})


def _torch() -> Iterator[Finding]:
    import torch

    from engine.devices import TorchDevices, seen_gpus

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    oneapi = "oneDNN" if torch.backends.mkldnn.is_available() else "no oneDNN"  # type: ignore[no-untyped-call]
    capability = torch.backends.cpu.get_cpu_capability()
    yield Finding("torch", True, f"{torch.__version__} ({build} build, {capability}, {oneapi})")
    cards = host.gpus()
    can_use = torch.cuda.is_available()
    if cards and not can_use:
        yield Finding("gpu", False, f"{'; '.join(cards)}, but torch cannot use it", "make setup CUDA=1")
    elif can_use:
        yield Finding("gpu", True, f"{seen_gpus(TorchDevices())}; --gpus and --device take these numbers")
    else:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        yield Finding("gpu", None, "none" if hidden is None else f"none (CUDA_VISIBLE_DEVICES is '{hidden}')")


def _kernels() -> Iterator[Finding]:
    choice = machine.auto_kernels()
    yield choice
    yield from machine.kernels()
    if choice.found.startswith("triton"):
        yield from trial.tools()
    yield trial.kernel(trial.command("auto"))


def _transports() -> Iterator[Finding]:
    fault = machine.shm_fault()
    advice = "workers on one host will move KV by tcp; memfd and unix sockets need Linux 3.17 or newer" if fault else ""
    yield Finding("transport shm", None if fault else True, fault or "memfd and unix sockets work", advice)
    yield Finding("transport tcp", True, "always there")


def _cuda_ipc(has_torch: bool) -> Finding:
    """Does once what a worker does whose KV lies on a GPU: take memory there and a handle to it."""
    subject = "transport cuda_ipc"
    if not has_torch:
        return Finding(subject, None, "not looked into: the worker extra is missing")
    import torch

    if not torch.cuda.is_available():
        return Finding(subject, None, "no GPU that torch can use")
    from kvtransfer.devices.cuda import CudaDevice

    try:
        device = CudaDevice.of_torch("cuda")
        address = device.allocate(1)
        try:
            device.export(address)
        finally:
            device.free(address)
    except BatonError as error:
        return Finding(subject, None, error.message, "KV on GPUs moves by tcp through pinned memory")
    return Finding(subject, True, f"{len(device.reachable_ids)} GPUs can be written to from the first")


def _resources() -> Iterator[Finding]:
    usable, memory = host.usable_cores(), host.available_memory_bytes()
    all_cores = cores.topology(cores.allowed())
    nodes = len({core.node for core in all_cores})
    where = (
        f"CPUs {cores.shown(cores.allowed())}: {len(all_cores)} cores on {nodes} NUMA node{'s' if nodes > 1 else ''}"
    )
    yield Finding("cores", None, f"{usable}, {where}; baton up gives each worker its share, at least one thread")
    found = f"{memory / 2**30:.1f} GiB free; without a GPU, KV gets half of what weights and activations leave"
    yield Finding("memory", memory > 1 << 30, found, "less than 1 GiB is free: end other programs")
    free = shutil.disk_usage(Path.home()).free
    yield Finding("disk", None, f"{free / 2**30:.0f} GiB free for models fetched from the hub")


def _model(model: str) -> Iterator[Finding]:
    advice = "see the README for the models that are served"
    from engine.model_config import ModelConfig
    from router.text.model_files import load_facts, load_tokenizer_facts, stated

    try:
        folder = model_source.resolve(model)
        preflight.model_files(folder)
        config = ModelConfig.from_folder(folder)
        facts, tokenizer = load_facts(folder), load_tokenizer_facts(folder)
    except BatonError as error:
        yield Finding("model", False, error.message, advice)
        return
    sizes = f"{config.num_layers} layers, {config.num_heads} heads of {config.head_dim} ({config.num_kv_heads} for KV)"
    context = f"{config.vocab_size} tokens, context of {config.max_model_tokens}, {config.dtype}"
    yield Finding("model", True, f"{folder}: {config.architecture}, {sizes}, {context}")
    own = tokenizer.special_tokens.get("eos_token")
    ends = [*map(str, facts.eos_token_ids), *([f"the tokenizer's {own}"] if own else [])]
    defaults = stated(facts.sampling) or "the API's own"
    yield Finding("generation", None, f"defaults: {defaults}; ends at {', '.join(ends) or 'no token'}")
