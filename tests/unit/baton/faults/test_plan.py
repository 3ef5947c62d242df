"""Schedules of faults: what they may say, and that everything else is refused with line, rule and expectation."""

from __future__ import annotations

import math
from pathlib import Path
from typing import get_args

import pytest

from baton.errors import BadConfig
from baton.faults.config import FaultsConfig
from baton.faults.kinds import KINDS, TAKES, FaultKind, Layer, has_length, kind_of
from baton.faults.plan import Plan, Rule
from baton.node_messages import CacheChanged, NodeMessage, RouterMessage
from kvtransfer.protocol.messages import ReceiverMessage, SenderMessage

WHOLE = """
seed = 7

[[fault]]
layer = "control"
kind = "com*"
node = "prefill-*"
role = "prefill"
life = 2
peer = "decode-1"
request = "chat-?"
after_s = 5
until_s = 30.5
probability = 0.02
times = 10
fault = "delay"
seconds = [0.1, 2]

[[fault]]
layer = "process"
at_s = 12
fault = "die"

[[fault]]
layer = "data"
nth = [1, 4]
fault = "corrupt"
position = 9

[[fault]]
layer = "session"
nth = 3
fault = "drop"
"""


def test_a_schedule_says_where_when_and_what() -> None:
    plan = Plan.parse(WHOLE, "x.toml")
    assert plan.seed == 7
    assert plan.rules == (
        Rule(
            Layer.CONTROL, FaultKind.DELAY, kind="com*", node="prefill-*", role="prefill", life=2, peer="decode-1",
            request="chat-?", after_s=5.0, until_s=30.5, probability=0.02, times=10, seconds=(0.1, 2.0),
        ),
        Rule(Layer.PROCESS, FaultKind.DIE, at_s=12.0),
        Rule(Layer.DATA, FaultKind.CORRUPT, nth=(1, 4), position=9),
        Rule(Layer.SESSION, FaultKind.DROP, nth=(3,)),
    )  # fmt: skip


def test_a_schedule_that_is_written_is_the_same_when_it_is_read() -> None:
    plan = Plan.parse(WHOLE, "x.toml")
    assert Plan.parse(plan.as_toml(), "again") == plan
    odd = Plan(2**53, (Rule(Layer.SESSION, FaultKind.DROP, request='a"\\b[*]', node="é", nth=(1,)),))
    assert Plan.parse(odd.as_toml(), "again") == odd


def test_every_message_has_its_kind() -> None:
    session = {kind_of(object.__new__(each)) for each in get_args(RouterMessage | NodeMessage)}
    assert session - {kind_of(object.__new__(CacheChanged))} == set(KINDS[Layer.SESSION])
    control = {kind_of(object.__new__(each)) for each in get_args(SenderMessage | ReceiverMessage)}
    assert control == set(KINDS[Layer.CONTROL])


@pytest.mark.parametrize(("layer", "fault"), [(layer, fault) for layer in Layer for fault in FaultKind])
def test_a_layer_takes_its_faults_and_refuses_others(layer: Layer, fault: FaultKind) -> None:
    text = f'[[fault]]\nlayer = "{layer}"\nfault = "{fault}"\nnth = 1\n'
    if fault in TAKES[layer]:
        (rule,) = Plan.parse(text, "x").rules
        assert (rule.layer, rule.fault, rule.seconds[0] > 0) == (layer, fault, has_length(layer, fault))
    else:
        with pytest.raises(BadConfig, match=rf"^x, line 1, fault 1: fault is '{fault}', expected one of .* layer "):
            Plan.parse(text, "x")


GOOD = 'layer = "session"\nfault = "delay"\nnth = 1\n'


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ('nthh = 2\nlayer = "session"', r"unknown key 'nthh' \(did you mean nth\?\)"),
        ("network = true", "unknown key 'network', expected some of layer, fault, kind"),
        ('layer = "sessions"', "layer is 'sessions', expected one of session, control, data"),
        ('fault = "drop"\nnth = 1', "layer is None, expected one of"),
        ('layer = "data"\nfault = "boom"', "fault is 'boom', expected one of drop, delay"),
        (GOOD + 'role = "queen"', "role is 'queen', expected prefill, decode, mixed, router, or a pattern"),
        (GOOD + 'kind = "commit"', "kind is 'commit', expected run, reserve.* at the layer session"),
        (GOOD + "node = 3", "node is 3, expected a text"),
        (GOOD + 'node = ""', "node is '', expected a text"),
        (GOOD + "life = -1", "life is -1, expected a whole number, 0 or more"),
        (GOOD + "life = true", "life is True, expected a whole number"),
        (GOOD + "after_s = -1", "after_s is -1, expected 0 to"),
        (GOOD + "after_s = nan", "after_s is nan, expected 0 to"),
        (GOOD + 'until_s = "5"', "until_s is '5', expected 0 to inf"),
        (GOOD + "after_s = 5\nuntil_s = 5", r"until_s is 5.0, expected more than after_s \(5\)"),
        (GOOD + "probability = 0.5", "nth and probability given, expected exactly one of at_s, nth, probability"),
        ('layer = "session"\nfault = "drop"', "none of them given, expected exactly one"),
        ('layer = "session"\nfault = "drop"\nprobability = 1.5', "probability is 1.5, expected 0 to 1"),
        ('layer = "session"\nfault = "drop"\nprobability = inf', "probability is inf, expected 0 to 1"),
        ('layer = "session"\nfault = "drop"\nnth = 0', "nth is 0, expected a whole number from 1 on"),
        ('layer = "session"\nfault = "drop"\nnth = []', r"nth is \[\], expected a whole number from 1 on"),
        ('layer = "session"\nfault = "drop"\nnth = [1, "2"]', r"nth is \[1, '2'\], expected"),
        ('layer = "session"\nfault = "drop"\nat_s = 3', "at_s is 3.0, expected none: only process, registry"),
        ('layer = "process"\nfault = "die"\nat_s = 3\nafter_s = 2', "at_s is given with after_s or until_s"),
        ('layer = "engine"\nfault = "stall"\nnth = 1\nrequest = "a"', "request is 'a', expected none: only session"),
        (GOOD + "seconds = -1", r"seconds is -1, expected 0 to 3600, or \[least, most\]"),
        (GOOD + "seconds = inf", "seconds is inf, expected 0 to 3600"),
        (GOOD + "seconds = [2, 1]", r"seconds is \[2, 1\], expected 0 to 3600"),
        (GOOD + "seconds = [1]", r"seconds is \[1\], expected"),
        (GOOD + "position = 3", "position is 3, expected none: only corrupt has one"),
        ('layer = "data"\nfault = "drop"\nnth = 1\nseconds = 1', "seconds is 1, expected none: drop at the layer data"),
    ],
)
def test_a_wrong_rule_is_refused_by_line_and_name(entry: str, message: str) -> None:
    text = f"seed = 1\n\n[[fault]]\n{GOOD}\n[[fault]]\n{entry}\n"
    with pytest.raises(BadConfig, match=f"^x.toml, line 8, fault 2: {message}"):
        Plan.parse(text, "x.toml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed = ", "x.toml is no TOML: "),
        ("seeds = 1", r"x.toml: unknown key 'seeds' \(did you mean seed\?\)"),
        ("seed = -1", "x.toml: seed is -1, expected 0 to"),
        ("fault = 3", r"x.toml: fault is 3, expected tables \[\[fault\]\]"),
        ("fault = [{layer = 1}]", "x.toml, fault 1: layer is 1, expected one of"),
    ],
)
def test_a_wrong_file_is_refused(text: str, message: str) -> None:
    with pytest.raises(BadConfig, match=f"^{message}"):
        Plan.parse(text, "x.toml")


def test_a_folder_is_one_schedule(tmp_path: Path) -> None:
    (tmp_path / "b.toml").write_text(f"seed = 2\n[[fault]]\n{GOOD}")
    (tmp_path / "a.toml").write_text(f"seed = 1\n[[fault]]\n{GOOD}life = 4\n")
    (tmp_path / "began.json").write_text("no schedule")
    plan = Plan.load(tmp_path)
    assert (plan.seed, [rule.life for rule in plan.rules]) == (1, [4, 0])


def test_what_cannot_be_read_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match=r"^--faults: cannot read '.*: No such file"):
        Plan.load(tmp_path / "none.toml")
    with pytest.raises(BadConfig, match=r"has no .toml file, expected a schedule"):
        Plan.load(tmp_path)
    (tmp_path / "x.toml").write_bytes(b"\xff")
    with pytest.raises(BadConfig, match=r"x.toml is no UTF-8"):
        Plan.load(tmp_path)


def test_each_run_has_a_folder_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "faults.toml"
    file.write_text(f"[[fault]]\n{GOOD}")
    first = FaultsConfig(file).of_run()
    assert (first.record, first.clock) == (tmp_path / "faults-drawn", tmp_path / "faults-drawn" / "began.json")
    first.begin(3.5)
    second = FaultsConfig(file).of_run()
    assert second.record == tmp_path / "faults-drawn-2"
    named = FaultsConfig(file, record=tmp_path / "mine", clock=tmp_path / "clock").of_run()
    assert (named.record, named.clock) == (tmp_path / "mine", tmp_path / "clock")


def test_without_a_schedule_there_is_nothing() -> None:
    assert FaultsConfig().of_run() == FaultsConfig()
    assert FaultsConfig().plan() == Plan()


def test_a_schedule_without_faults_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "faults.toml"
    file.write_text("seed = 1\n")
    with pytest.raises(BadConfig, match=r"has no \[\[fault\]\], expected at least one"):
        FaultsConfig(file).of_run()


def test_a_time_without_end_has_none_in_a_file() -> None:
    rule = Rule(Layer.SESSION, FaultKind.DROP, nth=(1,), after_s=2.0)
    assert rule.until_s == math.inf
    assert "until_s" not in rule.as_toml()


def test_rules_for_processes_that_are_not_there_are_named() -> None:
    entry = '[[fault]]\nlayer = "process"\nfault = "die"\nat_s = 1\nnode = "{}"\n'
    plan = Plan.parse("".join(map(entry.format, ("decode-*", "decode_0", "router-1", "*", "decode_0"))), "x")
    assert plan.strangers(("prefill-0", "decode-0", "router-0")) == ("decode_0", "router-1")
    assert Plan.parse(entry.format("rou[st]er-?"), "x").strangers(("router-0",)) == ()
