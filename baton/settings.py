"""Settings: a field of a frozen dataclass says one setting's default, meaning, range and option, and nothing else does.

Walks nested dataclasses, reads TOML files, checks names, types and ranges, and builds the dataclasses from what was
given. Knows no command line: `cli/options.py` makes options of the same fields.

A setting's key is the path of its field, such as ``engine.scheduler.max_batch_tokens``, on the command line and in a
file alike.
"""

from __future__ import annotations

import math
import tomllib
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from baton.errors import BadConfig, quoted
from baton.spelling import meant

_T = TypeVar("_T")
_METADATA = "setting"
# A file of every setting has 10 KB.
_MAX_FILE_BYTES = 1 << 20
_MAX_WHOLE = 2**63 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a field says about itself beside its name, type and default."""

    # Name of the option, "/--no-..." included, and its short form. Empty: reachable by a file alone.
    flag: str = ""
    short: str = ""
    # Other servers' names of the option.
    aliases: tuple[str, ...] = ()
    help: str = ""
    # Range, in the unit of the option. A number without a range has to be positive.
    least: float | None = None
    most: float | None = None
    choices: tuple[str, ...] = ()
    # Other words for some of the choices, each with the choice.
    synonyms: tuple[tuple[str, str], ...] = ()
    # What one of the option's units is in the field's.
    unit: float = 1
    # The number that stands for None, on the command line and in a file.
    none: int | None = None
    # For an option that is not the field itself: makes the field's value of its text; what it shows as default.
    parse: Callable[[str], object] | None = None
    shown: str = ""
    metavar: str = ""
    # Environment variable.
    variable: str = ""
    # False: computed, never set by an operator.
    is_key: bool = True
    is_hidden: bool = False
    # Of `baton up`, which starts workers and a router: whether its files may hold it, and its command line.
    up_file: bool = True
    up_flag: bool = True


def setting(
    flag: str = "",
    help: str = "",
    **more: Any,
) -> Mapping[str, Setting]:
    """``metadata`` of a dataclass field."""
    return {_METADATA: Setting(flag=flag, help=help, **more)}


def computed() -> Mapping[str, Setting]:
    """``metadata`` of a field that no operator sets."""
    return {_METADATA: Setting(is_key=False)}


@dataclass(frozen=True, slots=True)
class Key:
    """One setting of a dataclass. ``default`` is MISSING for one that has to be given."""

    path: str
    type: Any
    about: Setting
    default: object
    # The default is made when the process starts.
    is_computed: bool = False
    # As in ``repr`` of the dataclass: no message shows the value.
    is_secret: bool = False

    @property
    def option(self) -> str:
        """The option's name, or the key where it has none."""
        return self.about.flag.partition("/")[0] or self.path


@dataclass(frozen=True, slots=True)
class Given:
    """A value, and what an error calls the place where it was given."""

    value: object
    source: str


def keys(config: type, prefix: str = "") -> Iterator[Key]:
    """Every setting of a dataclass and of those nested in it."""
    hints = get_type_hints(config)
    for field in fields(config):
        about = field.metadata.get(_METADATA, Setting())
        inner, path = _nested(hints[field.name]), prefix + field.name
        if not about.is_key:
            if about.flag:
                yield Key(path, hints[field.name], about, _default(field))
        elif inner is not None:
            for key in keys(inner, f"{path}."):
                yield key if about.up_file else replace(key, about=replace(key.about, up_file=False))
        else:
            is_computed = field.default_factory is not MISSING
            yield Key(path, hints[field.name], about, _default(field), is_computed, is_secret=not field.repr)


def _default(field: Any) -> object:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _nested(hint: Any) -> type | None:
    """The dataclass that a field holds."""
    return hint if isinstance(hint, type) and is_dataclass(hint) else None


# -- files


def read_file(path: Path, option: str, known: Sequence[Key]) -> dict[str, Given]:
    """The settings of a TOML file by key. Raises BadConfig with the file, and the line or the key."""
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_FILE_BYTES + 1)
        if len(content) > _MAX_FILE_BYTES:
            raise BadConfig(f"{option}: {path} is larger than {_MAX_FILE_BYTES >> 10} KiB, expected settings in TOML")
        table = tomllib.loads(content.decode())
    except OSError as error:
        raise BadConfig(f"{option}: cannot read {quoted(str(path))}: {error.strerror}", param=option) from error
    except (ValueError, RecursionError) as error:
        raise BadConfig(f"{option}: {path} is no TOML: {error}", param=option) from error
    return flatten(table, known, f"{path}: ")


def flatten(table: Mapping[str, object], known: Sequence[Key], source: str) -> dict[str, Given]:
    """Nested tables by key, every value of the type of its field. Raises BadConfig, which begins with ``source``."""
    by_path = {key.path: key for key in known if key.about.is_key}
    tables = {path.rpartition(".")[0] for path in by_path}
    tables |= {name[:i] for name in tables for i, letter in enumerate(name) if letter == "."}
    tables.discard("")
    found: dict[str, Given] = {}

    def walk(table: Mapping[str, object], prefix: str) -> None:
        for name, value in table.items():
            path = prefix + name
            if "." in name:
                expected = "names without a dot, in tables or joined by dots without quotes"
                raise BadConfig(f"{source}the name {quoted(name)} has a dot in it, expected {expected}")
            if path in by_path:
                found[path] = Given(_typed(by_path[path], value, source + path), source + path)
            elif path not in tables:
                raise BadConfig(
                    f"{source}unknown setting {quoted(path)}{_instead(path, [*by_path, *tables])}", param=path
                )
            elif isinstance(value, dict):
                walk(value, f"{path}.")
            else:
                is_secret = any(key.is_secret for x, key in by_path.items() if x.startswith(f"{path}."))
                shown = _shown(value, is_secret=is_secret)
                raise BadConfig(f"{source}{path} is {shown}, expected a table, [{path}]", param=path)

    walk(table, "")
    return found


def _instead(path: str, known: Sequence[str]) -> str:
    """What was meant: a setting of this name in another table, or one that is spelled alike."""
    name = path.rpartition(".")[2]
    elsewhere = sorted(x for x in known if x.rpartition(".")[2] == name)
    if elsewhere:
        return f" (did you mean {' or '.join(elsewhere)}?)"
    return meant(path, known) or f", expected one of {', '.join(sorted(_beside(path, known)))}"


def _beside(path: str, known: Sequence[str]) -> set[str]:
    """The names of the table that ``path`` is in."""
    prefix = path.rpartition(".")[0] + "." if "." in path else ""
    return {x.removeprefix(prefix).partition(".")[0] for x in known if x.startswith(prefix) and x != prefix[:-1]} - {""}


def _shown(value: object, *, is_secret: bool) -> str:
    return "(hidden)" if is_secret else quoted(value)


def _typed(key: Key, value: object, source: str) -> object:
    kind = key.type
    if get_origin(kind) in (Union, types.UnionType):
        if not isinstance(value, bool) and value == key.about.none is not None:
            return None
        (kind,) = (x for x in get_args(kind) if x is not type(None))
    make, expected = _MAKERS.get(get_origin(kind) or kind, (None, ""))
    if make is None:
        assert issubclass(kind, Enum), key
        make, expected = kind, " or ".join(item.value for item in kind)
    try:
        made = make(value)
        return dict(key.about.synonyms).get(made, made) if isinstance(made, str) else made
    except (ValueError, OverflowError):
        shown = _shown(value, is_secret=key.is_secret)
        raise BadConfig(f"{source} is {shown}, expected {expected}", param=key.path) from None


def _is(*kinds: type) -> Callable[[object], Any]:
    """The value, of one of these types; a bool is no number."""

    def checked(value: object) -> Any:
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ValueError
        return value

    return checked


def _texts(value: object) -> tuple[str, ...]:
    return tuple(map(_is(str), _is(list, tuple)(value)))


def _path(value: object) -> Path:
    if not _is(str)(value):
        raise ValueError
    return Path(str(value))


def _numbers_by_name(value: object) -> dict[str, int]:
    return {name: _is(int)(number) for name, number in _is(dict)(value).items()}


_MAKERS: Mapping[Any, tuple[Callable[[object], Any], str]] = {
    bool: (_is(bool), "true or false"),
    int: (_is(int), "a whole number"),
    float: (lambda value: float(_is(int, float)(value)), "a number"),
    str: (_is(str), "a text"),
    Path: (_path, "a path"),
    tuple: (_texts, "a list of texts"),
    Mapping: (_numbers_by_name, "a table of whole numbers"),
}


# -- dataclasses


def build(config: type[_T], given: Mapping[str, Given], prefix: str = "") -> _T:
    """The dataclass of what was given under ``prefix``. Raises BadConfig, which names where the bad value was given."""
    hints = get_type_hints(config)
    values: dict[str, object] = {}
    for field in fields(config):  # type: ignore[arg-type]
        path, inner = prefix + field.name, _nested(hints[field.name])
        if path in given:
            values[field.name] = given[path].value
        elif inner is not None and any(name.startswith(f"{path}.") for name in given):
            values[field.name] = build(inner, given, f"{path}.")
    try:
        return config(**values)
    except BadConfig as error:
        source = given.get(f"{prefix}{error.param}")
        if source is None:
            # What was given made a default wrong. Inside a table the key has the table's name too.
            message = error.message if not error.message.startswith(f"{error.param} ") else f"{prefix}{error.message}"
            raise BadConfig(message, param=error.param) from error
        rest = error.message.removeprefix(f"{error.param} ")
        joint = " " if rest != error.message else ": "
        raise BadConfig(f"{source.source}{joint}{rest}", param=error.param) from error


def check(config: Any, prefix: str = "") -> None:
    """Raise BadConfig, with the key, for a setting of the dataclass, or of one nested in it, that is out of range."""
    for field in fields(config):
        value, about, name = getattr(config, field.name), field.metadata.get(_METADATA, Setting()), prefix + field.name
        if is_dataclass(value):
            check(value, f"{name}.")
        elif isinstance(value, str) and about.choices:
            _expect(value in about.choices, name, value, " or ".join(about.choices))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            # No float has such a whole number, and no counter counts so far.
            _expect(not isinstance(value, int) or abs(value) <= _MAX_WHOLE, name, value, "less than 2^63")
            _expect(math.isfinite(value) and _is_within(value / about.unit, about), name, value, range_of(about))


def _is_within(value: float, about: Setting) -> bool:
    is_above = value > 0 if about.least is None else value >= about.least
    return is_above and (about.most is None or value <= about.most)


def range_of(about: Setting) -> str:
    """In words, in the unit of the field."""
    least, most = (None if bound is None else bound * about.unit for bound in (about.least, about.most))
    if least is None:
        return "a positive number" if most is None else f"more than 0, at most {most:,}"
    return f"at least {least:,}" if most is None else f"{least:,} to {most:,}"


def _expect(ok: bool, name: str, value: object, expected: str) -> None:
    if not ok:
        raise BadConfig(f"{name} is {quoted(value)}, expected {expected}", param=name)


def difference(config: Any) -> dict[str, object]:
    """Nested tables, as JSON and `flatten` take them, of what is not as the dataclass has it by default.

    Without what ``repr`` does not show either: secrets go another way.
    """
    found: dict[str, object] = {}
    for field in fields(config):
        value = getattr(config, field.name)
        about = field.metadata.get(_METADATA, Setting())
        if not about.is_key or not field.repr or value == _default(field):
            continue
        if is_dataclass(value):
            found[field.name] = difference(value)
        else:
            found[field.name] = about.none if value is None else _plain(value)
    return found


def _plain(value: object) -> object:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else dict(value) if isinstance(value, Mapping) else value
