"""A command's options, made from the fields of dataclasses, and what was given by them and by a file."""

from __future__ import annotations

import inspect
import json
import math
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING
from enum import Enum, StrEnum
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import typer

from baton.errors import BadConfig, quoted
from baton.settings import Given, Key, flatten, keys, read_file

_FILE_HELP = "Settings in TOML; an option given beside it wins. docs/operating.md lists the keys."
_ON_OFF = ("on", "off")
# Of options that were given, not their defaults.
_GIVEN_BY = ("COMMANDLINE", "ENVIRONMENT")


def finite(value: float | None) -> float | None:
    """Ranges let NaN through."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number.")
    return value


def path(text: str) -> Path:
    """An empty one would be the current folder."""
    if not str(text):
        raise typer.BadParameter("it is empty, expected a path.")
    return Path(text)


class Options:
    """Of one command. ``parts``: the dataclasses that it builds, each with the prefix of its keys; one with a prefix is
    of processes that the command starts."""

    def __init__(self, *parts: tuple[str, type], positional: str = "") -> None:
        """``positional``: the option whose value may be given without its name."""
        self.positional = positional
        own = [key for prefix, config in parts if not prefix for key in keys(config)]
        passed_on = [key for prefix, config in parts if prefix for key in keys(config, prefix) if key.about.up_file]
        self.keys = (*own, *passed_on)
        self.options: dict[str, Key] = {}
        for key in (*own, *(k for k in passed_on if k.about.up_flag)):
            if key.about.flag:
                # Of two options of one name the first counts; a file can still hold the other.
                self.options.setdefault(_name(key), key)

    def taken(self, command: Callable[[Mapping[str, Given]], None]) -> Callable[..., None]:
        """Gives ``command`` the options and, by key, what was given."""
        positional = self.positional

        def run(context: typer.Context, **values: object) -> None:
            file, inherited = values.pop("config"), values.pop("settings")
            given = dict(context.meta[_FILE]) if file or inherited else {}
            if positional and (first := values.pop(_POSITIONAL)) is not None:
                key = self.options[positional]
                if _is_given(context, positional):
                    raise BadConfig(f"{positional.upper()} and {key.option} are both given, expected one of them")
                given[key.path] = Given(first, positional.upper())
            for name, value in values.items():
                if _is_given(context, name):
                    key = self.options[name]
                    given[key.path] = Given(_field_value(key, value), key.option)
                elif self.options[name].default is MISSING:
                    # From the file, by way of click: see _read.
                    assert self.options[name].path in given
            command(given)

        parameters = [_parameter("context", typer.Context, inspect.Parameter.empty)]
        parameters += [_parameter(name, _annotation(key), default_shown(key)) for name, key in self.options.items()]
        read = Annotated[Path | None, typer.Option("--config", parser=path, metavar="FILE", help=_FILE_HELP,
                                                   is_eager=True, callback=self._read)]  # fmt: skip
        take = Annotated[str, typer.Option("--settings", hidden=True, is_eager=True, callback=self._inherit)]
        parameters += [_parameter("config", read, None), _parameter("settings", take, "")]
        if positional:
            argument = typer.Argument(
                help=f"Instead of {self.options[positional].option}.", metavar=positional.upper(),
                show_default=False, is_eager=True, callback=self._take_positional,
            )  # fmt: skip
            parameters.append(_parameter(_POSITIONAL, Annotated[str | None, argument], None))
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    def _read(self, context: typer.Context, file: Path | None) -> Path | None:
        if file is not None:
            self._remember(context, read_file(file, "--config", self.keys))
        return file

    def _take_positional(self, context: typer.Context, value: str | None) -> str | None:
        if value is not None:
            context.default_map = {**(context.default_map or {}), self.positional: value}
        return value

    def _inherit(self, context: typer.Context, text: str) -> str:
        """What `baton up` tells the processes that it starts."""
        if text:
            self._remember(context, flatten(json.loads(text), self.keys, "--settings: "))
        return text

    def _remember(self, context: typer.Context, given: Mapping[str, Given]) -> None:
        context.meta.setdefault(_FILE, {}).update(given)
        # An option that has to be given is not missing if the file has it.
        for name, key in self.options.items():
            if key.default is MISSING and key.path in given:
                value = given[key.path].value
                context.default_map = {**(context.default_map or {}), name: str(getattr(value, "value", value))}


_FILE = "baton.settings"
_POSITIONAL = "first"


def under(prefix: str, given: Mapping[str, Given]) -> dict[str, Given]:
    """What was given under a prefix, by the keys without it."""
    return {key.removeprefix(prefix): value for key, value in given.items() if key.startswith(prefix)}


def _is_given(context: typer.Context, name: str) -> bool:
    """Rather than left to its default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name in _GIVEN_BY


def _name(key: Key) -> str:
    return key.option.lstrip("-").replace("-", "_")


def _parameter(name: str, annotation: Any, default: object) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _kind(key: Key) -> Any:
    """The field's type, without None."""
    if get_origin(key.type) in (Union, types.UnionType):
        (kind,) = (x for x in get_args(key.type) if x is not type(None))
        return kind
    return key.type


def _annotation(key: Key) -> Any:
    about, kind = key.about, _kind(key)
    words = [about.flag, *about.aliases, *filter(None, [about.short])]
    more: dict[str, Any] = {"help": plain(about.help), "hidden": about.is_hidden, "envvar": about.variable or None}
    if about.metavar:
        more["metavar"] = about.metavar
    if about.parse is not None:
        kind = str
    elif about.choices:
        kind = _choice(key, (*about.choices, *dict(about.synonyms)))
    elif kind is Path:
        kind, more["parser"] = Path | None, path
        more.setdefault("metavar", "PATH")
    elif get_origin(kind) is tuple:
        kind = list[str] | None
    elif issubclass(kind, Enum):
        kind = _choice(key, tuple(item.value for item in kind))
    elif kind in (int, float):
        more["min"], more["max"] = _bounds(key, kind)
        if kind is float:
            more["callback"] = finite
        kind = kind if default_shown(key) is not None else kind | None
    return Annotated[kind, typer.Option(*words, **more)]


def plain(text: str) -> str:
    """Help in which brackets are no markup."""
    return text.replace("[", r"\[")


def _choice(key: Key, values: tuple[str, ...]) -> Any:
    return StrEnum(_name(key), {value: value for value in values})


def _bounds(key: Key, kind: type) -> tuple[float | None, float | None]:
    """Of the option. The number that means None lies at an end of the range; without a range numbers are positive."""
    about = key.about
    least = about.least if about.least is not None else 1 if kind is int else None
    if about.none is not None and least is not None:
        least = min(least, about.none)
    return (None if least is None else kind(least)), (None if about.most is None else kind(about.most))


def default_shown(key: Key) -> Any:
    """The default as the option shows it."""
    about, value = key.about, key.default
    if value is MISSING:
        return inspect.Parameter.empty
    if about.parse is not None:
        return about.shown
    if value is None:
        return about.none
    if isinstance(value, bool):
        return _ON_OFF[not value] if about.choices else value
    if isinstance(value, int | float):
        return type(value)(value / about.unit)
    return list(value) or None if isinstance(value, tuple) else value


def _field_value(key: Key, value: Any) -> object:
    """Of the field, by what the option was given."""
    about, kind = key.about, _kind(key)
    if about.parse is not None:
        try:
            return about.parse(value)
        except ValueError as error:
            raise BadConfig(f"{key.option} is {quoted(value)}, {error}", param=key.path) from error
    if value is None or (about.none is not None and value == about.none):
        return None
    if kind is bool:
        return value == "on" if about.choices else value
    if kind in (int, float):
        return kind(value * about.unit)
    if get_origin(kind) is tuple:
        return tuple(value)
    if isinstance(value, Enum):
        return kind(dict(about.synonyms).get(value.value, value.value))
    return value
