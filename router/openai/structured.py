"""Makes grammars of the fields for structured output: OpenAI's `response_format`, vLLM's `structured_outputs` and
`guided_*`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from baton.errors import InvalidRequest, quoted
from router.grammar import grammars


class AskedForm(NamedTuple):
    """A grammar, and the field that it was made of; without one it is empty."""

    grammar: str = ""
    param: str = "grammar"


# By vLLM's names in `structured_outputs`; `guided_NAME` is the older form.
_MAKERS: Mapping[str, Callable[..., str]] = {
    "json": grammars.of_json_schema,
    "regex": grammars.of_regex,
    "choice": grammars.of_choice,
    "grammar": grammars.of_grammar,
}
# What makes JSON of them, which the switch bears on.
_JSON = ("json", "json_object")
_COMPACT = "disable_any_whitespace"
# Of `structured_outputs`, accepted where they ask for nothing.
_SWITCHES = ("json_object", "disable_fallback", _COMPACT, "disable_additional_properties")
_NEUTRAL = (*_SWITCHES, "structural_tag", "whitespace_pattern")
_SCHEMA_FIELDS = ("name", "description", "schema", "strict")


def grammar_of(
    response_format: object, structured_outputs: object, guided: Mapping[str, object], *others: AskedForm
) -> AskedForm:
    """``guided``: vLLM's older fields by their names; ``others``: of an API's own fields. Raises InvalidRequest for
    what cannot be a grammar, and for two of them."""
    found = [*_of_format(response_format), *_of_structured(structured_outputs), *_of_guided(guided)]
    found += [asked for asked in others if asked.grammar]
    if len(found) > 1:
        raise InvalidRequest(
            f"{found[0].param} and {found[1].param} both say what the answer is to be, expected one of them",
            param=found[1].param,
        )
    return found[0] if found else AskedForm()


def of_schema_fields(fields: object, where: str) -> AskedForm:
    """OpenAI's {name, schema, strict, description}."""
    if not isinstance(fields, Mapping):
        raise InvalidRequest(f"{where} is {quoted(fields)}, expected an object with name and schema", param=where)
    for name in fields:
        if name not in _SCHEMA_FIELDS:
            raise InvalidRequest(
                f"{where}.{quoted(name)} is unknown, expected {', '.join(_SCHEMA_FIELDS)}", param=where
            )
    is_strict = fields.get("strict")
    if is_strict is not None and not isinstance(is_strict, bool):
        raise InvalidRequest(f"{where}.strict is {quoted(is_strict)}, expected true, false or null", param=where)
    param = f"{where}.schema"
    schema = fields.get("schema")
    if schema is None:
        raise InvalidRequest(f"{param} is missing, expected a JSON schema", param=param)
    return AskedForm(grammars.of_json_schema(schema, is_strict, param=param), param)


def _of_format(wanted: object) -> list[AskedForm]:
    if wanted is None:
        return []
    kind = wanted.get("type", "missing") if isinstance(wanted, Mapping) else wanted
    if kind == "text":
        return []
    if kind == "json_object":
        return [AskedForm(grammars.of_json_object(param="response_format"), "response_format")]
    if kind == "json_schema" and isinstance(wanted, Mapping):
        return [of_schema_fields(wanted.get("json_schema"), "response_format.json_schema")]
    raise InvalidRequest(
        f"response_format.type is {quoted(kind)}, expected 'text', 'json_object' or 'json_schema'",
        param="response_format.type",
    )


def _of_structured(wanted: object) -> list[AskedForm]:
    if wanted is None:
        return []
    if not isinstance(wanted, Mapping):
        raise InvalidRequest(
            f"structured_outputs is {quoted(wanted)}, expected an object with one of {', '.join(_MAKERS)}",
            param="structured_outputs",
        )
    found = []
    is_compact = wanted.get(_COMPACT) is True
    for name, value in wanted.items():
        param = f"structured_outputs.{name}"
        if name in _MAKERS:
            options = {"is_compact": is_compact} if name in _JSON else {}
            found += [] if value is None else [AskedForm(_MAKERS[name](value, param=param, **options), param)]
        elif name == "json_object" and value is True:
            found.append(AskedForm(grammars.of_json_object(param=param, is_compact=is_compact), param))
        elif name == _COMPACT and value is True:
            _check_json(wanted)
        elif name not in _NEUTRAL or value not in (None, False):
            expected = "null or false" if name in _NEUTRAL else f"one of {', '.join(_MAKERS)}"
            expected = "true, false or null" if name == _COMPACT else expected
            raise InvalidRequest(
                f"structured_outputs.{quoted(name)} is {quoted(value)}, expected {expected}", param="structured_outputs"
            )
    return found


def _check_json(wanted: Mapping[str, object]) -> None:
    if all(wanted.get(name) in (None, False) for name in _JSON):
        param = f"structured_outputs.{_COMPACT}"
        raise InvalidRequest(f"{param} is true, expected {' or '.join(_JSON)} beside it", param=param)


def _of_guided(wanted: Mapping[str, object]) -> list[AskedForm]:
    return [
        AskedForm(_MAKERS[name.removeprefix("guided_")](value, param=name), name)
        for name, value in wanted.items()
        if value is not None
    ]
