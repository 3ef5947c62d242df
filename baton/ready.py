"""Writes the file in which a process says, once it serves, where it is reached."""

from __future__ import annotations

import json
import os
from pathlib import Path

from baton.errors import BadConfig


def write_json_atomically(path: Path, content: object) -> None:
    """A reader sees the old file or the new one, never a part. Raises BadConfig if it cannot be written."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        draft.write_text(json.dumps(content, indent=2) + "\n")
        draft.replace(path)
    except OSError as error:
        raise BadConfig(f"cannot write {path}: {error.strerror}") from error
