"""Machines, designs and workloads as users write them."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from baton.errors import BadConfig
from baton.types import Role
from loadgen import traces
from planner import design, machines, workload


def test_the_papers_iso_power_designs_draw_no_more_than_forty_h100() -> None:
    known = machines.catalogue()
    limit = design.parse(known, mixed=["h100-80gb:40"]).power_units
    for prompt, token in (
        ("a100-80gb:45", "a100-80gb:25"), ("h100-80gb:25", "h100-80gb:15"), ("h100-80gb:25", "a100-80gb:26"),
        ("h100-80gb:25", "h100-80gb-pcap:21"),
    ):  # fmt: skip
        found = design.parse(known, prompt=[prompt], token=[token])
        assert found.power_units <= limit
        assert found.power_units > 0.97 * limit
        assert (found.count(Role.PREFILL), found.count(Role.DECODE)) == tuple(
            int(each.rpartition(":")[2]) for each in (prompt, token)
        )


@pytest.mark.parametrize(
    ("pools", "complaint"),
    [
        ({"prompt": ["h100-80gb:2"]}, "2 prompt, 0 token and 0 mixed"),
        ({"mixed": ["h100-80gb:0"]}, "--mixed is 'h100-80gb:0'"),
        ({"mixed": ["h100-80gb"]}, "--mixed is 'h100-80gb'"),
        ({"mixed": ["h1:2"]}, "names the machine 'h1', expected one of a100-80gb"),
    ],
)
def test_a_design_that_cannot_be_is_refused(pools: dict[str, list[str]], complaint: str) -> None:
    with pytest.raises(BadConfig, match=complaint):
        design.parse(machines.catalogue(), **pools)


def test_a_users_machine_is_like_another_but_for_what_it_says(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('[mine]\nlike = "h100-80gb"\ndollars_per_hour = 3\n')
    known = machines.catalogue(tmp_path / "mine.toml")
    assert known["mine"].machine_dollars_per_hour == 24
    assert known["mine"].peak_flops == known["h100-80gb"].peak_flops


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[mine]\nnum_gpus = 8\n", "has no memory_bytes"),
        ('[mine]\nlike = "h9"\n', "is like 'h9'"),
        ('[mine]\nlike = "h100-80gb"\nnum_gpu = 8\n', "has 'num_gpu', expected one of num_gpus"),
        ('[mine]\nlike = "h100-80gb"\nnum_gpus = 1.5\n', "expected a whole number above 0"),
        ('[mine]\nlike = "h100-80gb"\npower_w = nan\n', "expected a number above 0"),
        ('[mine]\nlike = "h100-80gb"\npower_w = true\n', "expected a number above 0"),
        ("mine = 1\n", "expected a table"),
        ("[mine\n", "cannot be read"),
    ],
)
def test_a_file_of_machines_that_is_wrong_is_refused(text: str, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(BadConfig, match=complaint):
        machines.catalogue(tmp_path / "mine.toml")


def test_a_trace_is_read_in_both_forms(tmp_path: Path) -> None:
    simulators, azure = tmp_path / "a.csv", tmp_path / "b.csv"
    simulators.write_text("request_id,arrival_timestamp,prompt_size,token_size\n0,1.5,20,3\n1,0.5,10,1\n")
    azure.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.5,10,1\n2023-11-16 18:15:47.5,20,3\n"
    )
    lengths = [(10, 1), (20, 3)]
    for path, arrivals in ((simulators, [0.5, 1.5]), (azure, [0.0, 1.0])):
        packed = path.with_suffix(".csv.gz")
        packed.write_bytes(gzip.compress(path.read_bytes()))
        for each in (path, packed):
            requests = workload.read(each).requests
            assert [(r.num_prompt_tokens, r.num_output_tokens) for r in requests] == lengths
            assert [r.arrival_s for r in requests] == arrivals


@pytest.mark.parametrize("row", ["0,x,20,3", "0,1.5,0,3", "0,-1,20,3", "0,1.5,20", "0,nan,20,3", "0,1.5,inf,3"])
def test_a_trace_with_a_line_that_cannot_be_is_refused_by_its_line(row: str, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f"request_id,arrival_timestamp,prompt_size,token_size\n0,1,2,3\n{row}\n")
    with pytest.raises(BadConfig, match="line 3 of"):
        workload.read(path)


def test_drawn_requests_come_at_the_rate_and_are_the_same_for_a_seed() -> None:
    one, two, other = (workload.like_trace("conv", rate=20, seconds=100, seed=seed) for seed in (1, 1, 2))
    assert one == two != other
    assert one.rate == pytest.approx(20, rel=0.1)


def test_a_compressed_trace_that_is_damaged_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv.gz"
    whole = gzip.compress(b"request_id,arrival_timestamp,prompt_size,token_size\n0,1,2,3\n")
    for damaged in (whole[:-9], whole[:12] + b"\xff\xff" + whole[14:], b"none"):
        path.write_bytes(damaged)
        for read in (workload.read, lambda path: workload.named(str(path)), lambda path: traces.read(str(path))):
            with pytest.raises(BadConfig, match="cannot be read"):
                read(path)
