"""Checks the weight files of a folder: which there are, whether each is whole, and whether the index agrees. No
torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from baton.errors import UnsupportedModel, quoted
from baton.files import check_readable, is_there, names_in, read_object

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


def weight_files(folder: Path) -> tuple[list[Path], Mapping[str, str]]:
    """The files, and which of them the index says a tensor is in; a single file has no index.

    Raises UnsupportedModel where there are none, or more than one model.
    """
    index, single = folder / _INDEX, folder / _SINGLE
    if is_there(index) and is_there(single):
        raise UnsupportedModel(f"{folder} holds {_SINGLE} and {_INDEX}; remove the one that is not the model")
    if is_there(index):
        weight_map = read_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise UnsupportedModel(f"{index} is no safetensors index: weight_map is {quoted(weight_map)}")
        files = sorted(set(weight_map.values()))
        if not files or any(Path(name).name != name for name in files):
            raise UnsupportedModel(f"{index} names {named('', files) or ' no files'}, expected files of its own folder")
        return [folder / name for name in files], weight_map
    if is_there(single):
        return [single], {}
    others = [n for n in names_in(folder) if n.endswith((".bin", ".pt", ".pth", ".gguf", ".safetensors"))]
    found = named("", others).strip() or "no weights"
    raise UnsupportedModel(f"{folder} holds {found}; expected {_SINGLE} or {_INDEX}")


def open_weights(path: Path, framework: str = "pt") -> Any:
    """The file, mapped into memory: a context manager. Raises UnsupportedModel for one that is not whole."""
    from safetensors import SafetensorError, safe_open  # not in a router's install, which asks for names alone

    check_readable(path)
    try:
        return safe_open(path, framework=framework)
    except (OSError, SafetensorError) as error:
        raise UnsupportedModel(
            f"{path} ({path.stat().st_size} bytes) is no whole safetensors file: {error}; download it again"
        ) from error


def check_map(folder: Path, weight_map: Mapping[str, str], places: Mapping[str, str]) -> None:
    """An index that disagrees with its files is of another download than they are."""
    if not weight_map:
        return
    wrong = sorted(name for name in weight_map.keys() | places.keys() if weight_map.get(name) != places.get(name))
    if wrong:
        said, found = (files.get(wrong[0], "no file") for files in (weight_map, places))
        raise UnsupportedModel(
            named(f"{folder / _INDEX} and the files beside it disagree about", wrong)
            + f": the index says {quoted(said)}, it is in {found}; download the model again"
        )


def named(text: str, names: list[str]) -> str:
    """``text`` and the first names."""
    shown = ", ".join(names[:5])
    return f"{text} {shown}" + (f" and {len(names) - 5} more" if len(names) > 5 else "")
