"""Whether a change of the code changes what the honest profile simulates.

``python -m bench.planner.same before.json`` writes a digest of every run; a second call, with the file there, compares
and exits with 1 if one differs. A run's digest covers each request, machine, counter, gap and role change, to the bit.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from planner import machines, models
from planner.design import Design, parse
from planner.results import Run
from planner.sim.config import Outage, SimulationConfig
from planner.sim.run import simulate
from planner.table import ShapeTimes
from planner.workload import Workload, like_trace

_MODEL = "llama2-70b"
_H100, _A100 = "h100-80gb", "a100-80gb"


def digest(run: Run) -> str:
    found = (run.served, run.machines, run.ended_s, run.counters, run.warnings, run.role_changes, run.gaps_s)
    return hashlib.sha256(repr(found).encode()).hexdigest()


def _with_extras(work: Workload) -> Workload:
    """Some requests share a beginning, some are cancelled, some come first."""
    changed = [
        replace(
            request,
            prefix="abc"[request.number % 3] if request.number % 2 else "",
            num_prefix_tokens=request.num_prompt_tokens * 2 // 3 if request.number % 2 else 0,
            cancelled_after_s=1.5 if request.number % 7 == 3 else None,
            priority=request.number % 3,
        )
        for request in work.requests
    ]
    return replace(work, requests=tuple(changed))


def cases() -> Iterator[tuple[str, Workload, Design, SimulationConfig]]:
    known, plain = machines.catalogue(), SimulationConfig()
    split = parse(known, prompt=[f"{_H100}:5"], token=[f"{_H100}:3"])
    unlike = parse(known, prompt=[f"{_H100}:2"], token=[f"{_A100}:3"])
    mixed = parse(known, mixed=[f"{_H100}:4"])
    conv, code = like_trace("conv", rate=20, seconds=12, seed=0), like_trace("code", rate=12, seconds=12, seed=1)
    yield "conv, split", conv, split, plain
    yield "code, split", code, split, plain
    yield "conv, mixed", conv, mixed, plain
    yield "code, two kinds of machine", code, unlike, plain
    yield "prefixes, cancellations, priorities", _with_extras(conv), split, plain
    few_blocks = replace(plain, memory_share=0.27)
    yield "little memory", conv, mixed, few_blocks
    deaths = replace(plain, outages=(Outage("decode-0", 4.0, 9.0), Outage("prefill-1", 6.0)))
    yield "outages", conv, split, deaths
    yield "step by step", like_trace("conv", rate=10, seconds=6, seed=2), split, replace(plain, steps_at_once=1)


def main(path: Path) -> int:
    known = machines.catalogue()
    times = {name: ShapeTimes(_MODEL, known[name], 8) for name in (_H100, _A100)}
    before: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
    found: dict[str, str] = {}
    for name, work, design, config in cases():
        begin = time.process_time()
        found[name] = digest(simulate(work, design, models.BUILT_IN[_MODEL], times, config))
        each_ms = 1e3 * (time.process_time() - begin) / len(work.requests)
        verdict = "" if not before else "same" if before.get(name) == found[name] else "DIFFERENT"
        print(f"{name:40} {found[name][:12]} {each_ms:7.3f} ms a request  {verdict}", flush=True)
    if not before:
        path.write_text(json.dumps(found, indent=1))
    return int(bool(before) and before != found)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
