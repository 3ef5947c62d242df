"""What a person types and reads: options, model names, the relay line, error lines and exit codes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from baton.errors import BadConfig
from cli.launch import model_source
from cli.launch.options import ClusterOptions


def baton(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cli", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "NO_COLOR": "1", "HF_HUB_OFFLINE": "1"},
    )


@pytest.mark.parametrize(("prefill", "decode", "mixed"), [(1, 0, 0), (0, 1, 0), (0, 0, 0), (-1, 1, 1)])
def test_a_cluster_that_could_not_serve_is_refused(prefill: int, decode: int, mixed: int) -> None:
    with pytest.raises(BadConfig, match="expected"):
        ClusterOptions(model="x", num_prefill=prefill, num_decode=decode, num_mixed=mixed)


@pytest.mark.parametrize(("prefill", "decode", "mixed"), [(1, 1, 0), (0, 0, 1), (0, 1, 1), (1, 0, 1)])
def test_a_cluster_with_both_phases_is_accepted(prefill: int, decode: int, mixed: int) -> None:
    options = ClusterOptions(model="x", num_prefill=prefill, num_decode=decode, num_mixed=mixed)
    ids = [node_id for node_id, _ in options.worker_roles()]
    assert len(ids) == len(set(ids)) == prefill + decode + mixed


def test_a_folder_with_a_config_is_a_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert model_source.resolve(str(tmp_path)) == tmp_path.resolve()
    assert model_source.name_of(str(tmp_path)) == tmp_path.name
    assert model_source.name_of("org/name") == "org/name"


@pytest.mark.parametrize("model", ["/nowhere/at/all", "./nope", "a b", "../x", ""])
def test_what_is_neither_folder_nor_hub_id_is_refused(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadConfig, match=r"does not exist|no config\.json"):
        model_source.resolve(model)


def test_errors_are_one_clear_line_and_an_exit_code(tmp_path: Path) -> None:
    done = baton("up", "--model", str(tmp_path))
    assert done.returncode == 2
    assert f"error: BadConfig: {tmp_path} is no model" in done.stderr
    assert "Traceback" not in done.stderr
    done = baton("status", "--router", "127.0.0.1:1")
    assert done.returncode == 1
    assert "error: Unavailable: no answer from a router at 127.0.0.1:1" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_digest_is_on_or_off_and_nothing_else() -> None:
    for command in (["up"], ["worker", "--role", "mixed"]):
        done = baton(*command, "--model", "x", "--digest", "maybe")
        assert done.returncode == 2
        assert "maybe" in done.stderr


def test_a_model_that_the_hub_does_not_give_is_said_so() -> None:
    done = baton("up", "--model", "nobody/nothing")
    assert done.returncode == 2
    assert "nobody/nothing is neither a folder here nor could it be fetched" in done.stderr


def test_doctor_says_that_a_model_is_not_one(tmp_path: Path) -> None:
    done = baton("doctor", "--model", str(tmp_path))
    assert done.returncode == 1
    assert "has no config.json" in done.stdout
