"""`baton plan` from its options to its output."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from baton.errors import BadConfig
from cli.app import app

TRACE = "request_id,arrival_timestamp,prompt_size,token_size\n0,1,4096,32\n1,3,2048,8\n2,4,2048,16\n"
SPLIT = ("--prompt", "h100-80gb:1", "--token", "a100-80gb:1")


def plan(*arguments: str, profile: str = "compat") -> str:
    found = CliRunner().invoke(app, ["plan", "simulate", "--profile", profile, *arguments], catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return found.stdout


@pytest.fixture
def trace(tmp_path: Path) -> str:
    path = tmp_path / "three.csv"
    path.write_text(TRACE)
    return str(path)


def test_a_trace_is_run_and_its_files_are_what_is_told(trace: str, tmp_path: Path) -> None:
    told = plan("--trace", trace, *SPLIT, "--out", str(tmp_path / "new" / "out"))
    assert "profile compat" in told
    assert "1 x h100-80gb prefill + 1 x a100-80gb decode" in told
    assert "all nine objectives met" in told
    summary = json.loads((tmp_path / "new" / "out" / "summary.json").read_text())
    assert json.loads(plan("--trace", trace, *SPLIT, "--json")) == summary
    # What the public simulator says of these three.
    assert summary["E2E_s_p50"] == pytest.approx(1.003018891318284)
    with (tmp_path / "new" / "out" / "requests.csv").open(newline="") as file:
        assert [row["token_instance"] for row in csv.DictReader(file)] == ["a100-80gb_0"] * 3


def test_a_trace_is_stretched_cut_and_drawn_from(trace: str) -> None:
    def requests(*options: str) -> tuple[int, float]:
        found = json.loads(plan("--trace", trace, "--mixed", "h100-80gb:1", "--json", *options))
        return found["requests"], found["rate"]

    assert requests() == (3, 0.75)
    assert requests("--rate", "1.5") == (3, pytest.approx(1.5))
    assert requests("--seconds", "3.5") == (2, pytest.approx(2 / 3))
    assert requests("--rate", "1.5", "--seconds", "1.9")[0] == 2
    number, rate = requests("--poisson", "--rate", "5", "--seconds", "40")
    assert rate == pytest.approx(5, rel=0.3)
    assert (number, rate) == requests("--poisson", "--rate", "5", "--seconds", "40", "--seed", "0")
    assert (number, rate) != requests("--poisson", "--rate", "5", "--seconds", "40", "--seed", "1")


def test_machines_of_a_file_can_be_planned_with(trace: str, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('[mine]\nlike = "h100-80gb"\nmeasured_as = "h100-80gb"\ndollars_per_hour = 1\n')
    found = json.loads(plan("--trace", trace, "--machines", str(tmp_path / "mine.toml"), "--mixed", "mine:2", "--json"))
    assert found["dollars_per_hour"] == 16


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--trace", "nowhere.csv", *SPLIT), "expected code or conv, or a CSV file"),
        (("--trace", "conv"), "cannot serve a request"),
        (("--trace", "conv", *SPLIT, "--model", "gpt"), "the model is 'gpt', expected one of bloom-176b"),
        (("--trace", "conv", *SPLIT, "--poisson"), "expected --rate and --seconds"),
        (("--trace", "conv", *SPLIT, "--poisson", "--rate", "0.001", "--seconds", "0.01"), "no request arrives"),
        (("--trace", "three", *SPLIT, "--seconds", "0.5"), "no request of the trace 'three.csv' arrives"),
        (("--trace", "conv", *SPLIT, "--mixed", "h100-80gb:1"), "rules for either alone"),
        (("--trace", "conv", *SPLIT, "--machines", "nowhere.toml"), "cannot be read"),
        (("--trace", "conv", *SPLIT, "--out", "three"), "--out is .* which is a file"),
    ],
)
def test_what_cannot_be_planned_is_said(arguments: tuple[str, ...], complaint: str, trace: str) -> None:
    with pytest.raises(BadConfig, match=complaint):
        plan(*(trace if word == "three" else word for word in arguments))


def test_the_honest_profile_runs_models_and_machines_that_no_table_has(trace: str, tmp_path: Path) -> None:
    written = {
        "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(written))
    for model, machine in (("bloom-176b", "h100-80gb"), (str(tmp_path), "h200-141gb")):
        options = ("--trace", trace, "--model", model, "--prompt", f"{machine}:1", "--token", f"{machine}:1", "--json")
        found = json.loads(plan(*options, profile="honest"))
        assert (found["profile"], found["completed"]) == ("honest", 3)
        assert 0 < found["TTFT_s_p50"] < found["E2E_s_p50"]
        assert plan(*options, profile="honest") == plan(*options, profile="honest")


def test_what_a_run_costs_is_in_the_summary_and_told(trace: str) -> None:
    """8,192 prompt tokens, 56 output tokens."""
    found = json.loads(plan("--trace", trace, *SPLIT, "--json", profile="honest"))
    hours = found["sim_end_s"] / 3600
    assert found["dollars"] == pytest.approx(8 * (2.21 + 4.76) * hours)
    assert found["dollars_per_million_tokens"] == pytest.approx(found["dollars"] / (8192 + 56) * 1e6)
    assert found["dollars_per_million_output_tokens"] == pytest.approx(found["dollars"] / 56 * 1e6)
    assert found["joules_per_prompt_token"] == pytest.approx(found["prompt_j"] / 8192)
    assert found["joules_per_output_token"] == pytest.approx(found["decode_j"] / 56)
    assert found["joules_per_request"] * 3 == pytest.approx(
        sum(found[f"{part}_j"] for part in ("prompt", "decode", "idle"))
    )
    assert 0 < found["joules_per_prompt_token"] < found["joules_per_output_token"]
    told = plan("--trace", trace, *SPLIT, profile="honest")
    assert f"{found['joules_per_request']:,.0f} J a request" in told
    assert f"${found['dollars_per_million_tokens']:.2f} per million tokens" in told
    assert "this profile has no energy" in plan("--trace", trace, *SPLIT)


def test_the_honest_profile_has_one_model_on_a_machine(trace: str) -> None:
    with pytest.raises(BadConfig, match="tensor parallelism is 4, and h100-80gb has 8 GPUs"):
        plan("--trace", trace, "--model", "llama2-70b", "--tp", "4", "--mixed", "h100-80gb:1", profile="honest")
