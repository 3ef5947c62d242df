"""Every example of docs/clients.md, run as it stands there against a live cluster: its output is the document's."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from baton.client import Client
from tests.support.cluster import ADMIN_KEY, WITH_KEYS, Cluster, StartCluster
from tests.support.root import ROOT

DOCUMENT = ROOT / "docs/clients.md"
EXAMPLE_TIMEOUT_S = 30.0
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```\n(?:```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Example:
    line: int
    language: str
    code: str
    output: str

    def run(self, cluster: Cluster) -> str:
        code = self.code.replace("http://localhost:8000", cluster.http).replace("localhost:50051", cluster.grpc)
        command = [sys.executable, "-c", code] if self.language == "python" else ["sh", "-ec", code]
        done = subprocess.run(command, capture_output=True, text=True, timeout=EXAMPLE_TIMEOUT_S, check=False)
        assert (done.returncode, done.stderr) == (0, ""), f"line {self.line}: {done.stderr}"
        return done.stdout

    def matches(self, output: str) -> bool:
        """``...`` is any text in a line, and any lines where it is a line of its own."""
        lines = self.output.rstrip().splitlines()
        pattern = "".join(
            r"(?:.*\n)*" if line == "..." else re.escape(line).replace(re.escape("..."), ".*") + r"\n" for line in lines
        )
        return re.fullmatch(pattern, output.rstrip() + "\n") is not None


def examples(text: str) -> list[Example]:
    return [
        Example(text[: found.start()].count("\n") + 1, found[1], found[2], found[3] or "")
        for found in _BLOCK.finditer(text)
    ]


def test_every_block_of_the_document_is_an_example_with_its_output() -> None:
    text = DOCUMENT.read_text()
    found = examples(text)
    assert {example.language for example in found} == {"python", "sh"}
    assert all(example.output for example in found)
    assert text.count("\n```\n") == 2 * len(found)


def test_another_output_is_noticed() -> None:
    example = Example(1, "sh", "", "a ... c\nd (e)\n")
    assert example.matches("a b c\nd (e)\n")
    for wrong in ("a b c\n", "a b c\nd e\n", "a b\nc\nd (e)\n", "a b c\nd (e)\nf\n"):
        assert not example.matches(wrong)
    assert Example(1, "sh", "", "a\n...\nb\n").matches("a\nx\ny\nb\n")
    assert not Example(1, "sh", "", "a\n...\nb\n").matches("a\nx\nxb\n")


def test_examples_do_what_the_document_says(shared_cluster: StartCluster, demo_model: Path) -> None:
    cluster = shared_cluster(demo_model, prefill=1, decode=1, arguments=WITH_KEYS)
    has_curl = shutil.which("curl") is not None
    for example in examples(DOCUMENT.read_text()):
        if example.language == "python" or has_curl:
            output = example.run(cluster)
            assert example.matches(output), f"line {example.line}: expected\n{example.output}\nfound\n{output}"
    with Client(cluster.grpc, api_key=ADMIN_KEY) as client:
        cluster.wait_until(
            lambda: all(owner.state == "cached" for node in client.ledger().nodes for owner in node.owners),
            "baseline", deadline_s=10,
        )  # fmt: skip
    if not has_curl:
        pytest.skip("the examples for the shell need curl")
