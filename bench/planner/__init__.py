"""The planner beside what it has to agree with, and what it costs: ``python -m bench planner``."""

from __future__ import annotations

from typing import Any

from bench.planner import reference, speed


def run(quick: bool) -> dict[str, Any]:
    return {"compat beside the public simulator": reference.table(quick), "speed": list(speed.table(quick))}
