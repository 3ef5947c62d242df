"""Reads the files of a model folder. If one cannot be read, the error says why (owner, kind of file) and what to do."""

from __future__ import annotations

import contextlib
import json
import os
import stat
from pathlib import Path
from typing import Any

from baton.errors import UnsupportedModel, quoted

_LFS_HEAD = b"version https://git-lfs"


def is_there(path: Path) -> bool:
    """Whether the name exists, also as a broken link. Raises UnsupportedModel if the folder cannot be searched."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise UnsupportedModel(_fault(path, error)) from error
    return True


def names_in(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise UnsupportedModel(_fault(folder, error)) from error


def check_readable(path: Path) -> None:
    """Raise UnsupportedModel unless ``path`` is a readable, non-empty file."""
    try:
        mode = path.stat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            # Opening a pipe would block for ever.
            raise UnsupportedModel(f"{path} is a pipe, socket or device, expected a file")
        with path.open("rb") as file:
            head = file.read(len(_LFS_HEAD))
    except OSError as error:
        raise UnsupportedModel(_fault(path, error)) from error
    if not head:
        raise UnsupportedModel(f"{path} is empty; expected a file of the model: download it again")
    if head == _LFS_HEAD:
        raise UnsupportedModel(
            f"{path} is a git-lfs pointer and not the file itself: run `git lfs pull` in {path.parent}, or download it"
        )


def read_text(path: Path) -> str:
    """Raises UnsupportedModel, also where the bytes are not UTF-8."""
    check_readable(path)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UnsupportedModel(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise UnsupportedModel(_fault(path, error)) from error


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises UnsupportedModel."""
    text = read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits is a bare ValueError
        raise UnsupportedModel(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UnsupportedModel(f"{path} holds {quoted(content)}, expected a JSON object")
    return content


def _fault(path: Path, error: OSError) -> str:
    if isinstance(error, PermissionError):
        return f"{path} cannot be read: permission denied ({_barrier(path)})"
    if isinstance(error, FileNotFoundError) and path.is_symlink():
        return f"{path} is a link to {path.readlink()}, which does not exist: download the model again"
    if isinstance(error, FileNotFoundError):
        return f"{path} does not exist; expected a whole Hugging Face model folder"
    if isinstance(error, IsADirectoryError):
        return f"{path} is a folder, expected a file"
    return f"{path} cannot be read: {error.strerror or error}"


def _barrier(path: Path) -> str:
    """What denies access: the first folder of the path that this process may not enter, else the file."""
    real = Path(os.path.realpath(path))
    for folder in reversed(real.parents):
        if folder.is_dir() and not os.access(folder, os.X_OK):
            return f"{_owned(folder)}; chmod a+x {folder}, or run as its owner"
    return f"{_owned(real)}; chmod a+r {real}, or run as its owner"


def _owned(path: Path) -> str:
    with contextlib.suppress(OSError):
        found = path.stat()
        mode = stat.S_IMODE(found.st_mode)
        return f"{path} belongs to uid {found.st_uid}, has mode {mode:04o}, and this process runs as uid {os.geteuid()}"
    return f"this process runs as uid {os.geteuid()}"
