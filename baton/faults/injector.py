"""Decides which fault strikes at which point. Pure: no clock, no I/O, no shared source of randomness.

A draw is a hash of the seed, the rule, the point and how often that point was met, so other points, threads and
processes change nothing about it.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import translate
from functools import lru_cache
from hashlib import blake2b
from typing import NamedTuple

from baton.faults.kinds import FaultKind, Layer
from baton.faults.plan import Plan, Rule

# Points whose counts are kept. The count of one that was not met for so many others begins anew.
_MAX_POINTS = 65_536
_WILD = re.compile(r"[*?\[]")
# What a router puts behind an id that a client gave.
_RANDOM_PART = re.compile(r"~[0-9a-f]{8}(?=/|$)")


class Point(NamedTuple):
    """Where a fault may strike. ``request``: ID/CHOICE/ATTEMPT, empty if it is about none."""

    layer: Layer
    kind: str
    peer: str = ""
    request: str = ""


@dataclass(frozen=True, slots=True)
class Strike:
    """A fault that strikes now. ``rule``: its place in the plan. ``number``: of this point, from 1."""

    fault: FaultKind
    seconds: float
    position: int
    rule: int
    point: Point
    number: int


class _Drawn(NamedTuple):
    # Both from 0 to 1, without 1.
    chance: float
    share: float
    position: int


class Injector:
    """Of one life of one process. The answers to equal sequences at a point are equal, whatever else is asked."""

    def __init__(self, plan: Plan, node: str, role: str, life: int = 1, began_s: float | None = None) -> None:
        """``began_s``: the time at which this process began; None: times were not counted then."""
        self._seed = plan.seed
        self._who = (node, life)
        ours = [
            (number, rule)
            for number, rule in enumerate(plan.rules)
            if rule.life in (0, life) and _matches(rule.node, node) and _matches(rule.role, role)
        ]
        # Schedules that were drawn have a rule for each request, and most points are about another one.
        self._by_request: dict[tuple[Layer, str], list[tuple[int, Rule]]] = {}
        self._wide: dict[Layer, list[tuple[int, Rule]]] = {}
        for number, rule in ours:
            if _WILD.search(rule.request):
                self._wide.setdefault(rule.layer, []).append((number, rule))
            else:
                self._by_request.setdefault((rule.layer, rule.request), []).append((number, rule))
        self._left = {number: rule.times for number, rule in ours if rule.times}
        self._counts: OrderedDict[Point, int] = OrderedDict()
        # By layer, the time of the point before.
        self._last_s = dict.fromkeys(Layer, -1.0 if began_s is None else began_s)

    @property
    def is_idle(self) -> bool:
        """No rule is about this process."""
        return not self._wide and not self._by_request

    def decide(self, point: Point, elapsed_s: float | None) -> Strike | None:
        """``elapsed_s``: seconds since times are counted, None before."""
        point = point._replace(request=stable(point.request))
        number = self._count(point)
        last_s = self._last_s[point.layer]
        if elapsed_s is not None:
            self._last_s[point.layer] = elapsed_s
        for place, rule in self._candidates(point):
            if not _is_at(rule, point, elapsed_s) or self._left.get(place) == 0:
                continue
            drawn = self._draw(place, point, number)
            if not _strikes(rule, number, drawn, last_s, elapsed_s):
                continue
            if place in self._left:
                self._left[place] -= 1
            least, most = rule.seconds
            position = drawn.position if rule.position is None else rule.position
            return Strike(rule.fault, least + (most - least) * drawn.share, position, place, point, number)
        return None

    def _candidates(self, point: Point) -> Iterator[tuple[int, Rule]]:
        """In the order of the plan."""
        wide = self._wide.get(point.layer, [])
        if not point.request:
            yield from wide
            return
        of_request = self._by_request.get((point.layer, point.request), [])
        of_id = self._by_request.get((point.layer, _id_of(point.request)), [])
        yield from sorted((*wide, *of_request, *of_id), key=lambda each: each[0])

    def _count(self, point: Point) -> int:
        number = self._counts.pop(point, 0) + 1
        self._counts[point] = number
        if len(self._counts) > _MAX_POINTS:
            self._counts.popitem(last=False)
        return number

    def _draw(self, place: int, point: Point, number: int) -> _Drawn:
        # Where a request runs depends on what else runs, so its node and peer are not drawn by.
        where = (point.layer.value, point.kind, point.request) if point.request else (*point, *self._who)
        said = repr((self._seed, place, tuple(map(str, where)), number)).encode()
        digest = blake2b(said, digest_size=24).digest()
        chance, share, position = (int.from_bytes(digest[i : i + 8]) for i in (0, 8, 16))
        # 53 bits are what a float holds: never rounded up to 1.
        return _Drawn((chance >> 11) / 2**53, (share >> 11) / 2**53, position >> 33)


def stable(request: str) -> str:
    """Without what routers draw: the same in every run, if the client chose the id."""
    return _RANDOM_PART.sub("", request, count=1)


def _id_of(request: str) -> str:
    """Of ID/CHOICE/ATTEMPT; an id may hold slashes itself."""
    return request.rsplit("/", 2)[0]


@lru_cache(maxsize=1024)
def _pattern(text: str) -> re.Pattern[str]:
    return re.compile(translate(text))


def _matches(pattern: str, text: str) -> bool:
    return pattern in ("*", text) or _pattern(pattern).match(text) is not None


def _is_at(rule: Rule, point: Point, elapsed_s: float | None) -> bool:
    if not (_matches(rule.kind, point.kind) and _matches(rule.peer, point.peer)):
        return False
    if not (_matches(rule.request, point.request) or _matches(rule.request, _id_of(point.request))):
        return False
    if not rule.has_window:
        return True
    return elapsed_s is not None and rule.after_s <= elapsed_s < rule.until_s


def _strikes(rule: Rule, number: int, drawn: _Drawn, last_s: float, elapsed_s: float | None) -> bool:
    if rule.at_s is not None:
        # The first point from then on; a process that began later has none.
        return elapsed_s is not None and last_s < rule.at_s <= elapsed_s
    if rule.probability is not None:
        return drawn.chance < rule.probability
    return number in rule.nth
