"""Schemas of the JSON Schema test suite are followed exactly, or refused by name."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import pytest

from router.grammar.near_bounds import has_near_bounds
from tests.support import schema_suite
from tests.support.schema_suite import FILES, NARROWER, WIDER, cases, exception_of, why_not


@pytest.mark.parametrize("file", FILES)
def test_what_is_followed_agrees_with_the_suite_but_for_what_is_listed(file: str) -> None:
    for case in cases(file):
        for instance in case.instances:
            told = (case.description, instance.description, instance.text)
            if instance.is_valid and not instance.is_accepted:
                assert exception_of(file, instance.description, NARROWER), told
            elif instance.is_accepted and not instance.is_valid:
                assert exception_of(file, instance.description, WIDER), told


def words(schema: Any) -> set[str]:
    """Keywords and texts of a schema."""
    if isinstance(schema, dict):
        return {str(name) for name in schema} | set().union(*map(words, schema.values()))
    return set().union(*map(words, schema)) if isinstance(schema, list) else {json.dumps(schema).strip('"')}


@pytest.mark.parametrize("file", FILES)
def test_what_is_refused_is_refused_by_name(file: str) -> None:
    for case in cases(file):
        if case.why is not None:
            # What the library calls otherwise, and a keyword of the schema of schemas.
            named = words(case.schema) | {"patternProperty", "float range", "False", "regex", "$dynamicAnchor"}
            assert any(re.search(rf"(?<!\w){re.escape(word)}", case.why) for word in named if word), case


def test_most_of_the_suite_is_followed() -> None:
    """And every exception is needed."""
    found = [case for file in FILES for case in cases(file)]
    followed = [case for case in found if case.why is None]
    assert len(followed) > 200
    assert sum(len(case.instances) for case in followed) > 1000
    for listed, is_valid in ((NARROWER, True), (WIDER, False)):
        for file, begin in listed:
            assert any(
                case.file == file and i.description.startswith(begin) and i.is_valid is is_valid is not i.is_accepted
                for case in followed
                for i in case.instances
            ), (file, begin)


def test_the_table_and_the_page_say_what_is_so() -> None:
    for path, told in ((schema_suite.TABLE, schema_suite.table()), (schema_suite.PAGE, schema_suite.total())):
        assert told in path.read_text(encoding="utf-8"), "run python -m tests.support.schema_suite"


@pytest.mark.parametrize(
    ("schema", "accepted", "refused"),
    [
        ({"format": "date"}, ["2024-02-29", "2000-02-29", "0001-01-01"], ["2023-02-29", "1900-02-29", "0000-01-01"]),
        ({"format": "date", "pattern": "^2"}, ["2024-02-29"], ["1999-01-01", "2023-02-29"]),
        (
            {"format": "date", "pattern": "9$", "allOf": [{"pattern": "^2"}]},
            ["2024-02-29"],
            ["1996-02-29", "2024-02-28"],
        ),
        ({"format": "time"}, ["23:59:59Z", "00:00:00.5+01:30"], ["23:59:60Z", "23:59:59", "24:00:00Z"]),
        ({"format": "date-time"}, ["2024-02-29T23:59:59Z"], ["2023-02-29T23:59:59Z", "2024-02-29 23:59:59Z"]),
        ({"minLength": 2.0}, ["ab"], ["a"]),
    ],
)
def test_what_is_rewritten_means_the_same(schema: Any, accepted: list[str], refused: list[str]) -> None:
    # By itself, and where keywords are the names of properties.
    for name in ("x", "default", "format", "properties"):
        inside = {"type": "object", "properties": {name: schema}, "required": [name], "additionalProperties": False}
        for texts, is_accepted in ((accepted, True), (refused, False)):
            for text in texts:
                assert schema_suite.accepts(schema, text) is is_accepted, (schema, text)
                assert schema_suite.accepts(inside, {name: text}) is is_accepted, (inside, text)


def test_keywords_that_say_nothing_are_left_out_and_others_refused() -> None:
    for idle in (
        {"uniqueItems": False},
        {"not": False},
        {"if": {"type": "string"}},
        {"then": False},
        {"maxContains": 1},
    ):
        assert why_not(idle) is None, idle
    refused: list[dict[str, Any]] = [
        {"uniqueItems": True}, {"not": {}}, {"if": {}, "then": {}}, {"contains": {}, "maxContains": 1}
    ]  # fmt: skip
    for schema in refused:
        assert next(iter(schema)) in str(why_not(schema)), schema
    # A property of that name is none.
    closed = {"properties": {"uniqueItems": False}, "type": "object"}
    assert not schema_suite.accepts(closed, {"uniqueItems": 1})


def test_a_bound_is_followed_exactly_or_refused() -> None:
    bounds = [-1.25, -1, -0.5, 0, 0.5, 1, 1.25]
    num_refused = 0
    for low, high in itertools.combinations(bounds, 2):
        schema = {"type": "number", "exclusiveMinimum": low, "exclusiveMaximum": high}
        if why_not(schema) is not None:
            num_refused += 1
            continue
        for text in {str(low), str(high), f"{low}.0", f"{high}.0", "-0", "0", "0.0"}:
            if schema_suite.accepts_text(schema, text):
                assert low < float(text) < high, (schema, text)
    assert num_refused == 4


@pytest.mark.parametrize(
    ("schema", "is_near"),
    [
        ({"allOf": [{"exclusiveMinimum": 2}, {"maximum": 2.5}]}, True),
        ({"exclusiveMinimum": 2, "$ref": "#/$defs/n", "$defs": {"n": {"anyOf": [{"maximum": 2.5}]}}}, True),
        ({"exclusiveMinimum": 2, "$ref": "#n", "$defs": {"n": {"$anchor": "n", "maximum": 2.5}}}, True),
        ({"properties": {"a": {"exclusiveMinimum": 2}, "b": {"maximum": 2.5}}}, False),
        ({"properties": {"a": {"exclusiveMinimum": 2}, "b": {"anyOf": [{"maximum": 2.5}, {"type": "null"}]}}}, False),
        ({"type": "integer", "exclusiveMinimum": 2, "maximum": 2.5}, False),
        ({"exclusiveMinimum": 2, "maximum": 3.5}, False),
        ({"exclusiveMinimum": True, "maximum": 1.5}, False),
        ({"$ref": "#", "exclusiveMinimum": 2}, False),
        ({"exclusiveMinimum": 10**400, "maximum": 0.5}, False),
    ],
)
def test_near_bounds_of_one_value_are_found(schema: Any, is_near: bool) -> None:
    assert has_near_bounds(schema) is is_near


def test_near_bounds_are_looked_for_within_a_limit() -> None:
    branches = {"anyOf": [{"type": "string", "maxLength": n} for n in range(1000)]}
    uses = {f"p{n}": {"$ref": "#/$defs/d"} for n in range(5000)}
    near = {"a": {"exclusiveMinimum": 2}, "b": {"maximum": 2.5}}
    assert not has_near_bounds({"properties": uses, "$defs": {"d": branches}})
    assert has_near_bounds({"properties": uses | near, "$defs": {"d": branches}})
