"""`baton plan validate` beside fake nodes, what it refuses, and the simulated twin of a cluster's options."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from baton.client import AsyncClient
from baton.errors import BadConfig
from baton.types import MAX_COUNT, Role
from cli.app import app
from cli.observe import live
from cli.plan_validate import _share
from cli.planned import planned
from cli.processors import Taken
from cli.profile import Shapes, measure
from cli.validate import Asked, _disturbed, improved, validated
from engine.step import StepShape
from loadgen.clusters import Shape
from loadgen.plan import Plan
from planner.measured import write
from planner.overhead import NO_OVERHEAD, Overhead
from planner.validation import Limits, Verdict
from router.cluster.config import PolicyConfig
from tests.support.fake_nodes import FakeCluster, FakeConfig
from tests.support.profiles import LINE, MEASURED, too_fast
from tests.support.router import router_beside

NODE = FakeConfig(transfer_s=0.002, vocab_size=2048, step_s=0.004, prefill_token_s=1e-4)
ALWAYS: dict[str, Any] = {"policy": PolicyConfig(disaggregation="always")}
PLAN = Plan(prompt_tokens=40, output_tokens=5, rates=(10.0, 20.0), num_requests=6)
FEW = Shapes(prompts=(8, 64), batches=((3, 32),), in_a_row=(3, 16, 2), num_output_tokens=8, repeats=2)
WIDE = Limits(100.0, 100.0)


def test_the_options_of_a_cluster_are_simulated() -> None:
    words = "2+1 --disaggregation always --tbt-target-ms 70 --max-batch-tokens 512 --prefix-cache off"
    twin = planned(Shape.parse(words).options, MEASURED)
    assert [(group.role, group.count) for group in twin.design] == [(Role.PREFILL, 2), (Role.DECODE, 1)]
    scheduler = twin.config.scheduler
    assert twin.config.policy.disaggregation == "always"
    assert (scheduler.tbt_target_s, scheduler.max_batch_tokens, scheduler.has_prefix_cache) == (0.07, 512, False)
    assert twin.config.max_output_tokens == 1
    # As the option says, else from the least size that was seen, else never.
    token_bytes = MEASURED.as_model().kv_bytes_per_token
    for options, least, tokens in (
        (("--layerwise-from-kib", "64"), 1 << 20, 65536 / token_bytes),
        ((), 1 << 20, (1 << 20) / token_bytes),
        ((), None, MAX_COUNT),
    ):  # fmt: skip
        found = planned(("--mixed", "1", *options), replace(MEASURED, layerwise_from_bytes=least))
        assert found.config.layerwise_from_tokens == int(tokens)
    with pytest.raises(BadConfig, match="options of the cluster: No such option --tbt"):
        planned(("--mixed", "1", "--tbt", "5"), MEASURED)


def test_percentages() -> None:
    assert (_share("10%", "--x"), _share(" 12.5 ", "--x")) == (0.1, 0.125)
    for text in ("", "0", "-1%", "ten", "nan", "20000%"):
        with pytest.raises(BadConfig, match=r"--x is .*, expected a percentage above 0"):
            _share(text, "--x")


def test_what_cannot_be_validated_is_refused() -> None:
    shape = Shape.parse("1+1")
    for changes, text in (
        ({}, "nothing to validate"),
        ({"model": "m", "router": "a:1"}, "nothing to validate"),
        ({"model": "m", "shape": None}, "--model is started as which cluster"),
        ({"router": "a:1", "plan": Plan(streams=(2,))}, "give --rate"),
    ):
        asked: dict[str, Any] = {"shape": shape, "plan": PLAN, "limits": WIDE, **changes}
        with pytest.raises(BadConfig, match=text):
            Asked(**asked)


async def test_a_cluster_that_is_not_as_described_is_refused_before_anything_is_sent() -> None:
    async with (
        FakeCluster(NODE, prefill=1, decode=1) as cluster,
        router_beside(cluster, **ALWAYS) as router,
    ):
        address, layout = router.grpc or "", cluster["decode-0"].description.kv_layout
        described = cluster["decode-0"].description
        measured = replace(MEASURED, model=described.model.name, device=described.device, kv_layout=layout)
        asked = Asked(shape=Shape.parse("1+1"), plan=PLAN, limits=WIDE, router=address, measured=measured)
        for other, text in (
            (replace(asked, shape=Shape.parse("1+2")), "1 prefill, 1 decode and 0 mixed nodes .*, expected 1, 2 and 0"),
            (replace(asked, shape=Shape.parse("1+1 --tbt-target-ms 50")), "a target of 0 ms .* say 50"),
            (replace(asked, measured=replace(measured, model="other")), "the profile is of the model other"),
            (
                replace(asked, measured=replace(measured, kv_layout=replace(layout, head_dim=layout.head_dim * 2))),
                "the profile is of the KV layout",
            ),
        ):
            with pytest.raises(BadConfig, match=text):
                await validated(other, Console(quiet=True))
        assert sum(node.script.seen["tokens"] for node in cluster.nodes.values()) == 0


async def test_a_run_and_its_prediction_are_of_the_same_requests() -> None:
    async with (
        FakeCluster(NODE, prefill=1, decode=1) as cluster,
        router_beside(cluster, **ALWAYS) as router,
        AsyncClient(router.grpc or "") as client,
    ):
        address = router.grpc or ""
        measured = await measure(await live(client, address), {}, FEW, Console(quiet=True))
        asked = Asked(
            shape=Shape.parse("1+1 --disaggregation always"), plan=PLAN, limits=WIDE, router=address, measured=measured
        )
        found = await validated(asked, Console(quiet=True))
        wrong = await validated(replace(asked, measured=too_fast(measured), limits=Limits()), Console(quiet=True))
    assert found.is_met
    assert [report.load for report in found.reports] == ["40+5 10/s", "40+5 20/s"]
    for report in found.reports:
        assert len(report.pairs) == 6
        assert all(pair.predicted and pair.measured for pair in report.pairs)
        (moved,) = (row for row in report.rows if row.name == "transfers")
        assert (moved.predicted, moved.measured) == (6, 6)
    assert not wrong.is_met
    assert "E2E p50" in {row.name for row in wrong.reports[0].having(Verdict.MISSED)}
    better, changes = improved(wrong, Limits())
    assert better.mean_error < wrong.mean_error
    assert next(change.part for change in changes if change.is_taken) == "steps"
    # What the run fits already is left.
    assert improved(better, Limits())[0].mean_error <= better.mean_error


def test_other_work_on_the_host_is_told() -> None:
    measured = replace(MEASURED, overhead=Overhead(num_cores=2, node_cores=1), other_cores=0.02)
    quiet, busy = (Taken(10.0, 1.0, 1.0, 4.0, other_s) for other_s in (0.5, 6.0))
    assert not list(_disturbed(measured, quiet))
    (text,) = _disturbed(measured, busy)
    assert text.startswith("other work took 0.60 of 2 processors during this load, and 0.02 while the profile was")
    # While the profile was measured, too.
    assert list(_disturbed(replace(measured, other_cores=1.5), quiet))
    # Nothing is known of processes that are elsewhere, or do not say.
    assert not list(_disturbed(replace(measured, overhead=NO_OVERHEAD), busy))
    assert not list(_disturbed(measured, None))
    assert not list(_disturbed(measured, replace(busy, other_s=None)))


def simulate(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["plan", "simulate", *arguments])


def test_a_profile_takes_the_place_of_model_and_machines(tmp_path: Path) -> None:
    trace, times = tmp_path / "t.csv", tmp_path / "p.json"
    trace.write_text("arrival_timestamp,prompt_size,token_size\n0,100,5\n1,200,5\n")
    write(times, MEASURED)
    given = ("--trace", str(trace), "--times", str(times))
    found = simulate("--profile", "honest", *given, "--cluster", "1+1 --disaggregation always", "--json")
    assert found.exit_code == 0, found.output
    summary = json.loads(found.stdout)
    assert summary["design"] == "1 x measured prefill + 1 x measured decode"
    assert summary["TTFT_s_p50"] == pytest.approx(0.01 + 4 * 0.001 + LINE.step_s(StepShape().with_prompt(0, 150)))
    for wrong in (
        ("--profile", "compat", *given, "--cluster", "1+1"),
        ("--profile", "honest", *given),
        ("--profile", "honest", "--trace", str(trace), "--cluster", "1+1"),
        ("--profile", "honest", *given, "--cluster", "1+1", "--mixed", "h100-80gb:1"),
    ):
        with pytest.raises(BadConfig, match="--times has one kind of node"):
            CliRunner().invoke(app, ["plan", "simulate", *wrong], catch_exceptions=False)
