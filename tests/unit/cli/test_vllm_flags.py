"""`baton serve` with the options of `vllm serve`: taken under both names, or refused by name with the reason."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import typer
from typer.testing import CliRunner

from baton.settings import Given, flatten
from cli import up, vllm_flags, worker
from cli.app import app
from cli.options import Options
from cli.usage import Serving, UsageError, explain


def given(*words: str, options: Options = up.OPTIONS) -> Mapping[str, object]:
    """What the command is told, by key. Raises a UsageError."""
    told: dict[str, Given] = {}
    program = typer.Typer(context_settings={"help_option_names": ["-h", "--help"]})
    program.command(cls=Serving)(options.taken(told.update))
    typer.main.get_command(program).main(list(words), standalone_mode=False)
    return {key: value.value for key, value in told.items()}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("m", {"model": "m"}),
        ("--model m", {"model": "m"}),
        ("m --port 0 --host ::1", {"model": "m", "http_port": 0, "host": "::1"}),
        ("m --max-num-batched-tokens 512", {"model": "m", "worker.engine.scheduler.max_batch_tokens": 512}),
        ("m --max_num_batched_tokens=512", {"model": "m", "worker.engine.scheduler.max_batch_tokens": 512}),
        ("--block-size 16 m", {"model": "m", "worker.engine.block_tokens": 16}),
        ("m --num-gpu-blocks-override 99", {"model": "m", "worker.engine.num_blocks": 99}),
        ("m --dtype half", {"model": "m", "worker.engine.dtype": "float16"}),
        ("m --dtype float", {"model": "m", "worker.engine.dtype": "float32"}),
        ("m --dtype bfloat16", {"model": "m", "worker.engine.dtype": "bfloat16"}),
        ("m --generation-config vllm", {"model": "m", "router.generation_config": "none"}),
        ("m --served-model-name a b", {"model": "m", "model_names": ("a", "b")}),
        ("m --served-model-name a --model-name b", {"model": "m", "model_names": ("a", "b")}),
        ('m --allowed-origins ["*"]', {"model": "m", "router.allowed_origins": ("*",)}),
        (
            "m --allowed-origins a://b --allowed-origins c://d",
            {"model": "m", "router.allowed_origins": ("a://b", "c://d")},
        ),
        ("m --max-model-len 512", {"model": "m", "worker.engine.max_model_tokens": 512}),
        ("m --seed 3 --tokenizer t", {"model": "m", "router.seed": 3, "router.tokenizer": "t"}),
        ("m --chat-template x.jinja", {"model": "m", "router.chat_template": "x.jinja"}),
        ("o/m --revision v1", {"model": "o/m", "revision": "v1"}),
        ("m --enforce-eager", {"model": "m", "worker.engine.max_graph_seqs": 0}),
        ("m --no-enable-prefix-caching", {"model": "m", "worker.engine.scheduler.has_prefix_cache": False}),
        ("m -tp 1 --pipeline-parallel-size=1 --trust-remote-code --kv-cache-dtype auto", {"model": "m"}),
        # A value is no option, whatever it looks like.
        ("m --log-dir --enforce-eager", {"model": "m", "log_dir": "--enforce-eager"}),
    ],
)
def test_options_are_taken_under_the_names_that_people_know(words: str, expected: Mapping[str, object]) -> None:
    found = given(*words.split())
    assert {key: str(value) if key == "log_dir" else value for key, value in found.items()} == expected


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--pipeline-parallel-size 2", "--pipeline-parallel-size: no pipeline parallelism yet"),
        ("--tensor_parallel_size=4", "--tensor-parallel-size: no tensor parallelism yet"),
        ("-tp 8", "-tp: no tensor parallelism yet"),
        ("--enable-lora", "--enable-lora: no LoRA adapters yet"),
        ("--speculative-config {}", "--speculative-config: no speculative decoding yet"),
        ("--kv-cache-dtype fp8", "--kv-cache-dtype: KV is kept in --dtype"),
        ("--ssl-ca-certs x", "--ssl-ca-certs: clients show no certificate"),
        ("--task embed", "--task: generation is the one task"),
        ("--tensor-parallel-size", "--tensor-parallel-size: no tensor parallelism yet"),
        # None of these is known: what it resembles is said.
        ("--max-num-seq 3", "No such option --max-num-seq (did you mean --max-num-seqs?)"),
    ],
)
def test_what_is_not_there_is_named_and_not_guessed(words: str, said: str) -> None:
    with pytest.raises(UsageError) as refused:
        given("m", *words.split())
    assert explain(refused.value).startswith(said)


def test_workers_have_the_names_too_and_files_have_the_words() -> None:
    told = given("--model", "m", "--role", "decode", "--block-size", "32", options=worker.OPTIONS)
    assert told["engine.block_tokens"] == 32
    found = flatten({"engine": {"dtype": "half"}}, worker.OPTIONS.keys, "")
    assert found["engine.dtype"].value == "float16"


def test_a_name_has_one_meaning() -> None:
    commands = [typer.main.get_command(app).commands[name] for name in ("serve", "up", "worker", "router")]  # type: ignore[attr-defined]
    names = {
        name for command in commands for option in command.params for name in (*option.opts, *option.secondary_opts)
    }
    assert not names & vllm_flags.KNOWN


def test_serve_is_up_and_help_is_short() -> None:
    runner = CliRunner()
    for command in ("serve", "up"):
        shown = runner.invoke(app, [command, "-h"])
        assert shown.exit_code == 0
        assert "--http-port,--port" in shown.output
    assert runner.invoke(app, ["-h"]).exit_code == 0


def test_a_model_is_named_once() -> None:
    with pytest.raises(Exception, match="MODEL and --model are both given"):
        given("a", "--model", "b")
