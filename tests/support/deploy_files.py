"""What the tests of deploy/ share: whether `baton` takes a command line, and what a Dockerfile says."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer.main
import yaml

from cli.app import app
from tests.support.root import ROOT

try:
    # Newer typer brings a click of its own.
    from typer._click import exceptions as click_exceptions
except ImportError:
    from click import exceptions as click_exceptions

UsageError = click_exceptions.UsageError

DEPLOY = ROOT / "deploy"


def accept(arguments: Sequence[str]) -> dict[str, Any]:
    """The settings that `baton ARGUMENTS` would start with. Raises UsageError for what it does not take."""
    name, *rest = arguments
    group: Any = typer.main.get_command(app)
    assert name in group.commands, f"baton has no command {name!r}"
    context = group.commands[name].make_context(name, list(rest))
    return dict(context.params)


def validate(schema: str, *files: Path) -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def load_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def interpolate(text: str, environment: dict[str, str]) -> str:
    """Compose's ${NAME:-default} and ${NAME:?message}; a name without a default must be given."""

    def value(match: re.Match[str]) -> str:
        name, default = match["name"], match["default"]
        found = environment.get(name) or default
        assert found is not None, f"{name} has no default"
        return str(found)

    return re.sub(r"\$\{(?P<name>\w+)(?::-(?P<default>[^}]*)|:\?[^}]*)?\}", value, text)


@dataclass(frozen=True)
class Instruction:
    keyword: str
    text: str

    @property
    def command(self) -> list[str]:
        """The exec form; the shell form has no place where signals matter."""
        found = json.loads(self.text[self.text.index("[") :])
        assert isinstance(found, list)
        return found


@dataclass(frozen=True)
class Stage:
    name: str
    base: str
    instructions: tuple[Instruction, ...]

    def all(self, keyword: str) -> list[Instruction]:
        return [i for i in self.instructions if i.keyword == keyword]

    def last(self, keyword: str) -> Instruction:
        return self.all(keyword)[-1]


def parse_dockerfile(path: Path) -> tuple[dict[str, str], list[Stage]]:
    """Global arguments and stages."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    arguments: dict[str, str] = {}
    stages: list[Stage] = []
    for line in filter(None, map(str.strip, joined.splitlines())):
        keyword, _, text = line.partition(" ")
        assert keyword == keyword.upper(), line
        if keyword == "FROM":
            base, _, name = text.partition(" AS ")
            stages.append(Stage(name, base, ()))
        elif not stages:
            assert keyword == "ARG"
            name, _, default = text.partition("=")
            arguments[name] = default
        else:
            last = stages[-1]
            stages[-1] = Stage(last.name, last.base, (*last.instructions, Instruction(keyword, text.strip())))
    return arguments, stages


def copy_sources(instruction: Instruction) -> tuple[str, list[str]]:
    """(stage copied from, or "" for the build context; sources)."""
    words = shlex.split(instruction.text)
    options = [w for w in words if w.startswith("--")]
    paths = [w for w in words if not w.startswith("--")]
    stage = next((o.removeprefix("--from=") for o in options if o.startswith("--from=")), "")
    return stage, paths[:-1]
