"""The simulated twin of a cluster: the settings that options of `baton up` give its processes, and its design."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from baton.types import MAX_COUNT, Role
from cli import up
from planner.design import Design, Group
from planner.measured import Measured
from planner.sim.config import SimulationConfig

# Of workers and files that are not there.
_NOWHERE, _NO_NODES = Path("."), ("127.0.0.1:1",)


class Planned(NamedTuple):
    design: Design
    config: SimulationConfig


def planned(words: Sequence[str], measured: Measured) -> Planned:
    """Of nodes as they were measured. Raises BadConfig for what `baton up` would refuse."""
    options = up.parsed(("--model", str(_NOWHERE), *words))
    worker = options.worker_config(_NOWHERE)
    router = options.router_config(_NOWHERE, _NO_NODES)
    machine = measured.as_machine()
    roles = zip((Role.PREFILL, Role.DECODE, Role.MIXED), options.counts, strict=True)
    config = SimulationConfig(
        policy=router.policy,
        limits=router.limits,
        flow=router.flow,
        membership=router.membership,
        roles=worker.roles,
        scheduler=worker.engine.scheduler,
        # Clients ask for as many tokens as they get.
        max_output_tokens=1,
    )
    least = [worker.transfer.layerwise_from_bytes.get(name) for name in worker.transfer.transport_names]
    given = [num_bytes for num_bytes in least if num_bytes is not None]
    num_bytes = given[0] if given else measured.layerwise_from_bytes
    if num_bytes is None:
        # Nothing that was measured was so large.
        config = replace(config, layerwise_from_tokens=MAX_COUNT)
    else:
        config = replace(config, layerwise_from_tokens=int(num_bytes / measured.as_model().kv_bytes_per_token))
    design = Design(tuple(Group(role, machine, count) for role, count in roles if count))
    return Planned(design, config)
