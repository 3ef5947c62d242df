"""/tokenize and /detokenize, as in vLLM: the ids of a prompt or of a conversation, and the text of ids."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from baton.errors import InvalidRequest, quoted
from router.api.endpoint import Computation
from router.frontend.frontend import Frontend
from router.frontend.request import Caller, GenerationRequest
from router.openai.neutral import UnknownFields
from router.openai.request import ChatBody, CompletionBody, Strict, are_ids, fields_of, read
from router.text.tokenizer import require

# More ids than that become text and JSON in a thread.
_INLINE_IDS = 4096


class TokenizeBody(CompletionBody):
    """A request for a completion, of which the prompt counts."""

    return_token_strs: bool | None = None


class TokenizeChatBody(ChatBody):
    return_token_strs: bool | None = None


class DetokenizeBody(Strict):
    # Checked at once: an error for each of a million wrong ids took a second.
    tokens: Any
    model: str | None = None


def tokenize(frontend: Frontend, unknown: UnknownFields) -> Computation:
    def parse(content: bytes, caller: Caller) -> Callable[[], Awaitable[bytes]]:
        fields = fields_of(content)
        kind: type[TokenizeBody] | type[TokenizeChatBody] = TokenizeChatBody if "messages" in fields else TokenizeBody
        body = read(kind, fields, unknown)
        request = body.request(caller)
        if len(request.prompts) != 1:
            raise InvalidRequest(f"prompt has {len(request.prompts)} texts, expected one", param="prompt")
        return lambda: _ids(frontend, request, with_pieces=bool(body.return_token_strs))

    return parse


async def _ids(frontend: Frontend, request: GenerationRequest, *, with_pieces: bool) -> bytes:
    (token_ids,) = await frontend.token_ids(request)

    def work() -> bytes:
        found = {"count": len(token_ids), "max_model_len": frontend.model.max_tokens, "tokens": token_ids}
        return _dumped(found | {"token_strs": _pieces(frontend, token_ids) if with_pieces else None})

    return await _run(frontend, len(token_ids), work)


def _pieces(frontend: Frontend, token_ids: Sequence[int]) -> list[str | None]:
    tokenizer = require(frontend.tokenizer, "return_token_strs")
    return [tokenizer.piece(token_id) for token_id in token_ids]


def detokenize(frontend: Frontend, unknown: UnknownFields) -> Computation:
    def parse(content: bytes, caller: Caller) -> Callable[[], Awaitable[bytes]]:
        body = read(DetokenizeBody, fields_of(content), unknown)
        if not isinstance(body.tokens, list) or not are_ids(body.tokens):
            raise InvalidRequest(f"tokens is {quoted(body.tokens)}, expected a list of token ids", param="tokens")
        return lambda: _text(frontend, body.model or "", body.tokens)

    return parse


async def _text(frontend: Frontend, model: str, token_ids: Sequence[int]) -> bytes:
    tokenizer = require(frontend.tokenizer, "tokens")
    if model:
        frontend.model.check_name(model)
    if token_ids:
        frontend.model.check_ids("tokens", (min(token_ids), max(token_ids)))
    return await _run(
        frontend, len(token_ids), lambda: _dumped({"prompt": tokenizer.decode(token_ids, skip_special_tokens=False)})
    )


async def _run(frontend: Frontend, num_ids: int, work: Callable[[], bytes]) -> bytes:
    return work() if num_ids <= _INLINE_IDS else await frontend.offload.run(work)


def _dumped(value: dict[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
