"""From a client's request to generations: check it, encode its prompts, resolve its sampling, admit it.

Both faces, gRPC and HTTP, use it. `generation` has the text of every choice, `router.flow` the state of a sequence.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Sequence, Sized
from dataclasses import replace

from baton import errors
from baton.errors import quoted
from baton.types import MAX_COUNT, MAX_PRIORITY, MAX_REQUEST_ID_CHARS, MIN_PRIORITY, NO_SLO, SamplingParams, Slo
from router.clients import cache_salt
from router.cluster.admission import Prediction
from router.cluster.policy import Demand
from router.config import LimitsConfig
from router.dispatch.active import Active
from router.dispatch.dispatcher import Dispatcher
from router.dispatch.records import Origin
from router.dispatch.stream import Backlog
from router.flow.messages import Prompt
from router.frontend.generation import Accepted, Generation
from router.frontend.offload import Offload
from router.frontend.prompts import INLINE_CHARS, PromptEncoder
from router.frontend.request import GenerationRequest
from router.frontend.resume import Resume, prompt_digest
from router.frontend.sampling import SamplingResolver, choice_sampling
from router.frontend.served_model import ServedModel
from router.grammar.check import GrammarCheck
from router.reply.formats import AUTO, ReplyFormat
from router.reply.replies import Replies
from router.text.chat import ChatTemplate, Conversation
from router.text.detokenizer import TextStream
from router.text.model_files import ModelFacts
from router.text.tokenizer import Tokenizer
from router.turns import Turns

# What gateways make ids of: hexadecimal, base64, paths.
_REQUEST_ID = re.compile(rf"[A-Za-z0-9._:/+=@-]{{1,{MAX_REQUEST_ID_CHARS}}}")
# As long as a random one needs to be, and more.
_MAX_CACHE_SALT_CHARS = 256


class Frontend:
    def __init__(
        self, dispatcher: Dispatcher, *, tokenizer: Tokenizer | None, facts: ModelFacts, model_names: tuple[str, ...],
        limits: LimitsConfig, rng: random.Random, seeds: random.Random, grammar_check: GrammarCheck | None,
        shares_between_keys: bool = True,
        slo: Slo = NO_SLO, tool_call_parser: str = AUTO, reasoning_parser: str = AUTO,
    ) -> None:  # fmt: skip
        """``model_names``: as for ServedModel. ``rng``: for names of requests; ``seeds``: for seeds of requests without
        one. ``shares_between_keys``: prompts of all API keys may share KV; else each key is a tenant of its own.
        ``slo``: of requests that say nothing."""
        self._dispatcher = dispatcher
        self.offload = Offload(limits.num_offload_threads, limits.max_offloaded)
        self.tokenizer = tokenizer
        self.model = ServedModel(dispatcher.nodes.membership, facts, tokenizer, model_names)
        self._limits = limits
        self._rng = rng
        self._shares_between_keys = shares_between_keys
        self._slo = slo
        self._grammar_check = grammar_check
        self._chat: ChatTemplate | None = None
        self._replies: Replies | None = None
        if tokenizer is not None and tokenizer.facts.chat_template is not None:
            template, tool_template = tokenizer.facts.chat_template, tokenizer.facts.tool_template
            self._chat = ChatTemplate(template, tokenizer.facts.special_tokens, tool_template)
            form = ReplyFormat.of(template + (tool_template or ""), tool_call_parser, reasoning_parser)
            self._replies = Replies(form, tokenizer)
        self.prompts = PromptEncoder(self.model, tokenizer, self._chat, self._replies, limits, self.offload)
        self._sampling = SamplingResolver(self.model, tokenizer, limits, seeds)

    @property
    def backlog(self) -> Backlog:
        return self._dispatcher.backlog

    @property
    def turns(self) -> Turns:
        return self._dispatcher.turns

    async def close(self) -> None:
        self.offload.close()
        if self._grammar_check is not None:
            await self._grammar_check.close()

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
        _check_priority(request.priority)
        _check_truncation(request.truncate_to)
        salt = self._cache_salt(request)
        num_choices = self._num_choices(request)
        _check_resume(request, num_choices)
        timeout_s = self._timeout_s(request.timeout_s)
        self._sampling.check(request)
        slo = request.slo.over(self._slo)
        self._dispatcher.take_request(request.caller.client)
        self._dispatcher.check_capacity(num_choices, request.caller.client)
        is_single = request.sampling.max_tokens == 1
        if not all(isinstance(prompt, tuple) for prompt in request.prompts):
            # Before the work of tokenizing: a text has one token at least.
            self._predict(request, slo, [Demand(1, is_single, priority=request.priority)], arrived_s)
        try:
            async with asyncio.timeout(timeout_s):
                limit = self.model.max_tokens if request.truncate_to is None else None
                prompts, echoes = await self.prompts.encode(request, limit)
                request = await self._formed(request, prompts)
                if request.sampling.grammar:
                    await self._check_grammar(request)
                if request.bad_words:
                    request = replace(request, sampling=self._sampling.without_words(request))
        except TimeoutError:
            raise errors.DeadlineExceeded(f"the prompt was not tokenized within the timeout of {timeout_s} s") from None
        self._check_repeats(request, prompts, echoes)
        _check_prompt(request.resume, prompts[0])
        resolved = [self._sampling.resolve(request, len(prompt)) for prompt in prompts]
        for token_ids in prompts:
            self.model.check_ids("prompt", (min(token_ids), max(token_ids)))
        given = self._given(request, resolved[0])
        await self.turns.wait()
        # Checked again, since other requests came while this one was tokenized; there is no await between here and
        # submit.
        self._dispatcher.check_capacity(num_choices, request.caller.client)
        is_scored = request.sampling.prompt_logprobs is not None or request.sampling.pooling == "mean"
        shared = [Prompt(token_ids, salt, request.n, is_scored=is_scored) for token_ids in prompts]
        demands = [
            Demand(len(p.token_ids) + len(given), is_single, prompt=p, priority=request.priority) for p in shared
        ]
        prediction = self._predict(request, slo, demands, arrived_s)
        caller = request.caller
        origin = Origin(self.model.name, request.is_chat, caller.traceparent, caller.tracestate)
        actives: list[Active] = []
        try:
            for prompt, sampling in zip(shared, resolved, strict=True):
                for i in range(request.n):
                    actives.append(
                        self._dispatcher.submit(
                            request_id, len(actives), prompt, choice_sampling(request, sampling, i),
                            arrived_s=arrived_s, deadline_s=arrived_s + timeout_s, origin=origin, client=caller.client,
                            priority=request.priority, slo=slo,
                            prediction=None if actives or len(shared) > 1 else prediction, tokens=given,
                        )
                    )  # fmt: skip
            self._dispatcher.place()
            # The reservations are sent; objects needed only with the first token are made while the nodes work.
            await asyncio.sleep(0)
        except BaseException:
            self._dispatcher.cancel(actives, "the client left")
            raise
        generations = [
            self._generation(request, active, i // request.n, len(given)) for i, active in enumerate(actives)
        ]
        answer_id = request.request_id or request_id
        return Accepted(answer_id, self.model.name, echoes, generations, request.has_event_ids, request.resume)

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
        _check_truncation(request.truncate_to)
        try:
            async with asyncio.timeout(self._limits.default_timeout_s):
                prompts, _ = await self.prompts.encode(request, limit)
        except TimeoutError:
            raise errors.DeadlineExceeded("the prompt was not tokenized in time") from None
        return prompts

    def cancel(self, accepted: Accepted, reason: str) -> None:
        """No effect for choices that are over."""
        self._dispatcher.cancel([generation.active for generation in accepted.generations], reason)

    def _given(self, request: GenerationRequest, sampling: SamplingParams) -> tuple[int, ...]:
        """Tokens of the answer that nodes take from the client. The last one is generated again, which shows whether
        they are this request's; all are where a grammar has to follow them."""
        if request.resume is None or sampling.grammar or not request.resume.token_ids:
            return ()
        self.model.check_ids("resume.token_ids", request.resume.token_ids)
        given = request.resume.token_ids[:-1]
        if not sampling.ignore_eos and not set(sampling.stop_token_ids).isdisjoint(given):
            raise errors.InvalidRequest("resume.token_ids go on behind a stop token", param="resume")
        return given

    def _generation(self, request: GenerationRequest, active: Active, prompt_number: int, num_given: int) -> Generation:
        prompt, sampling = active.flow.prompt.token_ids, active.flow.sampling
        asked = request.prompts[prompt_number]
        reader = None
        if self._replies is not None and isinstance(asked, Conversation):
            assert sampling.seed is not None
            salt = f"{request.request_id or active.flow.request_id}/{active.flow.choice}/{sampling.seed}"
            reader = self._replies.reader(asked, prompt, salt)
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
            self._dispatcher, active, prompt, text, reader, self.model.eos_token_ids,
            is_prompt_only=request.is_prompt_only, resume=request.resume, num_given=num_given,
            grammar_param=request.grammar_param,
        )  # fmt: skip

    # ── Checks ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _check_model(self, name: str) -> None:
        """A request without a name takes any, and while none is known any name is taken."""
        if name and self.model.names:
            self.model.check_name(name)

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

    def _cache_salt(self, request: GenerationRequest) -> bytes:
        if len(request.cache_salt) > _MAX_CACHE_SALT_CHARS:
            raise errors.InvalidRequest(
                f"cache_salt has {len(request.cache_salt)} characters, expected at most {_MAX_CACHE_SALT_CHARS}",
                param="cache_salt",
            )
        return cache_salt("" if self._shares_between_keys else request.caller.client, request.cache_salt)

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

        grammar = work() if asked.num_chars <= INLINE_CHARS else await self.offload.run(work)
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
        grammar, param = request.sampling.grammar, request.grammar_param
        await self._grammar_check.check(grammar, param=param, client=request.caller.client)

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


def _check_resume(request: GenerationRequest, num_choices: int) -> None:
    """Raises InvalidRequest for an answer that no client can go on with."""
    if request.resume is None and not request.has_event_ids:
        return
    sampling = request.sampling
    scores = sampling.prompt_logprobs is not None or bool(sampling.pooling) or request.echo
    if num_choices > 1 or scores or request.is_prompt_only:
        what = f"{num_choices} choices" if num_choices > 1 else "prompts that are repeated or scored"
        # Only HTTP clients ask for ids of events.
        param = "x-baton-resumable" if request.resume is None else request.resume.param
        raise errors.InvalidRequest(f"an answer with {what} cannot be resumed, expected one choice", param=param)
    if request.resume is not None:
        request.resume.check()


def _check_prompt(resume: Resume | None, prompt: Sequence[int]) -> None:
    if resume is not None and resume.prompt_digest is not None and resume.prompt_digest != prompt_digest(prompt):
        raise errors.InvalidRequest(
            "the prompt is not that of the lost answer, expected the same request again", param="last-event-id"
        )
