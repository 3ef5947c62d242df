"""Wheels for a machine without a network: gathered with what they need, few enough to travel, installed from the folder
alone."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from bench.gpu_cluster import install
from scripts import gpu_wheels


def make_wheel(folder: Path, name: str, *needs: str, size: int = 10) -> None:
    folder.mkdir(exist_ok=True)
    lines = ["Metadata-Version: 2.1", f"Name: {name}", "Version: 1.0", *(f"Requires-Dist: {need}" for need in needs)]
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", f"value = {size}\n")
        wheel.writestr(f"{name}/data.bin", os.urandom(size))
        info = f"{name}-1.0.dist-info"
        wheel.writestr(f"{info}/METADATA", "\n".join(lines) + "\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


def gather(tmp_path: Path, *wanted: str, limit_bytes: int = gpu_wheels.LIMIT_BYTES) -> list[Path]:
    index = ["--no-index", f"--find-links={tmp_path / 'index'}"]
    to = tmp_path / "wheels"
    return gpu_wheels.gather(to, wanted, "3.12", "x86_64", options=index, limit_bytes=limit_bytes)


def test_what_is_gathered_installs_from_the_folder_alone(tmp_path: Path) -> None:
    make_wheel(tmp_path / "index", "kit_first", "kit_second>=1")
    make_wheel(tmp_path / "index", "kit_second")
    make_wheel(tmp_path / "index", "kit_other")
    wheels = gather(tmp_path, "kit_first")
    assert [wheel.name.partition("-")[0] for wheel in wheels] == ["kit_first", "kit_second"]
    site = tmp_path / "site"
    install(tmp_path / "wheels", site)
    code = "import kit_first, kit_second; print(kit_second.__file__)"
    env = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(site / "kit_second.py")


def test_what_cannot_travel_is_said(tmp_path: Path) -> None:
    make_wheel(tmp_path / "index", "kit_large", size=3 << 20)
    with pytest.raises(SystemExit, match=r"3 MiB of wheels, expected at most 2; the largest is kit_large"):
        gather(tmp_path, "kit_large", limit_bytes=2 << 20)
    with pytest.raises(SystemExit, match="is not empty"):
        gather(tmp_path, "kit_large")


def test_what_is_not_to_be_had_is_said(tmp_path: Path) -> None:
    (tmp_path / "index").mkdir()
    with pytest.raises(SystemExit, match="pip could not"):
        gather(tmp_path, "kit_missing")
    with pytest.raises(FileNotFoundError, match=r"gpu_wheels\.py"):
        install(tmp_path / "wheels", tmp_path / "site")


def test_the_client_and_the_router_are_wanted_but_nothing_that_transformers_brings() -> None:
    names = {gpu_wheels.name_of(line) for line in gpu_wheels.requirements(gpu_wheels.ROOT / "pyproject.toml")}
    assert names >= {
        "fastapi", "uvicorn", "redis", "httptools", "grpcio-health-checking", "grpcio-reflection", "grpcio-status",
        "grpcio", "protobuf", "pydantic",
    }  # fmt: skip
    assert not names & {"torch", "triton", *gpu_wheels.BROUGHT}
