"""`baton doctor`: what it looks at, and that whatever is wrong comes with what to do."""

from __future__ import annotations

import io
import resource
import socket
from pathlib import Path

import pytest
from rich.console import Console

from cli import machine
from cli.doctor import examine, report


def test_everything_is_looked_at_and_every_fault_has_a_cure() -> None:
    findings = examine()
    subjects = {finding.subject for finding in findings}
    assert {
        "extra router", "extra worker", "torch", "gpu", "kernels cpu", "kernels triton", "nvidia driver",
        "transport shm", "huge pages KV cache", "open files", "address space", "locked memory", "memory",
        "http and metrics port",
    } <= subjects  # fmt: skip
    assert all(finding.advice for finding in findings if finding.is_ok is False)


def test_the_instruction_set_is_that_of_the_kernels() -> None:
    from engine.kernels.cpu import CpuKernels

    found = next(finding for finding in machine.kernels() if finding.subject == "kernels cpu")
    assert found.found.split()[0] in CpuKernels().name


def test_a_low_limit_of_open_files_is_named_with_its_cure() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        found = next(machine.limits())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (found.subject, found.is_ok) == ("open files", None)
    assert found.found.startswith("256 (")
    assert "8192" in found.advice


def test_a_taken_port_is_seen() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        http, grpc = machine.ports(taken.getsockname()[1], 0)
    assert (http.is_ok, grpc.is_ok) == (None, True)
    assert "--http-port 0" in http.advice


@pytest.mark.parametrize("url", ["redis://:secret@127.0.0.1:1", "http://127.0.0.1"])
def test_a_registry_that_cannot_be_used_fails_the_doctor_and_keeps_the_password(url: str) -> None:
    finding = machine.registry(url, "default")
    assert finding.is_ok is False
    assert finding.advice
    shown = io.StringIO()
    assert report([finding], Console(file=shown, width=200)) == 1
    assert "secret" not in shown.getvalue()
    assert "127.0.0.1" in shown.getvalue()


def test_a_driver_that_does_not_work_is_told_apart_from_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path))
    command.write_text("#!/bin/sh\necho 580.95.05\necho 580.95.05\n")
    command.chmod(0o755)
    assert (machine.driver().is_ok, machine.driver().found) == (True, "580.95.05")
    command.write_text("#!/bin/sh\necho 'Driver/library version mismatch' >&2\nexit 18\n")
    broken = machine.driver()
    assert broken.is_ok is False
    assert "mismatch" in broken.advice
