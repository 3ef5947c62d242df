"""What the containers would run, run here without containers: as a user who is not root and may write only to /tmp."""

from __future__ import annotations

import os
import re
import signal
import site
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from cli.launch.process import ReservedPort
from tests.support.deploy_files import DEPLOY, interpolate, load_yaml, parse_dockerfile
from tests.support.redis_server import RedisServer
from tests.support.root import ROOT

UID = 10001
START_TIMEOUT_S = 60.0
SERVICES = load_yaml(DEPLOY / "compose.yaml")["services"]
STAGES = {stage.name: stage for stage in parse_dockerfile(DEPLOY / "Dockerfile")[1]}


# Root of a test becomes nobody, on a read-only tree with one folder of its own. It may still read what is root's alone,
# such as the interpreter, which in an image every user may read.
CONFINE = """
set -e
mount --bind "$1" "$1"
mount -o remount,ro,bind /
shift
exec setpriv --reuid=10001 --regid=10001 --clear-groups --no-new-privs \\
  --inh-caps=-all,+dac_read_search --ambient-caps=-all,+dac_read_search --bounding-set=-all,+dac_read_search "$@"
"""


def confined(scratch: Path, command: list[str]) -> list[str]:
    """Unchanged for who is not root: then the user has no special rights already."""
    if os.getuid() != 0:
        return command
    return ["unshare", "--mount", "sh", "-c", CONFINE, "sh", str(scratch), *command]


@pytest.fixture
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="baton-container-") as name:
        if os.getuid() == 0:
            os.chown(name, UID, UID)
        probe = confined(Path(name), ["sh", "-c", f"touch {name}/mine && ! touch {ROOT}/not-mine"])
        done = subprocess.run(probe, capture_output=True, text=True, timeout=20, check=False)
        if os.getuid() == 0 and done.returncode != 0:
            pytest.skip(f"root cannot become another user here: {done.stderr.strip()}")
        yield Path(name)


class Containers:
    """Processes with the image's command, environment and user, and a compose service's arguments."""

    def __init__(self, scratch: Path, registry: str) -> None:
        self._scratch = scratch
        self._registry = registry
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def environment(self) -> dict[str, str]:
        return {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": os.pathsep.join([str(ROOT), *site.getsitepackages()]),
            "PYTHONDONTWRITEBYTECODE": "1",
            "HOME": str(self._scratch),
            "TMPDIR": str(self._scratch),
            "OMP_NUM_THREADS": "1",
            "BATON_REGISTRY": self._registry,
            "BATON_CLUSTER_KEY": "c" * 32,
        }

    def command(self, arguments: list[str]) -> list[str]:
        return confined(self._scratch, [sys.executable, "-m", "cli", *arguments])

    def start(self, name: str, replaced: dict[str, str]) -> None:
        words = [interpolate(word, {"BATON_KV_MIB": "64"}) for word in SERVICES[name]["command"]]
        arguments = [words[0], *(replaced.pop(w.partition("=")[0], w) for w in words[1:])]
        assert not replaced, f"{name} has no {replaced}"
        self.processes[name] = subprocess.Popen(
            self.command(arguments),
            cwd=self._scratch,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=(log := (self._scratch / f"{name}.log").open("wb")),
            stderr=log,
        )
        log.close()

    def health(self, image: str, address: str) -> int:
        """The exit code of the image's HEALTHCHECK."""
        _, *arguments = STAGES[image].last("HEALTHCHECK").command
        command = self.command([*arguments[:-1], address])
        done = subprocess.run(
            command, cwd=self._scratch, env=self.environment, timeout=30, capture_output=True, check=False
        )
        return done.returncode

    def logs(self) -> str:
        return "".join(f"--- {p.name}\n{p.read_text()[-2000:]}" for p in sorted(self._scratch.glob("*.log")))


def until_healthy(containers: Containers, image: str, address: str) -> None:
    gives_up_at = time.monotonic() + START_TIMEOUT_S
    # The health check is a process of its own: a second of work that a starting worker does not need beside it.
    while not listens(address) or containers.health(image, address) != 0:
        assert time.monotonic() < gives_up_at, containers.logs()
        assert all(p.poll() is None for p in containers.processes.values()), containers.logs()
        time.sleep(0.1)


def listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


def test_the_compose_cluster_runs_as_nobody_and_leaves_with_0(
    scratch: Path, redis_server: RedisServer, demo_model: Path
) -> None:
    with ExitStack() as stack:
        containers = Containers(scratch, redis_server.url)
        ports = {name: stack.enter_context(reserved()) for name in ("http", "grpc", "prefill-0", "decode-0")}
        stack.callback(kill_all, containers)
        for name in ("prefill-0", "decode-0"):
            changes = {"--listen": f"--listen=127.0.0.1:{ports[name]}", "--advertise": "--advertise=127.0.0.1"}
            containers.start(name, {**changes, "--model": f"--model={demo_model}"})
        faces = {face: f"--{face}=127.0.0.1:{ports[face]}" for face in ("http", "grpc")}
        containers.start("router", {"--model": f"--model={demo_model}"} | {f"--{k}": v for k, v in faces.items()})
        for name in ("prefill-0", "decode-0"):
            until_healthy(containers, "worker", f"127.0.0.1:{ports[name]}")
        until_healthy(containers, "router", f"127.0.0.1:{ports['grpc']}")
        base = f"http://127.0.0.1:{ports['http']}"
        gives_up_at = time.monotonic() + START_TIMEOUT_S
        while "prefill-0" not in (nodes := httpx.get(f"{base}/ready").json()["nodes"]) or "decode-0" not in nodes:
            assert time.monotonic() < gives_up_at, containers.logs()
            time.sleep(0.05)
        body = {"model": "model", "prompt": "Months from May to July:", "max_tokens": 8}
        answer = httpx.post(f"{base}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 200, containers.logs()
        assert "prefill-0" in answer.headers["x-baton-relay"]
        for process in containers.processes.values():
            process.send_signal(signal.SIGTERM)
        assert {name: p.wait(START_TIMEOUT_S) for name, p in containers.processes.items()} == dict.fromkeys(
            containers.processes, 0
        )
        assert redis_server.keys() == [], "both have taken their records out"


@contextmanager
def reserved() -> Iterator[int]:
    port = ReservedPort("127.0.0.1", 0)
    try:
        yield port.port
    finally:
        port.close()


def kill_all(containers: Containers) -> None:
    for process in containers.processes.values():
        process.kill()
        process.wait()


def test_the_router_starts_where_there_is_no_torch() -> None:
    """As in its image: what only the worker's extra brings cannot be imported."""
    absent = ("torch", "transformers", "numpy", "safetensors", "triton", "xxhash", "llvmlite")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({absent!r})); "
        "import router.serve, router.nodes.registry, cli.draining, cli.ask; from cli.main import main; "
        "sys.argv = ['baton', 'router', '--help']; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert "Run the router" in done.stdout


def test_a_worker_serves_on_a_cpu_where_there_is_no_triton() -> None:
    """As in its image: what only GPUs and developers need cannot be imported."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('triton', 'transformers'))); from pathlib import Path; "
        "import worker.worker, cli.doctor; from engine.config import EngineConfig; from engine.runner import Runner; "
        "from tests.support.engine_driver import Driver, spec; "
        "assert 'kernels triton' not in [f.subject for f in cli.doctor.examine()]; "
        f"runner = Runner.load(Path({str(ROOT / 'demo' / 'model')!r}), EngineConfig(num_blocks=8)); "
        "print(runner.kernels, len(Driver(runner).generate(spec('a', (5, 6, 7), max_tokens=4)).token_ids))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"cpu-\w+ 4\n", done.stdout)


def test_extras_hold_what_their_names_say() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {extra: {re.split(r"[\[<>=~; ]", item)[0] for item in items} for extra, items in extras.items()}
    assert not named["worker"] & {"triton", "transformers"}
    assert "triton" in named["cuda"]
