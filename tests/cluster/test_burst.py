"""Many requests in one instant, and room for few: transfers queue up, and not one of them is lost or comes late."""

from __future__ import annotations

from pathlib import Path

import pytest

from demo.tasks import mixed_prompts
from tests.support.cluster import StartCluster
from tests.support.figures import figure
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


@pytest.mark.long
@pytest.mark.parametrize("max_queued", [1024, 64])
async def test_19_a_burst_of_five_hundred(
    start_cluster: StartCluster, demo_model: Path, tmp_path: Path, max_queued: int
) -> None:
    """A queue with room for all, and one that refuses most of them at once: what is taken is served in order of time,
    and the last hundred take no longer than the first."""
    jobs = [Job(task.prompt, 8, {"ignore_eos": True}) for task in mixed_prompts(seed=5, count=500)]
    settings = tmp_path / "burst.toml"
    settings.write_text(f"[router.limits]\nmax_queued = {max_queued}\n")
    cluster = start_cluster(demo_model, prefill=2, decode=1, arguments=("--kv-mib", "5", "--config", str(settings)))
    at_once = await run_all(cluster.http, jobs, len(jobs))
    cluster.wait_baseline()
    served = {number: answer for number, answer in enumerate(at_once) if answer.error is None}
    refused = [answer.error for answer in at_once if answer.error is not None]
    assert [error for error in refused if not error.startswith("429: ")] == []
    assert bool(refused) == (max_queued == 64)
    assert len(served) >= 64
    assert {answer.relay["attempts"] for answer in served.values()} == {1}, "no transfer failed on the way"
    took_s = sorted(answer.relay["e2e_s"] for answer in served.values())
    if refused:
        figure(19, "of 500 with a queue of 64 refused at once", len(refused), "requests")
    else:
        figure(19, "first 100 of a burst of 500", took_s[99])
        figure(19, "last 100 of a burst of 500", took_s[499] - took_s[399])
    few_at_a_time = await run_all(cluster.http, [jobs[number] for number in served], 4)
    assert [a.token_ids for a in served.values()] == [a.token_ids for a in few_at_a_time]
    cluster.wait_baseline()
    assert [n.state for n in cluster.status().nodes] == ["ready"] * 3
