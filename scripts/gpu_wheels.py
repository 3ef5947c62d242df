"""Collects wheels for a GPU machine without a network: ``python scripts/gpu_wheels.py DIR``.

The machine has torch, triton and transformers; these are the other packages that the cluster needs.
`python -m bench.gpu --wheels DIR` installs them there from DIR alone. The packages are the requirements of the client
and router in pyproject.toml with their dependencies, in the versions of this environment where it has them, since those
are tested.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT_BYTES = 64 << 20
# Installed with transformers, which requires exact versions of them.
BROUGHT = ("tokenizers", "huggingface-hub")
_PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014", "manylinux_2_12", "manylinux2010")


def requirements(pyproject: Path) -> list[str]:
    project = tomllib.loads(pyproject.read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["router"]]
    return [line for line in wanted if name_of(line) not in BROUGHT]


def name_of(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def constraints() -> list[str]:
    """The installed version of every package here."""
    return [f"{found.name}=={found.version}" for found in metadata.distributions() if "+" not in found.version]


def gather(
    folder: Path,
    wanted: Sequence[str],
    python: str,
    machine: str,
    fixed: Iterable[str] = (),
    options: Sequence[str] = (),
    limit_bytes: int = LIMIT_BYTES,
) -> list[Path]:
    """The wheels. Raises SystemExit if they exceed the size limit or pip does not find one."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise SystemExit(f"{folder} is not empty: two versions of one package would meet in it; name another folder")
    platforms = [f"--platform={platform}_{machine}" for platform in _PLATFORMS]
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:", f"--python-version={python}",
        "--implementation=cp", *platforms, f"--dest={folder}", *options,
    ]  # fmt: skip
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(fixed))
        file.flush()
        if subprocess.run([*command, f"--constraint={file.name}", *wanted], check=False).returncode:
            raise SystemExit("pip could not gather them; it says above why")
    wheels = sorted(folder.glob("*.whl"))
    size = sum(wheel.stat().st_size for wheel in wheels)
    if size > limit_bytes:
        largest = max(wheels, key=lambda wheel: wheel.stat().st_size).name
        raise SystemExit(f"{size >> 20} MiB of wheels, expected at most {limit_bytes >> 20}; the largest is {largest}")
    return wheels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12", help="version of the machine's interpreter")
    parser.add_argument("--machine", default="x86_64")
    options = parser.parse_args()
    wheels = gather(
        options.folder, requirements(ROOT / "pyproject.toml"), options.python, options.machine, constraints()
    )  # fmt: skip
    size = sum(wheel.stat().st_size for wheel in wheels)
    print(f"{len(wheels)} wheels, {size / (1 << 20):.1f} MiB, in {options.folder}")


if __name__ == "__main__":
    main()
