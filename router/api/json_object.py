"""Reads one object of a body's JSON, member by member; every error has the member's path."""

from __future__ import annotations

from typing import Any, TypeVar

from baton.errors import InvalidRequest, quoted, shortened

_Type = TypeVar("_Type")
_NAMES = {str: "a string", bool: "true or false", dict: "an object", list: "a list", int: "an integer"}


class JsonObject:
    """Raises InvalidRequest for a member of another type; `finish` for members that were not read."""

    __slots__ = ("_members", "_unread", "where")

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, dict):
            raise InvalidRequest(f"{where} is {quoted(value)}, expected an object", param=where)
        self.where = where
        self._members: dict[str, Any] = value
        self._unread = {name: None for name, member in value.items() if member not in (None, [], {}, "", False)}

    def get(self, name: str) -> Any:
        """The member as it is; None if it is absent."""
        self._unread.pop(name, None)
        return self._members.get(name)

    def optional(self, name: str, kind: type[_Type]) -> _Type | None:
        value = self.get(name)
        if value is not None and type(value) is not kind:
            raise self.fault(name, _NAMES[kind])
        return value

    def required(self, name: str, kind: type[_Type]) -> _Type:
        value = self.optional(name, kind)
        if value is None:
            raise InvalidRequest(f"{self.at(name)} is missing, expected {_NAMES[kind]}", param=self.at(name))
        return value

    def at(self, name: str) -> str:
        return f"{self.where}.{name}"

    def fault(self, name: str, expected: str) -> InvalidRequest:
        return InvalidRequest(f"{self.at(name)} is {quoted(self.get(name))}, expected {expected}", param=self.at(name))

    def finish(self, *ignored: str) -> None:
        """``ignored``: members without effect. Members that say nothing (null, false, empty) may have any name."""
        name = next((name for name in self._unread if name not in ignored), None)
        if name is not None:
            where = f"{self.where}.{shortened(name, 80)}"
            raise InvalidRequest(f"{where} is not supported", param=where)
