"""The planner's commands in README.md and docs/planning.md, as a new user runs them from the checkout, and their
pictures."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.root import ROOT

# Other commands need a running cluster, or what was measured on one.
_ALONE = ("simulate", "search", "export")
_MEASURED = "profile.json"
_COMMAND = re.compile(r"^(?:\.venv/bin/)?baton plan (?:.*\\\n)*.*$", re.MULTILINE)


def commands(page: str) -> list[list[str]]:
    """Arguments of what is shown in blocks of shell code; comments are left out."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    found = [
        shlex.split(command.replace("\\\n", " "), comments=True)[1:]
        for block in blocks
        for command in _COMMAND.findall(block)
    ]
    return [arguments for arguments in found if arguments[1] in _ALONE and _MEASURED not in arguments]


@pytest.mark.timeout(400)
@pytest.mark.parametrize("page", ["README.md", "docs/planning.md"])
def test_the_commands_of_a_page_run_one_after_the_other(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = commands(page)
    assert [arguments[1] for arguments in found] == list(_ALONE)
    # As in the checkout, without writing to it.
    (tmp_path / "deploy" / "kubernetes").mkdir(parents=True)
    (tmp_path / "deploy" / "kubernetes" / "base").symlink_to(ROOT / "deploy" / "kubernetes" / "base")
    overlays = tmp_path / "deploy" / "kubernetes" / "overlays"
    overlays.mkdir()
    (overlays / "nvidia").symlink_to(ROOT / "deploy" / "kubernetes" / "overlays" / "nvidia")
    monkeypatch.chdir(tmp_path)
    for arguments in found:
        # More than one process, on any machine.
        more = ("--workers", "2") if arguments[1] == "search" else ()
        done = subprocess.run(
            [sys.executable, "-m", "baton", *arguments, *more],
            env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=100, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "plan" / "summary.json").read_text())
    assert summary["completed"] == summary["requests"] > 100
    plan = json.loads((tmp_path / "plan" / "plan.json").read_text())
    assert plan["best"]
    assert {path.name for path in (tmp_path / "plan").glob("*.svg")} == {
        "run.svg", "region.svg", "front.svg", "latency.svg",
    }  # fmt: skip
    (overlay,) = (path for path in tmp_path.rglob("kustomization.yaml") if not path.is_symlink())
    assert yaml.safe_load(overlay.read_text())["patches"]


@pytest.mark.parametrize("page", ["README.md", "docs/planning.md"])
def test_the_pictures_of_a_page_are_there(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    shown = re.findall(r"images/(plan-\w+\.svg)", text)
    assert shown
    assert [name for name in shown if not (ROOT / "docs" / "images" / name).is_file()] == []
