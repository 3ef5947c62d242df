"""The pictures of README.md and docs/planning.md: what the README's own commands of the planner draw."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
_IMAGES = _ROOT / "docs" / "images"
_COMMAND = re.compile(r"^\.venv/bin/baton (plan (?:simulate|search) (?:.*\\\n)*.*)$", re.MULTILINE)


def commands() -> list[list[str]]:
    """Their arguments; comments are left out."""
    text = (_ROOT / "README.md").read_text(encoding="utf-8")
    return [shlex.split(found.replace("\\\n", " "), comments=True) for found in _COMMAND.findall(text)]


def write() -> list[Path]:
    """Runs them, and copies what they draw."""
    with tempfile.TemporaryDirectory() as folder:
        for arguments in commands():
            subprocess.run([sys.executable, "-m", "cli", *arguments], cwd=folder, check=True)
        drawn = sorted((Path(folder) / "plan").glob("*.svg"))
        return [Path(shutil.copyfile(path, _IMAGES / f"plan-{path.name}")) for path in drawn]
