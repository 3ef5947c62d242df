"""Rewrites a JSON schema into one of the same meaning, or a narrower one, that llguidance follows exactly.

Where the library would let through what is not valid, a part becomes one that it follows; where it refuses a keyword
that says nothing, the keyword is left out. What cannot be followed stays as it is, for the library to refuse by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

# Keywords whose values are no schemas, and those whose values have schemas by the names of properties or definitions.
DATA = ("const", "enum", "default", "examples")
_BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
COUNTED = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")

# The library knows neither the years with a 29th of February nor the minutes with a leap second. A time here has no
# leap seconds, capital letters, and at most nanoseconds; there is no year 0, as in most languages' types.
_LEAP = "(?:0[48]|[2468][048]|[13579][26])"
_YEAR = "(?:[1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])"
_DAY = "(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
_DATE = f"(?:{_YEAR}-(?:{_DAY}|02-(?:0[1-9]|1[0-9]|2[0-8]))|(?:[0-9]{{2}}{_LEAP}|{_LEAP}00)-02-29)"
_TIME = r"(?:[01][0-9]|2[0-3])(?::[0-5][0-9]){2}(?:\.[0-9]{1,9})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_PATTERNS = {"date": f"^{_DATE}$", "time": f"^{_TIME}$", "date-time": f"^{_DATE}T{_TIME}$"}

# Keywords that the library refuses, by the values with which they say nothing: given the value and its schema.
_IDLE: Mapping[str, Callable[[Any, Mapping[str, Any]], bool]] = {
    "uniqueItems": lambda value, _: value is False,
    "unevaluatedItems": lambda value, _: value in (True, {}),
    "unevaluatedProperties": lambda value, _: value in (True, {}),
    "propertyNames": lambda value, _: value in (True, {}),
    "dependentRequired": lambda value, _: value == {},
    "dependentSchemas": lambda value, _: value == {},
    "not": lambda value, _: value is False,
    "if": lambda _, schema: not schema.keys() & {"then", "else"},
    "then": lambda _, schema: "if" not in schema,
    "else": lambda _, schema: "if" not in schema,
    "minContains": lambda _, schema: "contains" not in schema,
    "maxContains": lambda _, schema: "contains" not in schema,
}


def exact(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Of a bounded depth. A copy where anything differs."""
    found: dict[str, Any] = _rewritten(schema)
    return found


def _rewritten(part: Any, *, is_by_name: bool = False) -> Any:
    if isinstance(part, list):
        return [_rewritten(item) for item in part]
    if not isinstance(part, Mapping):
        return part
    if is_by_name:
        return {name: _rewritten(value) for name, value in part.items()}
    schema = {
        name: value if name in DATA else _rewritten(value, is_by_name=name in _BY_NAME)
        for name, value in part.items()
        if not (name in _IDLE and _IDLE[name](value, part))
    }
    for name in COUNTED:
        if isinstance(count := schema.get(name), float) and count.is_integer():
            schema[name] = int(count)
    return _by_pattern(schema)


def _by_pattern(schema: dict[str, Any]) -> dict[str, Any]:
    name = schema.get("format")
    pattern = _PATTERNS.get(name) if isinstance(name, str) else None
    if pattern is None:
        return schema
    schema = {name: value for name, value in schema.items() if name != "format"}
    if "pattern" not in schema:
        return schema | {"pattern": pattern}
    others = schema.get("allOf", [])
    return schema | {"allOf": [*others, {"pattern": pattern}]} if isinstance(others, list) else schema
