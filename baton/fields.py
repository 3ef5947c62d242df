"""Reads a JSON object field by field, checks types and ranges, and lists the fields that were never read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from baton.errors import UnsupportedModel, quoted

MAX_INT = 2**31 - 1


class Fields:
    """One JSON object. An accessor marks its field as read, and raises UnsupportedModel for a value it cannot use."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self._values = values
        self._source = source
        self._read: set[str] = set()

    def get(self, key: str) -> Any:
        """The raw value; None if the field is absent."""
        self._read.add(key)
        return self._values.get(key)

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def within(self, key: str) -> str:
        """The source of an object in this one."""
        return f"{self._source}: {key}"

    def fault(self, key: str, expected: str) -> UnsupportedModel:
        return self.refusal(f"{key} is {quoted(self._values.get(key))}, expected {expected}")

    def refusal(self, text: str) -> UnsupportedModel:
        return UnsupportedModel(f"{self._source}: {text}")

    def integer(
        self, key: str, default: int | None = None, *, least: int = 1, most: int = MAX_INT, nullable: bool = False
    ) -> int:
        """``default`` is used if the field is absent, or null and ``nullable``; without a default it is required."""
        value = self._value(key, default, nullable)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.fault(key, f"an integer from {least} to {most}" + " or null" * nullable)
        return value

    def number(
        self, key: str, default: float | None = None, *, least: float, most: float, nullable: bool = False
    ) -> float:
        value = self._value(key, default, nullable)
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            raise self.fault(key, f"a number from {least:g} to {most:g}" + " or null" * nullable)
        return float(value)

    def optional_number(self, key: str, *, least: float, most: float) -> float | None:
        return None if self.get(key) is None else self.number(key, least=least, most=most)

    def flag(self, key: str, default: bool) -> bool:
        value = self._value(key, default, False)
        if not isinstance(value, bool):
            raise self.fault(key, "true or false")
        return value

    def text(self, key: str) -> str | None:
        value = self.get(key)
        if value is not None and not isinstance(value, str):
            raise self.fault(key, "a string")
        return value

    def texts(self, key: str) -> list[str]:
        value = self.get(key)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise self.fault(key, "a list of strings")
        return value

    def numbers(self, key: str, count: int, *, most: float) -> tuple[float, ...]:
        """Positive ones."""
        value = self.get(key)
        expected = f"a list of {count} positive numbers up to {most:g}"
        if not isinstance(value, list) or len(value) != count:
            raise self.fault(key, expected)
        for one in value:
            if isinstance(one, bool) or not isinstance(one, int | float) or not 0 < one <= most:
                raise self.fault(key, expected)
        return tuple(map(float, value))

    def fields(self, key: str) -> Mapping[str, Any]:
        value = self.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self.fault(key, "an object or null")
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One id, a list of ids, or null; some files have -1 for none."""
        value = self.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(one, int) and not isinstance(one, bool) and -1 <= one <= MAX_INT for one in ids):
            raise self.fault(key, "a token id, a list of them, or null")
        return tuple(one for one in ids if one >= 0)

    def unread(self) -> dict[str, Any]:
        """Fields that no accessor has read."""
        return {key: value for key, value in self._values.items() if key not in self._read}

    def _value(self, key: str, default: Any, nullable: bool) -> Any:
        value = self.get(key)
        is_absent = key not in self._values or (value is None and nullable)
        return default if is_absent else value
