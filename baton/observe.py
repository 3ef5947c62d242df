"""Records a request's lifeline: its time stamps, from which its relay, its log line and the metrics are computed.

All stamps are by the router's clock. Nodes measure their own parts and send durations, so times of two machines are
never subtracted. This module has no clock and no output of its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from baton.errors import shortened
from baton.types import NO_SLO, Slo, TransferReport

_MAX_FAILURES = 8
_MAX_MOVES = 8
# Rules that a line of the log names: the others say what the names of the nodes say.
_LEFT_POOLS = ("whole", "borrowed", "overflow", "prefix")
_MAX_MESSAGE_CHARS = 300


class Stamp(NamedTuple):
    """When something happened, in seconds since the request's arrival, by the router's clock."""

    name: str
    at_s: float


class Stage(NamedTuple):
    """A part of the time to the first token."""

    name: str
    duration_s: float


@dataclass(frozen=True, slots=True)
class FailedAttempt:
    """A failed run of a sequence, and its cause."""

    prefill_node_id: str
    decode_node_id: str
    # The node that is held responsible.
    blamed_node_id: str
    # The class name of an error in baton.errors.
    code: str
    message: str
    # When the failure was noticed, since the request's arrival.
    at_s: float
    # At that time, since the attempt's last token, else since its dispatch.
    silent_s: float

    def line(self) -> str:
        """One line for people."""
        nodes = self.prefill_node_id
        if self.decode_node_id != self.prefill_node_id:
            nodes += f" -> {self.decode_node_id}"
        return (
            f"an attempt on {nodes} failed after {_ms(self.at_s)} ({_ms(self.silent_s)} without a sign of life), held "
            f"against {self.blamed_node_id}: {self.code}: {self.message}"
        )


@dataclass(frozen=True, slots=True)
class Moved:
    """A running sequence went on at another node."""

    source_node_id: str
    target_node_id: str
    reason: str
    # Since the request's arrival.
    at_s: float
    # From the last token of the one node to the first of the other, as the router saw them; 0 if none followed.
    pause_s: float
    # As the source said; 0 if it did not.
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Relay:
    """The timing record of a request. Durations in seconds, each measured by one clock. ``attempts`` counts all.

    The seven parts of `ttft_stages` add up to ``ttft_s``. They are those of the attempt that produced the first token;
    earlier attempts are in ``rerun_s``. Without a first token they are zero, and ``stamps`` shows how far it got.
    """

    prefill_node_id: str
    decode_node_id: str
    # Arrival to the first dispatch of the prompt.
    router_queue_s: float
    # Measured by the prefill node: its queue, and the prompt's computation.
    prefill_queue_s: float
    prefill_s: float
    ttft_s: float
    e2e_s: float
    tbt_mean_s: float
    tbt_max_s: float
    attempts: int
    num_tokens: int = 0
    # Tokens of the prompt whose KV a node had already.
    num_cached_tokens: int = 0
    transfer: TransferReport | None = None
    # Chat template, tokenizer and checks: arrival to the router's queue.
    tokenize_s: float = 0.0
    # Attempts that failed before the first token.
    rerun_s: float = 0.0
    # In the router's queue until a pair was found, refused reservations included.
    placement_s: float = 0.0
    # From asking the decode node for blocks to sending the prompt; 0 if one node does both.
    reserve_s: float = 0.0
    # Dispatch to first token, less the node's own durations: network, sessions, event loops.
    network_s: float = 0.0
    # First to second token: includes the part of the hand-off that was not hidden.
    second_token_s: float = 0.0
    # Measured by the decode node: lease granted to KV verified. 0 if one node did both.
    lease_wait_s: float = 0.0
    # Pauses caused by failures, as the client saw them: from the last token before (else the dispatch) to the next
    # token.
    recovery_s: float = 0.0
    # The stamps that were taken, in order of time.
    stamps: tuple[Stamp, ...] = ()
    # The last few failed attempts, oldest first; ``attempts`` counts all.
    failures: tuple[FailedAttempt, ...] = ()
    slo: Slo = NO_SLO
    # The last few moves, oldest first; the node that decodes is the target of the newest.
    moves: tuple[Moved, ...] = ()
    # The rule that chose its nodes (`router.cluster.policy.Reason`).
    placement_reason: str = ""

    @property
    def ttft_stages(self) -> tuple[Stage, ...]:
        """The stages of the time to the first token, in order; their sum is ``ttft_s``."""
        return (
            Stage("tokenize", self.tokenize_s),
            Stage("rerun", self.rerun_s),
            Stage("placement", self.placement_s),
            Stage("reserve", self.reserve_s),
            Stage("prefill_queue", self.prefill_queue_s),
            Stage("prefill", self.prefill_s),
            Stage("network", self.network_s),
        )

    @property
    def objectives(self) -> Mapping[str, bool]:
        """Which of the objectives "ttft" and "tbt" were met. Without those that the request has not, and those that it
        ended too early for."""
        found = {}
        if self.slo.ttft_s is not None and (self.num_tokens or self.e2e_s > self.slo.ttft_s):
            found["ttft"] = self.num_tokens > 0 and self.ttft_s <= self.slo.ttft_s
        if self.slo.tbt_s is not None and self.num_tokens > 1:
            found["tbt"] = self.tbt_mean_s <= self.slo.tbt_s
        return found

    def line(self) -> str:
        """One line for people and logs."""
        nodes = self.prefill_node_id
        if self.decode_node_id != self.prefill_node_id:
            nodes += f" -> {self.decode_node_id}"
        if self.placement_reason in _LEFT_POOLS:
            nodes += f" ({self.placement_reason})"
        if self.moves:
            pauses = ", ".join(_ms(move.pause_s) for move in self.moves)
            nodes += f" (moved from {self.moves[-1].source_node_id}, {self.moves[-1].reason}; pauses {pauses})"
        parts = [
            nodes or "no node",
            f"queue {_ms(self.router_queue_s + self.prefill_queue_s)}",
            f"prefill {_ms(self.prefill_s)}",
        ]
        if self.num_cached_tokens:
            parts[-1] += f" ({self.num_cached_tokens} tokens cached)"
        if self.transfer is not None:
            moved = (
                f"transfer {_ms(self.transfer.exposed_s)} ({_size(self.transfer.num_bytes)} {self.transfer.transport}"
            )
            parts.append(moved + (", layer-wise)" if self.transfer.layerwise else ")"))
        parts += [
            f"TTFT {_ms(self.ttft_s)}",
            f"TBT {_ms(self.tbt_mean_s)} (max {_ms(self.tbt_max_s)})",
            f"E2E {_ms(self.e2e_s)}",
            f"{self.num_tokens} tokens",
        ]
        if self.attempts > 1:
            why = f" (the last failed by {self.failures[-1].code})" if self.failures else ""
            parts.append(f"{self.attempts} attempts{why}")
        if objectives := self.objectives:
            missed = " and ".join(name.upper() for name, is_met in objectives.items() if not is_met)
            parts.append(f"SLO missed by {missed}" if missed else "SLO met")
        return " | ".join(parts)


class _Attempt:
    """Stamps of one run of a sequence up to its first token."""

    __slots__ = ("began_s", "leased_s", "placed_s", "prefill_queue_s", "prefill_s", "sent_s")

    def __init__(self, began_s: float) -> None:
        self.began_s = began_s
        self.placed_s: float | None = None
        self.leased_s: float | None = None
        self.sent_s: float | None = None
        self.prefill_queue_s = 0.0
        self.prefill_s = 0.0


class Lifeline:
    """The time stamps of one sequence, all by one clock. Written by its owner as things happen.

    ``on_interval(seconds, count)`` is called with every time between tokens; tokens that arrive together share it.
    """

    __slots__ = ("_alive_s", "_attempt", "_cached_tokens", "_decode_id", "_ended_s", "_failures", "_first_sent_s",
                 "_first_token_s", "_handed_off_s", "_joined_s", "_last_token_s", "_lease_wait_s", "_moves",
                 "_num_tokens", "_on_interval", "_placement_reason",
                 "_prefill_id", "_queued_s", "_recovery_s", "_second_token_s", "_sent_s", "_tbt_max_s",
                 "_transfer", "arrived_s", "attempts", "is_pausing", "slo")  # fmt: skip

    def __init__(
        self, arrived_s: float, on_interval: Callable[[float, int], None] | None = None, slo: Slo = NO_SLO
    ) -> None:
        self.arrived_s = arrived_s
        self.slo = slo
        self.attempts = 1
        self._on_interval = on_interval
        self._queued_s = arrived_s
        # The attempt that produced the first token, once there is one; until then the current one.
        self._attempt = _Attempt(arrived_s)
        self._placement_reason = ""
        self._prefill_id = ""
        self._decode_id = ""
        self._first_sent_s: float | None = None
        # When the current attempt was first sent to a node.
        self._sent_s: float | None = None
        self._first_token_s: float | None = None
        self._second_token_s: float | None = None
        self._joined_s: float | None = None
        self._handed_off_s: float | None = None
        self._last_token_s = arrived_s
        self._ended_s: float | None = None
        # The last token or dispatch before a failure whose recovery is pending; None otherwise.
        self._alive_s: float | None = None
        self._failures: deque[FailedAttempt] = deque(maxlen=_MAX_FAILURES)
        self._recovery_s = 0.0
        self._num_tokens = 0
        self._tbt_max_s = 0.0
        self._lease_wait_s = 0.0
        self._cached_tokens: int | None = None
        self._transfer: TransferReport | None = None
        self._moves: deque[Moved] = deque(maxlen=_MAX_MOVES)
        # The newest move's first token is still to come.
        self.is_pausing = False

    def queued(self, now: float) -> None:
        """Tokenized, checked and admitted: waits for a pair of nodes."""
        self._queued_s = self._attempt.began_s = now

    def placed(self, prefill_id: str, decode_id: str, now: float, reason: str = "") -> None:
        self._placement_reason = reason
        self._prefill_id, self._decode_id, self._sent_s = prefill_id, decode_id, now
        if self._first_token_s is None:
            # Placed again after a refusal: the stamps of the earlier placement do not count.
            self._attempt.placed_s, self._attempt.leased_s, self._attempt.sent_s = now, None, None

    def leased(self, now: float) -> None:
        """The decode node has blocks for it."""
        if self._first_token_s is None:
            self._attempt.leased_s = now

    def sent(self, now: float) -> None:
        """The prompt was sent to a node."""
        self._sent_s = now
        if self._first_sent_s is None:
            self._first_sent_s = now
        if self._first_token_s is None:
            self._attempt.sent_s = now

    def prefilled(self, queue_s: float, compute_s: float, num_cached_tokens: int) -> None:
        """The prefill node's report of the prompt phase. Cached tokens of a rerun are not reported to the client."""
        if self._first_token_s is None:
            self._attempt.prefill_queue_s, self._attempt.prefill_s = queue_s, compute_s
        if self._cached_tokens is None:
            self._cached_tokens = num_cached_tokens

    def joined(self, wait_s: float, now: float) -> None:
        """The decode node has verified the KV and decodes."""
        self._joined_s, self._lease_wait_s = now, wait_s

    def transferred(self, report: TransferReport, now: float) -> None:
        self._transfer, self._handed_off_s = report, now

    def moved(self, source_id: str, target_id: str, reason: str, now: float) -> None:
        """It goes on at another node."""
        self._decode_id = target_id
        self._moves.append(Moved(source_id, target_id, reason, now - self.arrived_s, 0.0, 0))
        self.is_pausing = True

    def went_on(self, now: float) -> None:
        """The first token of the newest move's target."""
        self.is_pausing = False
        self._moves[-1] = replace(self._moves[-1], pause_s=now - self._last_token_s)

    def move_reported(self, report: TransferReport) -> None:
        """What the source of the newest move says of it."""
        self._moves[-1] = replace(self._moves[-1], num_bytes=report.num_bytes)

    @property
    def is_transfer_known(self) -> bool:
        return self._transfer is not None

    def tokens(self, num_tokens: int, now: float) -> None:
        interval_s = now - self._last_token_s
        if self._first_token_s is None:
            self._first_token_s = now
            num_intervals = num_tokens - 1
            # Tokens in the same message as the first one have no interval.
            interval_s = 0.0
            self._recovered(now)
        else:
            num_intervals = num_tokens
            if interval_s > self._tbt_max_s:
                self._tbt_max_s = interval_s
            if self._second_token_s is None:
                self._second_token_s = now
            self._recovered(now)
        if num_intervals > 0 and self._on_interval is not None:
            self._on_interval(interval_s / num_intervals, num_intervals)
        self._last_token_s = now
        self._num_tokens += num_tokens

    def _recovered(self, now: float) -> None:
        if self._alive_s is not None:
            self._recovery_s += now - self._alive_s
            self._alive_s = None

    def failed(self, blamed_node_id: str, code: str, message: str, now: float) -> FailedAttempt:
        """The attempt failed; another follows."""
        alive_s = self._last_sign_s(now)
        failure = FailedAttempt(
            self._prefill_id, self._decode_id, blamed_node_id, code, shortened(message, _MAX_MESSAGE_CHARS),
            now - self.arrived_s, now - alive_s,
        )  # fmt: skip
        self._failures.append(failure)
        self.attempts += 1
        self.set_aside(now)
        return failure

    def set_aside(self, now: float) -> None:
        """The attempt ends before the sequence; another follows."""
        if self._alive_s is None:
            self._alive_s = self._last_sign_s(now)
        self._transfer = self._handed_off_s = self._joined_s = None
        self._lease_wait_s = 0.0
        self.is_pausing = False
        if self._first_token_s is None:
            self._attempt = _Attempt(now)
        self._sent_s = None

    def _last_sign_s(self, now: float) -> float:
        """The present attempt's last token, or its dispatch, whichever is later."""
        sent_s = now if self._sent_s is None else self._sent_s
        return sent_s if self._first_token_s is None else max(self._last_token_s, sent_s)

    def ended(self, now: float) -> None:
        self._ended_s = now

    def relay(self) -> Relay:
        first = self._first_token_s
        ended = self._last_token_s if self._ended_s is None else self._ended_s
        intervals = self._num_tokens - 1
        parts = _Parts() if first is None else self._parts(first)
        return Relay(
            prefill_node_id=self._prefill_id,
            decode_node_id=self._decode_id,
            router_queue_s=(ended if self._first_sent_s is None else self._first_sent_s) - self.arrived_s,
            prefill_queue_s=parts.prefill_queue_s,
            prefill_s=parts.prefill_s,
            ttft_s=0.0 if first is None else first - self.arrived_s,
            e2e_s=ended - self.arrived_s,
            tbt_mean_s=(self._last_token_s - first) / intervals if first is not None and intervals > 0 else 0.0,
            tbt_max_s=self._tbt_max_s,
            attempts=self.attempts,
            num_tokens=self._num_tokens,
            num_cached_tokens=self._cached_tokens or 0,
            transfer=self._transfer,
            tokenize_s=parts.tokenize_s,
            rerun_s=parts.rerun_s,
            placement_s=parts.placement_s,
            reserve_s=parts.reserve_s,
            network_s=parts.network_s,
            second_token_s=0.0 if first is None or self._second_token_s is None else self._second_token_s - first,
            lease_wait_s=self._lease_wait_s,
            recovery_s=self._recovery_s,
            stamps=self._stamps(),
            failures=tuple(self._failures),
            slo=self.slo,
            moves=tuple(self._moves),
            placement_reason=self._placement_reason,
        )

    def _parts(self, first_s: float) -> _Parts:
        """The time to the first token, cut at the attempt's stamps; a missing stamp makes its stage zero."""
        attempt = self._attempt
        placed_s = attempt.began_s if attempt.placed_s is None else attempt.placed_s
        sent_s = placed_s if attempt.sent_s is None else attempt.sent_s
        # A node's durations are limited to the time that passed here: its clock may run faster.
        prefill_s = min(attempt.prefill_s, first_s - sent_s)
        prefill_queue_s = min(attempt.prefill_queue_s, first_s - sent_s - prefill_s)
        return _Parts(
            tokenize_s=self._queued_s - self.arrived_s,
            rerun_s=attempt.began_s - self._queued_s,
            placement_s=placed_s - attempt.began_s,
            reserve_s=sent_s - placed_s,
            prefill_queue_s=prefill_queue_s,
            prefill_s=prefill_s,
            network_s=first_s - sent_s - prefill_queue_s - prefill_s,
        )

    def _stamps(self) -> tuple[Stamp, ...]:
        attempt = self._attempt
        taken = (
            ("arrived", self.arrived_s),
            ("queued", self._queued_s),
            ("attempt", attempt.began_s if self.attempts > 1 else None),
            ("placed", attempt.placed_s),
            ("leased", attempt.leased_s),
            ("dispatched", attempt.sent_s),
            ("first_token", self._first_token_s),
            ("joined", self._joined_s),
            ("handed_off", self._handed_off_s),
            ("second_token", self._second_token_s),
            ("last_token", self._last_token_s if self._num_tokens else None),
            ("ended", self._ended_s),
        )
        stamps = [Stamp(name, at_s - self.arrived_s) for name, at_s in taken if at_s is not None]
        stamps += [Stamp("moved", move.at_s) for move in self._moves]
        return tuple(sorted(stamps, key=lambda stamp: stamp.at_s))


class _Parts(NamedTuple):
    """The time to the first token, cut up."""

    tokenize_s: float = 0.0
    rerun_s: float = 0.0
    placement_s: float = 0.0
    reserve_s: float = 0.0
    prefill_queue_s: float = 0.0
    prefill_s: float = 0.0
    network_s: float = 0.0


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds < 10 else f"{seconds:.1f} s"


def _size(num_bytes: int) -> str:
    if num_bytes < 1 << 20:
        return f"{num_bytes / 1024:.0f} KiB"
    return f"{num_bytes / (1 << 20):.1f} MiB"
