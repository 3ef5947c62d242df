"""Finds the folder of a model by its name: a local folder as it is, a hub id by download. Reads no weights."""

from __future__ import annotations

import re
from pathlib import Path

from baton.errors import BadConfig, quoted
from baton.files import check_readable, is_there
from baton.settings import setting

# Of the option that the commands share.
REVISION = setting("--revision", "Branch, tag or commit of a model of the hub. Default: its main branch.")
# Only what serving needs: no pickles, no other frameworks' copies of the weights.
_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "tokenizer*"]
_TOKENIZER_PATTERNS = ["tokenizer*", "special_tokens_map.json", "chat_template*", "additional_chat_templates/*"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def resolve(model: str, revision: str = "") -> Path:
    """The folder of ``model``. ``revision``: of one that is fetched from the hub. Raises BadConfig, with what was
    looked for, if there is none and the hub has none, and UnsupportedModel if its config.json cannot be read."""
    folder = Path(model).expanduser()
    if revision and is_there(folder):
        raise BadConfig(
            f"--revision is {quoted(revision)}, but {model} is a folder here, which has no revisions; leave it out"
        )
    if is_there(folder / "config.json"):
        check_readable(folder / "config.json")
        return folder.resolve()
    if is_there(folder):
        raise BadConfig(f"{model} is no model: {folder.resolve()} has no config.json (a Hugging Face folder has one)")
    if not _HUB_ID.fullmatch(model):
        raise BadConfig(f"model folder {model} does not exist ({folder.resolve()})")
    return _download(model, _PATTERNS, revision)


def tokenizer_folder(tokenizer: str) -> str:
    """Of --tokenizer; empty for none. Raises BadConfig if it is neither a folder nor a hub id."""
    folder = Path(tokenizer).expanduser()
    if not tokenizer or is_there(folder):
        return str(folder) if tokenizer else ""
    if not _HUB_ID.fullmatch(tokenizer):
        raise BadConfig(f"tokenizer folder {tokenizer} does not exist ({folder.resolve()})", param="tokenizer")
    return str(_download(tokenizer, _TOKENIZER_PATTERNS))


def _download(hub_id: str, patterns: list[str], revision: str = "") -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, revision=revision or None, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        name = f"{hub_id} at {revision}" if revision else hub_id
        raise BadConfig(
            f"{name} is neither a folder here nor could it be fetched from the Hugging Face hub: {reason}"
        ) from error


def name_of(model: str) -> str:
    """The model's default name in the API: the hub id, or the folder's name."""
    folder = Path(model).expanduser()
    return folder.resolve().name if folder.exists() else model
