"""What processes of a cluster take beside steps: event loops that wait for an engine's Python, loops that all tokens
pass, and processors that are fewer than the threads. Pure.

A node's event loop and its engine share one interpreter: while the engine computes, a message waits for it. All tokens
pass the one thread of the router and, where one generator sends all requests, that of the client. Processes of one host
share its processors. None of it shows in requests one by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

from baton.observe import Relay
from engine.step_times import not_negative
from planner.fitted import Line, RequestTimes
from planner.steps import RecordedStep

# A node that computes for a smaller share of the time says nothing of what waits for it.
_LEAST_BUSY_SHARE = 0.1
_MIN_RELAYS = 4
# Keeps loads that are all alike, as one of many tokens a request, apart.
_RIDGE = 1 + 1e-9


@dataclass(frozen=True, slots=True)
class LoopTimes:
    """Processor time of an event loop for each request, for the tokens that one step brings, and for each of them."""

    request_s: float = 0.0
    step_s: float = 0.0
    token_s: float = 0.0

    def __bool__(self) -> bool:
        return self.request_s > 0 or self.step_s > 0 or self.token_s > 0


FREE_LOOP = LoopTimes()


@dataclass(frozen=True, slots=True)
class Overhead:
    # A message to or from a node that computes is so much longer on its way.
    busy_message_s: float = 0.0
    # So is a hand-over to such a node, beside its transfer and the step under way.
    busy_join_s: float = 0.0
    # The loops that all tokens pass.
    router: LoopTimes = FREE_LOOP
    client: LoopTimes = FREE_LOOP
    # Processors of the host that all processes share, and those that a node uses while it computes; 0: each process has
    # its own.
    num_cores: float = 0.0
    node_cores: float = 0.0

    @property
    def slowest(self) -> LoopTimes:
        """What comes waits for this one: what it lets pass the other one has time for."""
        return max(self.router, self.client, key=lambda loop: (loop.step_s + loop.token_s, loop.request_s))

    def crowding(self, num_computing: float) -> float:
        """How many times as long the work of another process takes beside so many nodes that compute: each thread gets
        as much of the processors as any other."""
        if not self.num_cores:
            return 1.0
        return max(1.0, (num_computing * self.node_cores + 1) / self.num_cores)

    def more_crowded(self, num_computing: float, num_known: float) -> float:
        """How many times as long a step takes while so many nodes compute, itself included, as while so many do whose
        steps were measured: those of the loops run beside both."""
        return self.crowding(num_computing) / self.crowding(num_known) if num_computing > num_known else 1.0


NO_OVERHEAD = Overhead()


class Spent(NamedTuple):
    """What a load took of the processors. ``num_steps``: those that decoded. ``nodes_s``: all of them together;
    ``steps_s``: what all of their steps take with nothing that interrupts them."""

    num_requests: int
    num_steps: int
    num_tokens: int
    elapsed_s: float
    router_s: float
    client_s: float
    nodes_s: float
    steps_s: float


class Busy(NamedTuple):
    """Requests that came while others were served. ``steps``: of all nodes meanwhile; ``decode_s``: of the step that
    their second token comes from, and of what is left of the one before it."""

    relays: tuple[Relay, ...]
    steps: tuple[RecordedStep, ...]
    decode_s: float

    @property
    def is_telling(self) -> bool:
        return len(self.relays) >= _MIN_RELAYS and busy_share(self.steps) >= _LEAST_BUSY_SHARE


def overhead(spent: Sequence[Spent], busy: Busy, requests: RequestTimes, num_cores: int | None) -> Overhead:
    """``requests``: one by one; ``num_cores``: of the host that all processes share, None: there is none."""
    message_s, join_s = waits(busy, requests)
    node_cores = cores_of_step(spent)
    has_host = num_cores is not None and node_cores > 0
    return Overhead(
        message_s, join_s, loop_times(spent, [each.router_s for each in spent]),
        loop_times(spent, [each.client_s for each in spent]), float(num_cores or 0) if has_host else 0.0,
        min(node_cores, float(num_cores or 0)) if has_host else 0.0,
    )  # fmt: skip


def loop_times(spent: Sequence[Spent], took_s: Sequence[float]) -> LoopTimes:
    """``took_s``: of the loop's process in each load. Least squares, beside what it takes all the time."""
    rows = [(each.num_requests, each.num_steps, each.num_tokens, each.elapsed_s) for each in spent]
    return LoopTimes(*_parts(rows, took_s)[:-1]) if rows else FREE_LOOP


def cores_of_step(spent: Sequence[Spent]) -> float:
    """Processors that a node uses while it computes: processor time for each second of its steps, beside what a request
    takes of its event loop, and what it takes all the time. How long a step waits for a processor changes nothing."""
    rows = [(each.steps_s, each.num_requests, each.elapsed_s) for each in spent]
    steps_s, took_s = sum(each.steps_s for each in spent), [each.nodes_s for each in spent]
    if not steps_s:
        return 0.0
    # Loads that are all alike do not tell the parts apart.
    return _parts(rows, took_s)[0] or sum(took_s) / steps_s


def _parts(rows: Sequence[Sequence[float]], values: Sequence[float]) -> list[float]:
    """Least squares with no part below 0."""
    places = range(len(rows[0]))
    products = [[float(sum(row[i] * row[j] for row in rows)) for j in places] for i in places]
    for i, row in enumerate(products):
        row[i] *= _RIDGE
    return list(not_negative(products, [sum(row[i] * x for row, x in zip(rows, values, strict=True)) for i in places]))


def waits(busy: Busy, requests: RequestTimes) -> tuple[float, float]:
    """What a message and a hand-over wait for a node that computes. A node does so for a share of the time: of the
    requests as large a share, those that took longest, have met it."""
    if not busy.is_telling:
        return 0.0, 0.0
    share = busy_share(busy.steps)
    messages_s = [message_s(relay) - requests.message_s for relay in busy.relays]
    joins_s = [
        relay.second_token_s - relay.transfer.exposed_s - busy.decode_s - requests.join_s
        for relay in busy.relays
        if relay.transfer is not None and relay.second_token_s > 0
    ]
    return _of_share(messages_s, share), _of_share(joins_s, share)


def message_s(relay: Relay) -> float:
    """One way, by what a reservation took, which nothing but the loops of router and node is in; of a whole request by
    its run and its first token."""
    return (relay.reserve_s if relay.reserve_s > 0 else relay.network_s) / 2


def busy_share(steps: Iterable[RecordedStep]) -> float:
    """Of the time from the first step to the last one, of the node that decodes most."""
    by_node: dict[str, list[RecordedStep]] = {}
    for step in steps:
        by_node.setdefault(step.node, []).append(step)
    if not by_node:
        return 0.0
    everything = [step for of in by_node.values() for step in of]
    began_s = min(step.ended_s - step.turn_s for step in everything)
    passed_s = max(step.ended_s for step in everything) - began_s
    most = max(by_node.values(), key=lambda of: sum(step.shape.num_decoding for step in of))
    return min(1.0, sum(step.turn_s for step in most) / passed_s) if passed_s > 0 else 0.0


def _of_share(values: Sequence[float], share: float) -> float:
    """The median of so many of the largest; 0 if that is less."""
    ordered = sorted(values)
    if not ordered:
        return 0.0
    return max(0.0, ordered[min(len(ordered) - 1, int(len(ordered) * (1 - share / 2)))])


def expected(overhead: Overhead, requests: RequestTimes, busy: Busy) -> list[tuple[float, float]]:
    """(predicted, measured) of messages, the shortest first: the share that meets a node that computes takes longer."""
    took_s = sorted(message_s(relay) for relay in busy.relays)
    first_busy = len(took_s) * (1 - busy_share(busy.steps))
    return [
        (requests.message_s + (overhead.busy_message_s if place >= first_busy else 0.0), seconds)
        for place, seconds in enumerate(took_s)
    ]


def grown(before: Mapping[str, float], after: Mapping[str, float], *, is_router: bool) -> float:
    """Seconds of processor time of the router, or of all others. By process: the router's has an empty name."""
    return sum(value - before.get(name, 0.0) for name, value in after.items() if (name == "") is is_router)


def busy_of(relays: Sequence[Relay], steps: Sequence[RecordedStep], line: Line) -> Busy:
    """Of requests that came while others were served. A second token waits for half of a step, then for its own."""
    found = [step.shape for step in steps if step.shape.num_decoding and not step.shape.num_prompt_tokens]
    mean_s = fmean(map(line.step_s, found)) if found else 0.0
    return Busy(tuple(relays), tuple(steps), 1.5 * mean_s)
