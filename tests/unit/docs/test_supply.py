"""scripts/supply.py: what is asked of each package, what an answer means, and that no answer is not taken for a good
one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from scripts import supply

REPORT: dict[str, Any] = {
    "dependencies": [
        {
            "name": "jinja2",
            "version": "3.1.5",
            "vulns": [{"id": "PYSEC-1", "fix_versions": ["3.1.6"], "aliases": ["CVE-1"]}],
        },
        {"name": "idna", "version": "3.10", "vulns": []},
        {"name": "torch", "skip_reason": "not found"},
    ],
    "fixes": [],
}


def test_every_package_but_our_own_is_asked_for_by_the_version_of_the_index() -> None:
    installed = [("torch", "2.13.0+cpu"), ("Jinja2", "3.1.5"), ("baton-serve", "0.1.0"), ("torch", "2.13.0+cpu")]
    assert supply.requirements(installed) == ["Jinja2==3.1.5", "torch==2.13.0"]


def test_what_a_report_says() -> None:
    found = supply.findings(REPORT)
    assert (found.num_checked, found.skipped) == (2, ("torch",))
    assert [str(each) for each in found.weaknesses] == ["jinja2 3.1.5: PYSEC-1, fixed in 3.1.6"]
    assert supply.findings(REPORT, ["CVE-1"]).weaknesses == ()
    assert supply.findings(REPORT, ["CVE-2"]).weaknesses != ()


@pytest.mark.parametrize(
    ("answer", "arguments", "code", "said"),
    [
        (supply.findings(REPORT), [], 1, "2 packages checked, 1 known weaknesses; not known there: torch\njinja2"),
        (supply.findings(REPORT, ["PYSEC-1"]), [], 0, "2 packages checked, 0 known weaknesses"),
        (supply.NotAvailableError("no network"), [], 0, "audit: not available, nothing was checked: no network"),
        (supply.NotAvailableError("no network"), ["--strict"], 2, "audit: not available, nothing was checked"),
    ],
)
def test_the_exit_status_tells_weak_from_unknown(
    capsys: pytest.CaptureFixture[str], answer: Any, arguments: list[str], code: int, said: str
) -> None:
    def look(*_: object) -> supply.Findings:
        if isinstance(answer, Exception):
            raise answer
        found: supply.Findings = answer
        return found

    assert supply.main(["audit", *arguments], look) == code
    assert capsys.readouterr().out.startswith(said)


def test_an_index_that_knows_no_package_has_checked_nothing() -> None:
    """As a mirror without advisories answers: "no known vulnerabilities found" of packages that were all skipped."""

    def tool(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        skipped = [{"name": "idna", "skip_reason": "not found"}]
        Path(command[command.index("--output") + 1]).write_text(json.dumps({"dependencies": skipped}))
        return subprocess.CompletedProcess(command, 0, "", "No known vulnerabilities found")

    with pytest.raises(supply.NotAvailableError, match=r"no weaknesses of any of 1 packages"):
        supply.audit(Path(sys.executable), [], tool)


def test_a_tool_that_ends_without_a_report_has_checked_nothing() -> None:
    def tool(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "Traceback\nConnectionError: no route\n")

    with pytest.raises(supply.NotAvailableError, match=r"^ConnectionError: no route$"):
        supply.audit(Path(sys.executable), [], tool)
