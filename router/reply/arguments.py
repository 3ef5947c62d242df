"""The types of a tool's parameters, for formats that write arguments as plain text (Qwen3-Coder)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from router.grammar.grammars import MAX_REFERENCE_CHARS

_TYPES: Mapping[type, str] = {
    str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object", type(None): "null",
}  # fmt: skip
# Schemas that are looked at for one argument; a reference may lead to any number of them.
_MAX_SCHEMAS = 256
# How models that think in Python write JSON's words.
_WORDS = {"true": "true", "false": "false", "null": "null", "none": "null"}


class Parameters:
    """Of one tool; ``schema`` is the JSON schema of its arguments, whatever it is."""

    __slots__ = ("_schema",)

    def __init__(self, schema: Mapping[str, Any]) -> None:
        self._schema = schema

    def is_text(self, key: str) -> bool:
        """Whether the argument is a text in any case; one that the schema does not know is."""
        return self._types(key) <= {"string"}

    def may_be_text(self, key: str) -> bool:
        types = self._types(key)
        return not types or "string" in types

    def json_of(self, key: str, text: str) -> str:
        """The JSON of an argument: text where nothing else fits."""
        types = self._types(key)
        bare = text.strip()
        bare = _WORDS.get(bare.lower(), bare)
        try:
            found = json.loads(bare, parse_constant=_no_number)
        except (ValueError, RecursionError):
            return json.dumps(text, ensure_ascii=False)
        kind = _TYPES[type(found)]
        fits = kind in types or (kind == "integer" and "number" in types) or (kind == "number" and "integer" in types)
        return bare if fits or "string" not in types else json.dumps(text, ensure_ascii=False)

    def _types(self, key: str) -> set[str]:
        """Of the key's schema and all that it refers to; a schema may refer to itself."""
        properties = self._schema.get("properties")
        waiting = [properties.get(key)] if isinstance(properties, Mapping) else []
        found: set[str] = set()
        seen: set[int] = set()
        while waiting and len(seen) < _MAX_SCHEMAS:
            schema = waiting.pop()
            if isinstance(schema, Mapping) and id(schema) not in seen:
                seen.add(id(schema))
                found |= _own_types(schema)
                for name in ("anyOf", "oneOf", "allOf"):
                    waiting += schema[name] if isinstance(schema.get(name), list) else ()
                if isinstance(schema.get("$ref"), str):
                    waiting.append(self._referred(schema["$ref"]))
        return found

    def _referred(self, reference: str) -> object:
        if len(reference) > MAX_REFERENCE_CHARS:
            return None
        found: object = self._schema
        for name in reference.removeprefix("#/").split("/"):
            found = found.get(name) if isinstance(found, Mapping) else None
        return found


def _own_types(schema: Mapping[str, Any]) -> set[str]:
    stated = schema.get("type")
    if isinstance(stated, str):
        return {stated}
    if isinstance(stated, list):
        return {kind for kind in stated if isinstance(kind, str)}
    if isinstance(schema.get("enum"), list):
        return {_TYPES.get(type(value), "string") for value in schema["enum"]}
    return {_TYPES.get(type(schema["const"]), "string")} if "const" in schema else set()


def _no_number(word: str) -> None:
    raise ValueError(word)
