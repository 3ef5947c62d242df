"""The documents: the code that they name exists, lines are readable, decisions are short, and words are plain."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.support.root import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
# `folder/file.py`, `folder/file.py:function` and `folder/file.py` `Class`, as glossary and architecture write them.
_REFERENCE = re.compile(r"`([a-z_0-9]+(?:/[a-z_0-9]+)+\.(?:py|proto))(?::([A-Za-z_]+))?`(?: `([A-Z]\w+)(?:\.\w+)?`)?")
_MAX_COLUMNS = 120
_MAX_DECISION_WORDS = 900
_CONFLICT = re.compile(r"^(<{7}|>{7}) ", re.MULTILINE)
_RIDDLES = re.compile(r"\b(nobody|somebody|whom|whoever|everybody|anybody)\b", re.IGNORECASE)


def broken_references(text: str, root: Path) -> list[str]:
    broken = []
    for name, function, kind in _REFERENCE.findall(text):
        path = root / name
        source = path.read_text(encoding="utf-8") if path.is_file() else None
        for wanted in (function, kind):
            if source is None or (wanted and not re.search(rf"\b(def|class) {wanted}\b", source)):
                broken.append(f"{name}:{wanted}")
    return broken


def long_lines(text: str) -> list[str]:
    """Lines of prose; tables, code and pictures may be wider."""
    found, is_code = [], False
    for line in text.splitlines():
        if line.strip().startswith("```"):
            is_code = not is_code
        if not is_code and len(line) > _MAX_COLUMNS and not line.lstrip().startswith(("|", "<", "!")):
            found.append(line)
    return found


@pytest.mark.parametrize("name", ["architecture.md", "glossary.md"])
def test_the_code_that_a_page_names_exists(name: str) -> None:
    assert broken_references((ROOT / "docs" / name).read_text(encoding="utf-8"), ROOT) == []


def test_a_wrong_reference_is_found(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.py").write_text("class Here: ...\n")
    assert broken_references("`a/b.py` `Here` and `a/b.py:gone` and `a/c.py`", tmp_path) == [
        "a/b.py:gone",
        "a/c.py:",
        "a/c.py:",
    ]


def test_lines_of_prose_are_at_most_120_columns() -> None:
    assert long_lines("x" * 121) == ["x" * 121]
    assert {path.name: lines for path in PAGES if (lines := long_lines(path.read_text(encoding="utf-8")))} == {}


def test_decisions_are_short() -> None:
    sizes = {
        path.name: len(path.read_text(encoding="utf-8").split()) for path in (ROOT / "docs" / "decisions").iterdir()
    }
    assert {name: size for name, size in sizes.items() if size >= _MAX_DECISION_WORDS} == {}


def tracked_texts() -> list[tuple[str, str]]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    found = []
    for name in listed.stdout.split():
        path = ROOT / name
        try:
            found.append((name, path.read_text(encoding="utf-8")))
        except (UnicodeDecodeError, FileNotFoundError, IsADirectoryError):
            continue  # binary, or not in this working tree
    return found


def test_no_sentence_is_a_riddle_about_persons() -> None:
    """Subject, verb, the field's term: a router, a node, a client, never "whoever"."""
    # A licence's words are not ours to change.
    is_licence = re.compile(r"(^|/)LICENSE").search
    texts = [(name, text) for name, text in tracked_texts() if not name.startswith("tests/") and not is_licence(name)]
    assert [f"{name}: {word}" for name, text in texts for word in _RIDDLES.findall(text)] == []


def test_no_merge_was_left_half_done() -> None:
    assert _CONFLICT.search("a\n<" + "<<<<<< HEAD\nb\n")
    assert [name for name, text in tracked_texts() if _CONFLICT.search(text)] == []
