"""What simulating costs: requests a second on one core, by number of machines at proportional load."""

from __future__ import annotations

import resource
import time
from typing import Any

from planner import machines, models, workload
from planner.compat.run import simulate
from planner.design import Design, parse

# (machines, requests a second, seconds of trace). The second is the size that the planner is meant for.
_SIZES = ((10, 25.0, 600.0), (40, 100.0, 600.0), (100, 250.0, 120.0), (1000, 2500.0, 30.0))
_QUICK = ((10, 25.0, 60.0), (40, 100.0, 60.0))


def table(quick: bool) -> list[dict[str, Any]]:
    known = machines.catalogue()
    rows = []
    for count, rate, seconds in _QUICK if quick else _SIZES:
        work = workload.like_trace("conv", rate=rate, seconds=seconds, seed=0)
        num_prompt = count * 5 // 8
        split = parse(known, prompt=[f"h100-80gb:{num_prompt}"], token=[f"h100-80gb:{count - num_prompt}"])
        rows.append(_row("split", split, work))
        rows.append(_row("mixed", parse(known, mixed=[f"h100-80gb:{count}"]), work))
    return rows


def _row(name: str, design: Design, work: workload.Workload) -> dict[str, Any]:
    begin = time.process_time()
    simulate(work, design, models.BUILT_IN["bloom-176b"])
    each_s = (time.process_time() - begin) / len(work.requests)
    return {
        "profile": "compat",
        "pools": name,
        "machines": design.num_machines,
        "requests": len(work.requests),
        "ms per request": round(1e3 * each_s, 4),
        "requests a second and core": round(1 / each_s),
        "process so far MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
