"""Parses bodies of the OpenAI API into `GenerationRequest`.

Types are strict and null means absent. Unknown fields are refused by name, as OpenAI does, and values that cannot be
honoured are refused too: no field that would change the answer is ignored silently. Fields marked "no effect" are
accepted because clients send them by default and they concern accounts or speed only.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import from_json

from baton.chat import MAX_TOOLS, ChatMessage, Tool, ToolChoice
from baton.errors import InvalidRequest, quoted, shortened
from baton.types import (
    DEFAULTED_SAMPLING,
    MAX_ALLOWED_TOKEN_IDS,
    MAX_BAD_WORDS,
    MAX_COUNT,
    MAX_LOGIT_BIASES,
    MAX_SEED,
    MAX_STOP_TOKEN_IDS,
    MAX_TOP_LOGPROBS,
    SamplingParams,
)
from router.frontend.request import Caller, GenerationRequest, PromptInput
from router.openai.functions import ROLE as FUNCTION_ROLE
from router.openai.functions import call_of_turn, choice_of_function, tools_of_functions, with_tool_turns
from router.openai.neutral import UnknownFields, refuse_unless, take_neutral, unrecognized
from router.openai.structured import AskedForm, grammar_of
from router.openai.tools import calls_of, choice_of, tools_of
from router.text.chat import Conversation

_Model = TypeVar("_Model", bound=BaseModel)
# Maximum entries of a field, checked before each entry is validated: reporting an error for each entry of a megabyte of
# wrong ones took a second.
_MAX_ENTRIES = {
    "logit_bias": MAX_LOGIT_BIASES,
    "stop_token_ids": MAX_STOP_TOKEN_IDS,
    "stop": 1024,
    "stop_sequences": 1024,
    "stream_options": 64,
    "include": 64,
    "modalities": 16,
    "tools": MAX_TOOLS,
    "functions": MAX_TOOLS,
    "allowed_token_ids": MAX_ALLOWED_TOKEN_IDS,
    "bad_words": MAX_BAD_WORDS,
}
_GUIDED = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")
# Of many numbers, the value shows which one is wrong.
_NUMBERS = ("logit_bias", "stop_token_ids")


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", protected_namespaces=())


class StreamOptions(Strict):
    include_usage: bool | None = None
    # As in vLLM: every chunk has the number of tokens of its choice so far. Load tools request it.
    continuous_usage_stats: bool | None = None
    # No effect: obfuscation protects OpenAI's own transport.
    include_obfuscation: bool | None = None


class CommonBody(Strict):
    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    # Extensions of OpenAI's API with vLLM's names.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    prompt_logprobs: int | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: Literal["left", "right"] | None = None
    request_id: str | None = None
    cache_salt: str | None = None
    priority: int | None = None
    # The form of the answer; checked where grammars are made of them.
    response_format: Any = None
    structured_outputs: Any = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    # Extensions of Baton: seconds until the request fails, and the relay with the answer.
    timeout: float | None = None
    return_relay: bool | None = None
    # No effect.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    guided_decoding_backend: str | None = None

    def _refuse(self, param: str, why: str) -> None:
        if getattr(self, param):
            raise InvalidRequest(f"{param} is not supported: {why}", param=param)

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def wants_running_usage(self) -> bool:
        return self.wants_usage and self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)

    @property
    def wants_reasoning(self) -> bool:
        return True

    @property
    def has_functions(self) -> bool:
        """Calls are in the API's older form."""
        return False

    @property
    def stops_param(self) -> str:
        return "stop"

    @property
    def stops(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def sampling(self, max_tokens: int | None, max_tokens_param: str, num_logprobs: int | None) -> SamplingParams:
        """Raises InvalidRequest with the API's name of the parameter."""
        if self.prompt_logprobs is not None and self.stream:
            raise InvalidRequest(
                "prompt_logprobs is not available when stream is true; leave one of them out, or use echo with "
                "logprobs (completions)",
                param="prompt_logprobs",
            )
        if max_tokens is not None and not 1 <= max_tokens <= MAX_COUNT:
            raise InvalidRequest(
                f"{max_tokens_param} is {quoted(max_tokens)}, expected 1 to {MAX_COUNT}", param=max_tokens_param
            )
        return SamplingParams(
            temperature=_or(self.temperature, 1.0),
            top_p=_or(self.top_p, 1.0),
            # vLLM's -1 and 0 both mean off.
            top_k=max(0, self.top_k) if self.top_k is not None and self.top_k >= -1 else _or(self.top_k, 0),
            min_p=_or(self.min_p, 0.0),
            repetition_penalty=_or(self.repetition_penalty, 1.0),
            presence_penalty=_or(self.presence_penalty, 0.0),
            frequency_penalty=_or(self.frequency_penalty, 0.0),
            seed=_seed(self.seed),
            max_tokens=max_tokens,
            min_tokens=_or(self.min_tokens, 0),
            ignore_eos=bool(self.ignore_eos),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            logprobs=num_logprobs,
            logit_bias=_logit_bias(self.logit_bias),
            allowed_token_ids=tuple(self.allowed_token_ids or ()),
            prompt_logprobs=self.prompt_logprobs,
        )

    def _own_form(self) -> AskedForm:
        """The form of the answer that fields of this API alone ask for."""
        return AskedForm()

    def _request(
        self, prompts: tuple[PromptInput, ...], sampling: SamplingParams, caller: Caller, *,
        max_tokens_param: str = "max_tokens",
        is_chat: bool, echo: bool = False,
    ) -> GenerationRequest:  # fmt: skip
        if self.cache_salt == "":
            raise InvalidRequest(
                "cache_salt is empty, expected null or a text that is hard to guess", param="cache_salt"
            )
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options is only allowed when stream is true", param="stream_options")
        if self.allowed_token_ids == []:
            raise InvalidRequest("allowed_token_ids is empty, expected null or token ids", param="allowed_token_ids")
        guided = {name: getattr(self, name) for name in _GUIDED}
        asked = grammar_of(self.response_format, self.structured_outputs, guided, self._own_form())
        return GenerationRequest(
            prompts=prompts,
            sampling=replace(sampling, grammar=asked.grammar) if asked.grammar else sampling,
            grammar_param=asked.param,
            bad_words=tuple(self.bad_words or ()),
            truncate_to=self.truncate_prompt_tokens,
            truncates_end=self.truncation_side == "right",
            unset_sampling=tuple(name for name in DEFAULTED_SAMPLING if getattr(self, name) is None),
            model=self.model or "",
            request_id=self.request_id or "",
            n=1 if self.n is None else self.n,
            stops=self.stops,
            stops_param=self.stops_param,
            include_stop=bool(self.include_stop_str_in_output),
            cache_salt=self.cache_salt or "",
            priority=self.priority or 0,
            skip_special_tokens=self.skip_special_tokens is not False,
            # A chat template writes the special tokens itself.
            add_special_tokens=bool(self.add_special_tokens) if is_chat else self.add_special_tokens is not False,
            is_chat=is_chat,
            timeout_s=self.timeout,
            max_tokens_param=max_tokens_param,
            echo=echo,
            returns_prompt_ids=bool(self.return_token_ids),
            caller=caller,
        )


class CompletionBody(CommonBody):
    prompt: Any
    suffix: str | None = None
    echo: bool | None = None
    best_of: int | None = None
    logprobs: int | None = None

    def request(self, caller: Caller) -> GenerationRequest:
        self._refuse("suffix", "the served models complete from the left only")
        if self.best_of is not None and self.best_of != (1 if self.n is None else self.n):
            expected = quoted(1 if self.n is None else self.n)
            raise InvalidRequest(f"best_of is {quoted(self.best_of)}, expected n ({expected})", param="best_of")
        is_prompt_only = self.max_tokens == 0 and (bool(self.echo) or self.prompt_logprobs is not None)
        sampling = self.sampling(1 if is_prompt_only else self.max_tokens, "max_tokens", self.logprobs)
        if self.echo and self.logprobs is not None:
            num_scored = max(self.logprobs, self.prompt_logprobs or 0)
            sampling = replace(sampling, prompt_logprobs=num_scored)
        request = self._request(prompts_of(self.prompt), sampling, caller, is_chat=False, echo=bool(self.echo))
        return replace(request, is_prompt_only=is_prompt_only)


class Message(BaseModel):
    # Other message fields (refusals, audio) are checked below, not ignored.
    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())
    role: str
    content: str | list[Any] | None = None
    name: str | None = None
    # Of an assistant's turn, under the names of vLLM and of all others.
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[Any] | None = None
    # The older form of one call.
    function_call: Any = None
    # Of a tool's turn.
    tool_call_id: str | None = None

    def flat(self, number: int) -> ChatMessage:
        where = f"messages.{number}"
        extra = {k for k, v in (self.model_extra or {}).items() if v not in (None, [], "")}
        if extra:
            raise InvalidRequest(f"{where} has {quoted(sorted(extra))}, which the server does not support", param=where)
        if self.content is None and self.role not in ("assistant", FUNCTION_ROLE):
            raise InvalidRequest(f"{where}.content is missing, expected text", param=f"{where}.content")
        content: str | tuple[str, ...] | None = self.content if not isinstance(self.content, list) else None
        if isinstance(self.content, list):
            content = tuple(_part_text(part, f"{where}.content.{i}") for i, part in enumerate(self.content))
        calls = calls_of(self.tool_calls, where)
        if self.function_call is not None:
            if calls:
                message = f"{where} has tool_calls and function_call, expected one of them"
                raise InvalidRequest(message, param=f"{where}.function_call")
            calls = (call_of_turn(self.function_call, number),)
        return ChatMessage(
            self.role, content, self.name, self.reasoning or self.reasoning_content, calls, self.tool_call_id
        )


class ChatBody(CommonBody):
    # Validated one by one: thousands in one call would delay every stream.
    messages: list[Any]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    modalities: list[str] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    # False: reasoning is left out of the answer.
    include_reasoning: bool | None = None
    functions: list[Any] | None = None
    function_call: Any = None
    audio: Any = None
    # No effect.
    prediction: Any = None

    @property
    def wants_reasoning(self) -> bool:
        return self.include_reasoning is not False

    @property
    def has_functions(self) -> bool:
        return bool(self.functions)

    def request(self, caller: Caller) -> GenerationRequest:
        """Raises InvalidRequest for a value that the server cannot honour."""
        if self.max_completion_tokens is not None:
            max_tokens: int | None = self.max_completion_tokens
            param = "max_completion_tokens"
        else:
            max_tokens, param = self.max_tokens, "max_tokens"
        self._refuse("audio", "the served models write text only")
        refuse_unless("modalities", self.modalities, (["text"],), "the served models write text only")
        if self.continue_final_message and self.add_generation_prompt:
            raise InvalidRequest(
                "continue_final_message and add_generation_prompt are both true, expected one of them",
                param="continue_final_message",
            )
        sampling = self.sampling(max_tokens, param, self._num_logprobs())
        tools, choice = self._tools()
        conversation = Conversation(
            with_tool_turns([_message(m, i) for i, m in enumerate(self.messages)]),
            add_generation_prompt=self.add_generation_prompt is not False and not self.continue_final_message,
            variables=self.chat_template_kwargs or {},
            continues_final=bool(self.continue_final_message),
            tools=tools,
            tool_choice=choice,
            reasoning_effort=self.reasoning_effort,
        )
        return self._request((conversation,), sampling, caller, max_tokens_param=param, is_chat=True)

    def _tools(self) -> tuple[tuple[Tool, ...], ToolChoice]:
        if not self.functions:
            refuse_unless("function_call", self.function_call, ("none", "auto"), "there are no functions")
            return tools_of(self.tools), choice_of(self.tool_choice, self.parallel_tool_calls)
        for name in ("tools", "tool_choice"):
            if getattr(self, name):
                raise InvalidRequest(f"functions and {name} are both given, expected one form of tools", param=name)
        tools = tools_of_functions(self.functions)
        return tools, choice_of_function(self.function_call, tools)

    def _num_logprobs(self) -> int | None:
        if self.top_logprobs is not None and not 0 <= self.top_logprobs <= MAX_TOP_LOGPROBS:
            raise InvalidRequest(
                f"top_logprobs is {quoted(self.top_logprobs)}, expected 0 to {MAX_TOP_LOGPROBS}", param="top_logprobs"
            )
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None


def parse(kind: type[_Model], body: bytes, unknown: UnknownFields | None = None) -> _Model:
    """Raises InvalidRequest for malformed JSON and for the first wrong field, with its path as ``param``.

    ``unknown``: what happens to unknown fields; without it they are refused.
    """
    return read(kind, fields_of(body), unknown)


def read(kind: type[_Model], fields: dict[str, Any], unknown: UnknownFields | None) -> _Model:
    take_neutral(fields, is_chat=issubclass(kind, ChatBody))
    (unknown or UnknownFields(ignores=False)).take(fields, kind.model_fields)
    for name, value in fields.items():
        if name in _MAX_ENTRIES and isinstance(value, list | dict) and len(value) > _MAX_ENTRIES[name]:
            raise InvalidRequest(
                f"{name} has {len(value)} entries, expected at most {_MAX_ENTRIES[name]}", param=name
            )  # fmt: skip
    return _validated(kind, fields, ())


def _validated(kind: type[_Model], fields: object, where: tuple[int | str, ...]) -> _Model:
    try:
        return kind.model_validate(fields)
    except ValidationError as invalid:
        first = invalid.errors(include_url=False, include_context=False)[0]
        raise _bad_field(first["type"], (*where, *first["loc"]), first["msg"], first["input"]) from None


def fields_of(body: bytes) -> dict[str, Any]:
    """Raises InvalidRequest for what is no JSON object."""
    try:
        fields = from_json(body)
    except ValueError as error:
        if "number out of range" in str(error):
            raise InvalidRequest("the body's JSON has a number of more than 4300 digits") from None
        raise InvalidRequest(f"the body is not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise InvalidRequest("the body is not a JSON object")
    return fields


def _bad_field(kind: str, location: tuple[int | str, ...], message: str, value: object) -> InvalidRequest:
    # Errors of a union's branches have the type's name at the end of the path.
    path = [str(x) for x in location if not (isinstance(x, str) and ("[" in x or x in ("str", "int", "float")))]
    param = path[0] if path[0] in _NUMBERS else ".".join(path)
    if kind == "extra_forbidden":
        return unrecognized(param)
    if kind == "missing":
        return InvalidRequest(f"you must provide a {_name(param)} parameter", param=param)
    return InvalidRequest(f"{_name(param)} is {quoted(value)}: {message}", param=param)


def _name(param: str) -> str:
    return shortened(param, 80)


def _or(value: float | None, default: Any) -> Any:
    return default if value is None else value


def _seed(seed: int | None) -> int | None:
    """OpenAI's seeds are signed 64-bit integers, vLLM's unsigned: both are accepted."""
    if seed is None or seed >= 0:
        return seed
    if seed < -(2**63):
        raise InvalidRequest(f"seed is {quoted(seed)}, expected -2^63 to 2^64-1", param="seed")
    return seed + MAX_SEED + 1


def _logit_bias(bias: dict[str, float] | None) -> dict[int, float]:
    found = {}
    for key, value in (bias or {}).items():
        if not key.isascii() or not key.isdigit() or len(key) > 10:
            raise InvalidRequest(f"logit_bias has key {quoted(key)}, expected token ids", param="logit_bias")
        if int(key) in found:
            raise InvalidRequest(f"logit_bias has token id {int(key)} twice, expected it once", param="logit_bias")
        found[int(key)] = value
    return found


def _message(message: object, number: int) -> ChatMessage:
    return _validated(Message, message, ("messages", number)).flat(number)


def _part_text(part: object, where: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise InvalidRequest(f"{where} is of type {quoted(kind)}, expected 'text'", param=where)


def prompts_of(prompt: object, param: str = "prompt") -> tuple[PromptInput, ...]:
    """Text, texts, token ids, or lists of token ids."""
    if isinstance(prompt, str):
        return (prompt,)
    if isinstance(prompt, list) and prompt:
        if all(isinstance(x, str) for x in prompt):
            return tuple(prompt)
        if are_ids(prompt):
            return (tuple(prompt),)
        if all(isinstance(x, list) and are_ids(x) for x in prompt):
            return tuple(tuple(x) for x in prompt)
    raise InvalidRequest(
        f"{param} is {quoted(prompt)}, expected a string, a list of strings, a list of token ids or a list "
        "of such lists, not empty",
        param=param,
    )


def are_ids(items: list[Any]) -> bool:
    # Excludes bools, and avoids a Python loop: prompts are long.
    return not items or (set(map(type, items)) == {int} and min(items) >= 0 and max(items) <= MAX_COUNT)
