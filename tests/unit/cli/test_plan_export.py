"""`baton plan export` from its options to its file."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from baton.errors import BadConfig
from cli.app import app
from tests.support.deploy_files import DEPLOY

OVERLAY = ("--overlay", str(DEPLOY / "kubernetes" / "overlays" / "cpu"))
SPLIT = ("--prompt", "h100-80gb:3", "--token", "a100-80gb:2")


def export(*arguments: str) -> str:
    found = CliRunner().invoke(app, ["plan", "export", *arguments], catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return found.stdout


def test_an_overlay_is_printed_or_written_beside_the_one_that_it_changes(tmp_path: Path) -> None:
    printed = yaml.safe_load(export("--kubernetes", *SPLIT, *OVERLAY))
    told = export("--kubernetes", *SPLIT, *OVERLAY, "--token-count", "2-6", "--out", str(tmp_path / "new"))
    assert f"kubectl apply -k {tmp_path / 'new'}" in told
    written = yaml.safe_load((tmp_path / "new" / "kustomization.yaml").read_text())
    (base,) = written["resources"]
    assert (tmp_path / "new" / base).resolve() == Path(OVERLAY[1])
    assert printed["patches"][0] == written["patches"][0]
    assert "value: 6" in written["patches"][2]["patch"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (SPLIT, "expected --kubernetes"),
        (("--kubernetes",), "expected either --plan"),
        (("--kubernetes", *SPLIT, "--plan", "plan.json"), "expected either --plan"),
        (("--kubernetes", *SPLIT, "--kind", "h100-80gb mixed"), "expected either --plan"),
        (("--kubernetes", "--prompt", "h100-80gb:1"), "cannot serve a request"),
        (("--kubernetes", *SPLIT, "--token-count", "x"), "--token-count is 'x'"),
        (("--kubernetes", *SPLIT, "--overlay", "/nowhere"), "--overlay is '/nowhere', which has no kustomization.yaml"),
        (("--kubernetes", "--plan", "nowhere.json"), "cannot be read"),
    ],
)
def test_what_cannot_be_exported_is_said(arguments: tuple[str, ...], complaint: str) -> None:
    with pytest.raises(BadConfig, match=complaint):
        export(*(OVERLAY if "--overlay" not in arguments else ()), *arguments)
