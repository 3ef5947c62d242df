"""`/v1/embeddings`: prompts that are pooled instead of continued, by the nodes that compute prompts."""

from __future__ import annotations

import base64
import json
import math
import struct
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from baton import errors
from baton.errors import InvalidRequest, quoted
from baton.types import MAX_COUNT, SamplingParams
from router.api.endpoint import Asked, Endpoint
from router.api.whole import Json, WholeAnswer
from router.frontend.generation import Accepted, Ending
from router.frontend.request import Caller, GenerationRequest
from router.openai.neutral import UnknownFields
from router.openai.request import parse, prompts_of
from router.text.detokenizer import Part
from router.turns import Turns


class EmbeddingBody(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", protected_namespaces=())
    input: Any
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    # With vLLM's names.
    normalize: bool | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: Literal["left", "right"] | None = None
    request_id: str | None = None
    cache_salt: str | None = None
    priority: int | None = None
    # Extensions of Baton.
    pooling: Literal["last", "mean"] | None = None
    timeout: float | None = None
    # No effect.
    user: str | None = None

    def request(self, caller: Caller) -> GenerationRequest:
        if self.dimensions is not None and not 1 <= self.dimensions <= MAX_COUNT:
            raise InvalidRequest(
                f"dimensions is {quoted(self.dimensions)}, expected 1 or more, at most the model's", param="dimensions"
            )
        return GenerationRequest(
            prompts=prompts_of(self.input, "input"),
            sampling=SamplingParams(temperature=0.0, max_tokens=1, pooling=self.pooling or "last"),
            model=self.model or "",
            request_id=self.request_id or "",
            cache_salt=self.cache_salt or "",
            priority=self.priority or 0,
            add_special_tokens=self.add_special_tokens is not False,
            truncate_to=self.truncate_prompt_tokens,
            truncates_end=self.truncation_side == "right",
            timeout_s=self.timeout,
            is_prompt_only=True,
            caller=caller,
        )


def endpoint(unknown: UnknownFields) -> Endpoint:
    def read(content: bytes, caller: Caller) -> Asked:
        body = parse(EmbeddingBody, content, unknown)
        return Asked(body.request(caller), False, lambda accepted: EmbeddingForm(body, accepted))

    return read


class EmbeddingForm:
    """The form of one answer."""

    def __init__(self, body: EmbeddingBody, accepted: Accepted) -> None:
        is_base64 = body.encoding_format == "base64"
        normalizes = body.normalize is not False
        self._accepted = accepted
        self.writers = [
            _InputWriter(index, body.dimensions, normalizes=normalizes, is_base64=is_base64)
            for index in range(len(accepted.generations))
        ]

    async def prepare(self, turns: Turns) -> None:
        """Nothing is written before the embeddings."""

    def closing(self, endings: Sequence[Ending]) -> bytes:
        raise AssertionError("embeddings are not streamed")

    def failed(self, error: errors.BatonError) -> bytes:
        raise AssertionError("embeddings are not streamed")

    def whole(self, choices: Sequence[Json], endings: Sequence[Ending]) -> WholeAnswer:
        count = sum(len(generation.prompt_token_ids) for generation in self._accepted.generations)
        cached = sum(ending.num_cached_tokens for ending in endings)
        usage = {
            "prompt_tokens": count, "total_tokens": count, "completion_tokens": 0,
            "prompt_tokens_details": {"cached_tokens": cached},
        }  # fmt: skip
        tail = f'],"model":{json.dumps(self._accepted.model)},"usage":{json.dumps(usage)}}}'
        return WholeAnswer('{"object":"list","data":[', choices, tail)


class _InputWriter:
    def __init__(self, index: int, dimensions: int | None, *, normalizes: bool, is_base64: bool) -> None:
        self._index = index
        self._dimensions = dimensions
        self._normalizes = normalizes
        self._is_base64 = is_base64

    def begin(self) -> str:
        raise AssertionError("embeddings are not streamed")

    def chunk(self, part: Part) -> str:
        raise AssertionError("embeddings are not streamed")

    def end(self, ending: Ending) -> str:
        raise AssertionError("embeddings are not streamed")

    def whole(self) -> _InputWriter:
        return self

    def add(self, part: Part) -> int:
        return 0

    def json(self, ending: Ending) -> Json:
        values = embedding_of(ending.embedding, self._dimensions, normalizes=self._normalizes)
        if self._is_base64:
            shown = f'"{base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()}"'
        else:
            # As many digits as a float32 has.
            shown = f"[{','.join([f'{value:.9g}' for value in values])}]"
        return [f'{{"object":"embedding","index":{self._index},"embedding":{shown}}}']


def embedding_of(data: bytes, dimensions: int | None = None, *, normalizes: bool = True) -> tuple[float, ...]:
    """The first ``dimensions`` of a node's float32 values, of length 1 if it ``normalizes``."""
    values = struct.unpack(f"<{len(data) // 4}f", data)
    if dimensions is not None:
        if dimensions > len(values):
            raise InvalidRequest(
                f"dimensions is {dimensions}, expected at most {len(values)}, the model's", param="dimensions"
            )
        values = values[:dimensions]
    length = math.sqrt(math.fsum([value * value for value in values])) if normalizes else 1.0
    return values if length in (0.0, 1.0) else tuple([value / length for value in values])
