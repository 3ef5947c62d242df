"""`baton doctor`: what it looks at, and that whatever is wrong comes with what to do."""

from __future__ import annotations

import io
import json
import re
import resource
import socket
import sys
from pathlib import Path

import pytest
from rich.console import Console
from torch import Tensor

from baton.errors import InternalError
from cli import machine, trial
from cli.doctor import examine, report
from engine.kernels.reference import ReferenceKernels
from tests.support.root import ROOT


def test_everything_is_looked_at_and_every_fault_has_a_cure() -> None:
    findings = examine()
    subjects = {finding.subject for finding in findings}
    assert {
        "extra router", "extra worker", "torch", "gpu", "kernels cpu", "kernels triton", "nvidia driver",
        "transport shm", "huge pages KV cache", "open files", "address space", "locked memory", "memory",
        "http and metrics port", "kernel trial",
    } <= subjects  # fmt: skip
    assert all(finding.advice for finding in findings if finding.is_ok is False)
    tried = next(finding for finding in findings if finding.subject == "kernel trial")
    assert tried.is_ok is True
    assert re.fullmatch(r"cpu-\w+ on cpu: compiled, run and right in [\d.]+ s", tried.found)


def test_a_models_own_defaults_are_shown(tmp_path: Path) -> None:
    model = ROOT / "demo" / "model"
    for path in model.iterdir():
        if path.name != "generation_config.json":
            (tmp_path / path.name).symlink_to(path)
    generation = {"temperature": 0.6, "top_k": 20, "max_new_tokens": 99, "eos_token_id": [7, 8]}
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    (shown,) = [finding.found for finding in examine(str(tmp_path)) if finding.subject == "generation"]
    assert shown.startswith("defaults: temperature 0.6, top_k 20, max_tokens 99; ends at 7, 8")


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


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import os; os.kill(os.getpid(), 4)", "ended by SIGILL"),
        ("import sys; sys.exit('warning\\nerror: BadConfig: no C compiler')", "error: BadConfig: no C compiler"),
        ("import time; time.sleep(60)", "a kernel was not compiled and run in 1 s"),
        ("raise SystemExit(1)", "nothing"),
    ],
)
def test_a_kernel_that_does_not_run_takes_nobody_with_it(code: str, said: str) -> None:
    found = trial.kernel([sys.executable, "-c", code], timeout_s=20.0 if "sleep" not in code else 1.0)
    assert (found.is_ok, found.found) == (False, said)
    assert found.advice


def test_what_a_kernel_computes_is_looked_at() -> None:
    class Wrong(ReferenceKernels):
        name = "wrong"

        def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
            return super().rms_norm(x, weight, eps) + 1e-4

    assert trial.check(ReferenceKernels()).startswith("reference on cpu: compiled, run and right")
    with pytest.raises(InternalError, match=r"wrong on cpu is .* from the reference"):
        trial.check(Wrong())


def test_what_triton_builds_with_is_looked_for(tmp_path: Path) -> None:
    """One line each, with the package that has it."""
    compiler, header = trial.tools({"PATH": str(tmp_path)}, tmp_path)
    assert (compiler.is_ok, compiler.found) == (False, "no gcc, no clang")
    assert "apt-get install gcc" in compiler.advice
    assert header.is_ok is False
    assert f"apt-get install python{sys.version_info.major}.{sys.version_info.minor}-dev" in header.advice
    (tmp_path / "Python.h").touch()
    for name in ("clang", "gcc"):
        (tmp_path / name).touch(mode=0o755)
        compiler, header = trial.tools({"PATH": str(tmp_path)}, tmp_path)
        assert (compiler.is_ok, compiler.found) == (True, str(tmp_path / name)), "gcc comes first, as Triton has it"
        assert header.is_ok is True
    compiler, _ = trial.tools({"PATH": str(tmp_path), "CC": "icc"}, tmp_path)
    assert (compiler.is_ok, compiler.found) == (False, "CC is icc, which is not there")


@pytest.mark.parametrize(
    ("enabled", "shared", "ok"),
    [
        ("always [madvise] never", "always within_size [advise] never deny force", [True, True]),
        ("[always] madvise never", "always within_size advise [never] deny force", [True, None]),
        ("always madvise [never]", "[always] within_size advise never deny force", [None, True]),
    ],
)
def test_huge_pages_are_there_if_they_come_when_asked_for(
    enabled: str, shared: str, ok: list[bool | None], tmp_path: Path
) -> None:
    (tmp_path / "enabled").write_text(enabled)
    (tmp_path / "shmem_enabled").write_text(shared)
    found = [f for f in machine.memory_sharing(tmp_path) if f.subject.startswith("huge pages")]
    assert [f.is_ok for f in found] == ok
    assert all(str(tmp_path) in f.advice for f in found if not f.is_ok)
