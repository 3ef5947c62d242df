"""What Baton is made of, and whether a part of it is known to be weak.

python scripts/supply.py sbom [--out dist/sbom.json] [--python .venv/bin/python]
python scripts/supply.py audit [--ignore ID ...] [--python .venv/bin/python]

`sbom` writes the packages that are installed beside an interpreter as CycloneDX JSON, with licenses and dependencies
(cyclonedx-bom). `audit` asks PyPI for the known weaknesses of each of them (pip-audit): exit status 1 if there is one,
0 if there is none, and 0 with the words "not available" where PyPI cannot be asked; --strict makes that 2.

Both tools get an environment of their own on first use, .venv/supply; nothing is added to the one that is looked at.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

ROOT = Path(__file__).resolve().parents[1]
# What makes and reads the lists is pinned as well.
TOOLS = ("cyclonedx-bom==7.5.0", "pip-audit==2.10.1")
_TOOLS_FOLDER = ROOT / ".venv" / "supply"
_INSTALL_TIMEOUT_S = 300
_TOOL_TIMEOUT_S = 300
_CALL_TIMEOUT_S = 15
# The project itself is not on PyPI.
_OURS = ("baton-serve",)
_LIST = (
    "import importlib.metadata as m, json; "
    "print(json.dumps([[d.metadata['Name'], d.version] for d in m.distributions() if d.metadata['Name']]))"
)


Tool: TypeAlias = Callable[[Sequence[str]], "subprocess.CompletedProcess[str]"]


class NotAvailableError(Exception):
    """A registry or a service did not answer: nothing was found out."""


@dataclass(frozen=True, slots=True)
class Weakness:
    package: str
    version: str
    id: str
    fixed_in: tuple[str, ...]

    def __str__(self) -> str:
        fixed = f"fixed in {', '.join(self.fixed_in)}" if self.fixed_in else "not fixed yet"
        return f"{self.package} {self.version}: {self.id}, {fixed}"


@dataclass(frozen=True, slots=True)
class Findings:
    """``skipped``: packages that the service does not know."""

    num_checked: int
    skipped: tuple[str, ...]
    weaknesses: tuple[Weakness, ...]


def requirements(installed: Iterable[tuple[str, str]]) -> list[str]:
    """One line for each package. A build's own part (``+cpu``) is not in PyPI's versions."""
    found = {f"{name}=={version.partition('+')[0]}" for name, version in installed if name.lower() not in _OURS}
    return sorted(found, key=str.lower)


def findings(report: dict[str, Any], ignored: Sequence[str] = ()) -> Findings:
    """Of pip-audit's JSON. ``ignored``: ids, or aliases of them."""
    checked = [each for each in report["dependencies"] if "skip_reason" not in each]
    skipped = tuple(each["name"] for each in report["dependencies"] if "skip_reason" in each)
    weak = tuple(
        Weakness(each["name"], each["version"], vuln["id"], tuple(vuln["fix_versions"]))
        for each in checked
        for vuln in each["vulns"]
        if not {vuln["id"], *vuln.get("aliases", ())} & set(ignored)
    )
    return Findings(len(checked), skipped, weak)


def sbom(python: Path, out: Path) -> None:
    """Raises NotAvailableError."""
    out.parent.mkdir(parents=True, exist_ok=True)
    command = ["cyclonedx-py", "environment", "--output-reproducible", "--spec-version", "1.6"]
    command += ["--pyproject", str(ROOT / "pyproject.toml"), "--output-file", str(out), str(python)]
    done = _tool(command)
    if done.returncode:
        raise RuntimeError(f"cyclonedx-py ended with {done.returncode}: {done.stderr.strip()}")
    num = len(json.loads(out.read_text(encoding="utf-8"))["components"])
    sys.stdout.write(f"{out}: {num} packages\n")


def audit(python: Path, ignored: Sequence[str], tool: Tool | None = None) -> Findings:
    """``tool`` runs pip-audit. Raises NotAvailableError."""
    listed = subprocess.run([str(python), "-c", _LIST], capture_output=True, text=True, check=True).stdout
    with tempfile.TemporaryDirectory(prefix="baton-audit-") as folder:
        wanted, report = Path(folder) / "requirements.txt", Path(folder) / "report.json"
        wanted.write_text("\n".join(requirements(map(tuple, json.loads(listed)))) + "\n", encoding="utf-8")
        # They are installed already: nothing is to be resolved or downloaded.
        command = ["pip-audit", "--requirement", str(wanted), "--no-deps", "--disable-pip", "--format", "json"]
        command += ["--output", str(report), "--progress-spinner", "off", "--timeout", str(_CALL_TIMEOUT_S)]
        done = (tool or _tool)(command)
        if not report.exists():
            raise NotAvailableError(_last_line(done.stderr))
        found = findings(json.loads(report.read_text(encoding="utf-8")), ignored)
    if not found.num_checked:
        raise NotAvailableError(f"the index knows no weaknesses of any of {len(found.skipped)} packages")
    return found


def _tool(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Of the tools' environment, which is made if it is not there. Raises NotAvailableError."""
    folder = _TOOLS_FOLDER / "-".join(tool.replace("==", "-") for tool in TOOLS)
    try:
        if not (folder / "made").exists():
            venv.create(folder, with_pip=True, clear=True)
            pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
            done = _run([*pip, *TOOLS], _INSTALL_TIMEOUT_S)
            if done.returncode:
                raise NotAvailableError(f"{' and '.join(TOOLS)} could not be installed: {_last_line(done.stderr)}")
            (folder / "made").touch()
        return _run([str(folder / "bin" / command[0]), *command[1:]], _TOOL_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise NotAvailableError(f"no end within {error.timeout:g} s: {' '.join(map(str, error.cmd[:3]))}") from error


def _run(command: Sequence[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it said nothing"])[-1][:300]


def main(arguments: Sequence[str] | None = None, look: Callable[[Path, Sequence[str]], Findings] = audit) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["sbom", "audit"])
    parser.add_argument("--python", type=Path, default=ROOT / ".venv" / "bin" / "python", help="whose packages")
    parser.add_argument("--out", type=Path, default=ROOT / "dist" / "sbom.json", help="of sbom")
    parser.add_argument("--ignore", action="append", default=[], metavar="ID", help="a weakness that does not count")
    parser.add_argument("--strict", action="store_true", help="exit status 2 where nothing could be found out")
    given = parser.parse_args(arguments)
    try:
        if given.what == "sbom":
            sbom(given.python, given.out)
            return 0
        found = look(given.python, given.ignore)
    except NotAvailableError as error:
        sys.stdout.write(f"{given.what}: not available, nothing was checked: {error}\n")
        return 2 if given.strict else 0
    skipped = f"; not known there: {', '.join(found.skipped)}" if found.skipped else ""
    sys.stdout.write(f"{found.num_checked} packages checked, {len(found.weaknesses)} known weaknesses{skipped}\n")
    sys.stdout.writelines(f"{weakness}\n" for weakness in found.weaknesses)
    return 1 if found.weaknesses else 0


if __name__ == "__main__":
    sys.exit(main())
