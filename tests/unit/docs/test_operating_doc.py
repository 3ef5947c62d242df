"""docs/operating.md: its settings are those of the command line, its arithmetic is right, its errors exist."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
import tomllib

from baton import errors
from baton.settings import flatten
from baton.types import KvLayout
from cli import router, up, worker
from tests.support.root import ROOT

TEXT = (ROOT / "docs/operating.md").read_text()


def test_the_settings_are_those_of_the_command_line() -> None:
    command = [sys.executable, "scripts/settings_table.py", "check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_every_option_that_the_text_names_exists() -> None:
    listed = set(re.findall(r"^\| `(--[\w-]+)` \|", TEXT, re.MULTILINE))
    for also in re.findall(r"Also (`--[^.]*`)\. \|$", TEXT, re.MULTILINE):
        listed |= set(re.findall(r"`(--[\w-]+)`", also))
    # Of commands that are not in the tables, and of a script; one is an example of an option that is not there.
    others = {"--json", "--ledger", "--live", "--mixed", "--docs-url", "--config", "--drop", "--pipeline-parallel-size"}
    named = set(re.findall(r"`[^`]*?(--[a-z][\w-]*)", TEXT))
    assert listed
    assert named <= listed | others


def test_the_files_that_the_text_shows_are_taken() -> None:
    shown = re.findall(r"\n((?:    .*\n)+)", TEXT)
    files = {block.split()[1]: textwrap.dedent(block) for block in shown if block.startswith("    # ")}
    assert files.keys() == {"worker.toml", "router.toml", "cluster.toml"}
    for name, options in (("worker.toml", worker), ("router.toml", router), ("cluster.toml", up)):
        table = tomllib.loads(files[name])
        assert len(flatten(table, options.OPTIONS.keys, f"{name}: ")) >= 3


def test_every_option_has_a_meaning() -> None:
    rows = re.findall(r"^\| `--[\w-]+` \|.*\|$", TEXT, re.MULTILINE)
    assert rows
    assert all(len(row.rsplit("|", 2)[1].strip()) > 10 for row in rows)


def test_the_sizes_of_kv_are_right() -> None:
    rows = re.findall(r"^\| .*?(fp32|bf16) \| (\d+) x (\d+) x (\d+) \| (.*) \|$", TEXT, re.MULTILINE)
    assert len(rows) == 4
    for dtype, layers, heads, dim, cells in rows:
        name = {"fp32": "float32", "bf16": "bfloat16"}[dtype]
        block_bytes = KvLayout(int(layers), 1, int(heads), int(dim), 64, name).total_bytes
        per_token, per_block, blocks, tokens = (cell.strip() for cell in cells.split("|"))
        assert _bytes(per_token) * 64 == _bytes(per_block) == block_bytes
        assert int(blocks.replace(",", "")) == (16 << 30) // block_bytes
        assert int(tokens.replace(",", "")) == (16 << 30) // block_bytes * 64


def test_errors_are_called_what_they_are_called() -> None:
    for status, code in re.findall(r"clients get (\d+) `(\w+)`", TEXT):
        name = "".join(word.title() for word in code.split("_"))
        assert errors.from_code(name, "").http_status == int(status)
        assert type(errors.from_code(name, "")).__name__ == name


def _bytes(text: str) -> float:
    number, unit = text.split()
    return float(number) * {"KiB": 1 << 10, "MiB": 1 << 20}[unit]
