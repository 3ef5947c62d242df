"""Settings of the policy and its breakers."""

from __future__ import annotations

from dataclasses import dataclass, field

from baton.settings import setting

# Of splitting requests over nodes.
MODES = ("auto", "always", "never")


@dataclass(frozen=True, slots=True)
class PolicyConfig:
    disaggregation: str = field(
        default="auto",
        metadata=setting(
            "--disaggregation",
            "auto: a request runs on two nodes, or whole on one where that is predicted to be better for it and for "
            "those that it would disturb. always: on two wherever both pools have a node. never: whole on one.",
            choices=MODES,
        ),
    )
    # A request leaves the pools (for a mixed node, or to run whole on one) if that is predicted to save more than so
    # many seconds and to take less than this share of the time: predictions are no better than that, and an idle
    # cluster goes on splitting.
    leave_saving_s: float = 0.1
    leave_share: float = field(default=0.9, metadata=setting(most=1))
    # A prefill node without a target for the gaps between tokens keeps what it computed only if a step of the decode
    # node would take so many times as long as an empty one (a batch of 64 about doubles it): beside prompts, gaps are
    # long.
    crowded_factor: float = field(default=2.0, metadata=setting(least=1))
    # What a second by which other sequences' tokens come later counts on a node that keeps their gaps within its
    # target, and in their own seconds elsewhere: a gap that the operator allows harms little.
    bounded_gap_weight: float = field(default=0.05, metadata=setting(least=0, most=1))
    # If the shortest queue of prompts is predicted to take longer, a node of the other pool helps, whatever it disturbs
    # there: about as long as people wait for a first word without a complaint.
    borrow_after_s: float = 2.0
    # Nodes that a pool keeps for its own work: borrowing and changes of home pools leave as many.
    min_pool_nodes: int = 1
    # Home pools change slowly: pressure is averaged over the window, and a pool has to be behind for so long. Both are
    # longer than a burst that borrowing bridges, and shorter than a load that shifts with the time of day. 0: never.
    repurpose_after_s: float | None = field(default=60.0, metadata=setting(none=0))
    repurpose_window_s: float = 60.0
    # A pool is behind if a request loses so many seconds there, and so many times what it loses in the other pool,
    # both as they would be after the change: else it would soon be taken back.
    repurpose_pressure_s: float = 0.5
    repurpose_factor: float = field(default=2.0, metadata=setting(least=1))
    # No further prompt is sent to a node whose prompts take longer; it waits in the router and can still go elsewhere.
    # Long enough that what a full pool costs shows in its queue.
    max_prompt_wait_s: float = 10.0
    migrates: bool = field(
        default=True,
        metadata=setting(
            "--migration",
            "Let running requests go on at another node: when theirs drains, lacks KV blocks, or is slower.",
            choices=("on", "off"),
        ),
    )
    # Moves of running sequences out of a node, and into one, at a time: each takes memory bandwidth of both.
    max_moves: int = 4
    # A sequence is to move at most this often, so that nodes that change places in speed do not throw it to and fro;
    # off a node that drains, where there is no other choice, it is tried again sooner.
    move_again_s: float = 10.0
    drain_again_s: float = 0.5
    # From the decision to the first byte: two messages and a connection.
    move_latency_s: float = 0.1
    # A node that will have filled its blocks so soon gives sequences away: a move takes a part of a second.
    room_ahead_s: float = 2.0
    # A sequence goes to a node whose steps take less than its own one's by this factor and by so much: predictions are
    # no better than that, and less is not noticed.
    balance_factor: float = field(default=1.5, metadata=setting(least=1))
    balance_after_s: float = 0.01
    # The same for a sequence of a priority better than 0: it moves for less.
    priority_factor: float = field(default=1.2, metadata=setting(least=1))
    priority_after_s: float = 0.005
    # A waiting sequence is passed over for better priorities of its client for so long at most.
    max_priority_wait_s: float = 30.0
    # Clients take turns by work: prompt tokens to compute, and so much for each token that is generated. Most prices of
    # tokens have it between 2 and 5.
    output_token_work: float = 3.0
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
