"""The life of one sequence in the router: a pure machine from arrival to exactly one outcome.

    queued -> reserving -> prefilling -> decoding -> settling -> ended
       ^          |            |            |
       +----------+------------+------------+   a node failed: a new attempt from prompt + tokens so far

Colocated attempts skip `reserving`. When an attempt ends, its sequence id is cancelled on every node that may still
have it. The machine orders tokens and has no text; a stop string reaches it as an event. A short answer can be complete
before prefill has reported its transfer: then the end waits for the report, for `report_timeout_s` at most. A sequence
that decodes may move to another node meanwhile (`router/flow/move.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from baton import errors
from baton.node_messages import (
    Cancel,
    HandedOff,
    Joined,
    Migrate,
    NodeMessage,
    NotMigrated,
    PrefillDone,
    Refused,
    Reserve,
    RouterMessage,
    Run,
    SequenceFailed,
)
from baton.observe import Lifeline
from baton.types import (
    NO_SLO,
    Embedding,
    FinishReason,
    Lease,
    PromptLogprobs,
    SamplingParams,
    SequenceSpec,
    Slo,
    TokenChunk,
)
from router.cluster.load import Placement
from router.cluster.policy import Demand
from router.flow.config import FlowConfig
from router.flow.messages import (
    Abandon,
    Action,
    AttemptFailed,
    Begin,
    ClientCancelled,
    Detach,
    End,
    Enqueue,
    Event,
    FromNode,
    MakeRoom,
    MoveOver,
    MoveTo,
    NodeAvailable,
    NodeFull,
    NodeLost,
    NoNodeAvailable,
    Outcome,
    OutcomeKind,
    PairFailed,
    PairWorked,
    Phase,
    Placed,
    Prompt,
    StopText,
    Tick,
    ToNode,
)
from router.flow.move import Move, MoveOutcome, MovePhase
from router.flow.token_order import DifferentTokens, TokenOrder


class Flow:
    """One sequence of a request. ``sampling`` is resolved: max_tokens and seed are set, stop ids include EOS.

    After every ``handle``, ``wake_at_s`` says when to send Tick at the latest. Invariant: `tokens` only grows, each of
    its tokens is delivered exactly once and in order, and End is the last action.
    """

    __slots__ = ("_attempt", "_avoid", "_config", "_end", "_end_node_id", "_has_joined", "_internal_errors",
                 "_is_backing_off", "_is_embedded", "_last_error", "_move", "_order", "_refusals", "_spec", "_timer_s",
                 "choice", "deadline_s", "lifeline", "max_tokens", "num_scored", "outcome", "phase", "placement",
                 "priority", "prompt", "request_id", "sampling", "sequence_id", "tokens")  # fmt: skip

    def __init__(
        self,
        request_id: str,
        choice: int,
        prompt: Prompt,
        sampling: SamplingParams,
        *,
        arrived_s: float,
        deadline_s: float,
        config: FlowConfig,
        on_interval: Callable[[float, int], None] | None = None,
        priority: int = 0,
        slo: Slo = NO_SLO,
        tokens: Sequence[int] = (),
    ) -> None:
        """``tokens``: of its output, which are known and not delivered; fewer than a whole answer."""
        assert sampling.max_tokens is not None
        self.request_id = request_id
        self.choice = choice
        self.prompt = prompt
        self.sampling = sampling
        self.deadline_s = deadline_s
        self.priority = priority
        self.phase = Phase.QUEUED
        # What waits behind a hole is bounded by max_tokens.
        self._order = TokenOrder(tokens)
        self.tokens = self._order.tokens
        # Prompt tokens behind the first whose log-probabilities were delivered.
        self.num_scored = 0
        # Its embedding is not wanted, or was delivered.
        self._is_embedded = not sampling.pooling
        self.placement: Placement | None = None
        self.outcome: Outcome | None = None
        self.lifeline = Lifeline(arrived_s, on_interval, slo)
        self._config = config
        self.max_tokens = sampling.max_tokens
        # What the nodes of the present attempt are told.
        self._spec: SequenceSpec | None = None
        # Of the present attempt; a refused reservation uses one up as well.
        self.sequence_id = f"{request_id}/{choice}/0"
        self._attempt = 0
        self._refusals = 0
        self._internal_errors = 0
        # Number of tokens at the end, and why, once a node has said so.
        self._end: tuple[int, FinishReason] | None = None
        self._end_node_id = ""
        self._has_joined = False
        self._move: Move | None = None
        # When the present wait is over; None while only the deadline counts.
        self._timer_s: float | None = None
        self._is_backing_off = False
        self._avoid: dict[str, float] = {}
        self._last_error: errors.BatonError | None = None

    @property
    def wake_at_s(self) -> float:
        wake_at_s = self.deadline_s if self._timer_s is None else min(self.deadline_s, self._timer_s)
        return wake_at_s if self._move is None else min(wake_at_s, self._move.due_s)

    @property
    def is_complete(self) -> bool:
        """All tokens of a whole answer have been delivered, whatever else is still to come."""
        return self.outcome is not None and self.outcome.kind is OutcomeKind.FINISHED

    @property
    def has_ended(self) -> bool:
        return self.phase is Phase.ENDED

    @property
    def is_handing_over(self) -> bool:
        """The first token is out, and decode has not said that it has the sequence."""
        return self.phase is Phase.DECODING and not self._is_settled

    @property
    def can_move(self) -> bool:
        """It decodes where it is to stay, nothing waits behind a hole, and more than one token is to come."""
        is_whole = self.phase is Phase.DECODING and self._is_settled and not self._order.early and self._end is None
        return is_whole and self._move is None and self.max_tokens - len(self.tokens) > 1

    @property
    def holders(self) -> tuple[str, ...]:
        """Nodes that may have something of the present attempt."""
        placed = () if self.placement is None else self.placement.node_ids
        return placed if self._move is None else (*placed, *self._move.node_ids)

    def moves_from(self, node_id: str) -> bool:
        return self._move is not None and self._move.source_id == node_id

    @property
    def has_shared(self) -> bool:
        """Its nodes have all blocks of the prompt and have said so, or it is over.

        A decode node may say so before the prefill node's first token is here, which comes with what that node holds.
        """
        if self.placement is None or self.phase is Phase.ENDED:
            return self.phase is Phase.ENDED
        return self.phase in (Phase.DECODING, Phase.SETTLING) and self._is_settled

    @property
    def num_known_tokens(self) -> int:
        return len(self.prompt.token_ids) + len(self.tokens)

    def demand(self, now: float) -> Demand:
        return Demand(
            num_known_tokens=self.num_known_tokens,
            is_single_token=self.max_tokens - len(self.tokens) == 1,
            max_new_tokens=self.max_tokens - len(self.tokens),
            avoid=frozenset(n for n, until_s in self._avoid.items() if until_s > now) if self._avoid else (),
            prompt=self.prompt,
            priority=self.priority,
        )

    def handle(self, event: Event, now: float) -> list[Action]:  # noqa: C901 (a flat table)
        if self.phase is Phase.ENDED:
            return []
        if self.phase is Phase.SETTLING:
            return self._settle(event, now)
        match event:
            case FromNode():
                return self._on_message(event, now)
            case Begin():
                self.lifeline.queued(now)
                return [Enqueue(is_rerun=False)]
            case Placed():
                return self._on_placed(event, now)
            case NodeLost():
                return self._on_node_lost(event, now)
            case NoNodeAvailable():
                return self._on_no_node(now)
            case NodeAvailable():
                return self._on_node_available()
            case ClientCancelled():
                error: errors.BatonError = errors.Cancelled(event.reason)
                return self._finish(Outcome(OutcomeKind.CANCELLED, error=error), now, event.reason)
            case Abandon():
                return self._fail(event.error, now)
            case StopText():
                outcome = Outcome(OutcomeKind.FINISHED, FinishReason.STOP)
                # The client has been told that it is over: no report is waited for.
                return self._finish(outcome, now, "stop string", may_settle=False)
            case MakeRoom():
                return self._on_make_room(now)
            case MoveTo():
                return self._on_move(event, now)
            case Tick():
                return self._on_tick(now)

    def _to(self, node_id: str, message: RouterMessage) -> ToNode:
        return ToNode(node_id, message, self.prompt)

    def _on_message(self, event: FromNode, now: float) -> list[Action]:
        node_id, message = event.node_id, event.message
        if message.sequence_id != self.sequence_id or self.placement is None:
            return []  # About an attempt that is over.
        if self._move is not None and node_id in self._move.node_ids:
            found = self._on_move_message(self._move, node_id, message, now)
            if found is not None:
                return found
        if node_id not in self.placement.node_ids and not self.moves_from(node_id):
            return []  # A node that it has left, or was to move to.
        return self._take_message(node_id, message, self.placement, now)

    def _take_message(self, node_id: str, message: NodeMessage, placement: Placement, now: float) -> list[Action]:
        match message:
            case TokenChunk():
                return self._on_tokens(node_id, message, placement, now)
            case PromptLogprobs():
                return self._on_scored(message, now)
            case Embedding():
                is_first, self._is_embedded = not self._is_embedded, True
                return [message] if is_first else []
            case Lease():
                return self._on_reserved(message, now)
            case Refused():
                return self._on_refused(message, placement, now)
            case PrefillDone():
                # After the first tokens an attempt begins with more than the prompt.
                num_cached = min(message.num_cached_tokens, len(self.prompt.token_ids))
                self.lifeline.prefilled(message.queue_s, message.compute_s, num_cached)
            case Joined():
                return self._on_joined(message, placement, now)
            case HandedOff():
                self.lifeline.transferred(message.report, now)
            case SequenceFailed():
                return self._on_sequence_failed(node_id, message, placement, now)
        return []

    # ── Placement ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _on_placed(self, event: Placed, now: float) -> list[Action]:
        placement = event.placement
        assert self.phase is Phase.QUEUED
        assert self.placement is None
        self.placement = placement
        self._has_joined = False
        self.lifeline.placed(placement.prefill_id, placement.decode_id, now, event.reason)
        self._spec = SequenceSpec(
            self.sequence_id, self.prompt.token_ids, self.sampling, tuple(self.tokens), self.prompt.cache_salt,
            self.priority,
        )  # fmt: skip
        if placement.is_colocated:
            return self._run(None, now)
        self.phase = Phase.RESERVING
        self._timer_s = now + self._config.reserve_timeout_s
        return [self._to(placement.decode_id, Reserve(self._spec, self._ttl_s(now), placement.prefill_id))]

    def _on_reserved(self, lease: Lease, now: float) -> list[Action]:
        if self.phase is not Phase.RESERVING:
            return []
        self.lifeline.leased(now)
        return self._run(lease, now)

    def _run(self, lease: Lease | None, now: float) -> list[Action]:
        assert self.placement is not None
        assert self._spec is not None
        self.phase = Phase.PREFILLING
        # With a lease, its expiry bounds prompt and transfer; a node that keeps the sequence is bounded by the deadline
        # and, should it die or wedge, by membership.
        self._timer_s = None if lease is None else now + lease.ttl_s + self._config.gap_timeout_s
        self.lifeline.sent(now)
        return [self._to(self.placement.prefill_id, Run(self._spec, lease))]

    def _on_refused(self, message: Refused, placement: Placement, now: float) -> list[Action]:
        if self.phase is not Phase.RESERVING:
            return []
        error = message.failure.error()
        if isinstance(error, errors.InvalidRequest):
            return self._finish(Outcome(OutcomeKind.REJECTED, error=error), now, "refused")
        return self._look_elsewhere(placement.decode_id, error, now)

    def _look_elsewhere(self, full_node_id: str, error: errors.BatonError, now: float) -> list[Action]:
        """A node has no room. That is no failure and uses up no attempt; waiting is bounded by the deadline."""
        actions = [*self._leave(error.code, lost=full_node_id), NodeFull(full_node_id)]
        self._last_error = error
        self._refusals += 1
        self._avoid_until(now + self._config.backoff_max_s, full_node_id, now)
        self._requeue()
        # The first refusals only mean that a status was stale; then nodes say no whatever their status says.
        return actions + self._enqueue_after(self._backoff_s(self._refusals - 3), now)

    def _avoid_until(self, until_s: float, node_id: str, now: float) -> None:
        self._avoid = {n: s for n, s in self._avoid.items() if s > now} | {node_id: until_s}

    def _requeue(self) -> None:
        self.phase = Phase.QUEUED
        self.placement = None
        self._timer_s = None
        self._order.early.clear()
        self._end = None
        self._end_node_id = ""
        self._attempt += 1
        self.sequence_id = f"{self.request_id}/{self.choice}/{self._attempt}"

    def _enqueue_after(self, wait_s: float, now: float) -> list[Action]:
        if wait_s <= 0:
            return [Enqueue(is_rerun=True)]
        self._is_backing_off = True
        self._timer_s = now + wait_s
        return []

    def _backoff_s(self, exponent: int) -> float:
        """Nothing below zero, then doubling."""
        if exponent < 0:
            return 0.0
        return min(self._config.backoff_base_s * 2.0 ** min(exponent, 16), self._config.backoff_max_s)

    def _on_no_node(self, now: float) -> list[Action]:
        """Told on every fruitless look; the wait starts with the first."""
        if self.phase is Phase.QUEUED and self._timer_s is None:
            self._timer_s = now + self._config.no_node_timeout_s
        return []

    def _on_node_available(self) -> list[Action]:
        if self.phase is Phase.QUEUED and not self._is_backing_off:
            self._timer_s = None
        return []

    def _ttl_s(self, now: float) -> float:
        return max(0.1, min(self._config.lease_ttl_s, self.deadline_s - now + 1.0))

    # ── Progress ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _on_scored(self, message: PromptLogprobs, now: float) -> list[Action]:
        """By index, as tokens: each attempt begins with the first."""
        known = 1 + self.num_scored - message.index
        num_left = self._num_unscored - len(message.logprobs[known:])
        if message.index < 1 or known < 0 or num_left < 0:
            last = message.index + len(message.logprobs) - 1
            return self._defect(f"log-probabilities of prompt tokens {message.index} to {last} were not asked for", now)
        new = message.logprobs[known:]
        self.num_scored += len(new)
        return [PromptLogprobs(self.sequence_id, message.index + known, new)] if new else []

    @property
    def _num_unscored(self) -> int:
        if self.sampling.prompt_logprobs is None:
            return 0
        return len(self.prompt.token_ids) - 1 - self.num_scored

    def _on_tokens(self, node_id: str, chunk: TokenChunk, placement: Placement, now: float) -> list[Action]:
        if self.phase is Phase.RESERVING:
            return []
        if not placement.is_colocated and node_id == placement.decode_id:
            self._has_joined = True
        if self.lifeline.is_pausing and node_id == placement.decode_id:
            self.lifeline.went_on(now)
        if chunk.finish_reason is not None:
            self._end = (chunk.index + len(chunk.token_ids), chunk.finish_reason)
            self._end_node_id = node_id
        order = self._order
        had_hole = bool(order.early)
        if chunk.index == len(self.tokens) and not had_hole:  # nearly always
            self.tokens += chunk.token_ids
            return self._after_tokens(chunk, now)
        try:
            new = order.take(chunk)
        except DifferentTokens as different:
            return self._defect(str(different), now)
        if new is not None:
            return self._after_tokens(new, now)
        if not had_hole:
            self._timer_s = now + self._config.gap_timeout_s
        return self._defect("tokens beyond max_tokens", now) if len(order.early) > self.max_tokens else []

    def _after_tokens(self, new: TokenChunk, now: float) -> list[Action]:
        num_tokens = len(self.tokens)
        if num_tokens > self.max_tokens or (self._end is not None and num_tokens > self._end[0]):
            return self._defect("tokens beyond the end of the sequence", now)
        actions: list[Action] = []
        if new.token_ids:
            if self.phase is Phase.PREFILLING:
                if not self._is_embedded:
                    return self._defect("a token came before the prompt's embedding", now)
                if self._num_unscored:
                    return self._defect(f"a token came before {self._num_unscored} prompt tokens were scored", now)
                self.phase = Phase.DECODING
                self._refusals = 0
            self.lifeline.tokens(len(new.token_ids), now)
            actions.append(new)
        if self._order.early:
            self._timer_s = now + self._config.gap_timeout_s
        elif self._is_settled:
            self._timer_s = now + self._config.token_timeout_s
        if self._end is not None and num_tokens == self._end[0]:
            return actions + self._finish(Outcome(OutcomeKind.FINISHED, self._end[1]), now, "finished")
        if (reason := self._satisfied()) is not None:
            return actions + self._finish(Outcome(OutcomeKind.FINISHED, reason), now, "finished")
        return actions

    @property
    def _is_settled(self) -> bool:
        """The sequence is where it will be decoded, so only token times matter from here."""
        assert self.placement is not None
        return self.placement.is_colocated or self._has_joined

    def _satisfied(self) -> FinishReason | None:
        """Whether the tokens so far already are a whole answer."""
        if self.tokens and self.tokens[-1] in self.sampling.stop_token_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if len(self.tokens) >= self.max_tokens else None

    def _on_joined(self, message: Joined, placement: Placement, now: float) -> list[Action]:
        if self._has_joined:
            return []
        self._has_joined = True
        self.lifeline.joined(message.wait_s, now)
        self._timer_s = now + (self._config.token_timeout_s if self.tokens else self._config.gap_timeout_s)
        return [PairWorked(placement)]

    # ── Moves ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _on_move(self, event: MoveTo, now: float) -> list[Action]:
        if not self.can_move or self.placement is None or event.target_id == self.placement.decode_id:
            return []
        source_id = self.placement.decode_id
        self._move = Move(source_id, event.target_id, event.reason, now + self._config.reserve_timeout_s)
        # The KV of all tokens but the newest is there; a target that knows all but that gets one new token at least.
        spec = SequenceSpec(
            self.sequence_id, self.prompt.token_ids, self.sampling, tuple(self.tokens[:-1]), self.prompt.cache_salt,
            self.priority,
        )  # fmt: skip
        return [self._to(event.target_id, Reserve(spec, self._ttl_s(now), source_id, event.num_headroom_tokens))]

    def _on_move_message(self, move: Move, node_id: str, message: NodeMessage, now: float) -> list[Action] | None:
        """Of the source or the target; None: as if it did not move."""
        is_target, phase = node_id == move.target_id, move.phase
        match message:
            case Lease() if is_target and phase is MovePhase.ASKED:
                move.phase, move.due_s = MovePhase.SENT, now + message.ttl_s + self._config.move_answer_s
                return [self._to(move.source_id, Migrate(self.sequence_id, message))]
            case Refused() if is_target and phase is MovePhase.ASKED:
                return self._end_move(MoveOutcome.REFUSED, message.failure.message)
            case Joined() if is_target and phase is MovePhase.SENT:
                return self._moved(move, now)
            case TokenChunk() if is_target and phase is MovePhase.SENT:
                actions, there = self._moved(move, now), Placement(node_id, node_id)
                return [*actions, *self._on_tokens(node_id, message, there, now)]
            case HandedOff(_, report) if not is_target and phase is not MovePhase.ASKED:
                actions = self._moved(move, now) if phase is MovePhase.SENT else []
                self.lifeline.move_reported(report)
                self._move = None
                return [*actions, *self._lost_with(move, now)]
            case NotMigrated() if not is_target and phase is MovePhase.SENT:
                return self._end_move(MoveOutcome.FAILED, message.failure.message)
            case NotMigrated() | SequenceFailed() if not is_target and phase is MovePhase.LEAVING:
                # The target has it. A source that was not told so goes on.
                self._move = None
                goes_on = isinstance(message, NotMigrated)
                return [self._to(node_id, Cancel(self.sequence_id, "it has moved"))] if goes_on else []
            case TokenChunk() | HandedOff():
                return None
        is_current = is_target == (phase is MovePhase.LEAVING)
        return None if is_current else []

    def _moved(self, move: Move, now: float) -> list[Action]:
        """It is the target's from now on, as if it had always been there."""
        move.phase, move.due_s = MovePhase.LEAVING, now + self._config.move_answer_s
        actions: list[Action] = [MoveOver(move.source_id, move.target_id, move.reason, MoveOutcome.MOVED)]
        prefill_id = "" if self.placement is None else self.placement.prefill_id
        if prefill_id not in move.node_ids and not self.lifeline.is_transfer_known:
            # It is left behind, and has not said that it let go.
            actions.append(self._to(prefill_id, Cancel(self.sequence_id, "it has moved on")))
        self.placement = Placement(move.target_id, move.target_id)
        self.lifeline.moved(move.source_id, move.target_id, move.reason.value, now)
        if not self._order.early:
            self._timer_s = now + self._config.token_timeout_s
        return actions

    def _lost_with(self, move: Move, now: float) -> list[Action]:
        """The source has handed it over to a node that is lost by now."""
        if not move.is_target_lost:
            return []
        error = errors.NodeLost(f"node {move.target_id} was lost when the sequence had just moved there")
        return self._rerun(error, move.target_id, now, lost=move.target_id)

    def _end_move(self, outcome: MoveOutcome, why: str = "") -> list[Action]:
        """The sequence stays at its source, or is over everywhere."""
        move, self._move = self._move, None
        if move is None:
            return []
        actions: list[Action] = []
        other_id = move.source_id if move.phase is MovePhase.LEAVING else move.target_id
        if not move.is_target_lost or other_id != move.target_id:
            actions.append(self._to(other_id, Cancel(self.sequence_id, f"its move was {outcome.value}")))
        if move.phase is not MovePhase.LEAVING:
            actions.append(MoveOver(move.source_id, move.target_id, move.reason, outcome, why))
        return actions

    def _on_move_due(self, move: Move, now: float) -> list[Action]:
        if move.phase is not MovePhase.SENT:
            return self._end_move(MoveOutcome.REFUSED)
        error = errors.Unavailable(f"node {move.source_id} did not say what became of a move to {move.target_id}")
        return self._rerun(error, move.source_id, now)

    def _on_move_node_lost(self, move: Move, node_id: str) -> list[Action] | None:
        """None: as if it did not move."""
        if node_id == move.target_id and move.phase is not MovePhase.LEAVING:
            move.is_target_lost = True
            return self._end_move(MoveOutcome.REFUSED) if move.phase is MovePhase.ASKED else []
        if node_id == move.source_id and move.phase is MovePhase.LEAVING:
            self._move = None
            return []
        return None

    # ── Failure ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _on_sequence_failed(
        self, node_id: str, message: SequenceFailed, placement: Placement, now: float
    ) -> list[Action]:  # fmt: skip
        failure = message.failure
        error = failure.error()
        is_past_prefill = self._has_joined and node_id == placement.prefill_id != placement.decode_id
        if is_past_prefill and self._has_first_token:
            return []  # Decode has the sequence; what prefill has to say about it is history.
        if isinstance(error, errors.InvalidRequest):
            return self._finish(Outcome(OutcomeKind.REJECTED, error=error), now, "refused")
        if isinstance(error, errors.BadLogits):
            # The next node would compute the same, and neither of these is to blame.
            return self._fail(error, now)
        if isinstance(error, errors.InternalError):
            self._internal_errors += 1
            if self._internal_errors >= self._config.max_internal_errors:
                return self._fail(error, now)
        if isinstance(error, errors.Overloaded | errors.Draining) and self.phase is Phase.PREFILLING:
            return self._look_elsewhere(node_id, error, now)
        return self._rerun(error, failure.blamed_node_id or node_id, now)

    @property
    def _has_first_token(self) -> bool:
        """This attempt's first token has arrived (nothing waits behind a hole)."""
        return self.phase is Phase.DECODING and not self._order.early

    def _on_node_lost(self, event: NodeLost, now: float) -> list[Action]:
        if self._move is not None:
            found = self._on_move_node_lost(self._move, event.node_id)
            if found is not None:
                return found
        if self.placement is None or event.node_id not in (self.placement.prefill_id, self.placement.decode_id):
            return []
        is_decode = event.node_id == self.placement.decode_id
        if not is_decode and self._has_joined and self._has_first_token:
            return []  # The baton is handed over.
        error = errors.NodeLost(f"node {event.node_id} was lost: {event.reason}")
        return self._rerun(error, event.node_id, now, lost=event.node_id)

    def _rerun(self, error: errors.BatonError, blamed: str, now: float, lost: str = "") -> list[Action]:
        """End this attempt everywhere and start the next, unless the attempts are used up.

        Tokens that make a whole answer have ended the flow when they came.
        """
        assert self.placement is not None
        self._last_error = error
        placement = self.placement
        if self.lifeline.attempts >= self._config.max_attempts:
            spent = type(error)(f"gave up after {self.lifeline.attempts} attempts; the last: {error.message}")
            return self._fail(spent, now)
        actions = self._leave(error.code, lost)
        if not lost:
            actions.append(PairFailed(placement))
        self._avoid_until(now + self._config.avoid_s, blamed, now)
        failure = self.lifeline.failed(blamed, error.code, error.message, now)
        actions.append(AttemptFailed(self.sequence_id, failure))
        self._requeue()
        # The first rerun starts at once: the client's next token waits for it.
        return actions + self._enqueue_after(self._backoff_s(self.lifeline.attempts - 3), now)

    def _on_make_room(self, now: float) -> list[Action]:
        """No failure: no node is blamed, and no attempt is used up."""
        if self.placement is None:
            return []
        actions = self._leave("room for another client")
        self.lifeline.set_aside(now)
        self._requeue()
        return [*actions, Enqueue(is_rerun=True)]

    def _leave(self, reason: str, lost: str = "") -> list[Action]:
        """Cancel the attempt wherever it may live and stop listening to it."""
        if self.placement is None:
            return []
        if self._move is not None and self._move.target_id == lost:
            self._move.is_target_lost = True
        actions = self._end_move(MoveOutcome.ENDED)
        placement, sequence_id = self.placement, self.sequence_id
        has_run = self.phase in (Phase.PREFILLING, Phase.DECODING)
        if has_run and placement.prefill_id != lost:
            actions.append(self._to(placement.prefill_id, Cancel(sequence_id, reason)))
        if not placement.is_colocated and placement.decode_id != lost:
            actions.append(self._to(placement.decode_id, Cancel(sequence_id, reason)))
        actions.append(Detach(sequence_id))
        return actions

    def _on_tick(self, now: float) -> list[Action]:
        if now >= self.deadline_s:
            # Done and late is done: tokens that make a whole answer were drained before.
            waited = f"{now - self.lifeline.arrived_s:.1f} s, {len(self.tokens)} tokens"
            last = f"; last failure: {self._last_error.message}" if self._last_error else ""
            return self._fail(errors.DeadlineExceeded(f"the request's time is up after {waited}{last}"), now)
        if self._move is not None and now >= self._move.due_s:
            return self._on_move_due(self._move, now)
        if self._timer_s is None or now < self._timer_s:
            return []
        self._timer_s = None
        if self.phase is Phase.QUEUED:
            if self._is_backing_off:
                self._is_backing_off = False
                return [Enqueue(is_rerun=True)]
            return self._fail(self._last_error or errors.Unavailable("no node is available"), now)
        assert self.placement is not None
        return self._on_timeout(self.placement, now)

    def _on_timeout(self, placement: Placement, now: float) -> list[Action]:
        match self.phase:
            case Phase.RESERVING:
                what, blamed = "did not answer a reservation", placement.decode_id
            case Phase.PREFILLING:
                what, blamed = "did not finish the prompt in time", placement.prefill_id
            case _ if self._order.early or not self._is_settled:
                what, blamed = "left a hole in the tokens or did not hand over", placement.prefill_id
            case _:
                what, blamed = "brought no token", placement.decode_id
        return self._rerun(errors.Unavailable(f"node {blamed} {what}"), blamed, now)

    def _defect(self, what: str, now: float) -> list[Action]:
        return self._fail(errors.InternalError(f"{self.sequence_id}: {what}"), now)

    def _fail(self, error: errors.BatonError, now: float) -> list[Action]:
        return self._finish(Outcome(OutcomeKind.FAILED, error=error), now, error.code)

    def _finish(self, outcome: Outcome, now: float, reason: str, *, may_settle: bool = True) -> list[Action]:
        """The one way out, if need be by way of settling."""
        actions: list[Action] = []
        self.outcome = outcome
        self._order.early.clear()
        self.lifeline.ended(now)
        if may_settle and outcome.kind is OutcomeKind.FINISHED and self._awaits_report:
            self.phase = Phase.SETTLING
            self._timer_s = now + self._config.report_timeout_s
            return []
        if self.placement is not None:
            actions = self._farewell(reason, outcome)
        self.phase = Phase.ENDED
        self._timer_s = None
        return [*actions, End(outcome)]

    def give_up(self, error: errors.BatonError, now: float) -> Outcome:
        """Handling it raised: over at once, whatever it was in the middle of. The caller gives back what it holds."""
        if self.outcome is None:
            kind = OutcomeKind.REJECTED if isinstance(error, errors.InvalidRequest) else OutcomeKind.FAILED
            self.outcome = Outcome(kind, error=error)
            self.lifeline.ended(now)
        self._order.early.clear()
        self.phase = Phase.ENDED
        self._timer_s = None
        return self.outcome

    @property
    def _awaits_report(self) -> bool:
        """Decode announced the end of a sequence that was handed over, and prefill has not said how."""
        return (
            self.phase is Phase.DECODING
            and self._end is not None
            and self._has_joined
            and not self.lifeline.is_transfer_known
        )

    def _settle(self, event: Event, now: float) -> list[Action]:
        """The report, or anything that means it will not come. Done and late is done: the outcome stays."""
        assert self.placement is not None
        assert self.outcome is not None
        match event:
            case FromNode(_, HandedOff() as message) if message.sequence_id == self.sequence_id:
                self.lifeline.transferred(message.report, now)
            case FromNode(_, SequenceFailed() as message) if message.sequence_id == self.sequence_id:
                pass
            case NodeLost() if event.node_id == self.placement.prefill_id:
                pass
            case ClientCancelled() | Abandon() | StopText():
                pass
            case Tick() if now >= self.wake_at_s:
                pass
            case _:
                return []
        actions = self._farewell("finished", self.outcome)
        self.phase = Phase.ENDED
        self._timer_s = None
        return [*actions, End(self.outcome)]

    def _farewell(self, reason: str, outcome: Outcome) -> list[Action]:
        """Cancel what a node does not know to be over: all of it, unless a node itself announced the end."""
        assert self.placement is not None
        is_announced = outcome.kind is OutcomeKind.FINISHED and self._end is not None
        if not is_announced:
            return self._leave(reason)
        actions = self._end_move(MoveOutcome.ENDED)
        if self.placement.decode_id != self._end_node_id:
            # The first token was the last, and the lease is not needed; or the source of a move was the first to end.
            actions.append(self._to(self.placement.decode_id, Cancel(self.sequence_id, reason)))
        return [*actions, PairWorked(self.placement), Detach(self.sequence_id)]


def resolve_stop_ids(sampling: SamplingParams, eos_token_ids: Sequence[int]) -> tuple[int, ...]:
    """Stop ids as nodes get them: the caller's and, unless ignored, the model's end-of-sequence ids."""
    eos = () if sampling.ignore_eos else tuple(eos_token_ids)
    return tuple(dict.fromkeys((*sampling.stop_token_ids, *eos)))
