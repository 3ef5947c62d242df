"""What is recorded of sequences: metrics, log lines, and the watchers of ends. Decides nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from baton import errors
from baton.clock import Clock
from baton.defects import Defects, LogLimit
from baton.observe import FailedAttempt, Relay
from baton.types import Failure, SamplingParams
from router.flow.machine import Flow
from router.flow.messages import MoveOver, Outcome, OutcomeKind
from router.metrics import RouterMetrics

_log = logging.getLogger("baton.router")

# Refusals that are back-pressure.
_NO_ROOM = frozenset({"NoBlocks", "Overloaded", "Draining"})


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a request comes from, for records alone. Untrusted, as clients sent it."""

    model: str = ""
    is_chat: bool = False
    # W3C Trace Context.
    traceparent: str = ""
    tracestate: str = ""


@dataclass(frozen=True, slots=True)
class Ended:
    """A sequence that is over. ``arrived_s`` is by the router's clock."""

    request_id: str
    choice: int
    arrived_s: float
    outcome: Outcome
    relay: Relay
    num_prompt_tokens: int
    sampling: SamplingParams
    origin: Origin


class Records:
    def __init__(self, metrics: RouterMetrics, clock: Clock, defects: Defects) -> None:
        self._metrics = metrics
        self._defects = defects
        # When a node dies with hundreds of sequences, a few lines say why.
        self._failure_limit = LogLimit(clock)
        self._watchers: list[Callable[[Ended], None]] = []

    def watch(self, on_ended: Callable[[Ended], None]) -> None:
        """Be told of every sequence that ends. Returns at once."""
        self._watchers.append(on_ended)

    def refused(self, error: errors.BatonError) -> None:
        """A request was refused before it became a sequence."""
        self._metrics.refusals.add(error.code)

    def attempt_failed(self, sequence_id: str, failure: FailedAttempt) -> None:
        """Another attempt follows."""
        more = self._failure_limit.admits(f"{failure.blamed_node_id}/{failure.code}")
        if more is not None:
            _log.warning("%s: %s%s", sequence_id, failure.line(), more)

    def reservation_refused(self, node_id: str, sequence_id: str, failure: Failure) -> None:
        """Logged unless the node has no room, which is no failure."""
        code = failure.code
        self._metrics.reservation_refusals.add(code)
        if code in _NO_ROOM or (more := self._failure_limit.admits(f"{node_id}/refused/{code}")) is None:
            return
        about, message = errors.quoted(sequence_id), errors.quoted(failure.message)
        _log.warning("%s: %s refused a reservation: %s: %s%s", about, node_id, code, message, more)

    def move_failed(self, sequence_id: str, move: MoveOver) -> None:
        """The sequence goes on where it was, or has ended."""
        if not move.why or (more := self._failure_limit.admits(f"{move.target_id}/{move.outcome.value}")) is None:
            return
        about, what = errors.quoted(sequence_id), f"from {move.source_id} to {move.target_id} ({move.reason.value})"
        _log.info("%s: a move %s was %s: %s%s", about, what, move.outcome.value, errors.quoted(move.why), more)

    def ended(self, flow: Flow, outcome: Outcome, relay: Relay, origin: Origin) -> None:
        """The client has its answer: what a record raises changes nothing for it."""
        num_prompt_tokens = len(flow.prompt.token_ids)
        with self._defects.contained("record", flow.request_id):
            self._metrics.observe(outcome, relay, num_prompt_tokens)
        ended = Ended(
            flow.request_id, flow.choice, flow.lifeline.arrived_s, outcome, relay, num_prompt_tokens, flow.sampling,
            origin,
        )  # fmt: skip
        for watcher in self._watchers:
            with self._defects.contained("record", flow.request_id):
                watcher(ended)
        if _log.isEnabledFor(logging.INFO):
            _log.info("%s/%d %s (%s) %s", flow.request_id, flow.choice, outcome.kind.value, _detail(outcome),
                      relay.line())  # fmt: skip


def _detail(outcome: Outcome) -> str:
    if outcome.error is None:
        return "" if outcome.finish_reason is None else outcome.finish_reason.value
    if outcome.kind is OutcomeKind.FAILED:
        return f"{outcome.error.code}: {errors.shortened(outcome.error.message, 300)}"
    return outcome.error.code
