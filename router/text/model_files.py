"""Reads the small JSON and Jinja files of a model folder: special tokens, chat template, limits, sampling defaults.

The rules are those of transformers and, for generation_config.json, of vLLM. Nothing is cached.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from baton.errors import BadConfig, InvalidRequest, quoted
from baton.fields import Fields
from baton.files import is_there, read_object, read_text
from baton.types import DEFAULTED_SAMPLING, SamplingParams

# Special tokens that transformers names in every tokenizer.
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# The name of the template for conversations with tools, if there are several.
_TOOL_TEMPLATE = "tool_use"
# Defaults of transformers' tokenizer classes for the served models.
_CLASS_TOKENS: Mapping[str, Mapping[str, str]] = {
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "Qwen2Tokenizer": dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
    "GPT2Tokenizer": dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
}


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """The facts in the folder's JSON files; empty where they have none."""

    eos_token_ids: tuple[int, ...] = ()
    max_model_tokens: int | None = None
    # Defaults for fields that a request does not set; max_tokens applies to chat only.
    sampling: SamplingParams = field(default_factory=SamplingParams)


@dataclass(frozen=True, slots=True)
class TokenizerFacts:
    """The facts in the files beside tokenizer.json. A special token that the model does not have is not in the
    mapping."""

    special_tokens: Mapping[str, str] = field(default_factory=dict)
    chat_template: str | None = None
    # For conversations with tools; None: the same.
    tool_template: str | None = None


def load_facts(folder: Path, *, sampling_defaults: bool = True) -> ModelFacts:
    """End-of-sequence ids (generation_config.json before config.json), context length, sampling defaults."""
    path = folder / "config.json"
    whole = Fields(_read_json(path), str(path))
    config = Fields(text, str(path)) if (text := whole.fields("text_config")) else whole
    path = folder / "generation_config.json"
    generation = _read_json(path)
    ending = Fields(generation, str(path)) if "eos_token_id" in generation else config
    return ModelFacts(
        eos_token_ids=ending.token_ids("eos_token_id"),
        max_model_tokens=config.integer("max_position_embeddings", 0, least=0, nullable=True) or None,
        sampling=_sampling(generation, path) if sampling_defaults else SamplingParams(),
    )


def load_tokenizer_facts(folder: Path, chat_template: str = "") -> TokenizerFacts:
    """``chat_template``: another one than the folder's, or the path of its file."""
    config = _read_json(folder / "tokenizer_config.json")
    templates = (_given_template(chat_template), None) if chat_template else _chat_templates(folder, config)
    return TokenizerFacts(_special_tokens(folder, config), *templates)


def _given_template(text: str) -> str:
    if "{{" in text or "{%" in text:
        return text
    if not is_there(Path(text)):
        expected = "the path of a file, or a template, which has {{ or {% in it"
        raise BadConfig(f"--chat-template is {quoted(text)}, expected {expected}", param="chat_template")
    return read_text(Path(text))


# The numbers of generation_config.json that vLLM uses as defaults, by their names in SamplingParams. do_sample is not
# among them: vLLM ignores it too.
_SAMPLING_NUMBERS: Mapping[str, tuple[str, type]] = {
    "temperature": ("temperature", float),
    "top_p": ("top_p", float),
    "top_k": ("top_k", int),
    "min_p": ("min_p", float),
    "repetition_penalty": ("repetition_penalty", float),
    "max_new_tokens": ("max_tokens", int),
}


def _sampling(generation: Mapping[str, Any], path: Path) -> SamplingParams:
    """Raises BadConfig with the file's name for a value that is out of range for requests."""
    found: dict[str, Any] = {}
    for key, (name, kind) in _SAMPLING_NUMBERS.items():
        value = generation.get(key)
        if value is None:
            continue
        try:
            is_good = not isinstance(value, bool | str) and kind(value) == value
        except (TypeError, ValueError, OverflowError):
            is_good = False
        if not is_good:
            expected = "a whole number" if kind is int else "a number"
            raise _bad_default(path, f"{key} is {quoted(value)}, expected {expected}")
        # -1 is off as well, as in requests.
        found[name] = 0 if key == "top_k" and value == -1 else kind(value)
    try:
        return SamplingParams(**found)
    except InvalidRequest as error:
        raise _bad_default(path, error.message) from error


def defaults(sampling: SamplingParams) -> dict[str, float]:
    """Those that differ from the neutral ones."""
    neutral = SamplingParams()
    names = (*DEFAULTED_SAMPLING, "max_tokens")
    return {n: getattr(sampling, n) for n in names if getattr(sampling, n) != getattr(neutral, n)}


def stated(sampling: SamplingParams) -> str:
    """For display."""
    return ", ".join(f"{name} {value}" for name, value in defaults(sampling).items())


def _bad_default(path: Path, what: str) -> BadConfig:
    return BadConfig(
        f"{path}: {what}; mend the file or leave its defaults out with --generation-config none",
        param="generation_config",
    )


def _special_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Names as in transformers' templates; a token that is null or missing is omitted."""
    kind = str(config.get("tokenizer_class") or "").removesuffix("Fast")
    stated: dict[str, Any] = {**_CLASS_TOKENS.get(kind, {}), **config}
    if "added_tokens_decoder" not in config:
        # Written by older versions; newer ones write special tokens into the config only.
        stated |= _read_json(folder / "special_tokens_map.json")
    extra = stated.get("extra_special_tokens")
    if isinstance(extra, dict):  # tokens with custom names
        stated |= {name: token for name, token in extra.items() if name not in _NAMED_TOKENS}
        names = {*_NAMED_TOKENS, *extra}
    else:
        names = set(_NAMED_TOKENS)
    texts = {name: _token_text(token) for name, token in stated.items() if name in names or name.endswith("_token")}
    return {name: text for name, text in texts.items() if text is not None}


def _token_text(token: object) -> str | None:
    """The files have special tokens as strings or as objects with their content."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _chat_templates(folder: Path, config: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """The one for chat, and the one for tools if there is one beside it. Template files have priority over
    tokenizer_config.json, which has priority over a processor's chat_template.json."""
    files = [
        folder / "chat_template.jinja",
        folder / "chat_templates" / "default.jinja",
        folder / "additional_chat_templates" / "default.jinja",
    ]
    tool_file = folder / "additional_chat_templates" / f"{_TOOL_TEMPLATE}.jinja"
    found = [read_text(file) for file in files if is_there(file)]
    for_tools = read_text(tool_file) if is_there(tool_file) else None
    if found:
        return found[-1], for_tools
    of_config = _named_templates(config.get("chat_template"))
    named = of_config or _named_templates(_read_json(folder / "chat_template.json").get("chat_template"))
    return named.get("default"), for_tools or named.get(_TOOL_TEMPLATE)


def _named_templates(template: object) -> dict[str, str]:
    """By their names in transformers: "default" is for chat, the others are for tools and the like."""
    if isinstance(template, str):
        return {"default": template}
    if isinstance(template, list):
        template = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
    if not isinstance(template, dict):
        return {}
    return {name: text for name, text in template.items() if isinstance(name, str) and isinstance(text, str)}


def _read_json(path: Path) -> dict[str, Any]:
    return read_object(path) if is_there(path) else {}
