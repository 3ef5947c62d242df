"""Request fields of OpenAI and vLLM that this server does not support, and the values of them that have no effect.

Clients send many of them by default. A value without effect, and null, is accepted; any other is refused by the field's
name, so that no field that would change the answer is ignored silently.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any

from baton.errors import InvalidRequest, quoted, shortened

_log = logging.getLogger("baton.router.http")
# Names that are remembered as logged: clients choose them.
_MAX_LOGGED = 1000

_NO_BEAM = "the server samples, it searches no beams"
_NO_GUIDE = "the server guides no output"
_TEXT_ONLY = "the served models read and write text only"

# Field: the values beside null that have no effect, and the reason why others are refused.
_NEUTRAL: Mapping[str, tuple[tuple[object, ...], str]] = {
    "use_beam_search": ((False,), _NO_BEAM),
    "length_penalty": ((1.0,), _NO_BEAM),
    "early_stopping": ((False,), _NO_BEAM),
    "prompt_embeds": ((), "a prompt is text or token ids"),
    "spaces_between_special_tokens": ((True,), "text is what the tokenizer decodes"),
    "detokenize": ((True,), "the answer is text; token ids come with return_token_ids"),
    "logits_processors": (([],), _NO_GUIDE),
    "structural_tag": ((), _NO_GUIDE),
    "guided_json_object": ((False,), _NO_GUIDE),
    "guided_whitespace_pattern": ((), _NO_GUIDE),
    "repetition_detection": ((), "no repetition is looked for"),
    "kv_transfer_params": (({},), "the router chooses the nodes"),
    "vllm_xargs": (({},), "there are no such arguments"),
    "mm_processor_kwargs": (({},), _TEXT_ONLY),
    "media_io_kwargs": (({},), _TEXT_ONLY),
}
_NEUTRAL_IN_CHAT: Mapping[str, tuple[tuple[object, ...], str]] = {
    "echo": ((False,), "an answer has the new message alone"),
    "documents": (([],), "templates get the messages alone"),
    "chat_template": ((), "the model's own template is used"),
    "thinking_token_budget": ((), "reasoning has no limit of its own, only max_completion_tokens"),
    "verbosity": (("medium",), "the served models know no verbosity"),
    "web_search_options": ((), "the server does not search"),
}


def neutral_fields(*, is_chat: bool) -> Mapping[str, tuple[tuple[object, ...], str]]:
    """The values beside null, and the reason why others are refused, by field."""
    return {**_NEUTRAL, **(_NEUTRAL_IN_CHAT if is_chat else {})}


def take_neutral(body: dict[str, Any], *, is_chat: bool) -> None:
    """Removes unsupported fields with neutral values; raises InvalidRequest for the first with any other value."""
    for name in [n for n in body if n in _NEUTRAL or (is_chat and n in _NEUTRAL_IN_CHAT)]:
        values, why = _NEUTRAL.get(name) or _NEUTRAL_IN_CHAT[name]
        refuse_unless(name, body.pop(name), values, why)


class UnknownFields:
    """Fields that are in no API: refused by name, or left out and each logged once."""

    def __init__(self, *, ignores: bool) -> None:
        self._ignores = ignores
        self._logged: set[str] = set()

    def take(self, body: dict[str, Any], known: Collection[str]) -> None:
        """Raises InvalidRequest for the first of them, or removes all."""
        for name in [name for name in body if name not in known]:
            if not self._ignores:
                raise unrecognized(name)
            del body[name]
            if name not in self._logged and len(self._logged) < _MAX_LOGGED:
                self._logged.add(name)
                _log.warning("requests have a field %s, which is unknown and ignored", quoted(name))


def unrecognized(name: str) -> InvalidRequest:
    return InvalidRequest(f"Unrecognized request argument supplied: {shortened(name, 80)}", param=name)


def refuse_unless(param: str, value: object, neutral: tuple[object, ...], why: str) -> None:
    """Raises InvalidRequest unless the value is null or one of the neutral ones."""
    if value is None or any(_is_same(value, n) for n in neutral):
        return
    expected = " or ".join(["null", *map(repr, neutral)])
    raise InvalidRequest(f"{param} is {quoted(value)}, expected {expected}: {why}", param=param)


def _is_same(value: object, neutral: object) -> bool:
    # True does not equal 1 here, but 1 equals 1.0.
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
