"""A simulated request: its flow in the router, and what became of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from planner.results import Served
from planner.workload import Request
from router.cluster.policy import Demand
from router.flow.machine import Flow

# What a sequence draws, and what ends it.
TOKEN_ID, STOP_ID = 0, 1
_FIRST_PROMPT_ID = 2


@lru_cache(maxsize=4096)
def _plain_prompt(num_tokens: int) -> tuple[int, ...]:
    return (_FIRST_PROMPT_ID,) * num_tokens


def prompt_ids(request: Request, prefixes: dict[str, int]) -> tuple[int, ...]:
    """Equal for requests of one prefix as far as that goes, and for no others; ``prefixes`` has a number for each.

    Where nothing has a prefix nothing looks at them: all prompts of one length are one object.
    """
    if not prefixes:
        return _plain_prompt(request.num_prompt_tokens)
    num_shared = min(request.num_prefix_tokens, request.num_prompt_tokens) if request.prefix else 0
    own_id = _FIRST_PROMPT_ID + len(prefixes) + request.number
    shared_id = _FIRST_PROMPT_ID + prefixes.get(request.prefix, 0)
    return (shared_id,) * num_shared + (own_id,) * (request.num_prompt_tokens - num_shared)


class SimulatedRequest:
    """What the cluster-level scheduler places; compared by identity."""

    __slots__ = ("_num_untold", "flow", "is_leading", "last_token_s", "num_output_tokens", "num_prompt_tokens",
                 "served", "timer_s")  # fmt: skip

    client = ""

    def __init__(self, flow: Flow, served: Served, num_untold: Callable[[SimulatedRequest], int]) -> None:
        self.flow = flow
        self.served = served
        self.num_prompt_tokens = served.request.num_prompt_tokens
        self.num_output_tokens = served.request.num_output_tokens
        self._num_untold = num_untold
        # When it drew its newest token, as far as that matters.
        self.last_token_s = 0.0
        self.is_leading = False
        # When its timer fires; None without one.
        self.timer_s: float | None = None

    @property
    def sequence_id(self) -> str:
        return self.flow.sequence_id

    @property
    def has_tokens(self) -> bool:
        return bool(self.flow.tokens)

    def went_on(self, now: float) -> float:
        """It draws the first token since it last had to wait; returns how long that was."""
        served, waited_s = self.served, now - self.last_token_s
        if served.second_token_s is None:
            served.second_token_s = now
        served.max_gap_s = max(served.max_gap_s, waited_s)
        self.last_token_s = now
        return waited_s

    def can_move_from(self, node_id: str) -> bool:
        placement = self.flow.placement
        return placement is not None and placement.decode_id == node_id and self.flow.can_move

    def demand(self, now: float) -> Demand:
        """Of all tokens that were drawn by now, told or not."""
        demand, num_untold = self.flow.demand(now), self._num_untold(self)
        if not num_untold:
            return demand
        return Demand(
            demand.num_known_tokens + num_untold, demand.max_new_tokens - num_untold == 1,
            demand.max_new_tokens - num_untold, demand.avoid, demand.prompt, demand.priority,
        )  # fmt: skip
