"""The files of tiles that the package has."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any


def data(name: str = "sm90.json") -> dict[str, Any]:
    read: dict[str, Any] = json.loads((resources.files("engine.kernels.triton") / "tuned" / name).read_text())
    return read
