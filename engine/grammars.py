"""The grammars that sequences follow: built beside the engine thread, then a mask of the allowed tokens for each draw.

A mask depends on the grammar and the sequence's generated tokens alone, so any node that has the ids goes on alike. The
engine thread builds none: a sequence whose grammar is being built is not ready, and the scheduler passes it over.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from collections.abc import Sequence as Seq
from pathlib import Path
from queue import SimpleQueue

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.numpy import fill_next_token_bitmask
from numpy.typing import NDArray

from baton.errors import BatonError, InternalError, InvalidRequest, Overloaded, UnsupportedModel, described, shortened
from baton.grammar_limits import LIMITS
from baton.grammar_tokenizer import readable
from baton.types import SequenceSpec
from engine.list_masks import ListMask
from engine.mask_threads import Job, MaskThreads, Outcome
from engine.step import StepPlan

_log = logging.getLogger(__name__)

# Built grammars that are kept for the next sequence that asks for them, and those that are refused.
_MAX_KEPT = 64
# Of one mask: what the library's own limits let through takes 30 ms.
MASK_LIMIT_S = 1.0
# Of a grammar. A router has built it in 2 s, on a machine with other work.
_BUILD_LIMIT_S = 20.0
_NUM_BUILDERS = 2
_MAX_MESSAGE_CHARS = 300


def load_tokenizer(file: Path, vocab_size: int) -> LLTokenizer:
    """Of the model's vocabulary, or the tokenizer's where that is larger. Raises UnsupportedModel.

    Of 150,000 tokens it takes a second, in which no other thread runs, and 80 MB: to be called before anything is
    served.
    """
    try:
        text = readable(file.read_text(encoding="utf-8"))
        try:
            return LLTokenizer(text, n_vocab=vocab_size)
        except ValueError:
            return LLTokenizer(text)
    except ValueError as error:
        raise UnsupportedModel(f"{file} cannot be used for grammars: {error}") from error


class GrammarMask:
    """The state of one sequence's grammar. `TokenMask` for the engine thread."""

    __slots__ = (
        "__weakref__",
        "_bits",
        "_error",
        "_grammars",
        "_has_text",
        "_matcher",
        "_num_followed",
        "_spec",
        "_stops",
        "is_ready",
    )
    follows_tokens = True

    def __init__(self, grammars: Grammars, spec: SequenceSpec) -> None:
        self._grammars = grammars
        self._spec = spec
        # None until it is ready.
        self._matcher: LLMatcher | None = None
        self._stops: NDArray[np.uint8] | None = None
        self._error: BatonError | None = None
        # Generated tokens that the matcher has taken in, and the mask behind them, once it was asked for.
        self._num_followed = 0
        self._bits: bytes | None = None
        self._has_text = True
        self.is_ready = False

    @property
    def grammar(self) -> str:
        return self._spec.sampling.grammar

    def begin(self, matcher: LLMatcher, num_bytes: int) -> None:
        """Follow what was generated elsewhere; called once, by a builder."""
        self._matcher = matcher
        self._stops = _bits_of(self._spec.sampling.stop_token_ids, num_bytes)
        known = (*self._spec.prompt_token_ids, *self._spec.generated_token_ids)
        # An error is kept: the sequence fails when its next token is to be drawn.
        with contextlib.suppress(BatonError):
            self.follow(known)
            # States that are met for the first time take longest: no step waits for them.
            self._grammars.fill([(self, known)])
        self.is_ready = True

    def fail(self, error: BatonError) -> None:
        self._error = error
        self.is_ready = True

    def follow(self, token_ids: Seq[int]) -> LLMatcher:
        """The matcher behind these, the prompt's included: they begin with those of the call before, or the other way
        round. Raises InvalidRequest where the grammar ends."""
        if self._error is not None:
            raise self._error
        assert self._matcher is not None, "the scheduler passes over a sequence that is not ready"
        num_new = len(token_ids) - len(self._spec.prompt_token_ids) - self._num_followed
        if num_new:
            self._bits = None
            self._num_followed += num_new
            if num_new > 0:
                self._matcher.consume_tokens(list(token_ids[-num_new:]))
            else:
                self._matcher.rollback(-num_new)
        self._raise_for(self._matcher)
        return self._matcher

    def is_over(self, token_ids: Seq[int]) -> bool:
        matcher, sampling = self.follow(token_ids), self._spec.sampling
        if matcher.is_stopped():
            return True
        num_generated = len(token_ids) - len(self._spec.prompt_token_ids)
        may_stop = sampling.stop_token_ids and num_generated >= sampling.min_tokens
        if may_stop or not matcher.is_accepting():
            return False
        # No token can say that it is over where nothing may follow.
        self.bits(token_ids)
        return not self._has_text

    def bits(self, token_ids: Seq[int]) -> bytes:
        self.follow(token_ids)
        if self._bits is None:
            self._grammars.fill([(self, token_ids)])
        if self._error is not None:
            raise self._error
        assert self._bits is not None
        return self._bits

    def needs_bits(self, token_ids: Seq[int]) -> bool:
        try:
            self.follow(token_ids)
        except BatonError:
            return False  # Raised again by ``bits``.
        return self._bits is None

    def take(self, allowed: NDArray[np.uint8]) -> None:
        """The ids that are text of the grammar; the sequence's own mask allows a stop id as well where the grammar may
        end, and nowhere else."""
        matcher, stops = self._matcher, self._stops
        assert matcher is not None
        assert stops is not None
        self._has_text = bool(allowed.any())
        own = allowed | stops if matcher.is_accepting() else allowed & ~stops
        self._bits = own.tobytes()
        # Raised by ``bits``.
        with contextlib.suppress(BatonError):
            self._raise_for(matcher)
            if not (matcher.is_accepting() or own.any()):
                self._error = _refusal(f"no token may follow the {self._num_followed} generated ones")

    def _raise_for(self, matcher: LLMatcher) -> None:
        if matcher.is_error():
            told = matcher.get_error().removesuffix("\n<non-verbose/>")
            self._error = _refusal(shortened(told, _MAX_MESSAGE_CHARS))
            raise self._error


def _bits_of(token_ids: Seq[int], num_bytes: int) -> NDArray[np.uint8]:
    """Those that are below 8 * ``num_bytes``."""
    flags = np.zeros(8 * num_bytes, dtype=bool)
    flags[[i for i in token_ids if i < len(flags)]] = True
    return np.packbits(flags, bitorder="little")


def _refusal(why: str) -> InvalidRequest:
    return InvalidRequest(f"grammar cannot be followed any further: {why}; simplify it", param="grammar")


class Grammars:
    """All of one node. Masks are made in any thread and used in the engine's."""

    def __init__(
        self, tokenizer: LLTokenizer, vocab_size: int, *, num_threads: int, on_ready: Callable[[], None],
        mask_limit_s: float = MASK_LIMIT_S,
    ) -> None:  # fmt: skip
        """``on_ready``: called in a thread of a builder, when one more sequence has become ready. A sequence fails
        whose mask takes longer than ``mask_limit_s``, and so does each later one with its grammar."""
        self._tokenizer = tokenizer
        # Of a mask: whole words.
        self._num_bytes = -(-vocab_size // 32) * 4
        # The ids that the model can draw. What the library takes for the end of sequence is its guess: what really is
        # one, requests know.
        self._text = _bits_of(range(vocab_size), self._num_bytes) & ~_bits_of(tokenizer.eos_tokens, self._num_bytes)
        self._threads = MaskThreads(num_threads, limit_s=mask_limit_s)
        self._build_threads = MaskThreads(_NUM_BUILDERS, limit_s=_BUILD_LIMIT_S)
        self._mask_limit_s = mask_limit_s
        self._on_ready = on_ready
        self._limits = LLParserLimits(**LIMITS)  # type: ignore[arg-type]
        # Masks to be built; None ends a builder. As many as there are sequences.
        self._queue: SimpleQueue[weakref.ref[GrammarMask] | None] = SimpleQueue()
        # The process can exit without waiting for them.
        self._builders: list[threading.Thread] = []
        self._lock = threading.Lock()
        # Guarded by it: matchers that have followed nothing, and why a grammar is refused. The one that was asked for
        # longest ago comes first.
        self._built: OrderedDict[str, LLMatcher | str] = OrderedDict()

    def mask(self, spec: SequenceSpec) -> GrammarMask:
        """Returns at once; it is ready later."""
        mask = GrammarMask(self, spec)
        self._queue.put(weakref.ref(mask))
        with self._lock:
            if len(self._builders) < _NUM_BUILDERS:
                self._builders.append(threading.Thread(target=self._build, name="grammars", daemon=True))
                self._builders[-1].start()
        return mask

    def prepare(self, plan: StepPlan) -> None:
        """Make the masks of all that a step draws, in one go. Called by the engine thread."""
        wanted = []
        for piece in plan.pieces:
            mask, token_ids = piece.sequence.token_mask, piece.sequence.token_ids
            mask = mask.inner if isinstance(mask, ListMask) else mask
            if piece.samples and isinstance(mask, GrammarMask) and mask.needs_bits(token_ids):
                wanted.append((mask, token_ids))
        if wanted:
            self.fill(wanted)

    def fill(self, wanted: Seq[tuple[GrammarMask, Seq[int]]]) -> None:
        """The bits of these masks behind these tokens; one that takes too long fails its sequence alone."""
        words = np.zeros((len(wanted), -(-self._tokenizer.vocab_size // 32)), dtype=np.int32)
        jobs = [
            Job(mask.grammar, functools.partial(fill_next_token_bitmask, mask.follow(token_ids), words, row))
            for row, (mask, token_ids) in enumerate(wanted)
        ]
        self._threads.run(jobs)
        for (mask, _), job, row in zip(wanted, jobs, words, strict=True):
            if job.outcome is Outcome.DONE and job.error is None:
                mask.take(row.view(np.uint8)[: self._num_bytes] & self._text)
            else:
                # The matcher of a late one is in use for as long as its thread is.
                mask.fail(self._failure(mask, job))

    def _failure(self, mask: GrammarMask, job: Job) -> BatonError:
        if job.error is not None:
            return InternalError(f"grammar: {described(job.error)}")
        if job.outcome is Outcome.LATE:
            return self._refused(mask.grammar, f"the tokens that may follow take more than {self._mask_limit_s:g} s")
        with self._lock:
            found = self._built.get(mask.grammar)
        if isinstance(found, str):
            return _refusal(found)
        message = f"{self._threads.num_lost} requests with other grammars take too long on this node; try again"
        return Overloaded(message)

    def _refused(self, grammar: str, why: str) -> BatonError:
        """From now on. Each is logged once, as long as it is kept."""
        _log.warning("a grammar of %d characters is refused from now on: %s", len(grammar), why)
        self._keep(grammar, why)
        return _refusal(why)

    def _keep(self, grammar: str, built: LLMatcher | str) -> None:
        with self._lock:
            self._built[grammar] = built
            self._built.move_to_end(grammar)
            if len(self._built) > _MAX_KEPT:
                self._built.popitem(last=False)

    def close(self) -> None:
        """No more is built."""
        self._threads.close()
        self._build_threads.close()
        with self._lock:
            for _ in self._builders:
                self._queue.put(None)

    def _build(self) -> None:
        while (wanted := self._queue.get()) is not None:
            # None: its sequence is gone.
            if (mask := wanted()) is not None:
                self._begin(mask)
            del mask

    def _begin(self, mask: GrammarMask) -> None:
        try:
            mask.begin(self._matcher(mask.grammar), self._num_bytes)
        except Exception as error:
            mask.fail(error if isinstance(error, BatonError) else InternalError(f"grammar: {described(error)}"))
        self._on_ready()

    def _matcher(self, grammar: str) -> LLMatcher:
        """A copy of its own of one that has followed nothing. Raises InvalidRequest for a refused grammar."""
        with self._lock:
            found = self._built.get(grammar)
            if found is not None:
                self._built.move_to_end(grammar)
            if isinstance(found, LLMatcher):
                return found.deep_copy()
        if found is not None:
            raise _refusal(found)
        found = self._new(grammar)
        copy = found.deep_copy()
        self._keep(grammar, found)
        return copy

    def _new(self, grammar: str) -> LLMatcher:
        built: list[LLMatcher] = []
        job = Job(grammar, lambda: built.append(LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._limits)))
        self._build_threads.run([job])
        if job.outcome is Outcome.LATE:
            raise self._refused(grammar, f"it takes more than {_BUILD_LIMIT_S:g} s to build")
        if job.error is not None:
            raise InternalError(f"grammar: {described(job.error)}") from job.error
        if job.outcome is Outcome.LEFT_OUT:
            raise Overloaded("other grammars take too long to build on this node; try again")
        return built[0]
