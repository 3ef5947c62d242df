"""The data types that all processes share: sampling, sequences, tokens, KV layout. Validated on construction."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import Enum
from math import isnan
from typing import Literal, get_args

from baton.errors import BatonError, InvalidRequest, from_code, quoted

MAX_TOP_LOGPROBS = 20
MAX_SEED = 2**64 - 1
# The largest number that both the wire's uint32 and a kernel's int32 hold.
MAX_COUNT = 2**31 - 1
# Lower temperatures count as 0 (greedy), as in vLLM: logits divided by them overflow float32.
MIN_TEMPERATURE = 1e-5
# Bounds on lists that a node iterates over for every token.
MAX_LOGIT_BIASES = 1024
MAX_STOP_TOKEN_IDS = 1024
MAX_ALLOWED_TOKEN_IDS = 16_384
# Of a request; each may be two runs of tokens.
MAX_BAD_WORDS = 256
MAX_BAD_WORD_TOKENS = 64
MAX_REQUEST_ID_CHARS = 128
# Of an attempt: the request's id, with the numbers of its choice and of the attempt.
MAX_SEQUENCE_ID_CHARS = 255
MAX_LEASE_S = 86_400.0
# What tells tenants apart is a digest.
MAX_CACHE_SALT_BYTES = 64
# Of a grammar in llguidance's format; a JSON schema of an API is far smaller.
MAX_GRAMMAR_CHARS = 256 * 1024
# Of a request; smaller numbers come first, as in vLLM.
MIN_PRIORITY, MAX_PRIORITY = -1_000_000, 1_000_000
# How the embedding of a prompt is made: of its last token, or as the mean of all.
POOLINGS = ("last", "mean")
# Of a bound that a client asks for.
MAX_SLO_S = 86_400.0
DTYPE_BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


class Role(Enum):
    """What a worker is used for. Every worker can do both."""

    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"


class FinishReason(Enum):
    """Why generation ended."""

    STOP = "stop"
    LENGTH = "length"


def _check(ok: bool, name: str, value: object, expected: str) -> None:
    if not ok:
        raise InvalidRequest(f"{name} is {quoted(value)}, expected {expected}", param=name)


def _check_int(name: str, value: object, low: int, high: int) -> None:
    # bool is a subclass of int, so compare the type.
    if type(value) is not int or not low <= value <= high:
        raise InvalidRequest(f"{name} is {quoted(value)}, expected an integer in [{low}, {high}]", param=name)


def _check_number(name: str, value: object, low: float, high: float) -> None:
    # NaN and infinity fail the comparison.
    if type(value) not in (int, float) or not low <= value <= high:  # type: ignore[operator]
        raise InvalidRequest(f"{name} is {quoted(value)}, expected a number in [{low}, {high}]", param=name)


def _check_ids(name: str, ids: Collection[int], max_num: int) -> None:
    if len(ids) > max_num:
        raise InvalidRequest(f"{name} has {len(ids)} entries, expected at most {max_num}", param=name)
    # A fast check without a Python loop first: a request may have many choices, each with these ids.
    if set(map(type, ids)) != {int} or min(ids) < 0 or max(ids) > MAX_COUNT:
        bad = next(i for i in ids if type(i) is not int or not 0 <= i <= MAX_COUNT)
        raise InvalidRequest(f"{name} has {quoted(bad)}, expected token ids", param=name)


def _check_sequence_id(sequence_id: str) -> None:
    """It is kept in ledgers, logs and traces."""
    size = len(sequence_id)
    expected = f"1 to {MAX_SEQUENCE_ID_CHARS}"
    _check(0 < size <= MAX_SEQUENCE_ID_CHARS, "sequence_id", f"{size} characters", expected)


def _check_biases(biases: Collection[float]) -> None:
    # min and max may miss a NaN; the sum does not.
    if not set(map(type, biases)) <= {int, float} or min(biases) < -100 or max(biases) > 100 or isnan(sum(biases)):
        for bias in biases:
            _check_number("logit_bias", bias, -100, 100)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is sampled; proto/baton/v1/common.proto defines each field.

    The bounds are those of the wire, of float32 and of the kernels, so a valid object can be sent and computed.
    Raises InvalidRequest, with ``param`` set, for a value out of range or of another type.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    # The output is a sentence of it; empty: any text.
    grammar: str = ""
    # Report the log-probability of each prompt token and so many alternatives; None: none.
    prompt_logprobs: int | None = None
    # Report the prompt's embedding, made so; empty: none.
    pooling: str = ""
    # Only these are drawn; empty: all.
    allowed_token_ids: tuple[int, ...] = ()
    # The output has none of these runs of ids.
    bad_word_ids: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        # Runs several times per request: at the router's face and on every node.
        _check_number("temperature", self.temperature, 0, 100)
        _check_number("top_p", self.top_p, 0, 1)
        _check(self.top_p > 0, "top_p", self.top_p, "a number in (0, 1]")
        _check(type(self.top_k) is int and self.top_k >= 0, "top_k", self.top_k, "0 (off) or a positive integer")
        _check_number("min_p", self.min_p, 0, 1)
        # A much smaller value is 0 in float32, and a logit divided by it is not finite.
        _check_number("repetition_penalty", self.repetition_penalty, 0.01, 100)
        _check_number("presence_penalty", self.presence_penalty, -2, 2)
        _check_number("frequency_penalty", self.frequency_penalty, -2, 2)
        if self.top_k > MAX_COUNT:  # more than any vocabulary has: the same as all of it
            object.__setattr__(self, "top_k", MAX_COUNT)
        if 0 < self.temperature < MIN_TEMPERATURE:
            object.__setattr__(self, "temperature", 0.0)
        if self.seed is not None:
            _check_int("seed", self.seed, 0, MAX_SEED)
        _check_int("min_tokens", self.min_tokens, 0, MAX_COUNT)
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 1, MAX_COUNT)
            _check(self.min_tokens <= self.max_tokens, "min_tokens", self.min_tokens, "at most max_tokens")
        if self.logprobs is not None:
            _check_int("logprobs", self.logprobs, 0, MAX_TOP_LOGPROBS)
        _check(isinstance(self.grammar, str), "grammar", self.grammar, "text")
        size = len(self.grammar)
        _check(size <= MAX_GRAMMAR_CHARS, "grammar", f"{size} characters", f"at most {MAX_GRAMMAR_CHARS}")
        if self.prompt_logprobs is not None:
            _check_int("prompt_logprobs", self.prompt_logprobs, 0, MAX_TOP_LOGPROBS)
        _check(self.pooling in ("", *POOLINGS), "pooling", self.pooling, f"one of {', '.join(POOLINGS)}")

        self._check_lists()

    def _check_lists(self) -> None:
        if self.stop_token_ids:
            _check_ids("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKEN_IDS)
        if self.logit_bias:
            _check_ids("logit_bias", self.logit_bias, MAX_LOGIT_BIASES)
            _check_biases(self.logit_bias.values())
        if self.allowed_token_ids:
            _check_ids("allowed_token_ids", self.allowed_token_ids, MAX_ALLOWED_TOKEN_IDS)
        if self.bad_word_ids:
            num_words = len(self.bad_word_ids)
            _check(num_words <= 2 * MAX_BAD_WORDS, "bad_word_ids", f"{num_words} runs", f"at most {2 * MAX_BAD_WORDS}")
            for word in self.bad_word_ids:
                _check(len(word) > 0, "bad_word_ids", word, "words of at least one token")
                _check_ids("bad_word_ids", word, MAX_BAD_WORD_TOKENS)

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0


# Fields that a model may have its own defaults for (generation_config.json), used if a request does not set them.
DefaultedName = Literal["temperature", "top_p", "top_k", "min_p", "repetition_penalty"]
DEFAULTED_SAMPLING: tuple[DefaultedName, ...] = get_args(DefaultedName)


@dataclass(frozen=True, slots=True)
class SequenceSpec:
    """One sequence as sent to a node, with sampling resolved (max_tokens, seed and stop_token_ids are final).

    ``generated_token_ids`` are from an earlier attempt: computed like a prompt, counted as output.
    """

    sequence_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    generated_token_ids: tuple[int, ...] = ()
    # Only sequences of one salt share KV blocks.
    cache_salt: bytes = b""
    # Of two that wait the smaller one comes first; of two that need the same room the larger one yields.
    priority: int = 0

    def __post_init__(self) -> None:
        _check_int("priority", self.priority, MIN_PRIORITY, MAX_PRIORITY)
        _check_sequence_id(self.sequence_id)
        _check(len(self.prompt_token_ids) > 0, "prompt", "empty", "at least one token")
        _check(self.sampling.max_tokens is not None, "max_tokens", None, "a resolved number")
        _check(self.sampling.seed is not None, "seed", None, "a resolved number")
        expected = f"at most {MAX_CACHE_SALT_BYTES} bytes"
        _check(len(self.cache_salt) <= MAX_CACHE_SALT_BYTES, "cache_salt", f"{len(self.cache_salt)} bytes", expected)

    @property
    def num_known_tokens(self) -> int:
        """Tokens whose KV the prompt phase computes."""
        return len(self.prompt_token_ids) + len(self.generated_token_ids)

    @property
    def max_total_tokens(self) -> int:
        """Upper bound on prompt + output tokens over the whole life of the request."""
        assert self.sampling.max_tokens is not None
        return len(self.prompt_token_ids) + self.sampling.max_tokens


@dataclass(frozen=True, slots=True)
class Slo:
    """Service-level objectives of a request; None: no bound. Raises InvalidRequest for a bound that is not positive."""

    # From arrival to the first token.
    ttft_s: float | None = None
    # The mean time between two tokens.
    tbt_s: float | None = None

    def __post_init__(self) -> None:
        for name, bound_s in (("slo_ttft_s", self.ttft_s), ("slo_tbt_s", self.tbt_s)):
            if bound_s is not None:
                is_good = type(bound_s) in (int, float) and 0 < bound_s <= MAX_SLO_S
                _check(is_good, name, bound_s, f"more than 0 and at most {MAX_SLO_S:g}")

    @property
    def names(self) -> tuple[str, ...]:
        """Of the bounds that it has."""
        bounds = {"ttft": self.ttft_s, "tbt": self.tbt_s}
        return tuple(name for name, bound_s in bounds.items() if bound_s is not None)

    def within(self, others: Slo) -> Slo:
        """The tighter one of each bound."""
        ttft_s = [bound_s for bound_s in (self.ttft_s, others.ttft_s) if bound_s is not None]
        tbt_s = [bound_s for bound_s in (self.tbt_s, others.tbt_s) if bound_s is not None]
        return Slo(min(ttft_s, default=None), min(tbt_s, default=None))

    def over(self, others: Slo) -> Slo:
        """With the bounds of ``others`` where it has none."""
        return Slo(
            others.ttft_s if self.ttft_s is None else self.ttft_s, others.tbt_s if self.tbt_s is None else self.tbt_s
        )


NO_SLO = Slo()


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class PositionLogprobs:
    """The chosen token, its rank (1 = most likely) and the most likely alternatives, best first."""

    chosen: TokenLogprob
    rank: int
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Of consecutive prompt tokens; ``index`` is the position of the first, at least 1: nothing predicts the first."""

    sequence_id: str
    index: int
    logprobs: tuple[PositionLogprobs, ...]


@dataclass(frozen=True, slots=True)
class Embedding:
    """Of a prompt: float32 in little-endian order."""

    sequence_id: str
    values: bytes


@dataclass(frozen=True, slots=True)
class TokenChunk:
    """Consecutive new tokens; ``index`` is the position of the first among all generated tokens of the request."""

    sequence_id: str
    index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[PositionLogprobs, ...] = ()
    finish_reason: FinishReason | None = None


def blocks_for(num_tokens: int, block_tokens: int) -> int:
    """Blocks that hold this many tokens."""
    return -(-num_tokens // block_tokens)


@dataclass(frozen=True, slots=True)
class KvLayout:
    """Geometry of a KV cache: bytes are [num_layers, num_blocks] of [num_kv_heads, 2 (K, V), block_tokens, head_dim].

    With K and V next to each other inside a head, one (layer, block) is one run of bytes, and a range of heads is one
    run too. How the block_tokens * head_dim elements of one K or V are ordered is the kernels' business.
    """

    num_layers: int
    num_blocks: int
    num_kv_heads: int
    head_dim: int
    block_tokens: int
    dtype: str

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_blocks", "num_kv_heads", "head_dim", "block_tokens"):
            _check(getattr(self, name) > 0, name, getattr(self, name), "a positive integer")
        _check(self.dtype in DTYPE_BYTES, "dtype", self.dtype, f"one of {sorted(DTYPE_BYTES)}")

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in one layer."""
        return self.num_kv_heads * 2 * self.block_tokens * self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def total_bytes(self) -> int:
        return self.num_layers * self.num_blocks * self.block_bytes

    def offset(self, layer: int, block: int) -> int:
        """Byte offset of a block in the cache."""
        return (layer * self.num_blocks + block) * self.block_bytes

    def blocks_for(self, num_tokens: int) -> int:
        return blocks_for(num_tokens, self.block_tokens)

    def mismatch(self, other: KvLayout) -> str | None:
        """What makes two caches unable to exchange blocks, with both values; None if nothing does.

        The number of blocks may differ: ids are mapped one to one by the lease.
        """
        for name in ("num_layers", "num_kv_heads", "head_dim", "block_tokens", "dtype"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"{name} is {mine} here and {theirs} there"
        return None


@dataclass(frozen=True, slots=True)
class ModelDescription:
    name: str
    fingerprint: str
    dtype: str
    max_model_tokens: int
    vocab_size: int


@dataclass(frozen=True, slots=True)
class RopeRegimes:
    """Rotary frequencies that depend on the prompt's length: equal for all lengths up to ``limit``.

    Beyond it every length has its own (dynamic scaling), or all have the same (longrope).
    """

    limit: int
    is_each_its_own: bool

    def of(self, num_prompt_tokens: int) -> int:
        """Equal numbers mean equal frequencies."""
        if num_prompt_tokens <= self.limit:
            return 0
        return num_prompt_tokens if self.is_each_its_own else 1


@dataclass(frozen=True, slots=True)
class PrefixCaching:
    """What the hashes of a node's prefix cache depend on besides model, kernels and KV layout.

    ``phases_agree``: the kernels compute a token's KV with the same bits in a prompt and as a generated token. Where
    they do not, a block that holds the KV of generated tokens never serves as a block of a prompt.
    """

    phases_agree: bool
    # None: frequencies do not depend on the prompt's length.
    rope: RopeRegimes | None = None


@dataclass(frozen=True, slots=True)
class NodeDescription:
    """Who a node is; ``incarnation`` names one life of the process, ``host_id`` is equal where memory can be shared."""

    node_id: str
    incarnation: int
    # The pool that it started in; the one that it belongs to now and the role that it acts in are in its NodeStatus.
    home_role: Role
    address: str
    model: ModelDescription
    kv_layout: KvLayout
    protocol_version: int
    pid: int
    host_id: str
    transports: tuple[str, ...]
    device: str
    kernels: str
    software_version: str
    # host:port of its metrics; empty without.
    metrics_address: str = ""
    # None: it keeps no blocks for prompts that begin alike.
    prefix_cache: PrefixCaching | None = None
    # While it decodes, the node computes only so much of prompts that a step takes this long; None: no bound.
    tbt_target_s: float | None = None


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Time of an engine step, measured by the node: a line through its newest steps.

    ``base_s`` + ``prompt_token_s`` for each prompt token + ``sequence_s`` for each sequence that decodes +
    ``kv_token_s`` for each token in the KV of those.
    """

    base_s: float
    prompt_token_s: float
    sequence_s: float
    kv_token_s: float

    def step_s(self, num_prompt_tokens: int, num_decoding: int, num_kv_tokens: int) -> float:
        tokens_s = num_prompt_tokens * self.prompt_token_s + num_kv_tokens * self.kv_token_s
        return self.base_s + tokens_s + num_decoding * self.sequence_s


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """Load of a node, as the cluster-level scheduler sees it."""

    # The pool whose work it takes now: its home pool, or mixed while it also has the other pool's work.
    role: Role
    draining: bool = False
    total_blocks: int = 0
    free_blocks: int = 0
    queued_prompt_tokens: int = 0
    num_waiting: int = 0
    num_running: int = 0
    running_tokens: int = 0
    stalled_s: float = 0.0
    # Owned blocks by the ledger's states; with the free ones they make up the total.
    prompt_blocks: int = 0
    sending_blocks: int = 0
    leased_blocks: int = 0
    running_blocks: int = 0
    quarantined_blocks: int = 0
    # Held by no sequence; part of the free ones.
    cached_blocks: int = 0
    # The pool that it belongs to; None: that of ``role``.
    home: Role | None = None
    # An operator has set its role: no scheduler changes it.
    is_pinned: bool = False
    # None until enough steps were measured.
    step_times: StepTimes | None = None

    @property
    def home_role(self) -> Role:
        return self.home or self.role


@dataclass(frozen=True, slots=True)
class Lease:
    """Decode blocks reserved for one sequence; ``ttl_s`` counts from the grant, by the decode node's clock.

    ``block_ids`` are those that the prefill node fills, behind ``num_cached_blocks`` leading ones that the decode node
    holds already. What others share is not named here, so no writer outside can reach it.
    """

    sequence_id: str
    epoch: int
    node_id: str
    incarnation: int
    address: str
    block_ids: tuple[int, ...]
    ttl_s: float
    num_cached_blocks: int = 0

    def __post_init__(self) -> None:
        _check_sequence_id(self.sequence_id)
        # A lease without an end would keep its blocks for ever.
        _check_number("ttl_s", self.ttl_s, 0, MAX_LEASE_S)


@dataclass(frozen=True, slots=True)
class Failure:
    """A failure that crosses a wire inside a stream; ``code`` is the class name of an error in baton.errors."""

    code: str
    message: str
    retryable: bool
    blamed_node_id: str = ""
    # The request's field at fault; empty: none is.
    param: str = ""

    @classmethod
    def of(cls, error: BatonError, blamed_node_id: str = "") -> Failure:
        return cls(error.code, error.message, error.retryable, blamed_node_id, error.param or "")

    def error(self) -> BatonError:
        return from_code(self.code, self.message, self.param)


@dataclass(frozen=True, slots=True)
class TransferReport:
    """How a KV transfer went; ``exposed_s`` is what it added after the end of the prompt computation."""

    transport: str
    layerwise: bool
    num_bytes: int
    num_blocks: int
    total_s: float
    exposed_s: float
    retransmits: int = 0
