"""Makes the grammars of structured output: what a request asks for becomes one text (`SamplingParams.grammar`).

The text is a grammar in llguidance's format. What is refused here is refused by its form and size alone, in a time that
grows with the text; whether nodes can follow a grammar is what `router/grammar/check.py` finds out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from llguidance import regex_to_lark
from llguidance.gbnf_to_lark import any_to_lark

from baton.errors import InvalidRequest, quoted, shortened
from baton.types import MAX_GRAMMAR_CHARS
from router.grammar.exact_schema import COUNTED, DATA, exact
from router.grammar.near_bounds import has_near_bounds

# Between two parts of JSON: a space, or a line break and its indentation. Models have learned both, and one that is not
# allowed to end would write more for ever.
_WHITESPACE = r" |\n[ \t]{0,20}"
_BOUNDED = {"whitespace_pattern": _WHITESPACE}
# As `json.dumps` writes it on one line.
_COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# Levels of JSON in a schema. The library parses 128.
_MAX_DEPTH = 100
# The library counts these out state by state, whatever its limits: 10,000 states take 0.1 s, 1,000,000 minutes.
_MAX_MULTIPLE = 10_000
_MAX_COUNT = 10_000
# Of one choice's texts.
MAX_CHOICES = 4096
# GBNF is translated in Python, at 1 MB/s.
_MAX_GBNF_CHARS = 32_768
# Steps from reference to reference, and characters of one.
_MAX_REFERENCES, MAX_REFERENCE_CHARS = 8, 1024
# What is looked at to tell branches apart: an object's first properties, and constants of one of them.
_MAX_TAGS, _MAX_CONSTANTS = 32, 256
# What tells how often a part of a regular expression, or of a rule, is repeated: escapes, groups and classes, {n},
# {n,m}, and Lark's ~n and ~n..m. Nothing is tried twice: the text may be long.
_REPETITION = re.compile(
    r"\\.|(?P<bracket>[()\[\]])"
    r"|(?P<times>\{\s*+(\d*+)\s*+,?+\s*+(\d*+)\s*+\}|~\s*+(\d++)(?:\s*+\.\.\s*+(\d++))?+)|.",
    re.DOTALL,
)


def of_json_schema(schema: object, is_strict: bool | None = None, *, param: str, is_compact: bool = False) -> str:
    """JSON that is valid by the schema. ``is_strict`` false: as far as the schema's keywords can be followed; else one
    that cannot be followed is refused by the check. ``is_compact``: on one line, with a space behind each comma and
    colon; else a model may break lines. Raises InvalidRequest for ``param``."""
    if isinstance(schema, str):
        schema = _parsed(schema, param)
    if schema is True:
        schema = {}
    if not isinstance(schema, Mapping):
        raise InvalidRequest(f"{param} is {quoted(schema)}, expected a JSON schema (an object)", param=param)
    _check_keywords(schema, param)
    if has_near_bounds(schema):
        raise InvalidRequest(
            f"{param} has an exclusive bound less than 1 from the other one, expected minimum and maximum", param=param
        )
    followed = exact(schema)
    rewritten: dict[str, Any] = _Branches(followed).told_apart(followed)
    is_lenient = is_strict is False
    options = {**(_COMPACT if is_compact else _BOUNDED), "lenient": is_lenient, "coerce_one_of": is_lenient}
    return _grammar({"json_schema": {**rewritten, "x-guidance": options}}, param)


def of_json_object(*, param: str, is_compact: bool = False) -> str:
    """Any JSON object."""
    return of_json_schema({"type": "object"}, param=param, is_compact=is_compact)


def of_regex(regex: object, *, param: str) -> str:
    """The whole text matches the expression."""
    text = _text(regex, param)
    _check_repetitions(text, param)
    # Anchors at both ends say what holds anyway; others the library refuses.
    text = text.removeprefix("^")
    if text.endswith("$") and not _is_escaped(text):
        text = text[:-1]
    return of_lark(f"start: /{regex_to_lark(text)}/" if text else 'start: ""', param=param)


def of_choice(choices: object, *, param: str) -> str:
    """One of these texts."""
    if not isinstance(choices, Sequence) or isinstance(choices, str) or not choices:
        raise InvalidRequest(f"{param} is {quoted(choices)}, expected a list of texts", param=param)
    if len(choices) > MAX_CHOICES:
        raise InvalidRequest(f"{param} has {len(choices)} entries, expected at most {MAX_CHOICES}", param=param)
    texts = [json.dumps(_text(choice, param)) for choice in choices]
    # One lexeme: the library bounds the alternatives of a rule at half as many.
    return of_lark("start: CHOICE\nCHOICE: " + " | ".join(texts), param=param)


def of_grammar(text: object, *, param: str) -> str:
    """A client's grammar, in Lark's form or llama.cpp's GBNF."""
    text = _text(text, param)
    if "::=" in text:
        if len(text) > _MAX_GBNF_CHARS:
            raise InvalidRequest(f"{param} has {len(text)} characters, expected at most {_MAX_GBNF_CHARS}", param=param)
        try:
            text = any_to_lark(text)
        except Exception as error:  # The translator raises its own kinds, IndexError and RecursionError.
            message = f"{param} is not a grammar in GBNF: {shortened(str(error), 200)}"
            raise InvalidRequest(message, param=param) from error
    if "%json" in text:
        raise InvalidRequest(f"{param} has %json, expected rules alone; send the schema as json", param=param)
    _check_repetitions(text, param, is_lark=True)
    return of_lark(text, param=param)


def of_lark(lark: str, *, param: str) -> str:
    """Lark's form with llguidance's extensions: rules that Baton wrote, around schemas that `check_schema` let pass."""
    return _grammar({"lark_grammar": lark}, param)


def of_json_text(
    schema: Mapping[str, Any], is_strict: bool | None = None, *, param: str, is_compact: bool = False
) -> str:  # fmt: skip
    """A checked schema as JSON text for Lark's ``%json``; the rest as for `of_json_schema`."""
    grammar = json.loads(of_json_schema(schema, is_strict, param=param, is_compact=is_compact))
    return json.dumps(grammar["grammars"][0]["json_schema"])


def _grammar(grammar: Mapping[str, Any], param: str) -> str:
    try:
        text = json.dumps({"grammars": [grammar]}, allow_nan=False)
    except ValueError:
        raise InvalidRequest(f"{param} has a number that is not finite, expected JSON", param=param) from None
    if len(text) > MAX_GRAMMAR_CHARS:
        raise InvalidRequest(
            f"{param} has {len(text)} characters of JSON, expected at most {MAX_GRAMMAR_CHARS}", param=param
        )
    return text


def _text(value: object, param: str) -> str:
    if not isinstance(value, str) or not value:
        raise InvalidRequest(f"{param} is {quoted(value)}, expected a text that is not empty", param=param)
    if len(value) > MAX_GRAMMAR_CHARS:
        raise InvalidRequest(f"{param} has {len(value)} characters, expected at most {MAX_GRAMMAR_CHARS}", param=param)
    return value


def _parsed(text: str, param: str) -> object:
    try:
        return json.loads(_text(text, param))
    except (ValueError, RecursionError):
        raise InvalidRequest(f"{param} is {quoted(text)}, expected a JSON schema", param=param) from None


def _check_keywords(schema: object, param: str) -> None:
    """Of every object in it."""
    pending = [(schema, 1)]
    while pending:
        value, depth = pending.pop()
        if depth > _MAX_DEPTH:
            raise InvalidRequest(f"{param} has more than {_MAX_DEPTH} levels, expected fewer", param=param)
        if isinstance(value, Mapping):
            for name, member in value.items():
                _check_keyword(name, member, param)
            pending += [(member, depth + 1) for member in value.values()]
        elif isinstance(value, list):
            pending += [(item, depth + 1) for item in value]


class _Branches:
    """Of one schema. Each part of it is looked at once, however many references lead there."""

    def __init__(self, whole: Mapping[str, Any]) -> None:
        self._whole = whole
        # By reference, and by the id of a part of ``whole``.
        self._pointed: dict[str, Any] = {}
        self._tags: dict[int, dict[str, frozenset[str]]] = {}

    def told_apart(self, part: Any) -> Any:
        """With ``anyOf`` for each ``oneOf`` of objects that one property tells apart: the library sees that two
        branches are disjoint, but not through references."""
        if isinstance(part, list):
            return [self.told_apart(item) for item in part]
        if not isinstance(part, Mapping):
            return part
        found = {name: value if name in DATA else self.told_apart(value) for name, value in part.items()}
        branches = part.get("oneOf")
        if isinstance(branches, list) and "anyOf" not in part and self._are_told_apart(branches):
            # OpenAPI's `discriminator` names the property.
            return {"anyOf" if name == "oneOf" else name: found[name] for name in found if name != "discriminator"}
        return found

    def _are_told_apart(self, branches: list[Any]) -> bool:
        objects = [self._resolved(branch) for branch in branches]
        # Twice the same object is valid twice.
        if not objects or len(set(map(id, objects))) < len(objects):
            return False
        told = [self._tags_of(found) for found in objects]
        names = set.intersection(*(set(tags) for tags in told))
        return any(_are_disjoint([tags[name] for tags in told]) for name in names)

    def _tags_of(self, branch: Any) -> dict[str, frozenset[str]]:
        """Of an object's required properties with constant values: these, as JSON."""
        if not isinstance(branch, Mapping) or branch.get("type") != "object":
            return {}
        if id(branch) not in self._tags:
            self._tags[id(branch)] = self._constants(branch)
        return self._tags[id(branch)]

    def _constants(self, branch: Mapping[str, Any]) -> dict[str, frozenset[str]]:
        properties, required = branch.get("properties"), branch.get("required")
        if not isinstance(properties, Mapping) or not isinstance(required, list):
            return {}
        found = {}
        for name in required:
            value = self._resolved(properties.get(name)) if isinstance(name, str) else None
            constants = _constants_of(value)
            if constants and len(constants) <= _MAX_CONSTANTS:
                found[name] = frozenset(map(json.dumps, constants))
            if len(found) == _MAX_TAGS:
                break
        return found

    def _resolved(self, part: Any) -> Any:
        """What a local reference points to, a few steps far."""
        for _ in range(_MAX_REFERENCES):
            if not isinstance(part, Mapping) or not isinstance(part.get("$ref"), str):
                return part
            path = part["$ref"]
            if path not in self._pointed:
                self._pointed[path] = self._at(path)
            part = self._pointed[path]
        return None

    def _at(self, path: str) -> Any:
        if not path.startswith("#/") or len(path) > MAX_REFERENCE_CHARS:
            return None
        part: Any = self._whole
        for name in path.removeprefix("#/").split("/"):
            name = name.replace("~1", "/").replace("~0", "~")
            part = part.get(name) if isinstance(part, Mapping) else None
        return part


def _constants_of(value: Any) -> Sequence[Any]:
    if isinstance(value, Mapping) and "const" in value:
        return (value["const"],)
    if isinstance(value, Mapping) and isinstance(value.get("enum"), list):
        return list(value["enum"])
    return ()


def _are_disjoint(sets: Sequence[frozenset[str]]) -> bool:
    seen: set[str] = set()
    for values in sets:
        if not seen.isdisjoint(values):
            return False
        seen |= values
    return True


def _check_keyword(name: str, value: object, param: str) -> None:
    if isinstance(value, str) and name == "pattern":
        _check_repetitions(value, param)
    elif isinstance(value, Mapping) and name == "patternProperties":
        for pattern in value:
            _check_repetitions(pattern, param)
    elif isinstance(value, int | float):
        bound = _MAX_MULTIPLE if name == "multipleOf" else _MAX_COUNT if name in COUNTED else None
        if bound is not None and value > bound:
            raise InvalidRequest(f"{param} has {name} {quoted(value)}, expected at most {bound}", param=param)


def _check_repetitions(text: str, param: str, *, is_lark: bool = False) -> None:
    """Those of groups within groups multiply. The library counts them out as well, in the middle of an answer: 10**12
    take it a second, whatever its limits. In Lark's form brackets are no classes of characters."""
    # Of each open group and of the part before: how often the most repeated of its characters is repeated.
    open_groups, part, is_in_class = [1], 1, False
    for found in _REPETITION.finditer(text):
        bracket, times = found["bracket"], found["times"]
        if bracket and not is_lark and bracket in ("[", "]"):
            is_in_class, part = bracket == "[", 1
        elif is_in_class:
            continue
        elif bracket == "(":
            open_groups.append(1)
        elif bracket == ")":
            part = open_groups.pop() if len(open_groups) > 1 else 1
        elif times:
            part *= max([1, *(_small(number) for number in found.groups()[2:] if number)])
        else:
            part = 1
        open_groups[-1] = max(open_groups[-1], part)
        if part > _MAX_COUNT:
            message = f"{param} repeats a part {part} times or more, expected at most {_MAX_COUNT}"
            raise InvalidRequest(message, param=param)


def _small(digits: str) -> int:
    """The number, or one that is too large as well."""
    return int(digits) if len(digits) < 10 else 10**9


def _is_escaped(text: str) -> bool:
    """Whether the last character is."""
    return (len(text) - 1 - len(text[:-1].rstrip("\\"))) % 2 == 1
