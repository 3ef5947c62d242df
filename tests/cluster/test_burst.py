"""Many requests in one instant, and room for few: transfers queue up, and not one of them is lost or comes late."""

from __future__ import annotations

from pathlib import Path

import pytest

from demo.tasks import mixed_prompts
from tests.support.cluster import StartCluster
from tests.support.load import Job, run_all


@pytest.mark.parametrize("transport", ["shm", pytest.param("tcp", marks=pytest.mark.long)])
async def test_19_a_burst_larger_than_the_decode_pool_ends_whole(
    start_cluster: StartCluster, demo_model: Path, transport: str
) -> None:
    jobs = [Job(task.prompt, 8, {"ignore_eos": True}) for task in mixed_prompts(seed=5, count=96)]
    # Blocks for a dozen of these prompts on each node: all others wait for a lease, or for a transfer.
    cluster = start_cluster(demo_model, prefill=2, decode=1, transport=transport, arguments=("--kv-mib", "5"))
    room = next(n.total_blocks for n in cluster.ledger().nodes if n.node_id == "decode-0")
    at_once = await run_all(cluster.http, jobs, len(jobs))
    cluster.wait_baseline()
    assert [a.error for a in at_once] == [None] * len(jobs)
    assert [a.relay["attempts"] for a in at_once] == [1] * len(jobs), "no transfer failed on the way"
    few_at_a_time = await run_all(cluster.http, jobs, 4)
    assert [a.token_ids for a in at_once] == [a.token_ids for a in few_at_a_time]
    # Otherwise there was no crowd, and this test has shown nothing.
    # An answer does not wait long for the report of its transfer: on a busy machine some have none.
    assert sum(a.relay["transfer"]["num_blocks"] for a in at_once if a.relay["transfer"]) > 8 * room
