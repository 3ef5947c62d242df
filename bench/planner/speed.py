"""What simulating costs: requests a second on one core, by number of machines at proportional load."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from typing import Any

from planner import machines, models, workload
from planner.design import Design, parse
from planner.profiles import simulated
from planner.results import Profile

# (machines, requests a second, seconds of trace). The second is the size that the planner is meant for.
_SIZES = {
    Profile.COMPAT: ((10, 25.0, 600.0), (40, 100.0, 600.0), (100, 250.0, 120.0), (1000, 2500.0, 30.0)),
    # Each takes ten times as long.
    Profile.HONEST: ((10, 20.0, 60.0), (40, 80.0, 60.0), (100, 200.0, 20.0), (1000, 2000.0, 5.0)),
}
_QUICK = {
    Profile.COMPAT: ((10, 25.0, 60.0), (40, 100.0, 60.0)),
    Profile.HONEST: ((10, 20.0, 20.0), (40, 80.0, 10.0)),
}
_TENSOR_PARALLEL = 8


def table(quick: bool) -> Iterator[dict[str, Any]]:
    known = machines.catalogue()
    for profile, sizes in (_QUICK if quick else _SIZES).items():
        for count, rate, seconds in sizes:
            work = workload.like_trace("conv", rate=rate, seconds=seconds, seed=0)
            num_prompt = count * 5 // 8
            split = parse(known, prompt=[f"h100-80gb:{num_prompt}"], token=[f"h100-80gb:{count - num_prompt}"])
            yield _row(profile, "split", split, work)
            yield _row(profile, "mixed", parse(known, mixed=[f"h100-80gb:{count}"]), work)


def _row(profile: Profile, name: str, design: Design, work: workload.Workload) -> dict[str, Any]:
    known, model = machines.catalogue(), models.BUILT_IN["bloom-176b"]
    begin = time.process_time()
    simulated(profile, work, design, model, _TENSOR_PARALLEL, known)
    each_s = (time.process_time() - begin) / len(work.requests)
    return {
        "profile": profile.value,
        "pools": name,
        "machines": design.num_machines,
        "requests": len(work.requests),
        "ms per request": round(1e3 * each_s, 4),
        "requests a second and core": round(1 / each_s),
        "process so far MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
