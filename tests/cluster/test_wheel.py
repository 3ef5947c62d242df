"""The wheel, installed: it takes no name but `baton`, and runs its own code from a folder full of namesakes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.support.root import ROOT

PACKAGES = ("baton", "cli", "decode_node", "demo", "engine", "kvtransfer", "loadgen", "planner", "prefill_node",
            "router", "worker")  # fmt: skip
FILES = ("pyproject.toml", "setup.py", "README.md", "LICENSE")
# What the extra `worker` brings, and what stands for it in a folder of installed packages.
COMPUTES_WITH = ("huggingface_hub", "llvmlite", "numpy", "nvidia_ml", "pynvml", "safetensors", "torch", "transformers",
                 "triton", "xxhash")  # fmt: skip
NAMESAKES = ("engine", "router", "cli", "baton", "typing", "torch", "demo")
LIMIT_S = 100.0
SETUP_LIMIT_S = 60.0


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: building leaves files behind."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, source)
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, built], cwd=source, check=True, capture_output=True, timeout=60)
    (found,) = built.iterdir()
    return found


@dataclass(frozen=True, slots=True)
class Installed:
    """An environment with the wheel, and a folder of a user's to run it from."""

    bin: Path
    folder: Path

    def run(self, *command: str, limit_s: float = LIMIT_S) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.bin / command[0]), *command[1:]],
            cwd=self.folder, env=environment(), capture_output=True, text=True, timeout=limit_s, check=False,
        )  # fmt: skip


def environment() -> dict[str, str]:
    """As a user who has installed Baton and has no checkout."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "BATON_API_KEY", "COLUMNS")}


def install(wheel: Path, folder: Path, without: tuple[str, ...] = ()) -> Installed:
    """What is installed here, linked to, but for ``without``, for Baton, and for what points to this checkout."""
    prefix = folder / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", prefix], check=True, timeout=SETUP_LIMIT_S)
    (packages,) = prefix.glob("lib/python*/site-packages")
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        is_ours = entry.name.startswith(("baton_serve", "__editable__"))
        if not is_ours and not entry.name.startswith(without) and entry.suffix != ".pth":
            (packages / entry.name).symlink_to(entry)
    pip = [sys.executable, "-m", "pip", "--python", str(prefix / "bin" / "python")]
    install = [*pip, "install", "-qq", "--no-deps", "--no-index", wheel]
    subprocess.run(install, env=environment(), check=True, timeout=SETUP_LIMIT_S)
    users = folder / "user"
    users.mkdir()
    for name in NAMESAKES:
        (users / f"{name}.py").write_text(f"raise SystemExit('{name} of the current folder')\n")
    return Installed(prefix / "bin", users)


@pytest.fixture
def installed(wheel: Path, tmp_path: Path) -> Installed:
    return install(wheel, tmp_path)


def test_the_wheel_takes_no_name_but_baton_and_has_all_files(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"baton"}
    packed = {name.removeprefix("baton/_serving/") for name in names}
    ours = [path for name in PACKAGES for path in (ROOT / name).rglob("*") if path.is_file()]
    missing = [str(x.relative_to(ROOT)) for x in ours if str(x.relative_to(ROOT)) not in packed and x.suffix != ".pyc"]
    assert missing == []


@pytest.fixture
def running(installed: Installed) -> Iterator[subprocess.Popen[str]]:
    command = [
        *(str(installed.bin / "baton"), "up", "--model", str(ROOT / "demo" / "model"), "--api-key", "hush"),
        *("--prefill", "0", "--decode", "0", "--mixed", "1", "--kv-mib", "64", "--http-port", "0", "--grpc-port", "0"),
    ]
    launcher = subprocess.Popen(command, cwd=installed.folder, env=environment(), stderr=subprocess.PIPE, text=True)
    with launcher:
        try:
            yield launcher
        finally:
            launcher.terminate()


def test_a_cluster_runs_its_own_code_and_ends_with_its_router(
    installed: Installed, running: subprocess.Popen[str]
) -> None:
    assert running.stderr is not None
    # By the path that it was called by, as it is not on PATH; from the current folder, if it lies inside.
    called = installed.bin / "baton"
    program = called.relative_to(installed.folder) if called.is_relative_to(installed.folder) else called
    said = []
    for line in running.stderr:
        said.append(line)
        if line.startswith("try: "):
            break
    assert said[-1].startswith(f"try: {program} generate "), "".join(said)
    assert "--api-key KEY" in said[-1], "the hint would be refused without a key"
    assert "hush" not in said[-1]
    address = said[-1].split("--router ")[1].split()[0]

    children = {child.cmdline()[3]: child for child in psutil.Process(running.pid).children()}
    assert children["worker"].cmdline()[1] == "-P"
    assert children["router"].environ()["BATON_API_KEY"] == "hush"
    assert "BATON_API_KEY" not in children["worker"].environ()

    asked = installed.run("baton", "generate", "--router", address, "--api-key", "hush", "Months from May to July:")
    assert (asked.returncode, asked.stdout) == (0, " May June July.\n"), asked.stderr
    status = installed.run("baton", "status", "--router", address, "--api-key", "hush")
    title = status.stdout.splitlines()[0]
    assert title.startswith("model · 0 running"), status.stderr
    assert "kernels cpu" in title, "a pipe has no width to be cut to"
    http = next(line for line in said if line.startswith("ready: ")).split(" at ")[1].split("/v1")[0]
    load = ("--trace", "code", "--rate", "20", "--requests", "3", "--max-prompt", "16", "--max-output", "4")
    bench = installed.run("baton", "bench", "serve", "--url", http, "--api-key", "hush", *load, "-o", "load.json")
    assert bench.returncode == 0, bench.stderr
    assert json.loads((installed.folder / "load.json").read_text())["figures"][0]["whole"] == 3, bench.stdout
    users = installed.run("python", "-c", "import router")
    assert "router of the current folder" in users.stderr

    children["router"].send_signal(signal.SIGTERM)
    assert running.wait(LIMIT_S) == 0, "told to end is no failure"
    assert "router was told to end" in running.stderr.read()


def test_a_router_only_install_can_route_and_says_what_it_cannot(wheel: Path, tmp_path: Path) -> None:
    installed = install(wheel, tmp_path, without=(*COMPUTES_WITH, "opentelemetry_sdk"))
    doctor = installed.run("baton", "doctor", "--model", str(ROOT / "demo" / "model"))
    assert doctor.returncode == 0, doctor.stdout + doctor.stderr
    lines = {line[4:].split("  ")[0].strip(): line for line in doctor.stdout.splitlines()}
    assert "not installed" in lines["extra worker"]
    assert "not installed" in lines["extra otel"]
    assert "ModelConfig(" not in lines["model"]
    assert "LlamaForCausalLM" in lines["model"]
    assert "this machine can run routers and clients" in doctor.stdout
    assert "cannot serve" not in doctor.stdout
    for command in (["up"], ["worker", "--role", "mixed"]):
        told = installed.run("baton", *command, "--model", str(ROOT / "demo" / "model"))
        assert told.returncode == 2
        (line,) = told.stderr.splitlines()
        assert "workers need the extra worker" in line
