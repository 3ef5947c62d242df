"""Finds the folder of a model by its name: a local folder as it is, a hub id by download. Reads no weights."""

from __future__ import annotations

import re
from pathlib import Path

from baton.errors import BadConfig
from baton.files import check_readable, is_there

# Only what serving needs: no pickles, no other frameworks' copies of the weights.
_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "tokenizer*"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def resolve(model: str) -> Path:
    """The folder of ``model``. Raises BadConfig, with what was looked for, if there is none and the hub has none, and
    UnsupportedModel if its config.json cannot be read."""
    folder = Path(model).expanduser()
    if is_there(folder / "config.json"):
        check_readable(folder / "config.json")
        return folder.resolve()
    if is_there(folder):
        raise BadConfig(f"{model} is no model: {folder.resolve()} has no config.json (a Hugging Face folder has one)")
    if not _HUB_ID.fullmatch(model):
        raise BadConfig(f"model folder {model} does not exist ({folder.resolve()})")
    return _download(model)


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=_PATTERNS))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BadConfig(
            f"model {hub_id} is neither a folder here nor could it be fetched from the Hugging Face hub: {reason}"
        ) from error


def name_of(model: str) -> str:
    """The model's default name in the API: the hub id, or the folder's name."""
    folder = Path(model).expanduser()
    return folder.resolve().name if folder.exists() else model
