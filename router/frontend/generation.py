"""One choice of an answer: the tokens that nodes generate, as text, up to their end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from baton import errors
from baton.observe import Relay
from baton.types import FinishReason
from router.dispatch.active import Active
from router.dispatch.dispatcher import Dispatcher
from router.dispatch.stream import Batch
from router.flow.messages import Outcome, OutcomeKind
from router.frontend.resume import Resume
from router.reply.replies import ReplyReader
from router.text.detokenizer import Part, TextStream


@dataclass(frozen=True, slots=True)
class Ending:
    """The successful end of one choice."""

    finish_reason: FinishReason
    # The stop string or stop token that ended it; None for end of sequence and length.
    stop_reason: str | int | None
    num_tokens: int
    num_cached_tokens: int
    relay: Relay
    # Part of ``num_tokens``.
    num_reasoning_tokens: int = 0
    has_tool_calls: bool = False
    # Of the prompt, if it was asked for: float32 in little-endian order, as the model has it.
    embedding: bytes = b""


class Generation:
    """One choice: call `next` until it returns an Ending, or end it with `cancel`. `next` raises its errors."""

    __slots__ = ("_active", "_dispatcher", "_ending", "_eos_token_ids", "_grammar_param", "_is_prompt_only", "_last_id",
                 "_num_tokens", "_reader", "_rest", "_resume", "_text", "prompt_token_ids")  # fmt: skip

    def __init__(
        self, dispatcher: Dispatcher, active: Active, prompt_token_ids: tuple[int, ...], text: TextStream,
        reader: ReplyReader | None, eos_token_ids: tuple[int, ...], *, is_prompt_only: bool = False,
        resume: Resume | None = None, num_given: int = 0, grammar_param: str = "grammar",
    ) -> None:  # fmt: skip
        """``reader``: None where all output is content. One that ``is_prompt_only`` has no output: a node that has
        computed the prompt draws a token in any case. ``num_given``: tokens of ``resume`` that nodes were told.
        ``grammar_param``: what the client calls the grammar."""
        self.prompt_token_ids = prompt_token_ids
        self._dispatcher = dispatcher
        self._active = active
        self._text = text
        self._reader = reader
        self._eos_token_ids = eos_token_ids
        self._is_prompt_only = is_prompt_only
        self._num_tokens = 0
        self._last_id: int | None = None
        self._ending: Ending | None = None
        self._resume = resume
        self._grammar_param = grammar_param
        # What is to be read before anything that comes.
        self._rest: Batch | None = None
        if resume is not None and num_given:
            self._rest = Batch(list(resume.token_ids[:num_given]), [], [], None, has_more=True)

    @property
    def ending(self) -> Ending | None:
        """The Ending, as soon as the last part has been read."""
        return self._ending

    async def next(self) -> Part | Ending:
        """The next part, with all tokens that have arrived. Raises the error that ended the sequence."""
        if self._ending is not None:
            return self._ending
        batch, self._rest = self._rest, None
        if batch is None:
            batch = await self._active.stream.next()
        resume = self._resume
        if resume is not None and self._num_tokens < resume.num_tokens:
            batch = self._known(batch, resume)
        if batch.outcome is None:
            return self._part(batch)
        if batch.outcome.kind is not OutcomeKind.FINISHED and not (batch.token_ids or batch.scored):
            assert batch.outcome.error is not None
            raise self._named(batch.outcome.error)
        part = self._part(batch)
        if batch.outcome.error is not None:
            # Tokens first; the next call raises the error.
            return part
        if self._ending is None:
            self._finish(batch.outcome)
        return part

    def _named(self, error: errors.BatonError) -> errors.BatonError:
        """With the client's name of the field at fault."""
        if error.param == "grammar":
            error.param = self._grammar_param
        return error

    def _known(self, batch: Batch, resume: Resume) -> Batch:
        """The tokens that the client has; what comes behind them is read next. Raises InvalidRequest if the client's
        are others."""
        num_left = resume.num_tokens - self._num_tokens
        ids, behind = batch.token_ids[:num_left], batch.token_ids[num_left:]
        said = resume.token_ids[self._num_tokens : self._num_tokens + len(ids)]
        is_short = batch.outcome is not None and batch.outcome.error is None and len(ids) < num_left
        if is_short or (said and list(said) != ids):
            raise errors.InvalidRequest(
                f"the tokens that are said to be there ({resume.num_tokens}) are not how this request's answer begins",
                param=resume.param,
            )
        if not behind and batch.outcome is None:
            return replace(batch, has_more=True)
        rest = replace(batch, token_ids=behind, logprobs=batch.logprobs[num_left:])
        if not ids:
            return rest
        self._rest = rest
        return Batch(ids, batch.logprobs[:num_left], [], None, has_more=True)

    def _is_known(self, batch: Batch) -> bool:
        """At the client, too."""
        resume = self._resume
        if resume is None or self._num_tokens > resume.num_tokens:
            return False
        return self._num_tokens < resume.num_tokens or (resume.has_whole_text and not batch.token_ids)

    def _part(self, batch: Batch) -> Part:
        if batch.scored or self._is_prompt_only:
            return Part("", scored=batch.scored)
        is_known = self._is_known(batch)
        part = self._text.push(batch.token_ids, batch.logprobs)
        is_last = part.stop is not None
        # The outcome itself may wait for reports of nodes.
        if not is_last and self._active.flow.is_complete and not batch.has_more:
            is_last = True
            part = _closed(part, self._text.flush())
        if self._reader is not None:
            part = self._reader.read(part, is_last=is_last)
        self._num_tokens += len(part.token_ids)
        if part.token_ids:
            self._last_id = part.token_ids[-1]
        if part.stop is not None:
            self._dispatcher.stop_text(self._active)
            self._end(FinishReason.STOP, part.stop)
        return replace(part, is_last=is_last, is_known=is_known) if is_last or is_known else part

    @property
    def seed(self) -> int:
        """The one that its tokens are drawn with."""
        seed = self._active.flow.sampling.seed
        assert seed is not None, "sampling is resolved"
        return seed

    @property
    def resume(self) -> Resume | None:
        """What the client has of it."""
        return self._resume

    def _finish(self, outcome: Outcome) -> None:
        assert outcome.finish_reason is not None
        if self._is_prompt_only:
            self._end(FinishReason.LENGTH, None)
            return
        # A grammar's end stops without an id.
        ids = self._active.flow.sampling.stop_token_ids
        is_by_id = outcome.finish_reason is FinishReason.STOP and self._last_id in ids
        is_named = is_by_id and self._last_id not in self._eos_token_ids
        self._end(outcome.finish_reason, self._last_id if is_named else None)

    def _end(self, reason: FinishReason, stop: str | int | None) -> None:
        relay = self._active.stream.relay
        assert relay is not None, "a sequence that ended has a relay"
        num_reasoning = 0 if self._reader is None else self._reader.num_reasoning_tokens
        has_calls = self._reader is not None and self._reader.has_calls
        cached = relay.num_cached_tokens
        embedding = self._active.stream.embedding
        self._ending = Ending(reason, stop, self._num_tokens, cached, relay, num_reasoning, has_calls, embedding)

    @property
    def active(self) -> Active:
        return self._active


@dataclass(frozen=True, slots=True)
class Accepted:
    """An admitted request; ``generations`` are ordered by prompt, then choice."""

    # As the client gave it, if it did.
    request_id: str
    model: str
    # By prompt, if the request asks for an echo.
    echoes: Sequence[str] = ()
    generations: list[Generation] = field(default_factory=list)
    # As GenerationRequest.has_event_ids.
    has_event_ids: bool = False
    # What the client has of the only choice.
    resume: Resume | None = None


def _closed(part: Part, rest: Part) -> Part:
    """With its incomplete end, which belongs to the last token."""
    texts = part.token_texts
    if texts:
        texts = [*texts[:-1], texts[-1] + "".join(rest.token_texts)]
    return replace(part, text=part.text + rest.text, token_texts=texts, stop=rest.stop)
