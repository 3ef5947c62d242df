"""What requests ask for as grammars: each is one that the library builds and that matches what it should."""

from __future__ import annotations

import contextlib
import json
import random
import time
from typing import Any

import jsonschema
import numpy as np
import pytest
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from baton.errors import InvalidRequest
from baton.grammar_limits import LIMITS
from baton.types import MAX_GRAMMAR_CHARS
from router.grammar import grammars
from router.grammar.child import refusal
from tests.support.root import ROOT
from tests.support.schemas import FOLLOWED, REFUSED


@pytest.fixture(scope="module")
def tokenizer() -> LLTokenizer:
    return LLTokenizer((ROOT / "demo" / "model" / "tokenizer.json").read_text())


def matches(tokenizer: LLTokenizer, grammar: str, text: str) -> bool:
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LLParserLimits(**LIMITS))
    assert not matcher.is_error(), matcher.get_error()
    token_ids = tokenizer.tokenize_str(text)
    return matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting()


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("text", "is_valid"),
    [
        ('{"name": "Ada", "age": 3}', True),
        ('{"name":"Ada","age":3}', True),
        ('{\n  "name": "Ada",\n  "age": 3\n}', True),
        ('{"name": "Ada", "age": -3}', False),
        ('{"name": "Ada"}', False),
        ('{"name": "Ada", "age": 3}\n', False),
        # Between two parts a space, or a line break with its indentation.
        ('{ "name" : "Ada" , "age" : 3 }', True),
        ('{"name":  "Ada", "age": 3}', False),
        ('{"name": "Ada",\n' + " " * 20 + '"age": 3}', True),
        ('{"name": "Ada",\n' + " " * 21 + '"age": 3}', False),
        ('{"name": "Ada",\n\t\t"age": 3}', True),
        ('{"name": "Ada",\n\n"age": 3}', False),
        ('{"name": "Ada", \n"age": 3}', False),
    ],
)
def test_json_by_a_schema(tokenizer: LLTokenizer, text: str, is_valid: bool) -> None:
    assert matches(tokenizer, grammars.of_json_schema(SCHEMA, param="s"), text) is is_valid
    assert matches(tokenizer, grammars.of_json_schema(json.dumps(SCHEMA), param="s"), text) is is_valid
    lark = f"start: %json {grammars.of_json_text(SCHEMA, param='s')}"
    assert matches(tokenizer, grammars.of_lark(lark, param="s"), text) is is_valid


@pytest.mark.parametrize(
    ("text", "is_valid"),
    [
        ('{"name": "Ada", "age": 3}', True),
        ('{"name":"Ada","age":3}', False),
        ('{\n  "name": "Ada",\n  "age": 3\n}', False),
        ('{ "name": "Ada", "age": 3}', False),
    ],
)
def test_compact_json_has_one_way_to_be_written(tokenizer: LLTokenizer, text: str, is_valid: bool) -> None:
    assert matches(tokenizer, grammars.of_json_schema(SCHEMA, param="s", is_compact=True), text) is is_valid
    lark = f"start: %json {grammars.of_json_text(SCHEMA, param='s', is_compact=True)}"
    assert matches(tokenizer, grammars.of_lark(lark, param="s"), text) is is_valid


@pytest.mark.parametrize("is_compact", [False, True])
def test_whoever_writes_spaces_wherever_it_may_comes_to_an_end(tokenizer: LLTokenizer, is_compact: bool) -> None:
    schema = SCHEMA | {"properties": {"name": {"enum": ["Ada"]}, "age": {"enum": [3]}}}
    grammar = grammars.of_json_schema(schema, param="s", is_compact=is_compact)
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LLParserLimits(**LIMITS))
    # As many characters as there can be: a line break first.
    spaces = [tokenizer.greedy_tokenize(text)[0] for text in ("\n", " ", "\t")]
    text = ""
    while not matcher.is_stopped():
        allowed = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        ids = np.flatnonzero(np.unpackbits(allowed, bitorder="little"))
        chosen = next((i for i in spaces if i in ids), int(ids[0]))
        assert matcher.consume_token(chosen)
        text += tokenizer.decode_str([chosen])
        assert len(text) < 250, text
    assert json.loads(text) == {"name": "Ada", "age": 3}


def test_any_json_object(tokenizer: LLTokenizer) -> None:
    grammar = grammars.of_json_object(param="s")
    assert matches(tokenizer, grammar, '{"a": [1, null, {"b": "c"}]}')
    assert not matches(tokenizer, grammar, "[1]")
    assert matches(tokenizer, grammars.of_json_schema(True, param="s"), "[1]")
    assert not matches(tokenizer, grammars.of_json_object(param="s", is_compact=True), '{"a":1}')


@pytest.mark.parametrize(
    ("regex", "text", "is_valid"),
    [
        (r"[0-9]{3}/x", "123/x", True),
        (r"^[0-9]{3}$", "123", True),
        (r"[0-9]{3}", "1234", False),
        (r"\d+\$", "12$", True),
        (r"(yes|no)", "yes", True),
    ],
)
def test_a_regular_expression_matches_the_whole_text(
    tokenizer: LLTokenizer, regex: str, text: str, is_valid: bool
) -> None:
    assert matches(tokenizer, grammars.of_regex(regex, param="r"), text) is is_valid


def test_a_choice_is_one_of_its_texts_letter_by_letter(tokenizer: LLTokenizer) -> None:
    choices = ["yes", 'no "quoted"', "Grüße\n", "a|b"]
    grammar = grammars.of_choice(choices, param="c")
    assert all(matches(tokenizer, grammar, choice) for choice in choices)
    assert not matches(tokenizer, grammar, "a")
    # One may begin as another does; there may be so many, under the limits of nodes.
    begins = grammars.of_choice(["a", "ab", "abc"], param="c")
    assert [matches(tokenizer, begins, text) for text in ("a", "ab", "abc", "b")] == [True, True, True, False]
    many = grammars.of_choice([f"c{i}" for i in range(grammars.MAX_CHOICES)], param="c")
    matcher = LLMatcher(tokenizer, many, log_level=0, limits=LLParserLimits(**LIMITS))
    assert refusal(matcher, 16) is None


def test_grammars_in_lark_and_in_gbnf(tokenizer: LLTokenizer) -> None:
    lark = grammars.of_grammar('start: sum\nsum: "1" ("+" "1")*', param="g")
    gbnf = grammars.of_grammar('root ::= sum\nsum ::= "1" ("+" "1")*', param="g")
    for grammar in (lark, gbnf):
        assert matches(tokenizer, grammar, "1+1+1")
        assert not matches(tokenizer, grammar, "1+")


def deep(levels: int) -> Any:
    schema: Any = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.fixture(scope="module")
def enders(tokenizer: LLTokenizer) -> list[int]:
    """Tokens that end a part of JSON."""
    return [token_id for text in '"}]@' for token_id in tokenizer.tokenize_str(text)]


def walk(tokenizer: LLTokenizer, grammar: str, enders: list[int], rng: random.Random) -> str:
    """An answer at random that gets to an end."""
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LLParserLimits(**LIMITS))
    answer: list[int] = []
    while not matcher.is_stopped() and len(answer) < 5000:
        bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        allowed = np.flatnonzero(np.unpackbits(bits, bitorder="little"))
        ending = [token_id for token_id in enders if bits[token_id // 8] >> token_id % 8 & 1]
        if matcher.is_accepting() and rng.random() < 0.5:
            break
        token_id = rng.choice(ending) if ending and rng.random() < 0.5 else int(rng.choice(allowed))
        if token_id in tokenizer.eos_tokens:
            break
        answer.append(token_id)
        matcher.consume_token(token_id)
    assert not matcher.is_error(), matcher.get_error()
    assert matcher.is_accepting()
    return tokenizer.decode_str(answer)


@pytest.mark.parametrize("number", range(0, len(FOLLOWED), 3))
def test_answers_are_valid_by_their_schema(tokenizer: LLTokenizer, enders: list[int], number: int) -> None:
    rng = random.Random(number)
    for schema in FOLLOWED[number : number + 3]:
        validator = jsonschema.Draft202012Validator(
            schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
        )
        grammar = grammars.of_json_schema(schema, param="s")
        for _ in range(5):
            validator.validate(json.loads(walk(tokenizer, grammar, enders, rng)))


@pytest.mark.parametrize(("schema", "why"), REFUSED)
def test_what_cannot_be_followed_is_refused_by_name(tokenizer: LLTokenizer, schema: Any, why: str) -> None:
    try:
        matcher = LLMatcher(tokenizer, grammars.of_json_schema(schema, param="s"), log_level=0)
    except InvalidRequest as error:
        refusal = error.message
    else:
        refusal = matcher.get_error()
    assert why in refusal


REFUSED_SCHEMAS: list[tuple[object, str]] = [
    (5, "expected a JSON schema"),
    ([], "expected a JSON schema"),
    (False, "expected a JSON schema"),
    ("{", "expected a JSON schema"),
    (deep(150), "levels"),
    (deep(5000), "levels"),
    ({"type": "integer", "multipleOf": 1e9}, "multipleOf"),
    ({"type": "string", "maxLength": 10**9}, "maxLength"),
    ({"type": "array", "minItems": 10**9}, "minItems"),
    ({"type": "string", "pattern": "a{100000}"}, "repeats a part"),
    ({"type": "string", "pattern": "a{1,9999999999}"}, "repeats a part"),
    ({"type": "string", "pattern": "((a{99}b){99}){99}"}, "repeats a part"),
    ({"type": "string", "pattern": r"([\])]{999}(x|\({20})){5}{30}"}, "repeats a part"),
    ({"patternProperties": {"a{100000,}": {}}}, "repeats a part"),
    ({"const": float("nan")}, "not finite"),
    ({"enum": ["x" * MAX_GRAMMAR_CHARS]}, "expected at most"),
]


@pytest.mark.parametrize(("schema", "why"), REFUSED_SCHEMAS)
def test_a_schema_without_measure_is_refused_at_once(schema: object, why: str) -> None:
    with pytest.raises(InvalidRequest, match=why) as refused:
        grammars.of_json_schema(schema, param="the.schema")
    assert refused.value.param == "the.schema"
    assert refused.value.message.startswith("the.schema")


def test_repetitions_side_by_side_do_not_multiply() -> None:
    for regex in ("(a{99}b{99}){99}", r"\{99999}", "[{99999}]", "a{9999}b{9999}", "(((a{5}){5}){5}){5}", "(a{5})" * 9):
        grammars.of_regex(regex, param="p")


def test_long_texts_are_looked_through_once() -> None:
    begun_s = time.process_time()
    for part in ("[", "(", "{", "{1", "{ ", "~", "~1..", "{1,", "9", " ", "\\"):
        for text in (part * (200_000 // len(part)), "{" + part * (200_000 // len(part)), "a" + part * 9):
            for make in (grammars.of_regex, grammars.of_grammar):
                with contextlib.suppress(InvalidRequest):
                    make(text, param="p")
    # Half a second of the processor; anything quadratic takes an hour.
    assert time.process_time() - begun_s < 60


class Counted(dict[str, Any]):
    """Counts how often a member is looked for."""

    num_looks = 0

    def get(self, name: str, default: Any = None) -> Any:
        Counted.num_looks += 1
        return super().get(name, default)


def test_what_references_lead_to_is_looked_at_once() -> None:
    names = [f"p{i}" for i in range(200)]
    told = {"type": "object", "properties": Counted({n: {"const": 1} for n in names}), "required": names}
    values = {"enum": list(range(250))}
    by_value = {"type": "object", "properties": {"k": {"$ref": "#/$defs/values"}}, "required": ["k"]}
    nowhere = {"$ref": "#/" + "/".join(["x"] * 10_000)}
    Counted.num_looks = 0
    for schema in (
        {"$defs": {"a": told}, "oneOf": [{"$ref": "#/$defs/a"}] * 300},
        {"$defs": {"a": told, "b": {**told}}, "allOf": [{"oneOf": [{"$ref": f"#/$defs/{x}"} for x in "ab"]}] * 300},
        Counted({"x": nowhere, "oneOf": [{"$ref": "#/x"} for _ in range(300)]}),
        {"$defs": Counted({"values": values}), "oneOf": [{**by_value} for _ in range(300)]},
    ):
        grammars.of_json_schema(schema, param="s")
    assert Counted.num_looks < 2000


def test_branches_that_a_property_tells_apart_are_alternatives() -> None:
    tags = [{"type": "object", "properties": {"k": {"enum": [i, f"{i}"]}}, "required": ["k"]} for i in range(3)]
    branches = {"$defs": dict(zip("abc", tags, strict=True)), "oneOf": [{"$ref": f"#/$defs/{x}"} for x in "abc"]}
    assert '\\"anyOf\\"' in json.dumps(grammars.of_json_schema(branches, param="s"))
    branches["oneOf"].append({"$ref": "#/$defs/a"})
    assert '\\"oneOf\\"' in json.dumps(grammars.of_json_schema(branches, param="s"))


def test_other_grammars_without_measure_are_refused_at_once() -> None:
    for make, value in (
        (grammars.of_regex, "(ab){100000}"),
        (grammars.of_regex, ""),
        (grammars.of_regex, 5),
        (grammars.of_choice, []),
        (grammars.of_choice, "yes"),
        (grammars.of_choice, ["a", 1]),
        (grammars.of_choice, ["a"] * 5000),
        (grammars.of_grammar, 'start: "a"~20000'),
        (grammars.of_grammar, 'start: "a"~1..20000'),
        (grammars.of_grammar, "start: %json {}"),
        (grammars.of_grammar, "root ::= ("),
        (grammars.of_grammar, "root ::= " + "(" * 5000),
        (grammars.of_grammar, "root ::= x\n" * 10000),
        (grammars.of_grammar, "x" * (MAX_GRAMMAR_CHARS + 1)),
    ):
        with pytest.raises(InvalidRequest) as refused:
            make(value, param="p")  # type: ignore[operator]
        assert refused.value.param == "p"
