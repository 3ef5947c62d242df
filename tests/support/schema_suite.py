"""The JSON Schema test suite beside the grammars: which schemas are followed, and what they accept of its instances.

An instance is written as compact JSON, whole numbers without a fraction, its properties in any order: a grammar has the
schema's order. `python -m tests.support.schema_suite` writes the table beside the suite, and its sum into the page.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from baton.errors import InvalidRequest
from baton.grammar_limits import LIMITS
from router.grammar import grammars
from router.grammar.child import refusal
from tests.support.root import ROOT

FOLDER = ROOT / "tests" / "data" / "json-schema-test-suite" / "draft2020-12"
FILES = sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.rglob("*.json"))
PAGE = ROOT / "docs" / "clients.md"
TABLE = FOLDER.parent / "README.md"
BEGIN = "<!-- suite: written by `python -m tests.support.schema_suite` -->\n"
END = "\n<!-- end of suite -->"
_MAX_ORDERED = 4
_NUM_STEPS = 16

# Instances for which the grammar's answer is not the suite's, by file and the beginning of their description, and why.
# Valid, and yet not accepted:
NARROWER = {
    ("format", "invalid "): "formats are followed; in the suite they are annotations",
    ("optional/format/date-time", "a valid date-time with a leap second"): "no leap seconds",
    ("optional/format/date-time", "case-insensitive T and Z"): "capital letters",
    ("optional/format/time", "a valid time string with leap second"): "no leap seconds",
    ("optional/format/time", "valid leap second"): "no leap seconds",
    ("optional/format/time", "a valid time string with case-insensitive Z"): "capital letters",
    ("optional/format/email", "a quoted string"): "no quoted names",
    ("optional/format/email", "an IPv6-address-literal"): "no addresses of IPv6",
    ("optional/format/ipv6", "mixed format"): "no part of IPv4",
    ("optional/format/ipv6", "a long valid ipv6"): "no part of IPv4",
    ("optional/ecmascript-regex", "zero-width whitespace matches"): "white space is Unicode's, which lacks U+FEFF",
}
# Not valid, and yet accepted:
WIDER = {
    (
        "optional/ecmascript-regex",
        "zero-width whitespace does not match",
    ): "white space is Unicode's, which lacks U+FEFF"
}


class Instance(NamedTuple):
    description: str
    text: str
    is_valid: bool
    is_accepted: bool


class Case(NamedTuple):
    file: str
    description: str
    schema: Any
    # Why the schema is refused; None: it is followed.
    why: str | None
    instances: tuple[Instance, ...]


@functools.cache
def tokenizer() -> LLTokenizer:
    return LLTokenizer((ROOT / "demo" / "model" / "tokenizer.json").read_text())


@functools.cache
def cases(file: str) -> list[Case]:
    return [_case(file, case) for case in json.loads((FOLDER / f"{file}.json").read_text(encoding="utf-8"))]


def why_not(schema: Any) -> str | None:
    """As a router finds out."""
    try:
        grammar = grammars.of_json_schema(schema, param="schema")
    except InvalidRequest as error:
        return error.message
    return refusal(_matcher(grammar), _NUM_STEPS)


def accepts(schema: Any, value: Any) -> bool:
    return any(accepts_text(schema, text) for text in _texts(value))


def accepts_text(schema: Any, text: str) -> bool:
    return _accepts(_matcher(grammars.of_json_schema(schema, param="schema")), text)


def exception_of(file: str, description: str, listed: dict[tuple[str, str], str]) -> str | None:
    return next((why for (f, begin), why in listed.items() if f == file and description.startswith(begin)), None)


def checkable() -> list[Any]:
    """Schemas that are followed and that Python's jsonschema takes as they are meant: it divides floats, and knows
    Python's patterns alone."""
    found = [case for file in FILES for case in cases(file) if case.why is None]
    return [c.schema for c in found if "regex" not in c.file and c.description != "by small number"]


class Row(NamedTuple):
    file: str
    schemas: int
    followed: int
    agreed: int
    too_wide: int
    too_narrow: int


def rows() -> list[Row]:
    found = []
    for file in FILES:
        of_file = cases(file)
        told = [instance for case in of_file for instance in case.instances]
        counts = (
            len(of_file),
            sum(case.why is None for case in of_file),
            sum(i.is_valid == i.is_accepted for i in told),
            sum(i.is_accepted and not i.is_valid for i in told),
            sum(i.is_valid and not i.is_accepted for i in told),
        )
        found.append(Row(file, *counts))
    return found


def table() -> str:
    head = "| file | schemas | followed | refused | instances agreed | too wide | too narrow |"
    lines = []
    for row in rows():
        counts = (row.schemas, row.followed, row.schemas - row.followed, row.agreed, row.too_wide, row.too_narrow)
        lines.append(f"| {row.file} | {' | '.join(map(str, counts))} |")
    return "\n".join([head, "|---|---|---|---|---|---|---|", *lines])


def total() -> str:
    schemas, followed, agreed, wide, narrow = (sum(column) for column in list(zip(*rows(), strict=True))[1:])
    return (
        f"Of {schemas} schemas {followed} are followed and {schemas - followed} refused.\n"
        f"Of the instances of the former {agreed} are accepted or not as they should be,\n"
        f"{narrow} are valid and refused, {wide} is accepted and not valid."
    )


def _case(file: str, case: Any) -> Case:
    schema = case["schema"]
    why = why_not(schema)
    instances: list[Instance] = []
    if why is None:
        grammar = grammars.of_json_schema(schema, param="schema")
        matcher = _matcher(grammar)
        instances = [
            Instance(test["description"], texts[0], test["valid"], any(_accepts(matcher, text) for text in texts))
            for test in case["tests"]
            for texts in [_texts(test["data"])]
        ]
    return Case(file, case["description"], schema, why, tuple(instances))


def _matcher(grammar: str) -> LLMatcher:
    return LLMatcher(tokenizer(), grammar, log_level=0, limits=LLParserLimits(**LIMITS))  # type: ignore[arg-type]


def _accepts(matcher: LLMatcher, text: str) -> bool:
    fresh = matcher.deep_copy()
    token_ids = tokenizer().tokenize_str(text)
    return bool(fresh.try_consume_tokens(token_ids) == len(token_ids) and fresh.is_accepting())


def _texts(value: Any) -> list[str]:
    """With the properties of its objects in every order."""
    return [json.dumps(v, ensure_ascii=False, separators=(",", ":")) for v in _ordered(_whole(value))]


def _whole(value: Any) -> Any:
    """With numbers as integers that are ones."""
    if isinstance(value, list):
        return [_whole(item) for item in value]
    if isinstance(value, dict):
        return {name: _whole(member) for name, member in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _ordered(value: Any) -> Iterator[Any]:
    if isinstance(value, dict) and 1 < len(value) <= _MAX_ORDERED:
        yield from (dict(order) for order in itertools.permutations(value.items()))
    else:
        yield value


def write() -> None:
    for path, told in ((TABLE, table()), (PAGE, total())):
        before, rest = path.read_text(encoding="utf-8").split(BEGIN)
        path.write_text(f"{before}{BEGIN}{told}{END}{rest.split(END, 1)[1]}", encoding="utf-8")


if __name__ == "__main__":
    write()
