"""A request as the router's faces pass it on: prompts, how to choose tokens, and what the client asks of the answer."""

from __future__ import annotations

from dataclasses import dataclass

from baton.types import NO_SLO, SamplingParams, Slo
from router.frontend.resume import Resume
from router.text.chat import Conversation

# Text, token ids or a conversation.
PromptInput = str | tuple[int, ...] | Conversation


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

    prompts: tuple[PromptInput, ...]
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
    # The face's names for the bound on new tokens, for ``stops`` and for what ``sampling.grammar`` was made of, for
    # messages.
    max_tokens_param: str = "max_tokens"
    stops_param: str = "stop"
    grammar_param: str = "grammar"
    # The client has a part of the answer, which is left out.
    resume: Resume | None = None
    # Events of the stream say what the client has.
    has_event_ids: bool = False
    caller: Caller = Caller()

    @property
    def least_tokens(self) -> int:
        """Tokens that are generated at least."""
        return 0 if self.is_prompt_only else 1
