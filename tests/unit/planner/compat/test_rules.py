"""Rules of the public simulator, one by one; that all together give its results is tested with its results."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from math import nextafter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.errors import BadConfig
from baton.types import Role
from planner import machines, models
from planner.compat.events import Events
from planner.compat.machine import Machine
from planner.compat.run import simulate
from planner.compat.tasks import Job
from planner.design import Design, parse
from planner.results import Ending, MachineUse, Run, Served
from planner.table import TokenTimes
from planner.workload import Request, Workload

KNOWN = machines.catalogue()
BLOOM, LLAMA = models.BUILT_IN["bloom-176b"], models.BUILT_IN["llama2-70b"]
TIMES = TokenTimes("bloom-176b", KNOWN["h100-80gb"], 8)
# Of BLOOM's KV, and of what one machine has for KV.
TOKEN_BYTES = 2 * 70 * 14336 * 2
ROOM_BYTES = 8 * 80 * 1024**3 - 329_000_000_000
ONE = parse(KNOWN, mixed=["h100-80gb:1"])
TWO = parse(KNOWN, prompt=["h100-80gb:1"], token=["h100-80gb:1"])


def run(design: Design, requests: Iterable[tuple[float, int, int]], model: models.Model = BLOOM, tp: int = 8) -> Run:
    return simulate(Workload("test", tuple(Request(i, *each) for i, each in enumerate(requests))), design, model, tp)


def first_tokens(found: Run) -> list[float]:
    assert all(served.first_token_s is not None for served in found.served)
    return [served.first_token_s or 0.0 for served in found.served]


def test_one_request_takes_its_prompt_its_transfer_and_its_steps() -> None:
    served = run(TWO, [(1.0, 1000, 11)]).served[0]
    prompt_s, transfer_s, step_s = TIMES.prompt_s(1000), 1000 * TOKEN_BYTES / (200 * 1024**3), TIMES.decode_s(1)
    assert served.first_token_s == pytest.approx(1 + prompt_s)
    assert served.decode_start_s == pytest.approx(1 + prompt_s + transfer_s)
    assert served.second_token_s == pytest.approx(1 + prompt_s + transfer_s + step_s)
    assert served.ended_s == pytest.approx(1 + prompt_s + transfer_s + 10 * step_s)
    assert (served.prompt_machine, served.token_machine) == ("h100-80gb_0", "h100-80gb_1")


@pytest.mark.parametrize(("num_tokens", "num_steps"), [(2000, 11), (2048, 11), (2049, 100)])
def test_a_prompt_joins_at_the_border_of_a_step_but_one_longer_than_a_batch_waits_until_a_decode_ends(
    num_tokens: int, num_steps: int
) -> None:
    """Of a request whose tokens are for another machine; else they would cut the steps when they arrive."""
    events = Events()
    machine, other = (
        Machine(
            MachineUse(name, Role.MIXED, "h100-80gb"), TIMES, events, max_memory_bytes=10**12, weight_bytes=0,
            on_prompt_end=lambda job: None, on_decode_end=lambda job: None, on_idle=lambda machine: None,
        )
        for name in ("one", "other")
    )  # fmt: skip
    decode, prompt = (Job(Served(Request(i, 0.0, tokens, 101)), TOKEN_BYTES) for i, tokens in ((0, 1), (1, num_tokens)))
    decode.source, decode.target = other, machine
    prompt.source, prompt.target = machine, other
    machine.arrived(decode.decode)
    step_s = TIMES.decode_s(1)
    events.after(10.5 * step_s, lambda: machine.arrived(prompt.prompt))
    events.run()
    prompt_s = TIMES.batch_s(num_tokens, 1) if num_tokens < 2048 else TIMES.prompt_s(num_tokens)
    assert prompt.served.first_token_s == pytest.approx(num_steps * step_s + prompt_s)


def test_prompts_share_a_batch_up_to_its_tokens_and_a_longer_one_runs_alone() -> None:
    found = run(ONE, [(0.0, 50, 2), (0.001, 1000, 2), (0.002, 1048, 2), (0.003, 5000, 2)])
    first, *rest = first_tokens(found)
    together_s = first + TIMES.batch_s(1000 + 1048, 0)
    assert rest == pytest.approx([together_s, together_s, together_s + TIMES.prompt_s(5000)])
    assert found.machines[0].num_prompt_tokens == 50 + 1000 + 1048 + 5000


def test_a_decode_that_prompts_left_out_four_times_goes_first_and_to_its_end() -> None:
    found = run(ONE, [(0.0, 100, 30), *((0.01, 2048, 1) for _ in range(6))])
    prompt_s, decoding_s = TIMES.prompt_s(2048), 29 * TIMES.decode_s(1)
    before_s = TIMES.prompt_s(100) + 4 * prompt_s
    assert found.served[0].ended_s == pytest.approx(before_s + decoding_s)
    prompts = [TIMES.prompt_s(100) + i * prompt_s + (decoding_s if i > 4 else 0) for i in range(1, 7)]
    assert sorted(first_tokens(found)[1:]) == pytest.approx(prompts)


def test_a_prompt_that_finds_a_long_queue_takes_a_token_machine_which_then_goes_home() -> None:
    found = run(TWO, [(0.0, 4000, 40), *((0.001 * i, 4000, 40) for i in range(1, 4))])
    assert [served.prompt_machine for served in found.served] == ["h100-80gb_0"] * 2 + ["h100-80gb_1"] * 2
    assert found.counters["role_changes"] % 2 == 0 < found.counters["role_changes"]


def test_without_memory_on_the_token_machine_a_transfer_waits_a_second_at_a_time() -> None:
    """The first two fill the token machine, as both were placed before either had allocated."""
    most = ROOM_BYTES // TOKEN_BYTES
    whole = [(0.0, most // 2, most // 2 - 2), (0.1, 4000, 300)]
    found = run(TWO, whole)
    assert all(served.is_whole for served in found.served)
    crowded = run(parse(KNOWN, prompt=["h100-80gb:2"], token=["h100-80gb:1"]), [*whole, (0.2, most // 2, 100)])
    assert all(served.is_whole for served in crowded.served)
    assert crowded.counters["oom_events"] == 0


def test_what_never_fits_is_told_and_the_run_ends() -> None:
    most = ROOM_BYTES // TOKEN_BYTES
    for design in (ONE, TWO):
        found = run(design, [(0.0, most + 1, 10), (0.5, 100, 10)])
        assert found.served[0].ending is Ending.FAILED
        assert any(
            warning.startswith(("1 requests did not end", "2 requests did not end")) for warning in found.warnings
        )


def test_a_request_of_one_token_ends_with_its_prompt() -> None:
    for design in (ONE, TWO):
        found = run(design, [(0.01 * i, 500, 1) for i in range(300)])
        assert [served.ended_s for served in found.served] == first_tokens(found)
        assert found.served[0].decode_start_s is found.served[0].second_token_s is None
        assert not found.counters["kv_transfers"]


def test_a_split_machine_has_an_instance_for_each_group_of_gpus_and_a_mixed_one_has_one() -> None:
    split = run(TWO, [(0.0, 100, 10)], LLAMA, 4)
    assert [use.name for use in split.machines] == [f"h100-80gb_{i}" for i in range(4)]
    assert len(run(ONE, [(0.0, 100, 10)], LLAMA, 4).machines) == 1


@pytest.mark.parametrize("decodes", [7, 10, 33, 101])
def test_what_arrives_at_the_very_end_of_steps_takes_none_too_many(decodes: int) -> None:
    alone = run(ONE, [(0.3, 100, decodes + 1)]).served[0].ended_s
    assert alone is not None
    for arrival_s in (nextafter(alone, 0), alone, nextafter(alone, 9)):
        found = run(ONE, [(0.3, 100, decodes + 1), (arrival_s, 50, 2)])
        assert found.served[0].ended_s == pytest.approx(alone, abs=1e-12)
        assert found.served[1].first_token_s == pytest.approx(alone + TIMES.prompt_s(50))


def test_names_count_by_kind_of_machine() -> None:
    found = run(parse(KNOWN, prompt=["h100-80gb:1"], token=["h100-80gb-pcap:1", "a100-80gb:1"]), [(0.0, 100, 10)])
    assert [use.name for use in found.machines] == ["a100-80gb_0", "h100-80gb-pcap_1", "h100-80gb_2"]


@pytest.mark.parametrize(
    ("design", "model", "tp", "complaint"),
    [
        (parse(KNOWN, prompt=["h100-80gb:1"], token=["h100-80gb:1"], mixed=["h100-80gb:1"]), BLOOM, 8, "either alone"),
        (ONE, BLOOM, 16, "tensor parallelism is 16"),
        (ONE, BLOOM, 4, "no 'bloom-176b' on 'h100-80gb' with TP 4"),
        (TWO, LLAMA, 3, "with TP 3"),
        (ONE, replace(BLOOM, name="other"), 8, "no 'other'"),
        (
            parse({"h100-80gb": replace(KNOWN["h100-80gb"], memory_bytes=40e9)}, mixed=["h100-80gb:1"]),
            BLOOM, 8, "have 320 GB of memory",
        ),
    ],
)  # fmt: skip
def test_what_the_rules_do_not_have_is_refused(design: Design, model: models.Model, tp: int, complaint: str) -> None:
    with pytest.raises(BadConfig, match=complaint):
        run(design, [(0.0, 100, 10)], model, tp)


def test_what_the_rules_ignore_is_told() -> None:
    work = Workload("test", (Request(0, 0.0, 100, 10, cancelled_after_s=0.1),))
    assert any("cancellations" in warning for warning in simulate(work, ONE, BLOOM).warnings)


REQUESTS = st.lists(st.tuples(st.floats(0, 5), st.integers(1, 6000), st.integers(1, 300)), min_size=1, max_size=60).map(
    sorted
)
DESIGNS = st.sampled_from(
    [
        ONE, TWO, parse(KNOWN, mixed=["a100-80gb:3"]), parse(KNOWN, prompt=["h100-80gb:3"], token=["a100-80gb:1"]),
        parse(KNOWN, prompt=["a100-80gb:1"], token=["h100-80gb-pcap:2"]),
    ]
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(REQUESTS, DESIGNS)
def test_every_request_ends_once_and_in_order_and_nothing_is_left(
    requests: list[tuple[float, int, int]], design: Design
) -> None:
    """`simulate` checks bytes, tokens and requests itself."""
    found = run(design, requests)
    assert len(found.served) == len(requests)
    for served in found.served:
        moments = [served.first_token_s, served.decode_start_s, served.second_token_s, served.ended_s]
        times = [served.request.arrival_s, *(moment for moment in moments if moment is not None)]
        assert served.is_whole
        assert len(times) == (3 if served.request.num_output_tokens == 1 else 5)
        assert times == sorted(times)
    assert found == run(design, requests)
    busy_s = max(use.prompt_s + use.decode_s + use.mixed_s for use in found.machines)
    assert busy_s <= found.ended_s + 1e-6
