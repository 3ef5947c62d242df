"""What is one change away from a cluster, and the commands that make it so."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.types import Role
from planner.advise.commands import Place, commands, place_of
from planner.advise.setup import Setup, neighbours
from router.cluster.config import MODES
from tests.support.watched import member, members_of, pinned

POOLS = Setup(prefill=2, decode=3, disaggregation="auto")


def about(setup: Setup, tbt_s: float | None = 0.02) -> dict[str, Setup]:
    return {each.about: each.setup for each in neighbours(setup, tbt_s)}


def test_neighbours_of_pools() -> None:
    found = about(POOLS)
    pools = {name: (s.prefill, s.decode, s.mixed) for name, s in found.items() if s.disaggregation == "auto"}
    assert pools["a node from decode to prefill"] == (3, 2, 0)
    assert pools["all nodes mixed"] == (0, 0, 5)
    assert pools["another node in prefill"] == (3, 3, 0)
    assert pools["a node less in decode"] == (2, 2, 0)
    assert {s.disaggregation for s in found.values()} == set(MODES)
    assert found["a TBT target of 40 ms"].tbt_target_s == 0.04
    assert found["1,024 prompt tokens a step"].max_batch_tokens == 1024


def test_neighbours_of_mixed_nodes_and_of_one_node() -> None:
    found = about(Setup(mixed=4, tbt_target_s=0.05))
    assert {(s.prefill, s.decode) for name, s in found.items() if name.startswith("pools")} == {(1, 3), (2, 2), (3, 1)}
    targets = {s.tbt_target_s for s in found.values() if s.mixed == 4}
    assert targets == {None, 0.025, 0.05, 0.1}
    assert {s.num_nodes for s in about(Setup(mixed=1)).values()} == {1, 2}
    assert "a TBT target" not in " ".join(about(Setup(prefill=1, decode=1, disaggregation="always")))
    assert "a TBT target" not in " ".join(about(Setup(mixed=2), None))


_SETUPS = st.builds(
    Setup, st.integers(0, 5), st.integers(0, 5), st.integers(0, 5), st.sampled_from(MODES),
    st.none() | st.floats(0.001, 1.0), st.integers(1, 1 << 20),
)  # fmt: skip


@given(today=_SETUPS.filter(lambda setup: setup.can_serve), tbt_s=st.none() | st.floats(1e-4, 10))
def test_every_neighbour_can_serve_and_is_another_setup(today: Setup, tbt_s: float | None) -> None:
    found = list(neighbours(today, tbt_s))
    setups = [each.setup for each in found]
    assert all(setup.can_serve for setup in setups)
    assert len({today, *setups}) == 1 + len(setups)
    assert len({each.about for each in found}) == len(found)
    assert all(abs(setup.num_nodes - today.num_nodes) <= 1 for setup in setups)
    for place in Place:
        for setup in setups:
            assert commands(members_of(today), today, setup, program="baton", router="r:1", place=place)


def told(after: Setup, place: Place, before: Setup = POOLS) -> tuple[str, ...]:
    return commands(members_of(before), before, after, program="baton", router="h:50051", place=place)


@pytest.mark.parametrize("place", list(Place))
def test_nodes_that_stay_change_their_role(place: Place) -> None:
    assert told(replace(POOLS, prefill=3, decode=2), place) == ("baton role decode-2 prefill --router h:50051",)
    assert told(Setup(mixed=5), place) == tuple(
        f"baton role {node} mixed --router h:50051"
        for node in ("prefill-1", "prefill-0", "decode-2", "decode-1", "decode-0")
    )


def test_what_an_operator_has_put_there_moves_last() -> None:
    nodes = (member("p0", Role.PREFILL), member("d0", Role.DECODE), pinned(member("d1", Role.DECODE)))
    before = Setup(prefill=1, decode=2)
    made = commands(nodes, before, replace(before, prefill=2, decode=1), program="b", router="r:1", place=Place.HERE)
    assert made == ("b role d0 prefill --router r:1",)


def test_more_and_fewer_nodes() -> None:
    more, less = replace(POOLS, decode=4), replace(POOLS, prefill=1)
    assert told(more, Place.HERE) == ("baton up ... --prefill 2 --decode 4",)
    assert told(more, Place.HOSTS) == ("baton worker --role decode ...",)
    assert told(less, Place.HOSTS) == ("baton drain prefill-1 --router h:50051",)
    scale, bounds = told(more, Place.KUBERNETES)
    assert scale == "kubectl -n baton scale deployment/decode --replicas=4"
    *command, patch = shlex.split(bounds)
    assert command == ["kubectl", "-n", "baton", "patch", "hpa", "decode", "--patch"]
    assert json.loads(patch) == {"spec": {"minReplicas": 4, "maxReplicas": 4}}


def test_caps_and_splitting_are_settings_of_processes() -> None:
    capped = replace(POOLS, tbt_target_s=0.04, max_batch_tokens=512)
    assert told(capped, Place.HERE) == ("baton up ... --tbt-target-ms 40 --max-batch-tokens 512",)
    assert told(capped, Place.HOSTS) == ("baton worker ... --tbt-target-ms 40 --max-batch-tokens 512",)
    assert told(replace(capped, tbt_target_s=None), Place.HERE, capped) == ("baton up ... --tbt-target-ms 0",)
    whole = replace(POOLS, disaggregation="never")
    assert told(whole, Place.HERE) == ("baton up ... --disaggregation never",)
    assert told(whole, Place.HOSTS) == ("baton router ... --disaggregation never",)
    (line,) = told(whole, Place.KUBERNETES)
    *command, patch = shlex.split(line)
    assert command == ["kubectl", "-n", "baton", "patch", "deployment/router", "--type=json", "--patch"]
    (added,) = json.loads(patch)
    assert added == {"op": "add", "path": "/spec/template/spec/containers/0/args/-", "value": "--disaggregation=never"}
    lines = told(replace(POOLS, max_batch_tokens=512), Place.KUBERNETES)
    assert [line.split()[4] for line in lines] == ["deployment/prefill", "deployment/decode"]


def test_where_a_cluster_runs_is_seen_by_its_nodes() -> None:
    here = members_of(POOLS)
    assert place_of(here) is Place.HERE
    assert place_of([*here, member("x", Role.DECODE, address="10.0.0.7:1")]) is Place.HOSTS
    assert (
        place_of([member("x", Role.DECODE, address="[::1]:1"), member("y", Role.DECODE, address="localhost:1")])
        is Place.HERE
    )
    pods = [
        member(name, Role.DECODE, address="10.0.0.7:1")
        for name in ("prefill-6d4cf56db6-x7k2p", "decode-5c9f8b7d9-abcde")
    ]
    assert place_of(pods) is Place.KUBERNETES


def test_a_setup_is_a_design_and_a_configuration() -> None:
    setup = replace(POOLS, disaggregation="never", tbt_target_s=0.03, max_batch_tokens=512, max_num_seqs=9)
    config = setup.config(77)
    assert config.policy.disaggregation == "never"
    scheduler = config.scheduler
    assert (scheduler.tbt_target_s, scheduler.max_batch_tokens, scheduler.max_num_seqs) == (0.03, 512, 9)
    assert config.max_output_tokens == 77
    assert setup.name == "2 prefill + 3 decode, splitting never, TBT target 30 ms, 512 prompt tokens a step"
    assert setup.can_serve
    assert not Setup(prefill=3).can_serve
