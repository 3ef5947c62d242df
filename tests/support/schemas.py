"""JSON schemas for structured output, each keyword by itself and in company: those that are followed, and those that
are refused by name."""

from __future__ import annotations

from typing import Any

Schema = Any
INT: Schema = {"type": "integer", "minimum": 0, "maximum": 999}
WORD: Schema = {"type": "string", "pattern": "^[a-z]{1,8}$"}
BOOL: Schema = {"type": "boolean"}


def closed(required: tuple[str, ...] | None = None, **properties: Schema) -> Schema:
    """An object with these properties and no others; ``required``: None: all."""
    names = list(properties) if required is None else list(required)
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


def array(items: Schema, least: int = 0, most: int = 4) -> Schema:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


TYPES: list[Schema] = [
    *[{"type": name} for name in ("null", "boolean", "integer", "number", "string")],
    {"type": ["string", "null"]},
    {"type": ["integer", "boolean"]},
    {"type": ["null", "boolean", "integer"]},
    {"type": ["boolean", "number", "string", "null"]},
]
CONSTANTS: list[Schema] = [
    *[{"const": value} for value in (None, True, 0, -17, 2.5, "", "a", 'say "no"', "a\nb", "Grüße", "東京", [], {})],
    {"const": [1, "two", None]},
    {"const": {"a": {"b": [1, 2]}, "c": "d"}},
    {"enum": [1]},
    {"enum": ["red", "green", "blue"]},
    {"enum": [1, 2.5, "three", None, False]},
    {"enum": [[1], [1, 2], {"a": 1}]},
    {"enum": ["a", "ab", "abc", "abcd"]},
    {"enum": ["/", "\\", "\t", "\u0001", "é", "🎽"]},
    {"enum": [f"value {i}" for i in range(200)]},
    {"type": "string", "enum": ["x", "y"]},
    {"type": ["string", "null"], "enum": ["x", None]},
    {"type": "integer", "enum": [3, 5, 7]},
]
STRINGS: list[Schema] = [
    *[{"type": "string", "maxLength": n} for n in (0, 1, 7, 40)],
    {"type": "string", "minLength": 3, "maxLength": 3},
    {"type": "string", "minLength": 5, "maxLength": 20},
    {"type": "string", "minLength": 12},
    *[
        {"type": "string", "pattern": pattern}
        for pattern in (
            "^abc$", "^[a-f0-9]{8}$", "^a*b+c?$", "^(yes|no|maybe)$", r"^\d{3}-\d{4}$", r"^\w{2,5}$", "^[^x]{3}$",
            r"^[A-Z][a-z]+( [A-Z][a-z]+)?$", r"^\+?[1-9][0-9]{6,14}$", "^$", "^(a|b)(c|d){2}$", r"^#[0-9a-fA-F]{6}$",
            r"^v\d+\.\d+\.\d+$", r"^[^\s@]{1,8}@[a-z]{1,8}\.(com|org)$", "^é+$", r"^\$[0-9]+\.[0-9]{2}$", "^[0-9]{4}$",
        )
    ],
    {"type": "string", "pattern": "^[a-z]+$", "maxLength": 5},
    {"type": "string", "pattern": "^[a-z]+$", "minLength": 4, "maxLength": 6},
    *[{"type": "string", "format": f} for f in ("date", "time", "date-time", "email", "uuid", "ipv4", "duration")],
]  # fmt: skip
NUMBERS: list[Schema] = [
    *[{"type": "integer", "minimum": low, "maximum": high} for low, high in ((0, 9), (-5, 5), (100, 100), (7, 1234))],
    {"type": "integer", "minimum": 0},
    {"type": "integer", "maximum": -10},
    {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 3},
    {"type": "integer", "minimum": -1000, "exclusiveMaximum": -990},
    *[{"type": "integer", "multipleOf": n, "minimum": 0, "maximum": 9999} for n in (2, 5, 7, 100)],
    {"type": "integer", "multipleOf": 3, "minimum": 10, "maximum": 50},
    {"type": "number", "minimum": 0, "maximum": 1},
    {"type": "number", "minimum": -2.5, "maximum": 2.5},
    {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 5},
    {"type": "number", "exclusiveMinimum": 0.5, "exclusiveMaximum": 1},
    closed(
        a={"type": "number", "exclusiveMinimum": 0, "maximum": 9}, b={"anyOf": [{"type": "number", "maximum": 0.5}]}
    ),
    {"type": "number", "minimum": 1000},
    {"type": "number", "maximum": 0},
    {"type": "number", "multipleOf": 0.5},
    {"type": "number", "multipleOf": 0.25, "minimum": 0, "maximum": 10},
]
ARRAYS: list[Schema] = [
    array(INT),
    array(INT, 3, 3),
    array(BOOL, 1, 8),
    array({"type": "null"}, 0, 2),
    array({"enum": ["a", "b"]}, 2, 5),
    array(array(INT, 1, 2), 1, 3),
    array(closed(a=INT), 0, 2),
    array({"type": ["integer", "null"], "minimum": 0, "maximum": 9}, 2, 4),
    {"type": "array", "maxItems": 0},
    {"type": "array", "items": False},
    {"type": "array", "prefixItems": [INT, WORD], "items": False, "minItems": 2},
    {"type": "array", "prefixItems": [INT, WORD], "items": False, "minItems": 1},
    {"type": "array", "prefixItems": [BOOL], "items": INT, "minItems": 2, "maxItems": 3},
    {"type": "array", "prefixItems": [{"const": 1}, {"const": 2}, {"const": 3}], "items": False, "minItems": 3},
    {"type": "array", "items": INT, "minItems": 2, "maxItems": 6},
    {"type": "array", "items": {"$ref": "#/$defs/word"}, "maxItems": 3, "$defs": {"word": WORD}},
]
OBJECTS: list[Schema] = [
    closed(),
    closed(a=INT),
    closed(a=INT, b=WORD, c=BOOL),
    closed((), a=INT, b=WORD),
    closed(("b",), a=INT, b=WORD, c=BOOL),
    closed(("a", "c"), a=INT, b=WORD, c=BOOL, d={"type": "null"}),
    closed(inner=closed(inner=closed(inner=INT))),
    closed(list=array(closed(x=INT, y=INT), 1, 3)),
    closed(**{"a b": INT, 'c"d': INT, "é": INT, "": INT}),
    closed(**{f"field_{i}": BOOL for i in range(30)}),
    closed(*[tuple(f"f{i}" for i in range(0, 20, 2))], **{f"f{i}": INT for i in range(20)}),
    {"type": "object", "properties": {"a": INT}, "required": ["a"], "additionalProperties": INT},
    {"type": "object", "additionalProperties": BOOL},
    {"type": "object", "additionalProperties": False},
    {"type": "object", "patternProperties": {"^x[0-9]$": INT}, "additionalProperties": False},
    {"type": "object", "patternProperties": {"^x": INT, "^y": BOOL}, "additionalProperties": False},
    {"type": "object", "properties": {"a": INT}, "patternProperties": {"^b": BOOL}, "additionalProperties": False},
    {"properties": {"a": INT}, "type": "object", "required": ["a", "b"], "additionalProperties": BOOL},
    {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": False},
    closed(kind={"const": "circle"}, radius={"type": "number", "minimum": 0, "maximum": 100}),
    closed(title={"type": "string", "maxLength": 10, "description": "a title"}, note={"type": ["string", "null"]}),
    {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "T", "description": "D", **closed(a=INT)},
    {**closed(a=INT), "examples": [{"a": 1}], "default": {"a": 2}, "$comment": "none"},
    {"type": "object", "minProperties": 1, "properties": {"a": INT, "b": INT}, "additionalProperties": False},
]
CIRCLE = closed(kind={"const": "circle"}, radius=INT)
SQUARE = closed(kind={"const": "square"}, side=INT)
COMBINED: list[Schema] = [
    {"anyOf": [INT, WORD]},
    {"anyOf": [{"type": "null"}, closed(a=INT)]},
    {"anyOf": [{"const": 1}, {"const": "1"}, {"const": None}]},
    {"anyOf": [CIRCLE, SQUARE]},
    {"oneOf": [CIRCLE, SQUARE]},
    {"oneOf": [{"type": "integer", "minimum": 0, "maximum": 9}, {"type": "null"}]},
    {"oneOf": [{"const": "a"}, {"const": "b"}]},
    {"oneOf": [WORD, array(INT, 1, 2)]},
    closed(shape={"oneOf": [CIRCLE, SQUARE]}),
    closed(shapes=array({"anyOf": [CIRCLE, SQUARE]}, 1, 3)),
    {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 8}]},
    {"allOf": [INT]},
    {"allOf": [{"type": "string", "minLength": 2}, {"maxLength": 4}]},
    {"allOf": [{"type": "object", "properties": {"a": INT}, "additionalProperties": False}, {"required": ["a"]}]},
    {"allOf": [{"enum": [1, 2, 3]}, {"enum": [2, 3, 4]}]},
    {"type": "integer", "anyOf": [{"minimum": 10, "maximum": 12}, {"minimum": 100, "maximum": 101}]},
    {"anyOf": [{"type": "string", "enum": ["a"]}, {"type": "integer", "enum": [5]}], "title": "either"},
    {"anyOf": [{"allOf": [{"minimum": 1}, {"type": "integer", "maximum": 2}]}, {"type": "null"}]},
    closed(value={"anyOf": [INT, WORD, {"type": "null"}]}),
    array({"anyOf": [INT, array(WORD, 1, 1)]}, 1, 3),
]
TREE: Schema = closed(("value",), value=INT, next={"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]})
REFERENCES: list[Schema] = [
    {"$ref": "#/$defs/word", "$defs": {"word": WORD}},
    {**closed(a={"$ref": "#/$defs/n"}, b={"$ref": "#/$defs/n"}), "$defs": {"n": INT}},
    {**closed(a={"$ref": "#/$defs/one"}), "$defs": {"one": {"$ref": "#/$defs/two"}, "two": BOOL}},
    {"$ref": "#/$defs/node", "$defs": {"node": TREE}},
    {**closed(a={"$ref": "#/properties/b"}, b=INT)},
    {"anyOf": [{"$ref": "#/$defs/c"}, {"$ref": "#/$defs/s"}], "$defs": {"c": CIRCLE, "s": SQUARE}},
    {**closed(x={"$ref": "#/$defs/a~1b"}), "$defs": {"a/b": INT}},
    {**closed(x={"$ref": "#/$defs/w", "description": "beside"}), "$defs": {"w": WORD}},
    {"definitions": {"old": INT}, **closed(x={"$ref": "#/definitions/old"})},
    {**array({"$ref": "#/$defs/pair"}, 1, 2), "$defs": {"pair": array(INT, 2, 2)}},
]
REAL: list[Schema] = [
    closed(city={"type": "string", "maxLength": 20}, unit={"enum": ["celsius", "fahrenheit"]}),
    closed(
        name={"type": "string", "maxLength": 20},
        age={"type": "integer", "minimum": 0, "maximum": 130},
        email={"anyOf": [{"type": "string", "format": "email"}, {"type": "null"}]},
    ),
    closed(
        steps=array(
            closed(explanation={"type": "string", "maxLength": 20}, output={"type": "string", "maxLength": 10}), 1, 2
        ),
        final_answer={"type": "string", "maxLength": 10},
    ),
    closed(
        invoice=closed(
            number={"type": "string", "pattern": "^INV-[0-9]{4}$"},
            date={"type": "string", "format": "date"},
            lines=array(closed(sku=WORD, quantity=INT, price={"type": "number", "minimum": 0}), 1, 2),
            paid=BOOL,
        ),
    ),
    closed(
        sentiment={"enum": ["positive", "neutral", "negative"]},
        confidence={"type": "number", "minimum": 0, "maximum": 1},
    ),
    closed(
        query={"type": "string", "maxLength": 20},
        filters=array(
            closed(field=WORD, op={"enum": ["eq", "lt"]}, value={"type": ["string", "integer"], "maxLength": 5}), 0, 2
        ),
    ),
    closed(tool={"const": "search"}, arguments=closed(q=WORD, limit=INT)),
    closed(
        event=closed(
            title={"type": "string", "maxLength": 15},
            start={"type": "string", "format": "date-time"},
            attendees=array(WORD, 1, 3),
        )
    ),
    closed(rows=array(array(INT, 2, 2), 2, 2), header=array(WORD, 2, 2)),
    closed(person=closed(("first",), first=WORD, middle={"type": ["string", "null"], "maxLength": 4}, last=WORD)),
    {
        "$defs": {"Cat": closed(type={"const": "cat"}, lives=INT), "Dog": closed(type={"enum": ["dog"]})},
        "oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}],
        "discriminator": {"propertyName": "type", "mapping": {"cat": "#/$defs/Cat", "dog": "#/$defs/Dog"}},
    },
    {
        "title": "Animal",
        "$defs": {"Cat": closed(type={"const": "cat"}, lives=INT), "Dog": closed(type={"const": "dog"}, good=BOOL)},
        **closed(pet={"oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}]}),
    },
    closed(answer={"type": "string", "maxLength": 12}, sources=array({"type": "integer", "minimum": 1}, 0, 3)),
    closed(diff=array({"anyOf": [closed(op={"const": "add"}, line=INT), closed(op={"const": "del"}, line=INT)]}, 1, 2)),
    closed(color={"type": "string", "pattern": "^#[0-9a-f]{6}$"}, alpha={"type": "number", "minimum": 0, "maximum": 1}),
    closed(id={"type": "string", "format": "uuid"}, tags=array(WORD, 0, 3), active=BOOL),
    closed(level={"type": "integer", "enum": [1, 2, 3]}, reason={"type": "string", "minLength": 1, "maxLength": 15}),
    closed(matrix=array(array({"type": "number", "minimum": 0, "maximum": 1}, 2, 2), 2, 2)),
    closed(yes_no={"enum": ["yes", "no"]}, because={"type": ["string", "null"], "maxLength": 10}),
]
MORE: list[Schema] = [
    *[closed(value=schema) for schema in (*STRINGS[::5], *NUMBERS[::5], *ARRAYS[:15:5])],
    *[array(schema, 1, 2) for schema in (*CONSTANTS[1::6], *OBJECTS[1::8], *COMBINED[::6])],
    *[{"anyOf": [schema, {"type": "null"}]} for schema in (*NUMBERS[1::7], *OBJECTS[2::9])],
]
FOLLOWED = [*TYPES, *CONSTANTS, *STRINGS, *NUMBERS, *ARRAYS, *OBJECTS, *COMBINED, *REFERENCES, *REAL, *MORE]

# With a word of why.
REFUSED: list[tuple[Schema, str]] = [
    (False, "expected"),
    ({"not": {"type": "string"}}, "not"),
    ({"if": {"type": "string"}, "then": {"minLength": 1}}, "if"),
    ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    ({"type": "array", "contains": {"type": "integer"}}, "contains"),
    ({"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired"),
    ({"type": "object", "dependentSchemas": {"a": {}}}, "dependentSchemas"),
    ({"type": "object", "propertyNames": {"maxLength": 3}}, "propertyNames"),
    ({"type": "object", "unevaluatedProperties": False}, "unevaluatedProperties"),
    ({"type": "array", "unevaluatedItems": False}, "unevaluatedItems"),
    ({"oneOf": [{"type": "integer", "minimum": 0}, {"type": "integer", "maximum": 5}]}, "oneOf"),
    ({"type": "string", "pattern": "^(?=a)b"}, "look"),
    ({"type": "string", "pattern": r"^(a)\1$"}, "backreference"),
    ({"type": "string", "pattern": "("}, "regex"),
    ({"type": "string", "format": "of-no-kind"}, "of-no-kind"),
    ({"type": "colour"}, "colour"),
    ({"$ref": "#/$defs/missing"}, "missing"),
    ({"$ref": "https://example.com/schema.json"}, "example"),
    ({"allOf": [{"type": "integer"}, {"type": "string"}]}, "nsatisfiable"),
    ({"type": "string", "minLength": 5, "maxLength": 3}, "minLength"),
    ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum"),
    ({"enum": []}, "nsatisfiable"),
    ({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 0.5}, "exclusive"),
    ({"minimum": -0.5, "exclusiveMaximum": 0}, "exclusive"),
    ({"exclusiveMinimum": 2, "allOf": [{"maximum": 2.5}]}, "exclusive"),
    ({"exclusiveMinimum": 0, "$ref": "#/$defs/n", "$defs": {"n": {"anyOf": [{"maximum": 0.5}]}}}, "exclusive"),
    ({"oneOf": [closed(a={"const": 1}), closed(a={"enum": [1, 2]})]}, "oneOf"),
    ({"oneOf": [closed((), a={"const": 1}), closed((), a={"const": 2})]}, "oneOf"),
]
