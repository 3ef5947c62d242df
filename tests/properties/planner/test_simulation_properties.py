"""Whatever is asked of a cluster, whatever dies and whoever leaves: a run ends, with blocks, tokens and energy
conserved (the run checks that itself), and twice the same."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from baton.types import Role, StepTimes
from engine.scheduler_config import SchedulerConfig
from planner.design import Design, Group
from planner.machines import Machine
from planner.models import Model
from planner.sim.config import Outage, SimulationConfig
from planner.sim.run import simulate
from planner.times import LinearTimes
from planner.workload import Request, Workload

TIMES = {"m": LinearTimes(StepTimes(0.01, 1e-4, 1e-3, 1e-6))}
MODEL = Model(
    name="small", num_layers=4, hidden_size=64, num_heads=4, num_kv_heads=4, head_dim=64, num_parameters=1e6,
    num_active_parameters=1e6,
)  # fmt: skip
MACHINE = Machine(
    name="m", num_gpus=1, memory_bytes=5e7, peak_flops=1e12, memory_bytes_s=1e12, power_w=300, idle_power_w=50,
    dollars_per_hour=1, link_bytes_s=1e8, link_latency_s=1e-4, power_units=1,
)  # fmt: skip
REQUESTS = st.lists(
    st.tuples(
        st.floats(0, 1), st.integers(1, 3000), st.integers(1, 200), st.integers(-1, 1), st.sampled_from(["", "p", "q"]),
        st.one_of(st.none(), st.none(), st.floats(0, 4)),
    ),
    min_size=1, max_size=30,
)  # fmt: skip
OUTAGES = st.lists(
    st.tuples(
        st.sampled_from(["prefill-0", "decode-0", "mixed-0", "decode-1"]), st.floats(0, 8),
        st.one_of(st.none(), st.floats(0.01, 5)),
    ),
    max_size=3,
)  # fmt: skip


@settings(max_examples=60)
@given(
    asked=REQUESTS, died=OUTAGES, mode=st.sampled_from(["auto", "always", "never"]),
    target=st.sampled_from([None, 0.05]), memory=st.sampled_from([1.0, 3.0]),
)  # fmt: skip
def test_every_run_ends_with_all_conserved(
    asked: list[tuple[float, int, int, int, str, float | None]],
    died: list[tuple[str, float, float | None]],
    mode: str,
    target: float | None,
    memory: float,
) -> None:
    now, requests = 0.0, []
    for number, (wait_s, num_prompt, num_output, priority, prefix, cancelled_after_s) in enumerate(asked):
        now += wait_s
        requests.append(
            Request(number, now, num_prompt, num_output, priority, prefix, num_prompt // 2, cancelled_after_s)
        )
    machine = replace(MACHINE, memory_bytes=MACHINE.memory_bytes * memory)
    counts = {Role.PREFILL: 1, Role.DECODE: 2, Role.MIXED: 1}
    design = Design(tuple(Group(role, machine, count) for role, count in counts.items()))
    outages = {
        name: Outage(name, at_s, None if back_s is None else at_s + back_s) for name, at_s, back_s in died
    }  # fmt: skip
    config = SimulationConfig(
        scheduler=SchedulerConfig(block_tokens=16, max_num_seqs=12, tbt_target_s=target),
        outages=tuple(outages.values()), max_output_tokens=256, timeout_s=60.0,
    )  # fmt: skip
    config = replace(config, policy=replace(config.policy, disaggregation=mode))
    runs = [simulate(Workload("test", tuple(requests)), design, MODEL, TIMES, config) for _ in range(2)]
    assert repr(runs[0]) == repr(runs[1])
    assert all(one.ended_s is not None and one.ended_s <= one.request.arrival_s + 61 for one in runs[0].served)
