"""Settings of the policy and its breakers."""

from __future__ import annotations

from dataclasses import dataclass, field

from baton.settings import setting


@dataclass(frozen=True, slots=True)
class PolicyConfig:
    # A pool whose shortest queue is longer than this overflows to a mixed node with a shorter one.
    overflow_prompt_tokens: int = 8192
    overflow_decode_tokens: int = 65536
    # No further prompt is sent to a node with this many pending; it waits in the router and can still go elsewhere.
    max_pending_prompt_tokens: int = 16384
    # A waiting sequence is passed over for better priorities of its client for so long at most.
    max_priority_wait_s: float = 30.0
    # A request is refused if its first token is predicted later than this share of its objective: predictions are no
    # better than that. Sheddable ones (priority above 0) leave more of it to the others.
    admitted_share: float = field(default=0.9, metadata=setting(most=1))
    sheddable_share: float = field(default=0.5, metadata=setting(most=1))
    # Consecutive transfer failures that open a pair's breaker, and how long it stays open (doubling up to the maximum).
    breaker_failures: int = 2
    breaker_open_s: float = 1.0
    breaker_max_open_s: float = 30.0
    # KV blocks that the router knows of, one for each node that has it. At about 100 bytes a block, this is room for a
    # thousand nodes of 10,000 blocks. Blocks beyond it are not seen: such a hit is not sought, but still used. 0:
    # places by load alone.
    max_known_blocks: int = field(default=12_000_000, metadata=setting(least=0))
    # What work costs until it has been measured: a prompt's token, a byte of KV that is moved and not hidden behind the
    # prompt, and what a token in a node's running sequences adds to each of its steps.
    prompt_token_s: float = 1e-4
    move_byte_s: float = 1e-10
    kv_token_s: float = 1e-7
    # Tokens that a sequence is expected to generate, until some have ended.
    output_tokens: int = 128
