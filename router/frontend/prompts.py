"""Prompts of a request as token ids: rendered by the chat template, tokenized, cut, and bounded before the work."""

from __future__ import annotations

from baton import errors
from router.config import LimitsConfig
from router.frontend.offload import Offload
from router.frontend.request import GenerationRequest, PromptInput
from router.frontend.sampling import least_answer
from router.frontend.served_model import ServedModel, too_long
from router.reply.replies import Replies
from router.text.chat import ChatTemplate, Conversation
from router.text.tokenizer import Tokenizer, require

# Shorter prompts are rendered and tokenized on the event loop: passing them to a thread costs more.
INLINE_CHARS = 4096
# Prompts with at most this many characters per token of the context are tokenized without a count first; no language
# needs more.
_USUAL_CHARS_PER_TOKEN = 8


class PromptEncoder:
    """Text, ids and conversations to ids."""

    def __init__(
        self, model: ServedModel, tokenizer: Tokenizer | None, chat: ChatTemplate | None, replies: Replies | None,
        limits: LimitsConfig, offload: Offload,
    ) -> None:  # fmt: skip
        """``chat``, ``replies``: both None for a model without a chat template."""
        self._model = model
        self._tokenizer = tokenizer
        self._chat = chat
        self._replies = replies
        self._limits = limits
        self._offload = offload

    @property
    def max_request_bytes(self) -> int:
        """Limit for a request's body: what the context can need, within the configured limits."""
        needed = (self._model.max_tokens or 0) * self._limits.body_bytes_per_token
        return min(self._limits.max_body_bytes, max(self._limits.least_body_bytes, needed))

    @property
    def chat_refusal(self) -> str:
        """The reason why conversations are refused; empty if they are served."""
        if self._tokenizer is None:
            return "the router has no tokenizer.json of the model: it serves token ids alone"
        return "" if self._chat is not None else "the served model has no chat template; use completions with a prompt"

    async def encode(self, request: GenerationRequest, limit: int | None) -> tuple[list[tuple[int, ...]], list[str]]:
        """The ids of every prompt, and its text if that is echoed.

        A prompt of more than ``limit`` tokens is refused before it is tokenized; large prompts leave the event loop.
        """
        num_chars = sum(self._check_length(prompt, limit, request) for prompt in request.prompts)

        def work() -> tuple[list[tuple[int, ...]], list[str]]:
            found = [self._token_ids(prompt, request.add_special_tokens, limit) for prompt in request.prompts]
            ids = [self._kept(token_ids, request) for token_ids in found]
            pairs = zip(request.prompts, found, ids, strict=True)
            # The text of a prompt that was cut is that of its tokens.
            told = [prompt if len(kept) == len(all_ids) else kept for prompt, all_ids, kept in pairs]
            return ids, [self._echo(prompt, request) for prompt in told] if request.echo else []

        return work() if num_chars <= INLINE_CHARS else await self._offload.run(work)

    def _kept(self, token_ids: tuple[int, ...], request: GenerationRequest) -> tuple[int, ...]:
        count, limit = request.truncate_to, self._model.max_tokens
        if count == -1:
            if limit is None:
                return token_ids
            count = max(1, limit - least_answer(request))
        if count is None:
            return token_ids
        return token_ids[:count] if request.truncates_end else token_ids[-count:]

    def _echo(self, prompt: PromptInput, request: GenerationRequest) -> str:
        if isinstance(prompt, str):
            return prompt
        if self._tokenizer is None or isinstance(prompt, Conversation):
            return ""
        return self._tokenizer.decode(prompt, skip_special_tokens=request.skip_special_tokens)

    def _check_length(self, prompt: PromptInput, limit: int | None, request: GenerationRequest) -> int:
        """Refuses by the number of characters to tokenize or to render."""
        if isinstance(prompt, tuple):
            if limit is not None and len(prompt) > limit - request.least_tokens:
                raise too_long(limit, f"{len(prompt)}", "prompt")
            return len(prompt) if request.echo else 0
        if isinstance(prompt, Conversation):
            require(self._tokenizer, "messages")
            if self._chat is None:
                raise errors.InvalidRequest(self.chat_refusal, param="messages")
            if not prompt.messages:
                raise errors.InvalidRequest("messages is empty, expected at least one", param="messages")
            assert self._replies is not None
            self._replies.check(prompt)
            self._chat.check_effort(prompt, reasons=self._replies.form.reasoning is not None)
            return prompt.num_chars
        require(self._tokenizer, "prompt")
        self._check_chars(len(prompt), limit, "prompt")
        return len(prompt)

    def _check_chars(self, num_chars: int, limit: int | None, param: str) -> None:
        max_chars = self._max_chars(limit)
        if limit is not None and max_chars is not None and num_chars > max_chars:
            raise too_long(limit, f"{num_chars} characters, more than so many tokens can stand for,", param)

    def _max_chars(self, limit: int | None) -> int | None:
        """Maximum characters of a text that may fit."""
        assert self._tokenizer is not None
        per_token = self._tokenizer.max_chars_per_token or self._limits.prompt_chars_per_token
        return None if limit is None else limit * per_token

    def _token_ids(self, prompt: PromptInput, add_special_tokens: bool, limit: int | None) -> tuple[int, ...]:
        if isinstance(prompt, tuple):
            token_ids = prompt
        else:
            assert self._tokenizer is not None
            param = "prompt" if isinstance(prompt, str) else "messages"
            text = prompt if isinstance(prompt, str) else self._rendered(prompt, limit)
            is_unusual = limit is not None and len(text) > _USUAL_CHARS_PER_TOKEN * limit
            if limit is not None and is_unusual and self._tokenizer.has_more_than(2 * limit, text):
                raise too_long(limit, f"more than {limit}", param)
            token_ids = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        if not token_ids:
            raise errors.InvalidRequest("the prompt is empty, expected at least one token", param="prompt")
        return token_ids

    def _rendered(self, conversation: Conversation, limit: int | None) -> str:
        assert self._chat is not None
        return self._chat.render(conversation, self.max_request_bytes if limit is None else self._max_chars(limit))
