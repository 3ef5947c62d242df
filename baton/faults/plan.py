"""A schedule of faults: reads the rules of a TOML file, or of a folder of them, and refuses what they cannot mean."""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

from baton.errors import BadConfig, quoted
from baton.faults.kinds import DEFAULT_S, KINDS, TAKES, FaultKind, Layer, has_length
from baton.spelling import meant

_E = TypeVar("_E", bound=StrEnum)

OPTION = "--faults"
MAX_RULES = 100_000
_MAX_FILE_BYTES = 16 << 20
_MAX_SECONDS = 3600.0
_MAX_COUNT = 2**53
_HEADER = re.compile(r"^[ \t]*\[\[[ \t]*fault[ \t]*\]\]", re.MULTILINE)
# Layers whose points are about requests, and are on a connection.
_OF_REQUESTS = (Layer.SESSION, Layer.CONTROL, Layer.DATA)
# Of processes.
_ROLES = ("prefill", "decode", "mixed", "router")
# Layers whose points come by the clock, so that a time names one.
_OF_TIME = (Layer.PROCESS, Layer.REGISTRY)


@dataclass(frozen=True, slots=True)
class Rule:
    """One entry. Texts are patterns with ``*``, ``?`` and ``[...]``; a point must match all of them.

    It strikes at one time (``at_s``), at the ``nth`` points of the same layer, kind, peer and request counted from 1,
    or with a ``probability``.
    """

    layer: Layer
    fault: FaultKind
    kind: str = "*"
    # The process that it strikes, by node id and role, and which start of that node; 0: every one.
    node: str = "*"
    role: str = "*"
    life: int = 0
    peer: str = "*"
    # A request's id, or ID/CHOICE/ATTEMPT.
    request: str = "*"
    # Seconds since the cluster was ready, or, of a process that was started alone, since it served.
    after_s: float = 0.0
    until_s: float = math.inf
    at_s: float | None = None
    nth: tuple[int, ...] = ()
    probability: float | None = None
    # In one process; 0: no limit.
    times: int = 0
    # Drawn between both.
    seconds: tuple[float, float] = (0.0, 0.0)
    # Which byte is corrupted, counted round; None: drawn.
    position: int | None = None

    @property
    def has_window(self) -> bool:
        return self.after_s > 0 or self.until_s < math.inf

    def as_toml(self) -> str:
        """An entry of a file, of what is not the default."""
        least, most = self.seconds
        length = None
        if has_length(self.layer, self.fault):
            length = least if least == most else [least, most]
        values: dict[str, object] = {
            "layer": self.layer.value, "kind": self.kind, "node": self.node, "role": self.role, "life": self.life,
            "peer": self.peer, "request": self.request, "after_s": self.after_s, "until_s": self.until_s,
            "at_s": self.at_s, "nth": list(self.nth), "probability": self.probability, "times": self.times,
            "fault": self.fault.value, "seconds": length, "position": self.position,
        }  # fmt: skip
        unsaid: tuple[object, ...] = ("*", None, [])
        has_default: dict[str, object] = {"life": 0, "after_s": 0.0, "until_s": math.inf, "times": 0}
        lines = [
            f"{name} = {json.dumps(value, ensure_ascii=False)}"
            for name, value in values.items()
            if value not in unsaid and (name not in has_default or value != has_default[name])
        ]
        return "\n".join(["[[fault]]", *lines, ""])


@dataclass(frozen=True, slots=True)
class Plan:
    """All that may strike. Rules are in the order of the file: of those that match, the first one counts."""

    seed: int = 0
    rules: tuple[Rule, ...] = ()

    def as_toml(self) -> str:
        return "\n".join([f"seed = {self.seed}\n", *(rule.as_toml() for rule in self.rules)])

    def strangers(self, nodes: Sequence[str]) -> tuple[str, ...]:
        """Patterns of rules that none of these nodes and routers matches."""
        patterns = dict.fromkeys(rule.node for rule in self.rules)
        return tuple(each for each in patterns if not any(fnmatchcase(node, each) for node in nodes))

    @classmethod
    def load(cls, path: Path, option: str = OPTION) -> Plan:
        """``path``: a file, or a folder whose .toml files count as one, with the seed of the first. Raises BadConfig
        that names file, line and rule."""
        try:
            files = sorted(path.glob("*.toml")) if path.is_dir() else [path]
            if not files:
                raise BadConfig(f"{option}: the folder {path} has no .toml file, expected a schedule", param=option)
            plans = [cls.parse(_read(file, option), f"{option}: {file}") for file in files]
        except OSError as error:
            reason = error.strerror or error
            raise BadConfig(f"{option}: cannot read {quoted(str(path))}: {reason}", param=option) from error
        rules = tuple(rule for plan in plans for rule in plan.rules)
        if len(rules) > MAX_RULES:
            raise BadConfig(f"{option}: {path} has {len(rules)} faults, expected at most {MAX_RULES}", param=option)
        return cls(plans[0].seed, rules)

    @classmethod
    def parse(cls, text: str, source: str) -> Plan:
        """``source`` begins every message. Raises BadConfig."""
        try:
            table = tomllib.loads(text)
        except (ValueError, RecursionError) as error:
            raise BadConfig(f"{source} is no TOML: {error}", param=OPTION) from error
        _known(table, ("seed", "fault"), f"{source}: ")
        seed = table.get("seed", 0)
        if not _is_count(seed):
            raise BadConfig(f"{source}: seed is {quoted(seed)}, expected 0 to {_MAX_COUNT}", param=OPTION)
        faults = table.get("fault", [])
        if not isinstance(faults, list) or not all(isinstance(each, dict) for each in faults):
            raise BadConfig(f"{source}: fault is {quoted(faults)}, expected tables [[fault]]", param=OPTION)
        lines = [text.count("\n", 0, found.start()) + 1 for found in _HEADER.finditer(text)]
        wheres = [f"line {line}, fault {i}" for i, line in enumerate(lines, 1)]
        if len(wheres) != len(faults):  # Written as a list of inline tables.
            wheres = [f"fault {i}" for i in range(1, len(faults) + 1)]
        return cls(seed, tuple(_rule(each, f"{source}, {where}: ") for each, where in zip(faults, wheres, strict=True)))


def _read(file: Path, option: str) -> str:
    with file.open("rb") as opened:
        content = opened.read(_MAX_FILE_BYTES + 1)
    if len(content) > _MAX_FILE_BYTES:
        raise BadConfig(f"{option}: {file} is larger than {_MAX_FILE_BYTES >> 20} MiB, expected a schedule in TOML")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise BadConfig(f"{option}: {file} is no UTF-8: {error}", param=option) from error


def _rule(table: Mapping[str, object], where: str) -> Rule:
    _known(table, tuple(Rule.__dataclass_fields__), where)
    layer, fault = _one_of(Layer, table, "layer", where), _one_of(FaultKind, table, "fault", where)
    if fault not in TAKES[layer]:
        raise _bad(where, "fault", fault.value, f"one of {_listed(TAKES[layer])} at the layer {layer}")
    rule = Rule(
        layer,
        fault,
        **{name: _text(table, name, where) for name in ("kind", "node", "role", "peer", "request")},
        life=_count(table, "life", where),
        after_s=_number(table, "after_s", 0.0, where),
        until_s=_number(table, "until_s", math.inf, where, most=math.inf),
        at_s=_number(table, "at_s", 0.0, where) if "at_s" in table else None,
        nth=_nth(table, where),
        probability=_number(table, "probability", 0.0, where, most=1.0) if "probability" in table else None,
        times=_count(table, "times", where),
        seconds=_seconds(table, layer, fault, where),
        position=_count(table, "position", where) if "position" in table else None,
    )
    _check_address(rule, table, where)
    return rule


def _check_address(rule: Rule, table: Mapping[str, object], where: str) -> None:
    """What the parts of an address mean together."""
    layer = rule.layer
    if not any(fnmatchcase(kind, rule.kind) for kind in KINDS[layer]):
        raise _bad(where, "kind", rule.kind, f"{', '.join(KINDS[layer])}, or a pattern of those, at the layer {layer}")
    if not any(fnmatchcase(role, rule.role) for role in _ROLES):
        raise _bad(where, "role", rule.role, f"{', '.join(_ROLES)}, or a pattern of those")
    for name in ("peer", "request"):
        if name in table and layer not in _OF_REQUESTS:
            raise _bad(where, name, table[name], f"none: only {_listed(_OF_REQUESTS)} have one")
    given = [name for name in ("at_s", "nth", "probability") if name in table]
    if len(given) != 1:
        found = " and ".join(given) or "none of them"
        raise BadConfig(f"{where}{found} given, expected exactly one of at_s, nth, probability", param=OPTION)
    if rule.at_s is not None and layer not in _OF_TIME:
        expected = f"none: only {_listed(_OF_TIME)} have times; elsewhere use after_s, times = 1, probability = 1"
        raise _bad(where, "at_s", rule.at_s, expected)
    if rule.at_s is not None and rule.has_window:
        raise BadConfig(f"{where}at_s is given with after_s or until_s, expected one or the other", param=OPTION)
    if rule.until_s <= rule.after_s:
        raise _bad(where, "until_s", rule.until_s, f"more than after_s ({rule.after_s:g})")
    if rule.position is not None and rule.fault is not FaultKind.CORRUPT:
        raise _bad(where, "position", rule.position, f"none: only {FaultKind.CORRUPT} has one")


def _known(table: Mapping[str, object], known: Sequence[str], where: str) -> None:
    for key in table:
        if key not in known:
            instead = meant(key, known) or f", expected some of {', '.join(known)}"
            raise BadConfig(f"{where}unknown key {quoted(key)}{instead}", param=OPTION)


def _bad(where: str, name: str, value: object, expected: str) -> BadConfig:
    return BadConfig(f"{where}{name} is {quoted(value)}, expected {expected}", param=OPTION)


def _listed(names: Iterable[StrEnum]) -> str:
    return ", ".join(name.value for name in names)


def _one_of(kinds: type[_E], table: Mapping[str, object], name: str, where: str) -> _E:
    value = table.get(name)
    if not isinstance(value, str) or value not in {kind.value for kind in kinds}:
        raise _bad(where, name, value, f"one of {_listed(kinds)}")
    return kinds(value)


def _text(table: Mapping[str, object], name: str, where: str) -> str:
    value = table.get(name, "*")
    if not isinstance(value, str) or not value:
        raise _bad(where, name, value, "a text, or a pattern with *, ? and [...]")
    return value


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_COUNT


def _count(table: Mapping[str, object], name: str, where: str) -> int:
    value = table.get(name, 0)
    if not _is_count(value):
        raise _bad(where, name, value, "a whole number, 0 or more")
    assert isinstance(value, int)
    return value


def _number(table: Mapping[str, object], name: str, default: float, where: str, most: float = _MAX_COUNT) -> float:
    return _within(table.get(name, default), most, lambda value: _bad(where, name, value, f"0 to {most:g}"))


def _within(value: object, most: float, bad: Callable[[object], BadConfig]) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
        raise bad(value)
    return float(value)


def _nth(table: Mapping[str, object], where: str) -> tuple[int, ...]:
    value = table.get("nth", [])
    numbers: list[Any] = value if isinstance(value, list) else [value]
    if ("nth" in table and not numbers) or not all(_is_count(n) and n > 0 for n in numbers):
        raise _bad(where, "nth", value, "a whole number from 1 on, or a list of them")
    return tuple(numbers)


def _seconds(table: Mapping[str, object], layer: Layer, fault: FaultKind, where: str) -> tuple[float, float]:
    if not has_length(layer, fault):
        if "seconds" in table:
            raise _bad(where, "seconds", table["seconds"], f"none: {fault} at the layer {layer} has no length")
        return 0.0, 0.0

    def bad(_: object) -> BadConfig:
        expected = f"0 to {_MAX_SECONDS:g}, or [least, most] of it"
        return _bad(where, "seconds", table["seconds"], expected)

    value = table.get("seconds", DEFAULT_S[fault])
    both = value if isinstance(value, list) else [value, value]
    if len(both) != 2:
        raise bad(value)
    least, most = (_within(each, _MAX_SECONDS, bad) for each in both)
    if least > most:
        raise bad(value)
    return least, most
