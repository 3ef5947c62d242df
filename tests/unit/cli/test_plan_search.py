"""`baton plan search` from its options to its output."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from baton.errors import BadConfig
from cli.app import app

SMALL = (
    "--profile", "compat", "--prompt-tokens", "200-1500", "--output-tokens", "20-80", "--seconds", "8", "--max-rate",
    "9", "--workers", "1",
)  # fmt: skip
PAIR = ("--pair", "h100-80gb:a100-80gb", "--count", "1-3")


def search(*arguments: str) -> str:
    # Tables are cut to this width.
    wide = {"COLUMNS": "300"}
    found = CliRunner().invoke(app, ["plan", "search", *SMALL, *arguments], catch_exceptions=False, env=wide)
    assert found.exit_code == 0, found.output
    return found.stdout


def test_a_table_names_the_profile_each_kind_and_whether_splitting_pays() -> None:
    told = search(*PAIR)
    assert "profile compat · bloom-176b with TP 8" in told
    for kind in ("h100-80gb + a100-80gb", "h100-80gb mixed", "a100-80gb mixed"):
        assert kind in told
    assert "splitting" in told
    assert "searched in" in told


def test_30_it_is_told_that_splitting_does_not_pay() -> None:
    """Batch jobs: no objective but an end. One machine does as well as two."""
    loose = ("--slo", "E2E_slowdown:p99:100", "--rate-step", "3")
    for count in ("1-2", "1-1"):
        told = search("--machine", "h100-80gb", "--count", count, *loose).splitlines()
        assert "splitting does not pay: mixed machines do as well or better" in told


def test_json_and_pictures_are_the_same_each_time(tmp_path: Path) -> None:
    first, second = (search(*PAIR, "--out", str(tmp_path / name), "--json") for name in ("a", "b"))
    assert first == second
    found = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert found == ["front.svg", "latency.svg", "plan.json", "region.svg"]
    for name in found:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    plan = json.loads((tmp_path / "a" / "plan.json").read_text())
    assert plan == json.loads(first)
    assert plan["limits"]["machines"] == [1, 3]


def test_budgets_are_numbers_or_machines() -> None:
    for limit in ("76.16", "h100-80gb:2"):
        plan = json.loads(search("--machine", "h100-80gb", "--max-cost", limit, "--json"))
        assert plan["limits"]["dollars_per_hour"] == pytest.approx(76.16)
        best = [answer["best"] for answer in plan["answers"] if answer["best"]]
        assert max(each["machines"] for each in best) == 2
    plan = json.loads(search("--machine", "a100-80gb", "--max-power", "h100-80gb:1", "--json"))
    assert [answer["designs_in_grid"] for answer in plan["answers"]] == [0, 1]


def test_the_least_cost_carries_the_rate() -> None:
    plan = json.loads(search(*PAIR, "--goal", "cost", "--rate", "2", "--json"))
    best = [answer["best"] for answer in plan["answers"] if answer["best"]]
    assert best
    assert {each["rate"] for each in best} == {2.0}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--trace", "conv"), "expected the requests by --trace, or by both"),
        (("--goal", "cost"), "the goal cost has no rate"),
        (("--rate", "3"), "a rate of 3 is given"),
        (("--machine", "b200"), "--machine names the machine 'b200'"),
        (("--pair", "h100-80gb"), "--pair names the machine ''"),
        (("--max-cost", "h100-80gb"), "--max-cost is 'h100-80gb'"),
        (("--max-power", "-5"), "--max-power is '-5'"),
        (("--max-cost", "1"), "no design is within the limits"),
        (("--count", "5-3"), "--count is '5-3'"),
        (("--token-count", "a"), "--token-count is 'a'"),
        (("--slo", "TTFT:p99:1"), "--slo is 'TTFT:p99:1'"),
        (("--rate-step", "20"), "rates in steps of 20 up to 9"),
    ],
)
def test_what_cannot_be_searched_is_refused(arguments: tuple[str, ...], said: str) -> None:
    with pytest.raises(BadConfig) as raised:
        search(*arguments)
    assert said in str(raised.value)
    assert raised.value.param


# Where the tests run in the background of a shell, the signal may be ignored.
_BATON = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from cli.main import main
main()
"""


@pytest.mark.timeout(120)
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_processes_end_with_the_command(how: signal.Signals) -> None:
    command = (
        sys.executable, "-c", _BATON, "plan", "search", "--profile", "honest", "--trace", "conv", "--poisson",
        "--seconds", "600", "--workers", "2",
    )  # fmt: skip
    begun = subprocess.Popen(
        command, env=dict(os.environ), start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert begun.stdout is not None
    try:
        searches = _searches_of(psutil.Process(begun.pid))
        if how is signal.SIGINT:
            os.killpg(begun.pid, how)  # As a terminal does.
        else:
            begun.send_signal(how)
        told = begun.communicate(timeout=60)[0].decode()
    finally:
        begun.kill()
        begun.wait()
    gone, alive = psutil.wait_procs(searches, timeout=30)
    assert not alive
    assert len(gone) == 2
    if how is signal.SIGINT:
        assert begun.returncode == 130
        assert "Traceback" not in told


def _searches_of(command: psutil.Process) -> list[psutil.Process]:
    """Both of them, when they compute."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        spawned = [child for child in command.children() if "spawn_main" in " ".join(child.cmdline())]
        if len(spawned) == 2 and all(child.cpu_times().user > 0.5 for child in spawned):
            return spawned
        time.sleep(0.05)
    pytest.fail("the searches did not begin")
