"""Plans as overlays: pods and bounds of each pool, never beyond what the plan allows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import BadConfig
from baton.types import Role
from planner.design import Design, Group, parse
from planner.export import Planned, overlay, pools, read, warnings
from planner.machines import Machine, catalogue
from planner.models import BUILT_IN
from planner.results import Profile
from planner.search import report
from planner.search.kind import KindSearch
from planner.search.plan import Plan
from planner.search.question import Limits, Question, Range, kinds
from planner.search.source import Redrawn
from tests.support.designs import LENGTHS, Known

KNOWN = catalogue()
A, H = KNOWN["a100-80gb"], KNOWN["h100-80gb"]
SPLIT = parse(KNOWN, prompt=["h100-80gb:3"], token=["a100-80gb:2"])
# A pod has one GPU.
SMALL = replace(H, name="small", num_gpus=1)


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    """Of at most 6 machines; 2 prompt machines and 1 token machine carry as much as 3 mixed ones."""
    asked = Question(
        Redrawn(LENGTHS, 8.0, 1), Profile.COMPAT, BUILT_IN["bloom-176b"], 8, KNOWN, kinds((H,), ((H, A),)),
        limits=Limits(dollars_per_hour=200.0, machines=Range(1, 6), prompt=Range(1, 4)), max_rate=50.0,
    )  # fmt: skip

    def rate(prompt: int, token: int) -> float:
        return min(4 * prompt, 8 * token) if token else 2 * prompt

    searched = Plan(asked, tuple(KindSearch(asked, kind, Known(rate)).answer() for kind in asked.kinds))
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(report.as_json(searched)))
    return path


def scaled(text: str) -> dict[str, tuple[int, int]]:
    """The bounds of each pool's scaler, as kubectl reads them."""
    found = {}
    for patch in yaml.safe_load(text)["patches"]:
        if patch.get("target", {}).get("kind") == "HorizontalPodAutoscaler":
            low, high = (change["value"] for change in yaml.safe_load(patch["patch"]))
            found[patch["target"]["name"]] = (low, high)
    return found


def written(planned: Planned, bounds: dict[Role, Range] | None = None) -> dict[str, tuple[int, int]]:
    return scaled(overlay(planned, pools(planned, bounds or {}), "../nvidia"))


def test_a_plan_of_a_search_is_as_many_pods_as_it_has_machines(plan: Path) -> None:
    planned = read(plan, KNOWN)
    assert planned.design.name == "4 x h100-80gb prefill + 2 x a100-80gb decode"
    assert written(planned) == {"prefill": (4, 4), "decode": (2, 2)}
    assert written(planned, {Role.PREFILL: Range(2, 4)}) == {"prefill": (2, 4), "decode": (2, 2)}
    text = overlay(planned, pools(planned, {}), "../nvidia")
    assert yaml.safe_load(text)["resources"] == ["../nvidia"]
    assert "for 16 requests/s of" in text.splitlines()[0]


def test_mixed_machines_are_one_pool_and_the_other_one_is_left_out(plan: Path) -> None:
    planned = read(plan, KNOWN, "h100-80gb mixed")
    text = overlay(planned, pools(planned, {}), "../nvidia")
    assert scaled(text) == {"decode": (5, 5)}, "200 dollars pay for five"
    patches = [yaml.safe_load(patch["patch"]) for patch in yaml.safe_load(text)["patches"]]
    gone = [(patch["kind"], patch["metadata"]["name"]) for patch in patches if "$patch" in patch]
    assert gone == [(kind, "prefill") for kind in ("Deployment", "HorizontalPodAutoscaler", "PodDisruptionBudget")]
    assert [change["value"] for change in patches[2]] == ["--role=decode", "--role=mixed"]


@pytest.mark.parametrize(
    ("bounds", "complaint"),
    [
        (
            {Role.PREFILL: Range(1, 5)},
            "5 prefill machines, at most 4; 7 machines, at most 6; .* at most 200.00 and any",
        ),
        ({Role.DECODE: Range(2, 3)}, "there are 7 machines, at most 6"),
        ({Role.DECODE: Range(3, 4)}, "expected bounds around those of the design, 2"),
        ({Role.DECODE: Range(0, 2)}, "and at least 1"),
        ({Role.MIXED: Range(1, 2)}, "the mixed pool .* those of the design, 0"),
    ],
)
def test_no_pool_scales_beyond_the_plans_limits(plan: Path, bounds: dict[Role, Range], complaint: str) -> None:
    planned = read(plan, KNOWN)
    with pytest.raises(BadConfig, match=complaint):
        pools(planned, bounds)


_RANGES = st.tuples(st.integers(1, 9), st.integers(0, 9)).map(lambda ends: Range(ends[0], sum(ends)))


@given(
    counts=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    prompt=_RANGES, token=_RANGES, machines=_RANGES, allowed=st.tuples(_RANGES, _RANGES),
    dollars=st.none() | st.floats(20, 700), power=st.none() | st.floats(20, 700),
)  # fmt: skip
def test_whatever_is_asked_for_the_maxima_hold(
    counts: tuple[int, int], prompt: Range, token: Range, machines: Range, allowed: tuple[Range, Range],
    dollars: float | None, power: float | None,
) -> None:  # fmt: skip
    """Failure 28: nor does an autoscaler that is at its maximum in both pools."""
    limits = Limits(dollars, power, machines, *allowed)
    design = Design((Group(Role.PREFILL, H, counts[0]), Group(Role.DECODE, A, counts[1])))
    try:
        found = written(Planned(design, "x", 8, limits), {Role.PREFILL: prompt, Role.DECODE: token})
    except BadConfig:
        return
    (prompts_low, prompts), (tokens_low, tokens) = found["prefill"], found["decode"]
    assert prompts_low <= counts[0] <= prompts <= allowed[0].high
    assert tokens_low <= counts[1] <= tokens <= allowed[1].high
    assert prompts + tokens <= machines.high
    assert dollars is None or prompts * H.machine_dollars_per_hour + tokens * A.machine_dollars_per_hour <= dollars
    assert power is None or prompts * H.power_units + tokens * A.power_units <= power


def test_a_pod_has_the_gpus_of_one_model() -> None:
    split = Planned(SPLIT, "x", 4)
    assert written(split) == {"prefill": (6, 6), "decode": (4, 4)}, "two models on a machine of 8 GPUs"
    assert '{nvidia.com/gpu: "4"}' in overlay(split, pools(split, {}), "b")
    whole = Planned(SPLIT, "x")
    assert '{nvidia.com/gpu: "8"}' in overlay(whole, pools(whole, {}), "b")
    one = Planned(Design((Group(Role.MIXED, SMALL, 2),)), "x")
    assert "gpu" not in overlay(one, pools(one, {}), "b"), "as the overlays have it"
    with pytest.raises(BadConfig, match="tensor parallelism is 3, and h100-80gb has 8 GPUs; expected a divisor"):
        pools(Planned(SPLIT, "x", 3), {})


def test_pools_of_different_machines_are_told_apart_by_a_label() -> None:
    planned = Planned(SPLIT, "x")
    found = pools(planned, {})
    patches = yaml.safe_load(overlay(planned, found, "b", "example.com/machine"))["patches"]
    pods = [yaml.safe_load(p["patch"])["spec"]["template"]["spec"] for p in patches if "target" not in p]
    assert [pod["nodeSelector"] for pod in pods] == [{"example.com/machine": m.name} for m in (H, A)]
    odd: Machine = replace(H, name="h100 (new)")
    planned = Planned(Design((Group(Role.MIXED, odd, 2),)), "x")
    with pytest.raises(BadConfig, match=r"the machine 'h100 \(new\)' cannot be the value of a label"):
        overlay(planned, pools(planned, {}), "b", "machine")


def test_what_an_operator_has_to_know_is_said() -> None:
    mixed_sizes = Planned(parse(KNOWN, prompt=["h100-80gb:1"], token=["a100-80gb:2"]), "x")
    told = list(warnings(pools(mixed_sizes, {}), ""))
    assert ["prefill may have one pod" in told[0], "--machine-label" in told[1], "ask for 8 GPUs" in told[2]] == [
        True
    ] * 3
    assert len(told) == 3
    quiet = Planned(Design((Group(Role.MIXED, SMALL, 2),)), "x")
    assert list(warnings(pools(quiet, {}), "")) == []


@pytest.mark.parametrize(
    ("design", "complaint"),
    [
        (
            Design((Group(Role.PREFILL, H, 1), Group(Role.PREFILL, A, 1), Group(Role.DECODE, A, 1))),
            "several machine types",
        ),
        (Design((Group(Role.PREFILL, H, 1), Group(Role.DECODE, A, 1), Group(Role.MIXED, A, 1))), "beside pools"),
    ],
)
def test_designs_that_the_manifests_have_no_pools_for_are_refused(design: Design, complaint: str) -> None:
    with pytest.raises(BadConfig, match=complaint):
        pools(Planned(design, "x"), {})


def test_files_that_are_no_plan_are_refused(plan: Path, tmp_path: Path) -> None:
    good: dict[str, Any] = json.loads(plan.read_text())
    (tmp_path / "none.json").write_text(json.dumps(good | {"best": None}))
    with pytest.raises(BadConfig, match=r"no design of the kind 'None' .* h100-80gb \+ a100-80gb, h100-80gb mixed"):
        read(tmp_path / "none.json", KNOWN)
    with pytest.raises(BadConfig, match="no design of the kind 'x'"):
        read(plan, KNOWN, "x")
    with pytest.raises(BadConfig, match=r"machine 'h100-80gb', expected one of a100-80gb; .* --machines"):
        read(plan, {"a100-80gb": A})
    for text in ("", "[]", "3", "{}", json.dumps(good | {"limits": {}}), json.dumps(good | {"answers": [1]})):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(BadConfig, match=r"expected the plan\.json that `baton plan search --out` writes"):
            read(tmp_path / "bad.json", KNOWN)
    with pytest.raises(BadConfig, match="cannot be read"):
        read(tmp_path / "nowhere.json", KNOWN)
