"""What a request's sampling comes to: defaults of the model, the room of the context, ids that end the answer."""

from __future__ import annotations

import random
from dataclasses import replace

from baton import errors
from baton.errors import quoted
from baton.types import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS, MAX_SEED, SamplingParams
from router.config import LimitsConfig
from router.flow.machine import resolve_stop_ids
from router.frontend.request import GenerationRequest
from router.frontend.served_model import ServedModel, too_long
from router.text.tokenizer import Tokenizer, require

_DEFAULT_COMPLETION_TOKENS = 16


class SamplingResolver:
    """Checks a request's sampling, and completes it."""

    def __init__(
        self, model: ServedModel, tokenizer: Tokenizer | None, limits: LimitsConfig, seeds: random.Random
    ) -> None:
        """``seeds``: of requests without one."""
        self._model = model
        self._tokenizer = tokenizer
        self._limits = limits
        self._seeds = seeds
        self._has_defaults = model.sampling != SamplingParams()

    def check(self, request: GenerationRequest) -> None:
        """Before the prompt is tokenized. Raises InvalidRequest."""
        self._check_stops(request)
        sampling = request.sampling
        self._model.check_ids("stop_token_ids", sampling.stop_token_ids)
        self._model.check_ids("logit_bias", tuple(sampling.logit_bias))
        self._model.check_ids("allowed_token_ids", sampling.allowed_token_ids)

    def _check_stops(self, request: GenerationRequest) -> None:
        if not request.stops:
            return
        param = request.stops_param
        require(self._tokenizer, param)
        if len(request.stops) > self._limits.max_stop_strings:
            raise errors.InvalidRequest(
                f"{param} has {len(request.stops)} stop strings, expected at most {self._limits.max_stop_strings}",
                param=param,
            )
        for stop in request.stops:
            if not 0 < len(stop) <= self._limits.max_stop_chars:
                raise errors.InvalidRequest(
                    f"{param} has a stop string of {len(stop)} characters, expected 1 to {self._limits.max_stop_chars}",
                    param=param,
                )

    def without_words(self, request: GenerationRequest) -> SamplingParams:
        """The words as token ids, as they begin a text and, where that is another token, as they follow a space."""
        tokenizer = require(self._tokenizer, "bad_words")
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
            if not bare or len(bare) > MAX_BAD_WORD_TOKENS:
                raise errors.InvalidRequest(
                    f"bad_words has {quoted(word)}, which is {len(bare)} tokens, expected 1 to {MAX_BAD_WORD_TOKENS}",
                    param="bad_words",
                )
            runs.append(bare)
            # As in vLLM: a space that is a token of its own is no part of the word.
            if len(spaced) == len(bare) and spaced[0] != bare[0]:
                runs.append(spaced)
        return replace(request.sampling, bad_word_ids=(*request.sampling.bad_word_ids, *runs))

    def resolve(self, request: GenerationRequest, num_prompt_tokens: int) -> SamplingParams:
        """Final max_tokens, seed and stop ids; raises PromptTooLong if prompt and output do not fit."""
        defaults, sampling = self._model.sampling, request.sampling
        if self._has_defaults:
            sampling = replace(sampling, **{name: getattr(defaults, name) for name in request.unset_sampling})
        limit = self._model.max_tokens
        room = None if limit is None else limit - num_prompt_tokens
        if room is not None and room < request.least_tokens:
            assert limit is not None
            raise too_long(limit, f"{num_prompt_tokens}", "messages" if request.is_chat else "prompt")
        max_tokens, param = sampling.max_tokens, request.max_tokens_param
        if max_tokens is None:
            # OpenAI's default for completions has priority over the model's, as in vLLM.
            default = (defaults.max_tokens or room) if request.is_chat else None
            default = default or _DEFAULT_COMPLETION_TOKENS
            max_tokens = default if room is None else min(default, room)
            if sampling.min_tokens > max_tokens:
                max_tokens, param = sampling.min_tokens, "min_tokens"
        if request.resume is not None and request.resume.num_tokens > max_tokens:
            raise errors.InvalidRequest(
                f"{request.resume.num_tokens} tokens are said to be there, expected at most {param} ({max_tokens})",
                param=request.resume.param,
            )
        if room is not None and max_tokens > room and not request.is_prompt_only:
            raise errors.PromptTooLong(
                f"this model's maximum context length is {limit} tokens, but {num_prompt_tokens + max_tokens} were "
                f"asked for ({num_prompt_tokens} in the prompt and {max_tokens} to generate); shorten one of them",
                param=param,
            )
        seed = sampling.seed if request.resume is None else request.resume.seed
        seed = self._seeds.getrandbits(63) if seed is None else seed
        vocab_size = self._model.vocab_size
        eos_ids = [i for i in self._model.eos_token_ids if vocab_size is None or i < vocab_size]
        stop_ids = resolve_stop_ids(sampling, eos_ids)
        return replace(sampling, max_tokens=max_tokens, seed=seed, stop_token_ids=stop_ids)


def least_answer(request: GenerationRequest) -> int:
    """Tokens that a prompt has to leave room for."""
    sampling = request.sampling
    if request.is_prompt_only:
        return 0
    default = 1 if request.is_chat else _DEFAULT_COMPLETION_TOKENS
    return max(default if sampling.max_tokens is None else sampling.max_tokens, sampling.min_tokens, 1)


def choice_sampling(request: GenerationRequest, sampling: SamplingParams, choice: int) -> SamplingParams:
    assert sampling.seed is not None
    if choice == 0:
        return sampling
    # A chat's answer has its prompt's log-probabilities once.
    num_scored = None if request.is_chat else sampling.prompt_logprobs
    return replace(sampling, seed=(sampling.seed + choice) % (MAX_SEED + 1), prompt_logprobs=num_scored)
