"""Settings from dataclass fields: files and options by the same keys, the option before the file before the default."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from baton.errors import BadConfig
from baton.registry import RegistryConfig
from baton.settings import Given, build, difference, flatten, keys, read_file
from baton.types import Role
from cli import router, up, worker
from cli.launch import cluster
from cli.launch.options import ClusterOptions
from cli.launch.placement import Place
from cli.main import main
from cli.options import Options, under
from cli.usage import program
from engine.config import EngineConfig
from engine.scheduler_config import SchedulerConfig
from kvtransfer.config import TransferConfig
from kvtransfer.transports.table import TRANSPORTS
from router.config import LimitsConfig, RouterConfig
from tests.support.root import ROOT
from worker.config import Peaks, WorkerConfig
from worker.departure import DrainConfig

MODEL = ROOT / "demo" / "model"
ALL = {"up": up.OPTIONS, "worker": worker.OPTIONS, "router": router.OPTIONS}
WORKER_KEYS = tuple(keys(WorkerConfig))


def worker_config(given: Mapping[str, Given]) -> WorkerConfig:
    return build(WorkerConfig, {**given, "model": Given(Path("m"), "--model")})


def given_to(options: Options, *arguments: str) -> dict[str, Given]:
    """What a command line gives a command."""
    found: dict[str, Given] = {}
    app = typer.Typer()
    app.command()(options.taken(lambda given: found.update(given)))
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return found


def file_with(tmp_path: Path, text: str) -> str:
    path = tmp_path / "settings.toml"
    path.write_text(text)
    return str(path)


def test_the_option_wins_over_the_file_and_the_file_over_the_default(tmp_path: Path) -> None:
    file = file_with(tmp_path, 'role = "decode"\nmodel = "m"\n[engine]\nblock_tokens = 32\n'
                     "scheduler = { max_num_seqs = 7, watermark = 0.5 }\n[drain]\ngrace_s = 3\n")  # fmt: skip
    given = given_to(worker.OPTIONS, "--config", file, "--max-num-seqs", "9", "--kv-mib", "64")
    config = worker_config(given)
    assert config.engine.scheduler.max_num_seqs == 9, "of the command line"
    assert (config.engine.block_tokens, config.engine.scheduler.watermark, config.drain.grace_s) == (32, 0.5, 3.0)
    assert config.engine.kv_bytes == 64 << 20, "in the unit of the field"
    assert config.role is Role.DECODE
    assert config.engine.scheduler.max_batch_tokens == SchedulerConfig().max_batch_tokens


def test_an_environment_variable_wins_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = file_with(tmp_path, 'model = "m"\napi_keys = ["a"]\n[registry]\nurl = "redis://file"\ncluster = "here"\n')
    monkeypatch.setenv("BATON_REGISTRY", "redis://variable")
    config = build(RouterConfig, given_to(router.OPTIONS, "--config", file))
    assert config.registry == RegistryConfig("redis://variable", "here")
    assert config.api_keys == ("a",)


def test_an_option_that_names_its_default_wins_over_the_file(tmp_path: Path) -> None:
    file = file_with(tmp_path, 'metrics_port = -1\n[transfer]\ntransports = ["tcp"]\ndigest = false\n')
    own = ("--model", "m", "--role", "mixed", "--config", file)
    assert worker_config(given_to(worker.OPTIONS, *own)).transfer.transports == ("tcp",)
    assert worker_config(given_to(worker.OPTIONS, *own)).metrics_port is None
    config = worker_config(
        given_to(worker.OPTIONS, *own, "--transport", "auto", "--digest", "on", "--metrics-port", "0")
    )
    assert config.transfer == TransferConfig()
    assert config.metrics_port == 0


@pytest.mark.parametrize("command", ALL)
def test_every_option_without_being_given_leaves_the_default(command: str) -> None:
    required = {"up": (), "worker": ("--role", "mixed"), "router": ()}[command]
    assert set(given_to(ALL[command], "--model", "m", *required)) == {"model"} | ({"role"} if required else set())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("colour = 1", "unknown setting 'colour', expected one of"),
        ("[engine]\nblok_tokens = 1", "unknown setting 'engine.blok_tokens' (did you mean engine.block_tokens?)"),
        ("max_batch_tokens = 1", "(did you mean engine.scheduler.max_batch_tokens?)"),
        ("[engine.scheduler]\nvocab_size = 1", "unknown setting 'engine.scheduler.vocab_size'"),
        ("engine = 3", "engine is 3, expected a table, [engine]"),
        ("[engine]\nblock_tokens = true", "engine.block_tokens is True, expected a whole number"),
        ("[engine]\nblock_tokens = 64.0", "engine.block_tokens is 64.0, expected a whole number"),
        ('close_s = "3"', "close_s is '3', expected a number"),
        ("listen = 3", "listen is 3, expected a text"),
        ('[transfer]\ndigest = "on"', "transfer.digest is 'on', expected true or false"),
        ('[transfer]\ntransports = "tcp"', "transfer.transports is 'tcp', expected a list of texts"),
        ("[transfer]\nlayerwise_from_bytes = 3", "expected a table of whole numbers"),
        ('role = "boss"', "role is 'boss', expected prefill or decode or mixed"),
        ("ready_file = 1", "ready_file is 1, expected a path"),
        ("'engine.block_tokens' = 16", "the name 'engine.block_tokens' has a dot in it, expected names without a dot"),
        ("'' = 3", "unknown setting '', expected one of"),
        (f"close_s = {10**400}", "close_s is an integer of about 401 digits, expected a number"),
        ("x" * 500_000 + " = 1", "(500000 characters), expected one of"),
        ("[engine]\nblock_tokens = 1\nblock_tokens = 2", "no TOML: Cannot overwrite a value (at "),
        ("= 3", "no TOML: Invalid statement (at line 1, column 1)"),
        ("x = " + "[" * 2000, "no TOML"),
        ("#" * (1 << 20) + "\n", "larger than 1024 KiB"),
    ],
    ids=lambda text: text[:40].replace("\n", " "),
)
def test_a_wrong_file_is_refused_by_name(tmp_path: Path, text: str, said: str) -> None:
    file = file_with(tmp_path, text)
    with pytest.raises(BadConfig) as refused:
        read_file(Path(file), "--config", WORKER_KEYS)
    assert said in refused.value.message
    assert file in refused.value.message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[engine]\nblock_tokens = 5", "engine.block_tokens is 5, expected a power of two"),
        ("[engine]\nnum_threads = 1025", "engine.num_threads is 1025, expected 0 to 1,024"),
        ("[engine.scheduler]\nwatermark = nan", "engine.scheduler.watermark is nan, expected at least 0"),
        ("[drain]\ngrace_s = inf", "drain.grace_s is inf, expected 0.1 to 86,400"),
        ('[engine]\nkernels = "fast"', "engine.kernels is 'fast', expected auto or cpu or triton or reference"),
        ('[registry]\nurl = "http://h"', "registry.url is 'http://h', expected redis://"),
        ("[transfer.sender]\nheartbeat_s = 0", "transfer.sender.heartbeat_s is 0.0, expected a positive number"),
        ('listen = "here"', "listen is 'here', expected host:port"),
        (f"[engine]\nblock_tokens = {10**400}", "engine.block_tokens is an integer of about 401 digits, expected less"),
        ("[engine.scheduler]\nmax_waiting = 0x" + "f" * 5000, "engine.scheduler.max_waiting is an integer of about"),
        ("[transfer]\nlayerwise_from_bytes = { bogus = 5 }", "transfer.layerwise_from_bytes has 'bogus' = 5, expected"),
        ("[transfer]\nlayerwise_from_bytes = { tcp = -5 }", "transfer.layerwise_from_bytes has 'tcp' = -5, expected"),
        (
            "[transfer.layerwise_from_bytes]\ntcp = 0x" + "f" * 5000,
            "transfer.layerwise_from_bytes has 'tcp' = an integ",
        ),
    ],
    ids=lambda text: text[:40].replace("\n", " "),
)
def test_a_value_out_of_range_is_refused_with_its_key_and_its_file(tmp_path: Path, text: str, said: str) -> None:
    file = file_with(tmp_path, 'role = "mixed"\n' + text)
    with pytest.raises(BadConfig) as refused:
        worker_config(read_file(Path(file), "--config", WORKER_KEYS))
    assert refused.value.message.startswith(f"{file}: {said}")


def test_a_default_that_a_given_value_makes_wrong_is_named_with_its_table(tmp_path: Path) -> None:
    file = file_with(tmp_path, 'role = "mixed"\n[lease]\nmax_ttl_s = 1')
    with pytest.raises(BadConfig, match=r"^lease\.default_ttl_s is 30\.0, expected more than 0 and at most max_ttl_s"):
        worker_config(read_file(Path(file), "--config", WORKER_KEYS))


@pytest.mark.parametrize(
    "text",
    [
        'api_keys = "hush"',
        'api_keys = [1, "hush"]',
        'api_keys = { first = "hush" }',
        'registry = "redis://:hush@h"',
        'registry = { url = ["redis://:hush@h"] }',
    ],
)
def test_no_error_shows_a_secret(tmp_path: Path, text: str) -> None:
    with pytest.raises(BadConfig, match=r" is \(hidden\), expected ") as refused:
        read_file(Path(file_with(tmp_path, text)), "--config", tuple(keys(RouterConfig)))
    assert "hush" not in refused.value.message


def test_layerwise_from_kib_takes_the_whole_range() -> None:
    own = ("--model", "m", "--role", "mixed", "--layerwise-from-kib")
    for kib, num_bytes in (("0", 0), ("2147483647", (2**31 - 1) << 10)):
        found = worker_config(given_to(worker.OPTIONS, *own, kib)).transfer.layerwise_from_bytes
        assert found == dict.fromkeys(TRANSPORTS, num_bytes)
    assert worker_config(given_to(worker.OPTIONS, *own, "-1")).transfer.layerwise_from_bytes == {}
    for kib in ("-2", "2147483648", "x", ""):
        with pytest.raises(BadConfig, match=r"^--layerwise-from-kib is '.*', expected -1, or KiB"):
            given_to(worker.OPTIONS, *own, kib)


def test_what_an_option_gave_is_refused_by_the_options_name() -> None:
    with pytest.raises(BadConfig, match=r"^--block-tokens is 5, expected a power of two"):
        worker_config(given_to(worker.OPTIONS, "--model", "m", "--role", "mixed", "--block-tokens", "5"))


def test_up_takes_what_is_its_workers_and_its_routers_and_refuses_what_it_decides(tmp_path: Path) -> None:
    text = 'model = "m"\n[worker.engine]\nblock_tokens = 32\n[router.limits]\nmax_queued = 3\n'
    given = given_to(up.OPTIONS, "--config", file_with(tmp_path, text), "--block-tokens", "16", "--otel")
    assert {key: value.value for key, value in given.items()} == {
        "model": "m", "worker.engine.block_tokens": 16, "router.limits.max_queued": 3, "router.otel": True,
    }  # fmt: skip
    for table in ('[worker]\nrole = "mixed"', '[worker]\nlisten = "h:1"', '[worker.engine]\ndevice = "cpu"',
                  '[router]\nnodes = ["h:1"]', '[worker.registry]\nurl = "redis://h"'):  # fmt: skip
        with pytest.raises(BadConfig, match="unknown setting"):
            read_file(Path(file_with(tmp_path, table)), "--config", up.OPTIONS.keys)


EVERYTHING = WorkerConfig(
    model=Path("m"),
    role=Role.PREFILL,
    node_id="n",
    listen="[::1]:7",
    engine=EngineConfig(num_blocks=3, scheduler=SchedulerConfig(max_num_seqs=9), is_batch_invariant=False),
    transfer=TransferConfig(transports=("tcp", "shm"), layerwise_from_bytes={"tcp": 5}),
    drain=DrainConfig(grace_s=1.5),
    metrics_port=None,
    peaks=Peaks(1e15, 2.5e12),
    ready_file=Path("/x"),
)


def test_a_process_is_told_exactly_what_differs_from_the_defaults() -> None:
    """As `baton up` tells its children, as JSON."""
    told = json.loads(json.dumps(difference(EVERYTHING)))
    assert told["engine"] == {"num_blocks": 3, "scheduler": {"max_num_seqs": 9}, "is_batch_invariant": False}
    assert worker_config(flatten(told, WORKER_KEYS, "")) == EVERYTHING
    secret = RouterConfig(registry=RegistryConfig("redis://:hush@h", "c"), api_keys=("hush",), router_id="r")
    assert difference(replace(secret, limits=LimitsConfig(max_queued=2))) == {
        "router_id": "r", "registry": {"cluster": "c"}, "limits": {"max_queued": 2},
    }  # fmt: skip


def test_what_up_is_told_reaches_its_workers_and_its_router(tmp_path: Path) -> None:
    """By the command lines that it starts them with, settings without an option included."""
    text = f"""
        model = "{MODEL}"
        model_names = ["told", "too"]
        registry = {{ url = "redis://:hush@h", cluster = "c" }}
        [worker.engine]
        num_threads = 3
        scheduler = {{ watermark = 0.25 }}
        [router]
        tokenizer = "{MODEL}"
        [router.limits]
        max_queued = 3
    """
    given = given_to(up.OPTIONS, "--config", file_with(tmp_path, text), "--max-num-seqs", "9", "--api-key", "hush")
    options = build(ClusterOptions, given)
    options = replace(options, worker=under("worker.", given), router=under("router.", given))
    common = options.worker_config(MODEL)
    started = cluster._worker(options, common, "decode-0", "decode", Place("cuda:1", gpu_workers=2), 7001, 7002)
    line = started.program.command
    config = build(WorkerConfig, {**given_to(worker.OPTIONS, *line[4:]), "model": Given(MODEL, "--model")})
    assert (config.role, config.node_id, config.listen, config.metrics_port, config.model_name) == (
        Role.DECODE, "decode-0", "127.0.0.1:7001", 7002, "told",
    )  # fmt: skip
    assert config.engine == EngineConfig(
        device="cuda:1", gpu_workers=2, num_threads=3, scheduler=SchedulerConfig(watermark=0.25, max_num_seqs=9)
    )
    assert config.tokenizer == str(MODEL), "grammars are kept by the tokenizer that the router has"
    routed = options.router_config(MODEL, ["127.0.0.1:7001"])
    line = cluster._router("router", routed, MODEL, cluster.Endpoints("http://127.0.0.1:1", "127.0.0.1:2"), 1).command
    told = given_to(router.OPTIONS, *line[4:])
    assert told["limits.max_queued"].value == 3
    assert (told["http"].value, told["model_names"].value, told["registry.cluster"].value) == (
        "127.0.0.1:1",
        ("told", "too"),
        "c",
    )
    assert "hush" not in "".join((*line, *started.program.command)), "every user of the machine can read arguments"


def test_an_option_of_up_wins_over_a_variable_in_its_children_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_OTEL", "0")
    monkeypatch.setenv("BATON_API_KEY", "variable")
    given = given_to(up.OPTIONS, "--model", str(MODEL), "--otel", "--api-key", "option")
    options = build(ClusterOptions, given)
    options = replace(options, router=under("router.", given))
    routed = options.router_config(MODEL, ["127.0.0.1:7001"])
    program = cluster._router("router", routed, MODEL, cluster.Endpoints("http://127.0.0.1:1", "127.0.0.1:2"), 1)
    environment = cluster._environment(options)
    assert not {"BATON_OTEL", "BATON_API_KEY"} & set(environment)
    for name in ("BATON_OTEL", "BATON_API_KEY"):
        monkeypatch.delenv(name)
    for name, value in {**environment, **program.environment}.items():
        monkeypatch.setenv(name, value)
    config = build(RouterConfig, given_to(router.OPTIONS, *program.command[4:]))
    assert (config.otel, config.api_keys) == (True, ("option",))


def test_every_part_of_a_process_is_reachable_by_a_file() -> None:
    tables = {key.path.rpartition(".")[0] for options in ALL.values() for key in options.keys}
    assert tables >= {
        "engine", "engine.scheduler", "transfer", "transfer.sender", "transfer.receiver", "lease", "session", "drain",
        "registration", "registry", "metrics_server", "peaks",  # of a worker
        "limits", "link", "flow", "membership", "policy", "watch",  # of the router
        "supervise", "worker.engine.scheduler", "worker.session", "router.limits", "router.policy",  # of `up`
    }  # fmt: skip


def test_every_setting_has_a_type_that_files_can_hold_and_a_default_in_its_range() -> None:
    for config, own in ((WorkerConfig, {"model": Path("m"), "role": Role.MIXED}), (RouterConfig, {"nodes": ("h:1",)})):
        default: Any = config(**own)  # type: ignore[arg-type]
        known = tuple(keys(config))
        assert len({key.path for key in known}) == len(known) > 30
        assert build(config, {**flatten(difference(default), known, ""), **{k: Given(v, k) for k, v in own.items()}})


def test_a_new_field_with_a_flag_is_an_option_of_its_commands() -> None:
    for key in WORKER_KEYS:
        if key.about.flag:
            assert key.option in {k.option for k in worker.OPTIONS.options.values()}
            if key.about.up_file and key.about.up_flag:
                assert up.OPTIONS.options[key.option.lstrip("-").replace("-", "_")].path == f"worker.{key.path}"


def test_a_default_stands_in_one_place() -> None:
    """Of the step's size, which once stood in five."""
    found = [
        path.name
        for folder in ("baton", "cli", "engine", "worker", "router", "kvtransfer")
        for path in (ROOT / folder).rglob("*.py")
        if "2048" in path.read_text() and "max_batch_tokens" in path.read_text()
    ]
    assert found == ["scheduler_config.py"]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[..., str]]:
    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["baton", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        (line,) = capfd.readouterr().err.splitlines()
        return line

    return run


@pytest.mark.parametrize("command", ALL)
def test_a_file_that_cannot_be_read_is_one_line(said: Callable[..., str], tmp_path: Path, command: str) -> None:
    assert "--config: cannot read '/nowhere/x': No such file" in said(command, "--config", "/nowhere/x")
    assert "unknown setting 'colour'" in said(command, "--config", file_with(tmp_path, "colour = 1"))
    assert "Missing option '--model'" in said(command, "--config", file_with(tmp_path, "")), "the file has none either"


def test_hints_name_a_command_that_exists(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    installed, python = tmp_path / "env" / "bin" / "baton", str(tmp_path / "env" / "bin" / "python")
    installed.parent.mkdir(parents=True)
    installed.touch(mode=0o755)
    for path, called, hint in (
        (installed.parent, [python, str(installed), "up"], "baton"),
        ("/nowhere", [python, str(installed), "up", "--model", "m"], "env/bin/baton"),
        ("/nowhere", ["/opt/python", "/opt/baton", "up"], "/opt/baton"),
        ("/nowhere", [python, "-m", "cli", "up"], "env/bin/python -m cli"),
        ("/nowhere", [python, "-P", "/checkout/cli/__main__.py", "up"], "env/bin/python -P /checkout/cli/__main__.py"),
    ):
        monkeypatch.setenv("PATH", str(path))
        monkeypatch.setattr(sys, "orig_argv", called)
        assert program() == hint
