"""Finds where a JSON schema bounds a number in a way that llguidance follows wrongly.

It takes an exclusive bound that is a whole number for an inclusive one where the other bound is less than 1 away from
it and further from 0: ``exclusiveMinimum: 0`` with ``maximum: 0.5`` allows 0. The two may be in parts that apply to the
same value.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

_SAME_VALUE = ("allOf", "anyOf", "oneOf")
# Parts that are looked at, once for each value that they apply to.
_MAX_PARTS = 20_000


def has_near_bounds(schema: Mapping[str, Any]) -> bool:
    """Also where a reference cannot be followed here that may lead to one."""
    parts = list(_parts(schema))
    if not _are_near(parts):
        return False
    applied = {id(inner) for part in parts for inner in _applied(part)}
    targets: dict[str, Any] = {}
    num_parts = 0
    for part in parts:
        # What is applied beside others is looked at with them.
        if id(part) in applied and part is not schema:
            continue
        same = _same_value(part, schema, targets, _MAX_PARTS - num_parts)
        if same is None or _are_near(same):
            return True
        num_parts += len(same)
    return False


def _parts(value: Any) -> Iterator[Mapping[str, Any]]:
    pending = [value]
    while pending:
        value = pending.pop()
        if isinstance(value, Mapping):
            yield value
            pending += value.values()
        elif isinstance(value, list):
            pending += value


def _applied(part: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    lists = (part[name] for name in _SAME_VALUE if isinstance(part.get(name), list))
    return (inner for inner in chain.from_iterable(lists) if isinstance(inner, Mapping))


def _same_value(
    part: Mapping[str, Any], whole: Mapping[str, Any], targets: dict[str, Any], max_parts: int
) -> list[Mapping[str, Any]] | None:
    """This part and all that apply to the same value; None: that cannot be told. ``targets``: of references."""
    found: dict[int, Mapping[str, Any]] = {}
    pending = [part]
    while pending:
        part = pending.pop()
        if id(part) in found:
            continue
        found[id(part)] = part
        if len(found) > max_parts:
            return None
        pending += _applied(part)
        if isinstance(path := part.get("$ref"), str):
            if path not in targets:
                targets[path] = _target(path, whole)
            target = targets[path]
            if target is None:
                return None
            pending += [target] if isinstance(target, Mapping) else []
    return list(found.values())


def _target(path: str, whole: Any) -> Any:
    if path != "#" and not path.startswith("#/"):
        return None
    for name in path.split("/")[1:]:
        name = name.replace("~1", "/").replace("~0", "~")
        if isinstance(whole, list) and name.isdecimal() and len(name) < 8:
            whole = whole[int(name)] if int(name) < len(whole) else None
        else:
            whole = whole.get(name) if isinstance(whole, Mapping) else None
    return whole


def _are_near(parts: list[Mapping[str, Any]]) -> bool:
    """Whole numbers that are excluded, beside fractions less than 1 away."""
    numbers = [part for part in parts if part.get("type") != "integer"]
    least = {n for part in numbers for n in _bounds(part, "exclusiveMinimum") if n >= 0}
    most = {n for part in numbers for n in _bounds(part, "exclusiveMaximum") if n <= 0}
    above = [n for part in numbers for n in _bounds(part, "maximum", "exclusiveMaximum")]
    below = [n for part in numbers for n in _bounds(part, "minimum", "exclusiveMinimum")]
    return any(n // 1 in least for n in above if n % 1) or any(n // 1 + 1 in most for n in below if n % 1)


def _bounds(part: Mapping[str, Any], *names: str) -> list[int | float]:
    """Those that a double can hold: the library's are doubles."""
    found = [part.get(name) for name in names]
    return [n for n in found if isinstance(n, int | float) and not isinstance(n, bool) and abs(n) < 1e300]
