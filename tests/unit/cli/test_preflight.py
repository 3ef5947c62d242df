"""Whatever a command is told wrongly: one line that names it and the cure, exit code 2, before anything starts."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from baton.address import parse_address
from baton.client import Client, Options
from baton.errors import BadConfig, InvalidRequest
from cli import ask, preflight
from cli.main import main
from demo import model as _model  # the folder, as a package without code
from tests.support.fake_nodes import FakeCluster
from tests.support.root import ROOT
from tests.support.router import router_beside

MODEL = str(Path(next(iter(_model.__path__))))
UP = ["up", "--model", MODEL, "--http-port", "0", "--grpc-port", "0"]
WORKER = ["worker", "--model", MODEL, "--role", "mixed", "--kv-mib", "64"]
ROUTER = ["router", "--model", MODEL, "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0", "--node", "127.0.0.1:1"]


@dataclass(frozen=True, slots=True)
class Said:
    exit_code: int
    line: str


@pytest.fixture
def baton(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Said]]:
    """Runs a command line in this process; it has to end with one line on standard error."""
    terminate = signal.getsignal(signal.SIGTERM)

    def run(*arguments: str) -> Said:
        monkeypatch.setattr(sys, "argv", ["baton", *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        (line,) = capfd.readouterr().err.splitlines()
        assert isinstance(ended.value.code, int)
        return Said(ended.value.code, line)

    yield run
    signal.signal(signal.SIGTERM, terminate)


def refused(said: Said, *parts: str) -> None:
    assert said.exit_code == 2
    for part in parts:
        assert part in said.line


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([*UP, "--ready-file", "/nowhere/x"], ["--ready-file", "no folder /nowhere"]),
        ([*UP, "--ready-file", "/tmp"], ["--ready-file", "is a folder"]),
        ([*UP, "--ready-file", ""], ["--ready-file", "empty"]),
        ([*UP, "--ready-file", "/dev/null"], ["--ready-file", "no regular file"]),
        ([*UP, "--ready-file", "/proc/x"], ["--ready-file", "cannot write '/proc/x'"]),
        ([*UP, "--ready-file", "x" * 300], ["--ready-file", "cannot write"]),
        ([*UP, "--log-dir", ""], ["--log-dir", "empty"]),
        ([*UP, "--log-dir", "/proc/x"], ["--log-dir", "cannot write '/proc/x'"]),
        ([*UP, "--log-dir", f"{MODEL}/config.json"], ["--log-dir", "which is a file"]),
        ([*UP, "--log-dir", f"{MODEL}/config.json/x"], ["--log-dir", "Not a directory"]),
        ([*UP, "--http-port", "5", "--grpc-port", "5"], ["--http-port and --grpc-port are both 5"]),
        ([*UP, "--gpus", "1"], ["--gpus 1: GPU 1 is not there; torch sees no GPUs"]),
        ([*UP, "--cpus", "9999"], ["--cpus names CPU 9999"]),
        ([*WORKER, "--cpus", "0-"], ["--cpus is '0-', expected CPUs"]),
        ([*UP, "--http-port", "70000"], ["--http-port", "65535"]),
        ([*UP, "--grpc-port", "-1"], ["--grpc-port"]),
        ([*UP, "--host", ""], ["--host is empty"]),
        ([*UP, "--host", "nobody.invalid"], ["'nobody.invalid' does not resolve"]),
        ([*UP, "--host", "192.0.2.1"], ["192.0.2.1 is no address of this machine"]),
        ([*UP, "--prefill", "-1"], ["--prefill"]),
        ([*UP, "--mixed", "100000"], ["--mixed"]),
        ([*UP, "--threads", "1000000"], ["--threads"]),
        ([*UP, "--block-tokens", "5"], ["--block-tokens is 5", "a power of two from 16 to 256"]),
        ([*WORKER, "--block-tokens", "65536"], ["--block-tokens is 65536", "a power of two from 16 to 256"]),
        ([*UP, "--max-num-seqs", "9" * 5000], ["--max-num-seqs"]),
        ([*UP, "--peak-tflops", "nan"], ["--peak-tflops"]),
        ([*UP, "--api-key", "a b"], ["--api-key", "without spaces"]),
        ([*UP, "--registry", "redis://:secret@h:70000"], ["redis://h:70000", "Port out of range"]),
        ([*UP, "--registry", "http://h"], ["--registry is 'http://h'", "redis://host:port"]),
        ([*UP, "--cluster", "a:b"], ["--cluster is 'a:b'", "letters"]),
        ([*UP, "--model-name", "a\nb"], ["--model-name is 'a\\nb'", "printable"]),
        ([*UP, "--model-name", " "], ["--model-name is ' '", "printable"]),
        ([*UP, "--model-name", "a", "--served-model-name", "a"], ["--model-name is 'a', expected each name once"]),
        ([*UP, "--max-model-len", "999999"], ["--max-model-len is 999999, expected at most 2048, the model's context"]),
        ([*UP, "--revision", "main"], ["--revision is 'main'", "which has no revisions"]),
        ([*UP, "--chat-template", "/nowhere"], ["--chat-template is '/nowhere', expected the path of a file"]),
        ([*UP, "--chat-template", "{% for"], ["chat template cannot be compiled"]),
        ([*UP, "--tokenizer", "/nowhere"], ["tokenizer folder /nowhere does not exist"]),
        ([*UP, "--tokenizer", "/"], ["--tokenizer is '/', which has no tokenizer.json"]),
        ([*UP, "--seed", "-1"], ["--seed"]),
        ([*UP, "--allowed-origins", "here"], ["--allowed-origins is 'here', expected * or an origin"]),
        ([*UP, "--allowed-origins", "https://a.b/c"], ["--allowed-origins is 'https://a.b/c'", "without a path"]),
        ([*UP, "--transport", "cuda_ipc"], ["cuda_ipc", "expected shm or tcp"]),
        ([*UP, "--kernels", "triton"], ["--kernels triton", "NVIDIA GPU"]),
        ([*WORKER, "--transport", "cuda_ipc"], ["cuda_ipc", "expected shm or tcp"]),
        ([*WORKER, "--kernels", "triton"], ["--kernels triton", "NVIDIA GPU"]),
        ([*WORKER, "--model-name", "x" * 300], ["--model-name is ", "1 to 255 printable"]),
        ([*WORKER, "--node-id", "a\nb"], ["--node-id is 'a\\nb'"]),
        ([*WORKER, "--node-id", "x" * 300], ["--node-id is 'xxx", "1 to 255 printable"]),
        ([*WORKER, "--advertise", "0.0.0.0"], ["--advertise is 0.0.0.0, which cannot be dialled"]),
        ([*WORKER, "--advertise", "a b"], ["--advertise", "expected host:port"]),
        ([*WORKER, "--advertise", "x" * 300], ["--advertise", "up to 253 characters"]),
        ([*WORKER, "--listen", "nobody.invalid:0", "--allow-open"], ["--listen", "'nobody.invalid' does not resolve"]),
        ([*WORKER, "--listen", "127.0.0.1"], ["--listen is '127.0.0.1', expected host:port"]),
        ([*WORKER, "--listen", "127.0.0.1:70000"], ["--listen", "a port from 0 to 65535"]),
        ([*WORKER, "--listen", "::1:7"], ["--listen", "in brackets: [::1]:7"]),
        ([*WORKER, "--listen", "127.0.0.1:5", "--metrics-port", "5"], ["--listen and --metrics-port are both"]),
        ([*WORKER, "--advertise", "me:5"], ["--advertise"]),
        ([*WORKER, "--grace", "inf"], ["--grace"]),
        ([*WORKER, "--registry-lease", "nan"], ["--registry-lease", "3600"]),
        (ROUTER[:-2], ["--node HOST:PORT", "--registry redis://"]),
        ([*ROUTER, "--node", ""], ["--node is ''", "expected host:port"]),
        ([*ROUTER, "--node", "127.0.0.1:0"], ["--node is '127.0.0.1:0'", "from 1"]),
        ([*ROUTER, "--node", "0.0.0.0:7001"], ["--node is '0.0.0.0:7001'", "can be dialled"]),
        ([*ROUTER, "--node", "http://h:7001"], ["--node is 'http://h:7001'", "the host is an address or a name"]),
        ([*ROUTER, "--model-name", "a\x1bb"], ["--model-name", "printable"]),
        ([*ROUTER, "--node", "127.0.0.1:1"], ["--node has 127.0.0.1:1 2 times"]),
        ([*ROUTER, "--http", "127.0.0.1:²"], ["--http", "expected host:port"]),
        ([*ROUTER, "--http", "127.0.0.1:9", "--grpc", "127.0.0.1:9"], ["--http and --grpc are both 127.0.0.1:9"]),
        (["generate", "x", "--router", "here"], ["--router is 'here', expected host:port"]),
        (["generate", "x", "--top-k", "9" * 30], ["--top-k"]),
        (["generate", "x", "--temperature", "nan"], ["--temperature"]),
        (["chat", "--router", "h:0"], ["--router is 'h:0'", "from 1"]),
        (["status", "--watch", "nan"], ["--watch"]),
        (["trace", "-o", "/nowhere/x"], ["--output", "no folder /nowhere"]),
        (["trace", "-o", "/tmp"], ["--output", "is a folder"]),
        (["trace", "-o", ""], ["--output", "empty"]),
        (["trace", "--last", "inf"], ["--last"]),
        (["drain", "decode-0", "--direct"], ["NODE is 'decode-0', expected host:port"]),
        (["drain", "decode-0", "--grace", "nan"], ["--grace"]),
        (["health", "here"], ["ADDRESS is 'here', expected host:port"]),
        (["health", "127.0.0.1:1", "--timeout", "inf"], ["--timeout"]),
        (["demo", "--model", "/nowhere"], ["model folder /nowhere does not exist"]),
    ],
    ids=lambda value: " ".join(value)[:60].replace(MODEL, "M") if isinstance(value, list) else None,
)
def test_a_wrong_value_is_named_before_anything_starts(
    baton: Callable[..., Said], arguments: list[str], parts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")  # no nvidia-smi
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    refused(baton(*arguments), *parts)


@pytest.mark.parametrize(
    "arguments",
    [
        [*UP, "--http-port", "PORT"],
        [*UP, "--grpc-port", "PORT"],
        [*WORKER, "--listen", "127.0.0.1:PORT"],
        [*WORKER, "--metrics-port", "PORT"],
        [*ROUTER, "--http", "127.0.0.1:PORT"],
        [*ROUTER, "--grpc", "127.0.0.1:PORT"],
    ],
    ids=lambda arguments: f"{arguments[0]} {arguments[-2]}",
)
def test_a_port_that_is_taken_is_named_with_its_cure(baton: Callable[..., Said], arguments: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        option = arguments[-2]
        refused(baton(*(x.replace("PORT", port) for x in arguments)), option, f"127.0.0.1:{port}", "give another port")


def test_a_worker_looks_at_its_port_and_the_memory_before_it_loads(baton: Callable[..., Said]) -> None:
    """One line, as `refused` asks for: loading says which kernels it takes."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        refused(baton(*WORKER, "--listen", address), "--listen", address)
    refused(baton(*WORKER, "--kv-mib", "9000000"), "KV cache of 9000000 MiB", "--kv-mib")


@pytest.mark.parametrize("command", [["up"], ["worker", "--role", "mixed"]], ids=lambda x: x[0])
def test_a_model_that_is_not_whole_is_refused_at_once(
    baton: Callable[..., Said], command: list[str], tmp_path: Path
) -> None:
    config = tmp_path / "config.json"
    refused(baton(*command, "--model", str(tmp_path)), "has no config.json")
    config.write_text("{}")
    refused(baton(*command, "--model", str(tmp_path)), "architecture")
    config.write_bytes((Path(MODEL) / "config.json").read_bytes())
    refused(baton(*command, "--model", str(tmp_path)), "holds no weights; expected model.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("[]")
    refused(baton(*command, "--model", str(tmp_path)), "model.safetensors.index.json", "index")
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    refused(baton(*command, "--model", str(tmp_path)), "model-1.safetensors")


@pytest.mark.parametrize("command", [["up"], ["worker", "--role", "mixed"]], ids=lambda x: x[0])
@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"intermediate_size": 640}, ["mlp.gate_proj.weight", "has shape", "by config.json"]),
        ({"vocab_size": 77}, ["model.embed_tokens.weight", "expected (77, "]),
        ({"num_hidden_layers": 9}, ["lack model.layers.", "and 49 more"]),
        ({"num_hidden_layers": 1}, ["does not have: model.layers.1."]),
    ],
    ids=["width", "vocabulary", "more layers", "fewer layers"],
)
def test_weights_that_are_not_the_configs_are_refused_at_once(
    baton: Callable[..., Said], command: list[str], change: dict[str, int], parts: list[str], tmp_path: Path
) -> None:
    for path in Path(MODEL).iterdir():
        if path.name != "config.json":
            (tmp_path / path.name).symlink_to(path)
    config = json.loads((Path(MODEL) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    refused(baton(*command, "--model", str(tmp_path), "--kv-mib", "64"), *parts)


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("model.safetensors", b"\xff" * 100, ["model.safetensors", "no whole safetensors file"]),
        ("tokenizer.json", b"{}", ["tokenizer.json cannot be loaded"]),
        ("tokenizer_config.json", b"[]", ["tokenizer_config.json holds [], expected a JSON object"]),
        ("generation_config.json", b'{"temperature": -1}', ["temperature is -1.0", "--generation-config none"]),
    ],
)
def test_what_a_child_would_refuse_of_the_model_is_refused_before_one_starts(
    baton: Callable[..., Said], tmp_path: Path, name: str, content: bytes, parts: list[str]
) -> None:
    for path in Path(MODEL).iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(content if path.name == name else path.read_bytes())
    refused(baton("up", "--model", str(tmp_path), "--http-port", "0", "--grpc-port", "0"), *parts)


@contextlib.contextmanager
def closed() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    yield port


@contextlib.contextmanager
def deaf() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize("redis", [closed, deaf], ids=["closed", "deaf"])
def test_a_redis_that_does_not_answer_is_told_in_seconds_without_its_password(
    baton: Callable[..., Said], redis: Callable[[], contextlib.AbstractContextManager[int]]
) -> None:
    with redis() as port:
        started_s = time.monotonic()
        said = baton(*UP, "--registry", f"redis://user:hush@127.0.0.1:{port}/3")
    refused(said, f"redis://127.0.0.1:{port}/3", "start redis-server")
    assert "hush" not in said.line
    # The check itself is bounded by 3 s; on a busy machine the rest of the command takes some as well.
    assert time.monotonic() - started_s < 30


def test_a_ready_file_and_a_log_folder_that_can_be_written_are_left_as_they_were(tmp_path: Path) -> None:
    ready = tmp_path / "ready.json"
    preflight.replaceable_file(ready, "--ready-file")
    assert list(tmp_path.iterdir()) == []
    ready.write_text("old")
    preflight.replaceable_file(ready, "--ready-file")
    preflight.writable_file(ready, "--output")
    preflight.writable_file(Path("/dev/null"), "--output")
    assert ready.read_text() == "old"
    preflight.writable_folder(tmp_path / "new" / "logs", "--log-dir")
    assert list((tmp_path / "new" / "logs").iterdir()) == []


def test_a_command_that_fails_early_leaves_the_ready_file_of_another_alone(
    baton: Callable[..., Said], tmp_path: Path
) -> None:
    ready = tmp_path / "ready.json"
    ready.write_text("of a cluster that runs")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        refused(baton(*UP, "--http-port", port, "--ready-file", str(ready)), port)
    assert ready.read_text() == "of a cluster that runs"


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["up", "--stop", "x"], "No such option --stop, which is one of generate;"),
        (["up", "--modle", "x"], "(did you mean --model?)"),
        (["up", "--htp-prot", "x"], "(did you mean --http-port?)"),
        (["worker", "--kvmib", "1"], "(did you mean --kv-mib?)"),
        (["up", "--zzz"], "No such option --zzz;"),
        (["sttus"], "No such command 'sttus' (did you mean status?)"),
        (["serving"], "No such command 'serving'"),
        (["serve"], "Missing option '--model'"),
        (["up"], "Missing option '--model'"),
        (["worker", "-m", "x", "--role", "boss"], "'boss' is not one of"),
    ],
)
def test_what_was_meant_goes_by_spelling(baton: Callable[..., Said], arguments: list[str], meant: str) -> None:
    refused(baton(*arguments), meant, "--help`")


def test_an_address_is_read_as_it_is_written() -> None:
    assert parse_address("[::1]:80", "x") == ("::1", 80)
    assert parse_address("host:0", "x") == ("host", 0)
    for bad in ("", ":1", "host:", "host:-1", "host: 1", "host:1e3", "host:65536", "a:b:1", "host:000000001"):
        with pytest.raises(BadConfig, match=r"^--listen is "):
            parse_address(bad, "--listen")


async def test_chat_says_at_once_that_there_is_no_template() -> None:
    async with FakeCluster(mixed=1) as cluster, router_beside(cluster) as router:
        assert router.grpc is not None

        def talk(address: str) -> None:
            with Client(address) as client:
                ask.chat(client, _Unread(), Options(), system="", show_relay=False)

        with pytest.raises(InvalidRequest, match=r"serves no conversations: .*tokenizer"):
            await asyncio.to_thread(talk, router.grpc)


@pytest.mark.parametrize("arguments", [["--version"], ["doctor"], ["health", "127.0.0.1:1"], ["--help"]], ids=" ".join)
def test_output_that_cannot_be_written_is_one_line(arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "baton", *arguments], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60,
            check=False,
        )  # fmt: skip
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: Unavailable: the output cannot be written: No space left on device")


def test_a_prompt_from_a_closed_standard_input_is_one_line(
    baton: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    refused(baton("generate", "-", "--router", "127.0.0.1:1"), "standard input is closed")


def test_a_port_that_takes_connections_and_says_nothing_is_named(
    baton: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    with deaf() as port:
        said = baton("status", "--router", f"127.0.0.1:{port}")
    assert said.exit_code == 1
    assert f"127.0.0.1:{port} takes connections and does not answer in time" in said.line


def test_sigterm_ends_a_start_where_exceptions_are_ignored_too() -> None:
    """Importing has such places: callbacks of weak references."""
    code = (
        "import os, signal; from cli.launch.process import end_on_sigterm; end_on_sigterm()\n"
        "class Ignoring:\n"
        "    def __del__(self): os.kill(os.getpid(), signal.SIGTERM)\n"
        "Ignoring(); print('still there')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


class _Unread(ask.Console):
    def input(self, *arguments: object, **settings: object) -> str:  # type: ignore[override]
        raise AssertionError("no message should be asked for")


def test_the_current_folder_is_not_where_baton_comes_from(tmp_path: Path) -> None:
    """`python -m cli` from a folder of others: what the command imports is its own, and Python's own stays Python's."""
    for name in ("engine", "router", "baton", "typing", "torch", "redis", "pathlib"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name} of the current folder')")
    done = subprocess.run(
        [sys.executable, "-m", "cli", *UP, "--log-dir", "/proc/x"],
        cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: BadConfig: --log-dir: cannot write '/proc/x'")


def test_nothing_tells_users_to_install_baton_by_name() -> None:
    """It is in no index, where any stranger could take the name (docs/decisions/0008-names.md, which says so)."""
    files = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "Makefile", ROOT / "deploy" / "Dockerfile"]
    for folder, kinds in (("docs", ".md"), ("deploy", ".md .yaml"), ("scripts", ".sh .py")):
        files += [path for path in (ROOT / folder).rglob("*") if path.suffix in kinds.split()]
    for package in (
        "baton",
        "cli",
        "router",
        "engine",
        "demo",
        "kvtransfer",
        "prefill_node",
        "decode_node",
        "worker",
        "loadgen",
        "planner",
    ):
        files += (ROOT / package).rglob("*.py")
    told = re.compile(r"(pip|pipx|uv|poetry)\s+(\w+\s+)*(install|add)\s+(-\S+\s+)*['\"]?baton\b")
    found = [path.name for path in files if told.search(path.read_text(encoding="utf-8"))]
    assert found == ["0008-names.md"]
