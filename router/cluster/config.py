"""Settings of the policy and its breakers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PolicyConfig:
    # A pool whose shortest queue is longer than this overflows to a mixed node with a shorter one.
    overflow_prompt_tokens: int = 8192
    overflow_decode_tokens: int = 65536
    # No further prompt is sent to a node with this many pending; it waits in the router and can still go elsewhere.
    max_pending_prompt_tokens: int = 16384
    # Consecutive transfer failures that open a pair's breaker, and how long it stays open (doubling up to the maximum).
    breaker_failures: int = 2
    breaker_open_s: float = 1.0
    breaker_max_open_s: float = 30.0
