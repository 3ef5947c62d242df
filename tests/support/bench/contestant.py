"""An engine of ``bench peers`` that has no model and, if asked, a fault."""

from __future__ import annotations

import sys
from pathlib import Path

from bench.peers import engines
from bench.peers.child import Child
from bench.peers.drivers.protocol import Start
from tests.support.root import ROOT


def contestant(name: str, tmp_path: Path, fault: str = "none", at: int = 0) -> engines.Contestant:
    start = Start("model", "model", 1, (0,), 1024)
    command = [sys.executable, "-m", "tests.support.bench.peer", start.line(), fault, str(at)]
    child = Child(command, tmp_path / f"{name}.log", {"PYTHONPATH": str(ROOT)})
    child.answer(60.0)
    child.pause()
    return engines.Contestant(name, child)
