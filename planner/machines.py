"""Machine types: what they compute with, cost and draw. Read from ``data/machines.toml`` and from files of the user."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from baton.errors import BadConfig, quoted

_CATALOGUE = Path(__file__).resolve().parent / "data" / "machines.toml"


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Figures are of one GPU where nothing else is said. The file of the catalogue has the source of each."""

    name: str
    num_gpus: int
    memory_bytes: float
    # Dense 16-bit floating-point operations a second, and bytes a second from memory: peaks of the data sheet.
    peak_flops: float
    memory_bytes_s: float
    # At most, and while it does nothing.
    power_w: float
    idle_power_w: float
    dollars_per_hour: float
    # Of the whole machine, from and to others; seconds before the first byte arrives.
    link_bytes_s: float
    link_latency_s: float
    # Of the whole machine beside its GPUs, in the unit of `power_units`, which iso-power designs are compared in: the
    # paper's unit is arbitrary.
    power_units: float
    # The machine whose measured table is used for this one; empty: its own name.
    measured_as: str = ""
    # What a GPU would draw at most if it were not capped to `power_w`; 0: it is not.
    uncapped_power_w: float = 0.0

    @property
    def cap_share(self) -> float:
        """Of the power that a GPU would draw without a cap."""
        return min(1.0, self.power_w / self.uncapped_power_w) if self.uncapped_power_w else 1.0

    @property
    def machine_dollars_per_hour(self) -> float:
        return self.num_gpus * self.dollars_per_hour


def catalogue(path: Path | None = None) -> dict[str, Machine]:
    """The machines that come with Baton, and those of ``path``, which replace others of their name. Raises BadConfig.

    A file has a table for each machine, ``[NAME]`` with the fields of Machine, or ``like = "OTHER"`` and the fields
    that differ.
    """
    found: dict[str, Machine] = {}
    for each in (_CATALOGUE, path):
        if each is not None:
            found = _read(each, found)
    return found


def _read(path: Path, known: Mapping[str, Machine]) -> dict[str, Machine]:
    try:
        tables = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadConfig(f"the machines of {quoted(str(path))} cannot be read: {error}", param="machines") from error
    found = dict(known)
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise BadConfig(f"{quoted(name)} in {quoted(str(path))}: expected a table [NAME]", param="machines")
        found[name] = _machine(name, table, found, path)
    return found


_OPTIONAL = ("measured_as", "uncapped_power_w")
_TYPES = {field.name: field.type for field in fields(Machine)}


def _machine(name: str, table: Mapping[str, Any], known: Mapping[str, Machine], path: Path) -> Machine:
    where = f"machine {quoted(name)} in {quoted(str(path))}"
    given = dict(table)
    values: dict[str, Any] = {}
    if (like := given.pop("like", None)) is not None:
        if like not in known:
            raise BadConfig(
                f"{where} is like {quoted(str(like))}, expected one of {', '.join(known)}", param="machines"
            )
        values = {field.name: getattr(known[like], field.name) for field in fields(Machine)}
    for key, value in given.items():
        if key not in _TYPES or key == "name":
            expected = ", ".join(key for key in _TYPES if key != "name")
            raise BadConfig(f"{where} has {quoted(key)}, expected one of {expected}", param="machines")
        values[key] = _checked(where, key, value)
    values["name"] = name
    if missing := [key for key in _TYPES if key not in values and key not in _OPTIONAL]:
        raise BadConfig(f"{where} has no {', '.join(missing)}", param="machines")
    return Machine(**values)


def _checked(where: str, key: str, value: Any) -> Any:
    if _TYPES[key] == "str":
        if not isinstance(value, str):
            raise BadConfig(f"{where}: {key} is {quoted(str(value))}, expected a text", param="machines")
        return value
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    least = 0 if key in ("idle_power_w", "link_latency_s", "dollars_per_hour", "uncapped_power_w") else 1e-30
    if not is_number or not least <= value < float("inf") or (_TYPES[key] == "int" and value != int(value)):
        kind = "a whole number" if _TYPES[key] == "int" else "a number"
        above = "at least 0" if not least else "above 0"
        raise BadConfig(f"{where}: {key} is {quoted(str(value))}, expected {kind} {above}", param="machines")
    return int(value) if _TYPES[key] == "int" else float(value)
