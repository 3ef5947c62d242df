"""From a client's request to generations: validate, tokenize, resolve sampling, admit; then tokens back to text.

Both faces, gRPC and HTTP, use it. It owns the checks of requests and the text of every choice; `router.flow` owns the
state of a sequence.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Sequence, Sized
from dataclasses import dataclass, field, replace

from baton import errors
from baton.errors import quoted
from baton.observe import Relay
from baton.types import (
    MAX_BAD_WORDS,
    MAX_COUNT,
    MAX_PRIORITY,
    MAX_REQUEST_ID_CHARS,
    MAX_SEED,
    MIN_PRIORITY,
    NO_SLO,
    FinishReason,
    SamplingParams,
    Slo,
)
from router.active import Active
from router.chat import ChatTemplate, Conversation
from router.clients import cache_salt
from router.cluster.admission import Prediction
from router.cluster.policy import Demand
from router.config import LimitsConfig
from router.dispatch import Dispatcher
from router.flow import resolve_stop_ids
from router.flow_messages import Outcome, OutcomeKind, Prompt
from router.grammar_check import GrammarCheck
from router.model_files import ModelFacts, defaults
from router.offload import Offload
from router.records import Origin
from router.reply.formats import AUTO, ReplyFormat
from router.reply.replies import Replies, ReplyReader
from router.stream import Backlog, Batch
from router.text import Part, TextStream
from router.tokenizer import Tokenizer, require
from router.turns import Turns

# What gateways make ids of: hexadecimal, base64, paths.
_REQUEST_ID = re.compile(rf"[A-Za-z0-9._:/+=@-]{{1,{MAX_REQUEST_ID_CHARS}}}")
_DEFAULT_COMPLETION_TOKENS = 16
# As long as a random one needs to be, and more.
_MAX_CACHE_SALT_CHARS = 256
# Shorter prompts are rendered and tokenized on the event loop: passing them to a thread costs more.
_INLINE_CHARS = 4096
# Prompts with at most this many characters per token of the context are tokenized without a count first; no language
# needs more.
_USUAL_CHARS_PER_TOKEN = 8


Prompts = tuple[str | tuple[int, ...] | Conversation, ...]


@dataclass(frozen=True, slots=True)
class Caller:
    """The client. Untrusted."""

    # The client for the turns of the queue and the prefix cache: `router.clients.client_of`.
    client: str = ""
    # W3C Trace Context, as received.
    traceparent: str = ""
    tracestate: str = ""


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A request as both faces pass it on. Each prompt is text, token ids or a conversation, and gets ``n`` choices."""

    prompts: Prompts
    sampling: SamplingParams
    # Tokens of a prompt that are kept: the last ones, or the first. -1: as many as leave room for the answer. None: a
    # prompt that is too long is refused.
    truncate_to: int | None = None
    truncates_end: bool = False
    # Names of sampling fields that the caller left to the model's defaults.
    unset_sampling: tuple[str, ...] = ()
    model: str = ""
    request_id: str = ""
    n: int = 1
    stops: tuple[str, ...] = ()
    # Texts that the output does not have.
    bad_words: tuple[str, ...] = ()
    include_stop: bool = False
    # Only requests of one salt share the KV of prompts that begin alike.
    cache_salt: str = ""
    # Of a client's waiting requests the smaller number comes first.
    priority: int = 0
    # Where it has no bound, the router's counts.
    slo: Slo = NO_SLO
    skip_special_tokens: bool = True
    add_special_tokens: bool = True
    # Without max_tokens, chat may use the rest of the context and a completion gets 16.
    is_chat: bool = False
    timeout_s: float | None = None
    # The answer repeats the prompt's text, or its ids, in every choice.
    echo: bool = False
    returns_prompt_ids: bool = False
    # The prompt is scored or repeated, and nothing is generated; max_tokens is 1, and the prompt may fill the context.
    is_prompt_only: bool = False
    # The face's names for the bound on new tokens and for what ``sampling.grammar`` was made of, for messages.
    max_tokens_param: str = "max_tokens"
    grammar_param: str = "grammar"
    caller: Caller = Caller()

    @property
    def least_tokens(self) -> int:
        """Tokens that are generated at least."""
        return 0 if self.is_prompt_only else 1


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

    __slots__ = ("_active", "_dispatcher", "_ending", "_eos_token_ids", "_is_prompt_only", "_last_id", "_num_tokens",
                 "_reader", "_text", "prompt_token_ids")  # fmt: skip

    def __init__(
        self, dispatcher: Dispatcher, active: Active, prompt_token_ids: tuple[int, ...], text: TextStream,
        reader: ReplyReader | None, eos_token_ids: tuple[int, ...], *, is_prompt_only: bool = False,
    ) -> None:  # fmt: skip
        """``reader``: None where all output is content. One that ``is_prompt_only`` has no output: a node that has
        computed the prompt draws a token in any case."""
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

    @property
    def ending(self) -> Ending | None:
        """The Ending, as soon as the last part has been read."""
        return self._ending

    async def next(self) -> Part | Ending:
        """The next part, with all tokens that have arrived. Raises the error that ended the sequence."""
        if self._ending is not None:
            return self._ending
        batch = await self._active.stream.next()
        if batch.outcome is None:
            return self._part(batch)
        if batch.outcome.kind is not OutcomeKind.FINISHED and not (batch.token_ids or batch.scored):
            assert batch.outcome.error is not None
            raise batch.outcome.error
        part = self._part(batch)
        if batch.outcome.error is not None:
            # Tokens first; the next call raises the error.
            return part
        if self._ending is None:
            self._finish(batch.outcome)
        return part

    def _part(self, batch: Batch) -> Part:
        if batch.scored or self._is_prompt_only:
            return Part("", scored=batch.scored)
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
        return part

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
    created_s: float
    # By prompt, if the request asks for an echo.
    echoes: Sequence[str] = ()
    generations: list[Generation] = field(default_factory=list)


class Frontend:
    def __init__(
        self, dispatcher: Dispatcher, *, tokenizer: Tokenizer | None, facts: ModelFacts, model_names: tuple[str, ...],
        limits: LimitsConfig, rng: random.Random, seeds: random.Random, grammar_check: GrammarCheck | None,
        shares_between_keys: bool = True,
        slo: Slo = NO_SLO, tool_call_parser: str = AUTO, reasoning_parser: str = AUTO,
    ) -> None:  # fmt: skip
        """``model_names``: empty for the name that the nodes say. ``rng``: for names of requests; ``seeds``: for seeds
        of requests without one. ``shares_between_keys``: prompts of all API keys may share KV; else each key is a
        tenant of its own. ``slo``: of requests that say nothing."""
        self._dispatcher = dispatcher
        self.offload = Offload(limits.num_offload_threads, limits.max_offloaded)
        self.tokenizer = tokenizer
        self._facts = facts
        self._has_defaults = facts.sampling != SamplingParams()
        # As in vLLM, the tokenizer's end of sequence stops whether or not generation_config.json lists it.
        own_eos = () if tokenizer is None or tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
        self._eos_token_ids = tuple(dict.fromkeys((*facts.eos_token_ids, *own_eos)))
        self._model_names = model_names
        self._limits = limits
        self._rng = rng
        self._seeds = seeds
        self._shares_between_keys = shares_between_keys
        self._slo = slo
        self._grammar_check = grammar_check
        self._chat: ChatTemplate | None = None
        self._replies: Replies | None = None
        if tokenizer is not None and tokenizer.facts.chat_template is not None:
            template, tool_template = tokenizer.facts.chat_template, tokenizer.facts.tool_template
            self._chat = ChatTemplate(template, tokenizer.facts.special_tokens, tool_template)
            form = ReplyFormat.of(template + (tool_template or ""), tool_call_parser, reasoning_parser)
            self._replies = Replies(form, tokenizer, rng)

    @property
    def model_name(self) -> str:
        """As answers have it; empty while no name is known."""
        return next(iter(self.model_names), "")

    @property
    def model_names(self) -> tuple[str, ...]:
        reference = self._dispatcher.nodes.membership.reference
        return self._model_names or ((reference.model.name,) if reference and reference.model.name else ())

    @property
    def default_sampling(self) -> dict[str, float]:
        """Of generation_config.json, where it differs from the API's own."""
        return defaults(self._facts.sampling)

    @property
    def backlog(self) -> Backlog:
        return self._dispatcher.backlog

    @property
    def turns(self) -> Turns:
        return self._dispatcher.turns

    @property
    def max_model_tokens(self) -> int | None:
        """Prompt and output together; None while no node and no folder has given it."""
        reference = self._dispatcher.nodes.membership.reference
        bounds = [
            reference.model.max_model_tokens if reference else self._facts.max_model_tokens,
            self._dispatcher.nodes.membership.capacity_tokens,
        ]
        return min((b for b in bounds if b is not None), default=None)

    @property
    def max_request_bytes(self) -> int:
        """Limit for a request's body: what the context can need, within the configured limits."""
        needed = (self.max_model_tokens or 0) * self._limits.body_bytes_per_token
        return min(self._limits.max_body_bytes, max(self._limits.least_body_bytes, needed))

    async def close(self) -> None:
        self.offload.close()
        if self._grammar_check is not None:
            await self._grammar_check.close()

    @property
    def chat_refusal(self) -> str:
        """The reason why conversations are refused; empty if they are served."""
        if self.tokenizer is None:
            return "the router has no tokenizer.json of the model: it serves token ids alone"
        return "" if self._chat is not None else "the served model has no chat template; use completions with a prompt"

    async def start(self, request: GenerationRequest) -> Accepted:
        """Admit a request with all of its choices, or raise the reason for its refusal."""
        try:
            return await self._start(request)
        except errors.BatonError as error:
            self._dispatcher.records.refused(error)
            raise

    async def _start(self, request: GenerationRequest) -> Accepted:
        arrived_s = self._dispatcher.clock.now()
        self._check_model(request.model)
        request_id = self._request_id(request.request_id)
        self._check_stops(request)
        _check_priority(request.priority)
        _check_truncation(request.truncate_to)
        salt = self._cache_salt(request)
        num_choices = self._num_choices(request)
        timeout_s = self._timeout_s(request.timeout_s)
        self._check_sampling_ids(request.sampling)
        slo = request.slo.over(self._slo)
        self._dispatcher.check_capacity(num_choices, request.caller.client)
        is_single = request.sampling.max_tokens == 1
        if not all(isinstance(prompt, tuple) for prompt in request.prompts):
            # Before the work of tokenizing: a text has one token at least.
            self._predict(request, slo, [Demand(1, is_single, priority=request.priority)], arrived_s)
        try:
            async with asyncio.timeout(timeout_s):
                limit = self.max_model_tokens if request.truncate_to is None else None
                prompts, echoes = await self._tokenized(request, limit)
                request = await self._formed(request, prompts)
                if request.sampling.grammar:
                    await self._check_grammar(request)
                if request.bad_words:
                    request = replace(request, sampling=self._without_words(request))
        except TimeoutError:
            raise errors.DeadlineExceeded(f"the prompt was not tokenized within the timeout of {timeout_s} s") from None
        self._check_repeats(request, prompts, echoes)
        resolved = [self._resolve(request, len(prompt)) for prompt in prompts]
        for token_ids in prompts:
            self.check_ids("prompt", (min(token_ids), max(token_ids)))
        await self.turns.wait()
        # Checked again, since other requests came while this one was tokenized; there is no await between here and
        # submit.
        self._dispatcher.check_capacity(num_choices, request.caller.client)
        is_scored = request.sampling.prompt_logprobs is not None or request.sampling.pooling == "mean"
        shared = [Prompt(token_ids, salt, request.n, is_scored=is_scored) for token_ids in prompts]
        demands = [Demand(len(p.token_ids), is_single, prompt=p, priority=request.priority) for p in shared]
        prediction = self._predict(request, slo, demands, arrived_s)
        caller = request.caller
        origin = Origin(self.model_name, request.is_chat, caller.traceparent, caller.tracestate)
        actives: list[Active] = []
        try:
            for prompt, sampling in zip(shared, resolved, strict=True):
                for i in range(request.n):
                    actives.append(
                        self._dispatcher.submit(
                            request_id, len(actives), prompt, _choice_sampling(request, sampling, i),
                            arrived_s=arrived_s, deadline_s=arrived_s + timeout_s, origin=origin, client=caller.client,
                            priority=request.priority, slo=slo,
                            prediction=None if actives or len(shared) > 1 else prediction,
                        )
                    )  # fmt: skip
            self._dispatcher.place()
            # The reservations are sent; objects needed only with the first token are made while the nodes work.
            await asyncio.sleep(0)
        except BaseException:
            self._dispatcher.cancel(actives, "the client left")
            raise
        generations = [self._generation(request, active, i // request.n) for i, active in enumerate(actives)]
        return Accepted(request.request_id or request_id, self.model_name, arrived_s, echoes, generations)

    def _predict(
        self, request: GenerationRequest, slo: Slo, prompts: Sequence[Demand], arrived_s: float
    ) -> Prediction | None:
        """Raises TooLate for a request that would miss its objectives, or make others miss the router's."""
        if request.priority > 0:
            slo = slo.within(self._slo)
        return self._dispatcher.predict(prompts, slo, request.caller.client, arrived_s)

    async def token_ids(self, request: GenerationRequest, limit: int | None = None) -> list[tuple[int, ...]]:
        """Of every prompt, which is not served. Raises PromptTooLong for one of more than ``limit`` tokens."""
        self._check_model(request.model)
        try:
            async with asyncio.timeout(self._limits.default_timeout_s):
                prompts, _ = await self._tokenized(request, limit)
        except TimeoutError:
            raise errors.DeadlineExceeded("the prompt was not tokenized in time") from None
        return prompts

    def cancel(self, accepted: Accepted, reason: str) -> None:
        """No effect for choices that are over."""
        self._dispatcher.cancel([generation.active for generation in accepted.generations], reason)

    def _generation(self, request: GenerationRequest, active: Active, prompt_number: int) -> Generation:
        prompt, sampling = active.flow.prompt.token_ids, active.flow.sampling
        asked = request.prompts[prompt_number]
        reader = None
        if self._replies is not None and isinstance(asked, Conversation):
            reader = self._replies.reader(asked, prompt)
        text = TextStream(
            self.tokenizer,
            prompt_token_ids=prompt,
            stops=request.stops,
            include_stop=request.include_stop,
            stop_token_ids=sampling.stop_token_ids,
            skip_special_tokens=request.skip_special_tokens,
            shown_ids=() if reader is None or self._replies is None else self._replies.shown_ids,
            min_tokens=sampling.min_tokens,
            wants_token_texts=sampling.logprobs is not None or (reader is not None and reader.counts_reasoning),
        )
        return Generation(
            self._dispatcher, active, prompt, text, reader, self._eos_token_ids, is_prompt_only=request.is_prompt_only
        )

    # ── Checks ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _check_model(self, name: str) -> None:
        """A request without a name takes any, and while none is known any name is taken."""
        if name and self.model_names:
            self.check_model(name)

    def check_model(self, name: str) -> None:
        """Raises UnknownModel for a name that is none of the model's."""
        if name not in self.model_names:
            has = " and ".join(map(quoted, self.model_names)) or "no model yet"
            raise errors.UnknownModel(f"the model {quoted(name)} does not exist; this server has {has}", param="model")

    def new_id(self) -> str:
        """One that cannot be guessed."""
        return f"{self._rng.getrandbits(96):024x}"

    def _request_id(self, asked: str) -> str:
        if not asked:
            return self.new_id()
        if not _REQUEST_ID.fullmatch(asked):
            raise errors.InvalidRequest(
                f"request_id (in the body or the header x-request-id) is {quoted(asked)}, expected 1 to "
                f"{MAX_REQUEST_ID_CHARS} letters, digits and ._-:/+=@",
                param="request_id",
            )
        # Unique even if a client uses an id twice at the same time.
        return f"{asked}~{self._rng.getrandbits(32):08x}"

    def _check_stops(self, request: GenerationRequest) -> None:
        if not request.stops:
            return
        require(self.tokenizer, "stop")
        if len(request.stops) > self._limits.max_stop_strings:
            raise errors.InvalidRequest(
                f"{len(request.stops)} stop strings, expected at most {self._limits.max_stop_strings}", param="stop"
            )
        for stop in request.stops:
            if not 0 < len(stop) <= self._limits.max_stop_chars:
                raise errors.InvalidRequest(
                    f"a stop string has {len(stop)} characters, expected 1 to {self._limits.max_stop_chars}",
                    param="stop",
                )

    def _cache_salt(self, request: GenerationRequest) -> bytes:
        if len(request.cache_salt) > _MAX_CACHE_SALT_CHARS:
            raise errors.InvalidRequest(
                f"cache_salt has {len(request.cache_salt)} characters, expected at most {_MAX_CACHE_SALT_CHARS}",
                param="cache_salt",
            )
        return cache_salt("" if self._shares_between_keys else request.caller.client, request.cache_salt)

    # ── Prompts ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _tokenized(
        self, request: GenerationRequest, limit: int | None
    ) -> tuple[list[tuple[int, ...]], list[str]]:
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

        return work() if num_chars <= _INLINE_CHARS else await self.offload.run(work)

    def _kept(self, token_ids: tuple[int, ...], request: GenerationRequest) -> tuple[int, ...]:
        count, limit = request.truncate_to, self.max_model_tokens
        if count == -1:
            if limit is None:
                return token_ids
            count = max(1, limit - _least_answer(request))
        if count is None:
            return token_ids
        return token_ids[:count] if request.truncates_end else token_ids[-count:]

    def _echo(self, prompt: str | tuple[int, ...] | Conversation, request: GenerationRequest) -> str:
        if isinstance(prompt, str):
            return prompt
        if self.tokenizer is None or isinstance(prompt, Conversation):
            return ""
        return self.tokenizer.decode(prompt, skip_special_tokens=request.skip_special_tokens)

    def _check_length(
        self, prompt: str | tuple[int, ...] | Conversation, limit: int | None, request: GenerationRequest
    ) -> int:
        """Refuses by the number of characters to tokenize or to render."""
        if isinstance(prompt, tuple):
            if limit is not None and len(prompt) > limit - request.least_tokens:
                raise _too_long(limit, f"{len(prompt)}", "prompt")
            return len(prompt) if request.echo else 0
        if isinstance(prompt, Conversation):
            require(self.tokenizer, "messages")
            if self._chat is None:
                raise errors.InvalidRequest(self.chat_refusal, param="messages")
            if not prompt.messages:
                raise errors.InvalidRequest("messages is empty, expected at least one", param="messages")
            assert self._replies is not None
            self._replies.check(prompt)
            self._chat.check_effort(prompt, reasons=self._replies.form.reasoning is not None)
            return prompt.num_chars
        require(self.tokenizer, "prompt")
        self._check_chars(len(prompt), limit, "prompt")
        return len(prompt)

    def _check_chars(self, num_chars: int, limit: int | None, param: str) -> None:
        max_chars = self._max_chars(limit)
        if limit is not None and max_chars is not None and num_chars > max_chars:
            raise _too_long(limit, f"{num_chars} characters, more than so many tokens can stand for,", param)

    def _max_chars(self, limit: int | None) -> int | None:
        """Maximum characters of a text that may fit."""
        assert self.tokenizer is not None
        per_token = self.tokenizer.max_chars_per_token or self._limits.prompt_chars_per_token
        return None if limit is None else limit * per_token

    def _token_ids(
        self, prompt: str | tuple[int, ...] | Conversation, add_special_tokens: bool, limit: int | None
    ) -> tuple[int, ...]:
        if isinstance(prompt, tuple):
            token_ids = prompt
        else:
            assert self.tokenizer is not None
            param = "prompt" if isinstance(prompt, str) else "messages"
            text = prompt if isinstance(prompt, str) else self._rendered(prompt, limit)
            is_unusual = limit is not None and len(text) > _USUAL_CHARS_PER_TOKEN * limit
            if limit is not None and is_unusual and self.tokenizer.has_more_than(2 * limit, text):
                raise _too_long(limit, f"more than {limit}", param)
            token_ids = self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        if not token_ids:
            raise errors.InvalidRequest("the prompt is empty, expected at least one token", param="prompt")
        return token_ids

    def _rendered(self, conversation: Conversation, limit: int | None) -> str:
        assert self._chat is not None
        return self._chat.render(conversation, self.max_request_bytes if limit is None else self._max_chars(limit))

    def _resolve(self, request: GenerationRequest, num_prompt_tokens: int) -> SamplingParams:
        """Final max_tokens, seed and stop ids; raises PromptTooLong if prompt and output do not fit."""
        defaults, sampling = self._facts.sampling, request.sampling
        if self._has_defaults:
            sampling = replace(sampling, **{name: getattr(defaults, name) for name in request.unset_sampling})
        limit = self.max_model_tokens
        room = None if limit is None else limit - num_prompt_tokens
        if room is not None and room < request.least_tokens:
            assert limit is not None
            raise _too_long(limit, f"{num_prompt_tokens}", "messages" if request.is_chat else "prompt")
        max_tokens, param = sampling.max_tokens, request.max_tokens_param
        if max_tokens is None:
            # OpenAI's default for completions has priority over the model's, as in vLLM.
            default = (defaults.max_tokens or room) if request.is_chat else None
            default = default or _DEFAULT_COMPLETION_TOKENS
            max_tokens = default if room is None else min(default, room)
            if sampling.min_tokens > max_tokens:
                max_tokens, param = sampling.min_tokens, "min_tokens"
        if room is not None and max_tokens > room and not request.is_prompt_only:
            raise errors.PromptTooLong(
                f"this model's maximum context length is {limit} tokens, but {num_prompt_tokens + max_tokens} were "
                f"asked for ({num_prompt_tokens} in the prompt and {max_tokens} to generate); shorten one of them",
                param=param,
            )
        seed = self._seeds.getrandbits(63) if sampling.seed is None else sampling.seed
        vocab_size = self._vocab_size
        eos_ids = [i for i in self._eos_token_ids if vocab_size is None or i < vocab_size]
        stop_ids = resolve_stop_ids(sampling, eos_ids)
        return replace(sampling, max_tokens=max_tokens, seed=seed, stop_token_ids=stop_ids)

    @property
    def _vocab_size(self) -> int | None:
        """The model's; the tokenizer's while no node is known."""
        reference = self._dispatcher.nodes.membership.reference
        if reference is not None:
            return reference.model.vocab_size
        return None if self.tokenizer is None else self.tokenizer.vocab_size

    def _check_sampling_ids(self, sampling: SamplingParams) -> None:
        self.check_ids("stop_token_ids", sampling.stop_token_ids)
        self.check_ids("logit_bias", tuple(sampling.logit_bias))
        self.check_ids("allowed_token_ids", sampling.allowed_token_ids)

    def _without_words(self, request: GenerationRequest) -> SamplingParams:
        """The words as token ids, as they begin a text and, where that is another token, as they follow a space."""
        tokenizer = require(self.tokenizer, "bad_words")
        if len(request.bad_words) > MAX_BAD_WORDS:
            raise errors.InvalidRequest(
                f"bad_words has {len(request.bad_words)} entries, expected at most {MAX_BAD_WORDS}", param="bad_words"
            )
        runs: list[tuple[int, ...]] = []
        for word in request.bad_words:
            if not 0 < len(word.strip()) <= self._limits.max_stop_chars:
                raise errors.InvalidRequest(
                    f"bad_words has {quoted(word)}, expected 1 to {self._limits.max_stop_chars} characters",
                    param="bad_words",
                )
            bare, spaced = (
                tokenizer.encode(f"{space}{word.lstrip()}", add_special_tokens=False) for space in ("", " ")
            )
            runs.append(bare)
            # As in vLLM: a space that is a token of its own is no part of the word.
            if spaced[0] != bare[0] and len(spaced) == len(bare):
                runs.append(spaced)
        return replace(request.sampling, bad_word_ids=(*request.sampling.bad_word_ids, *runs))

    async def _formed(self, request: GenerationRequest, prompts: Sequence[tuple[int, ...]]) -> GenerationRequest:
        """With the grammar of the whole reply, which may reason before its answer, and have calls beside or instead of
        it."""
        asked, answer, replies = request.prompts[0], request.sampling.grammar, self._replies
        if replies is None or not isinstance(asked, Conversation):
            return request
        if not (answer or asked.requires_calls or asked.has_strict_tools):
            return request

        def work() -> str:
            return replies.grammar(asked, prompts[0], answer)

        grammar = work() if asked.num_chars <= _INLINE_CHARS else await self.offload.run(work)
        if grammar == answer:
            return request
        param = request.grammar_param if answer else "tools"
        return replace(request, sampling=replace(request.sampling, grammar=grammar), grammar_param=param)

    async def _check_grammar(self, request: GenerationRequest) -> None:
        if self._grammar_check is None:
            raise errors.InvalidRequest(
                f"{request.grammar_param} needs a tokenizer.json in the served model's folder, which has none; ask for "
                "text",
                param=request.grammar_param,
            )
        await self._grammar_check.check(request.sampling.grammar, param=request.grammar_param)

    def check_ids(self, param: str, ids: Sequence[int]) -> None:
        """Every id that a node would look up must be in the vocabulary."""
        vocab_size = self._vocab_size
        if vocab_size is None:
            return
        for token_id in ids:
            if not 0 <= token_id < vocab_size:
                raise errors.InvalidRequest(
                    f"token id {token_id} in {param} is out of range, expected 0 to {vocab_size - 1}", param=param
                )

    def _check_repeats(self, request: GenerationRequest, prompts: Sequence[Sized], echoes: Sequence[str]) -> None:
        """Bounds the answer's size: each of many choices may repeat the prompt."""
        wanted: dict[str, Sequence[Sized]] = {"echo": echoes, "return_token_ids": prompts}
        for param, items in wanted.items():
            is_asked = request.echo if param == "echo" else request.returns_prompt_ids
            size = request.n * sum(map(len, items)) if is_asked else 0
            if size > self._limits.max_repeated:
                raise errors.InvalidRequest(
                    f"{param} with n {request.n} repeats {size} characters or ids of the prompts, expected at most "
                    f"{self._limits.max_repeated}; ask for fewer choices at once",
                    param=param,
                )

    def _num_choices(self, request: GenerationRequest) -> int:
        num_choices = request.n * len(request.prompts)
        if not 1 <= num_choices <= self._limits.max_choices:
            raise errors.InvalidRequest(
                f"{quoted(num_choices)} choices were asked for, expected 1 to {self._limits.max_choices} (n times the "
                "number of prompts)",
                param="n" if len(request.prompts) <= self._limits.max_choices else "prompt",
            )
        return num_choices

    def _timeout_s(self, asked_s: float | None) -> float:
        if asked_s is None:
            return self._limits.default_timeout_s
        if not 0 < asked_s <= self._limits.max_timeout_s:
            raise errors.InvalidRequest(
                f"timeout is {quoted(asked_s)} s, expected more than 0 and at most {self._limits.max_timeout_s}",
                param="timeout",
            )
        return asked_s


def _least_answer(request: GenerationRequest) -> int:
    """Tokens that a prompt has to leave room for."""
    sampling = request.sampling
    if request.is_prompt_only:
        return 0
    default = 1 if request.is_chat else _DEFAULT_COMPLETION_TOKENS
    return max(default if sampling.max_tokens is None else sampling.max_tokens, sampling.min_tokens, 1)


def _check_priority(priority: int) -> None:
    if not MIN_PRIORITY <= priority <= MAX_PRIORITY:
        raise errors.InvalidRequest(
            f"priority is {quoted(priority)}, expected {MIN_PRIORITY} to {MAX_PRIORITY} (the smaller number comes "
            "first)",
            param="priority",
        )


def _check_truncation(count: int | None) -> None:
    if count is not None and count != -1 and not 1 <= count <= MAX_COUNT:
        raise errors.InvalidRequest(
            f"truncate_prompt_tokens is {quoted(count)}, expected 1 to {MAX_COUNT}, or -1 for what fits",
            param="truncate_prompt_tokens",
        )


def _closed(part: Part, rest: Part) -> Part:
    """With its incomplete end, which belongs to the last token."""
    texts = part.token_texts
    if texts:
        texts = [*texts[:-1], texts[-1] + "".join(rest.token_texts)]
    return replace(part, text=part.text + rest.text, token_texts=texts, stop=rest.stop)


def _too_long(limit: int, length: str, param: str) -> errors.PromptTooLong:
    return errors.PromptTooLong(
        f"this model's maximum context length is {limit} tokens, but the prompt alone has {length}; shorten the prompt",
        param=param,
    )


def _choice_sampling(request: GenerationRequest, sampling: SamplingParams, choice: int) -> SamplingParams:
    assert sampling.seed is not None
    if choice == 0:
        return sampling
    # A chat's answer has its prompt's log-probabilities once.
    num_scored = None if request.is_chat else sampling.prompt_logprobs
    return replace(sampling, seed=(sampling.seed + choice) % (MAX_SEED + 1), prompt_logprobs=num_scored)
