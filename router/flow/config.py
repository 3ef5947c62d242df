"""How long a sequence waits for what, and how often it is run again."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FlowConfig:
    # How often a request may run; beyond, the last failure is its outcome.
    max_attempts: int = 20
    # Nodes' own defects are not worth as many runs: the request itself may be the cause.
    max_internal_errors: int = 3
    backoff_base_s: float = 0.05
    backoff_max_s: float = 1.0
    # How long a blamed node is avoided by this request.
    avoid_s: float = 5.0
    reserve_timeout_s: float = 5.0
    lease_ttl_s: float = 60.0
    # Tokens after a hole wait this long for the hole to be filled by the other session.
    gap_timeout_s: float = 2.0
    # How long a complete answer waits to hear from prefill how its transfer went.
    report_timeout_s: float = 0.2
    # How long after its lease has expired the source of a move may take to say what became of it: a node waits 30 s for
    # an acknowledgement, and a few more for writes to end.
    move_answer_s: float = 45.0
    # A decoding sequence that brings no token for so long is run again elsewhere.
    token_timeout_s: float = 60.0
    # A sequence waits this long for any node to be available.
    no_node_timeout_s: float = 30.0
