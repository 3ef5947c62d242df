"""``bench peers`` with engines and servers that have no model: what fails is told, the others' rows are whole."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench.peers import engines, report, servers
from bench.peers.book import Book, read
from bench.peers.cells import CELLS, Cell, Reading, prompts, regime
from bench.peers.child import Child, Failed, Others, Usage
from bench.peers.drivers.gguf_converter import gguf_name, interleaved
from bench.peers.environments import Recipe, Unavailable, environment, wanted
from loadgen.load import closed, poisson, same_size
from tests.support.bench.contestant import contestant
from tests.support.root import ROOT

# Samples of milliseconds, on a machine that others use.
QUICK = engines.Limits(start_s=60.0, fill_s=60.0, sample_s=60.0, attempts=1)
TINY = (Cell("prefill 8", "prefill", 8, repeats=2), Cell("decode batch 2", "decode", batch=2, steps=3))


class SteadyProbes:
    """A machine whose memory changes after some readings."""

    def __init__(self, *gb_s: float) -> None:
        self._gb_s = list(gb_s or (40.0,))

    def read(self) -> Reading:
        return Reading(self._gb_s.pop(0) if len(self._gb_s) > 1 else self._gb_s[0], 400.0)


@pytest.fixture
def book(tmp_path: Path):
    book = Book(tmp_path / "rows.jsonl")
    yield book
    book.close()


def measured(tmp_path, book, *fakes, limits=QUICK, rounds=3, probes=None):
    contestants = [contestant(name, tmp_path, *fault) for name, *fault in fakes]
    started = list(contestants)
    try:
        engines.measure(TINY, contestants, rounds, probes or SteadyProbes(), limits, book)
    finally:
        engines.end(started)
    return contestants


def samples(book: Book, name: str) -> list[tuple[str, int]]:
    return [(row["cell"], row["round"]) for row in book.rows if row["kind"] == "sample" and row["who"] == name]


ALL = [(cell.name, number) for cell in TINY for number in range(3)]


# Calls of a fake: warm-up and two prompts a round of the prefill, then fill, warm-up and a round's steps each.
@pytest.mark.parametrize(
    ("fault", "at", "num_rows", "reason"),
    [
        ("raise", 1, 0, "RuntimeError: planted"),
        ("raise", 4, 1, "RuntimeError: planted"),
        ("exit", 4, 1, "ended with 3: last words"),
        ("raise", 8, 3, "RuntimeError: planted"),
        ("short", 10, 3, "5 tokens in 3 steps of 2"),
    ],
)
def test_a_failing_engine_is_told_and_the_others_rows_are_whole(tmp_path, book, fault, at, num_rows, reason):
    left = measured(tmp_path, book, ("baton",), ("bad", fault, at), ("peer", "noise", 0))
    assert [one.name for one in left] == ["baton", "peer"]
    assert samples(book, "baton") == samples(book, "peer") == ALL
    assert len(samples(book, "bad")) == num_rows
    [failure] = [row for row in book.rows if row["kind"] == "failure"]
    assert failure["who"] == "bad"
    assert reason in failure["reason"]
    # Every row was on disk when it was told.
    assert read(book.path) == book.rows
    assert reason in report.markdown(book.rows)


def test_a_hanging_engine_costs_its_limit_and_no_more(tmp_path, book):
    limits = replace(QUICK, sample_s=1.0)
    started = time.monotonic()
    measured(tmp_path, book, ("baton",), ("bad", "hang", 2), limits=limits)
    assert time.monotonic() - started < 60
    assert samples(book, "baton") == ALL
    assert [row["reason"] for row in book.rows if row["kind"] == "failure"] == ["no answer after 1 s"]


def test_a_disturbed_sample_is_taken_again_and_kept_apart(tmp_path, book):
    measured(tmp_path, book, ("baton",), limits=replace(QUICK, disturbed_cores=-1.0, attempts=3), rounds=1)
    assert [row["kind"] for row in book.rows] == ["disturbed", "disturbed", "sample"] * len(TINY)
    assert [row["rounds"] for row in report.summary(book.rows)["engines"]] == [1, 1]


def test_processor_time_is_that_of_descendants_in_groups_of_their_own_too():
    spin = "import os, subprocess, sys; print(os.getpid(), flush=True)\nwhile True: pass"
    script = (
        "import subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[1]], start_new_session=True).wait()"
    )
    with subprocess.Popen([sys.executable, "-c", script, spin], stdout=subprocess.PIPE, text=True) as parent:
        spinning = int(parent.stdout.readline())
        try:
            before, deadline = Usage(), time.monotonic() + 60
            while Usage().family_s(parent.pid) < 0.5:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            # For every other measurement it is one of the others.
            stranger = Others.between(before, Usage(), 1 << 30, 1.0)
            assert stranger.busiest
            assert stranger.cores >= 0.3
        finally:
            os.kill(spinning, signal.SIGKILL)


def test_every_round_begins_with_another_engine(tmp_path, book):
    measured(tmp_path, book, ("a",), ("b",), ("c",))
    order = [row["who"] for row in book.rows if row["kind"] == "sample"]
    assert order == list("abcbcacab") * len(TINY)


def test_an_engine_takes_no_processor_time_between_its_turns(tmp_path):
    one = contestant("spinning", tmp_path, "spin")
    try:
        time.sleep(0.1)
        before_s = Usage().family_s(one.child.group)
        time.sleep(0.5)
        # A tick that was begun is counted when it ends.
        assert Usage().family_s(one.child.group) < before_s + 0.05
        one.ask({"do": "prefill", "prompt": [1]}, 60.0)
        one.child.resume()
        deadline = time.monotonic() + 60
        while Usage().family_s(one.child.group) < before_s + 0.2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        one.child.end()
    assert Usage().family_s(one.child.group) == 0
    with pytest.raises(Failed, match="ended with"):
        one.child.check()


def test_a_command_that_is_not_there_is_a_failure(tmp_path):
    with pytest.raises(Failed, match="no-such-program"):
        Child(["/no-such-program"], tmp_path / "log", {})


def test_a_stopped_engine_ends_with_a_bench_that_was_killed(tmp_path):
    script = (
        "import sys, time; from pathlib import Path\n"
        "from tests.support.bench.contestant import contestant\n"
        "print(contestant('left', Path(sys.argv[1])).child.group, flush=True)\n"
        "time.sleep(600)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as bench:
        try:
            group = int(bench.stdout.readline())
            assert len(members(group)) == 1
        finally:
            bench.kill()
    deadline = time.monotonic() + 60
    while members(group):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def members(group: int) -> list[str]:
    """States of a group's living processes; one that has ended and was not waited for is none."""
    states = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        # Processes of others come and go.
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[2]) == group and fields[0] != "Z":
                states.append(fields[0])
    return states


def test_ratio_is_to_the_best_peer_of_each_round_and_regimes_are_apart():
    def row(who, number, tokens_s, gb_s, token):
        return {
            "kind": "sample", "cell": "x", "round": number, "who": who, "tokens_s": tokens_s, "seconds": 1.0,
            "first_tokens": [token], "read_gb_s": gb_s, "gflop_s": 400.0, "regime": regime(gb_s), "others_cores": 0.1,
            "flop_share": 0.5, "bandwidth_share": 0.25,
        }  # fmt: skip

    rows = [
        row("baton", 0, 120.0, 30.0, 7), row("p", 0, 100.0, 30.0, 7), row("q", 0, 60.0, 30.0, 8),
        row("baton", 1, 200.0, 60.0, 9), row("p", 1, 80.0, 60.0, 9), row("q", 1, 160.0, 60.0, 9),
        row("baton", 2, 150.0, 60.0, 9), row("p", 2, 100.0, 60.0, 9),
    ]  # fmt: skip
    every, fast, slow = report.summary(rows)["engines"]
    assert every["samples_ratio"] == [1.2, 1.25, 1.5]
    assert (every["ratio"], every["best_peer"], every["first_tokens_as_ours"]) == (1.25, "q", "4/5")
    assert (slow["regime"], slow["rounds"], slow["ratio"]) == ("below 35 GB/s", 1, 1.2)
    assert (fast["regime"], fast["rounds"], fast["ratio"]) == ("above 55 GB/s", 2, 1.375)
    assert "| x | all | **1.25** (1.20 1.25 1.50) | 120 200 150 |" in report.markdown(rows)


def test_a_run_that_was_cut_can_be_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"kind": "failure", "who": "a", "stage": "b", "reason": "c | d"}\n{"kind": "sam')
    assert "| a | b | c \\| d |" in report.markdown(read(path))


def test_floors_are_those_of_the_model():
    one, many = CELLS[2], CELLS[4]
    flops, num_bytes = one.floor(512)
    assert num_bytes == pytest.approx(426.2e6 + 512 * 16384, rel=1e-3)
    assert flops == pytest.approx(2 * 213.1e6 + 4 * 1024 * 16 * 512, rel=1e-3)
    assert many.floor(512)[1] - num_bytes == 31 * 512 * 16384
    flops, _ = CELLS[0].floor(0)
    # 180 M parameters a token, the head once, half of the square of attention.
    assert flops == pytest.approx(2 * 512 * 180.4e6 + 2 * 32.8e6 + 2 * 1024 * 16 * 512**2, rel=1e-3)


def test_prompts_are_the_same_for_every_engine_and_share_no_beginning():
    first, second = prompts("x", 2, 16)
    assert [first, second] == prompts("x", 2, 16)
    assert first[0] != second[0]


# -- environments


def test_an_environment_that_cannot_be_made_says_why_and_is_tried_again(tmp_path):
    recipe = Recipe("x", torch=False, packages=("no-such-package-of-baton",), build_env={"PIP_NO_INDEX": "1"})
    for _ in range(2):
        with pytest.raises(Unavailable, match="no-such-package-of-baton"):
            environment(recipe, tmp_path, tmp_path)
    assert not (tmp_path / "x" / ".made.json").exists()


def test_an_environment_that_is_there_is_used_and_a_changed_recipe_makes_it_anew(tmp_path):
    recipe = Recipe("x", torch=False)
    made = environment(recipe, tmp_path, tmp_path)
    assert made.python.exists()
    witness = made.folder / "witness"
    witness.touch()
    assert environment(recipe, tmp_path, tmp_path) == made
    assert witness.exists()
    environment(Recipe("x", torch=False, left_out=("torch",)), tmp_path, tmp_path)
    assert not witness.exists()


def test_an_installation_that_hangs_is_given_up(tmp_path):
    from bench.peers.environments import run

    with pytest.raises(Unavailable, match="longer than 0 s"):
        run([sys.executable, "-c", "import time; time.sleep(600)"], tmp_path / "log", 0.2)


def test_requirements_lose_extras_and_what_is_left_out():
    given = ["numpy", "torch==2.13.0+cpu; platform_machine == 'x86_64'", "torchvision", "ray>=2; extra == 'ray'"]
    assert wanted(given, ("torch", "torchvision")) == ["numpy"]


def test_gguf_names_and_the_order_of_rotary_rows():
    assert gguf_name("model.layers.11.self_attn.q_proj.weight") == "blk.11.attn_q.weight"
    assert gguf_name("lm_head.weight") == "output.weight"
    with pytest.raises(KeyError):
        gguf_name("model.layers.0.self_attn.q_norm.weight")
    rows = np.arange(16).reshape(8, 2)
    # Two heads of four rows: 0 1 2 3 becomes 0 2 1 3.
    assert interleaved(rows, 2)[:, 0].tolist() == [0, 4, 2, 6, 8, 12, 10, 14]


# -- servers


def plan(tmp_path: Path, name: str, wrong: str) -> servers.Plan:
    address = tmp_path / f"{name}.url"
    command = (sys.executable, "-m", "tests.support.bench.openai_server", str(address), wrong)
    return servers.Plan(
        name, command, {}, lambda: address.read_text() if address.exists() else None, "m", wrong == "none"
    )


LOADS = (
    closed("closed", same_size(6, 8, 5), 3, 180.0),
    poisson("open", same_size(4, 8, 5), 200.0, 180.0, "0"),
)


def test_servers_get_the_same_load_and_one_that_fails_costs_its_own_rows(tmp_path, book):
    plans = [plan(tmp_path, servers.VLLM, "none"), plan(tmp_path, "half", "http"), plan(tmp_path, "ours", "none")]
    standing = [servers.Server(p, Child(p.command, tmp_path / "log", {}, has_pipes=False), "") for p in plans]
    try:
        for server in standing:
            server.url = servers._await(server.plan, server.child, time.monotonic() + 60)
        servers.measure(LOADS, started := list(standing), 2, SteadyProbes(), book)
        assert len(started) == 3
    finally:
        for server in standing:
            server.child.end()
    rows = {(r["who"], r["load"], r["round"]): r for r in book.rows if r["kind"] == "load"}
    assert len(rows) == 3 * 2 * 2
    for (who, load, _), row in rows.items():
        expected = next(len(one.requests) for one in LOADS if one.name == load)
        assert row["requests"] + row["errors"] == expected
        assert row["errors"] == (expected // 2 if who == "half" else 0)
        assert len(row["gaps_ms"]) == 4 * row["requests"]
        assert row["cut"] == 0
    assert "HTTP 503" in rows["half", "closed", 0]["first_error"]
    assert {row["server"] for row in report.summary(book.rows)["servers"]} == {servers.VLLM, "half", "ours"}
    json.dumps(report.summary(book.rows))


@pytest.mark.parametrize(("wrong", "reason"), [("few", "tokens, expected 8"), ("late", "the first request")])
def test_a_server_that_answers_wrong_or_not_does_not_start(tmp_path, book, wrong, reason):
    assert servers.start(plan(tmp_path, "bad", wrong), tmp_path, 5.0, book) is None
    [failure] = [row for row in book.rows if row["kind"] == "failure"]
    assert reason in failure["reason"]


def test_a_load_is_cut_at_its_limit_and_says_so(tmp_path, book):
    slow = plan(tmp_path, "slow", "late")
    server = servers.Server(slow, Child(slow.command, tmp_path / "log", {}, has_pipes=False), "")
    try:
        server.url = servers._await(slow, server.child, time.monotonic() + 60)
        servers.measure([closed("cut", same_size(3, 8, 64), 2, 0.5)], left := [server], 1, SteadyProbes(), book)
    finally:
        server.child.end()
    assert left == []
    [row] = [row for row in book.rows if row["kind"] == "load"]
    assert (row["requests"], row["cut"]) == (0, 3)
    report.markdown(book.rows)
