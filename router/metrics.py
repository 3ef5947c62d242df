"""The metrics of the router: requests and their stages, routing, refusals, and the state of the pools.

Written by dispatcher and frontend on the event loop. A subset is repeated under vLLM's names, so that its dashboards
and load tools work: the cluster looks like one engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from baton.metrics import LATENCY_BUCKETS_S, Family, Histogram, Labels, Metrics
from baton.observe import Relay
from baton.types import FinishReason, Role
from router.cluster.config import MODES, PolicyConfig
from router.cluster.membership import Member, State
from router.cluster.policy import Reason
from router.cluster.prefix_index import PrefixIndex
from router.cluster.rebalance import MoveReason
from router.flow.messages import Outcome, OutcomeKind, Phase
from router.flow.move import MoveOutcome

# Finer in the range of decode steps.
_TBT_BUCKETS_S = (
    *(0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5),
    *(1.0, 2.5, 5.0, 10.0),
)
# Two bounds for each doubling, up to 131,072 tokens.
_LENGTH_BUCKETS = tuple(float(bound) for power in range(1, 18) for bound in (2**power * 3 // 4, 2**power) if bound > 0)
# All series of the router have the label `model_name`, as vLLM's do.
_VLLM_LABELS = ("engine",)
_TTFT_STAGES = ("tokenize", "rerun", "placement", "reserve", "prefill_queue", "prefill", "network")


class RouterMetrics:
    """``observe`` counts an ended sequence; the other counters are incremented where events happen."""

    def __init__(self, metrics: Metrics, *, has_vllm_names: bool = False) -> None:
        self._metrics = metrics
        self._has_vllm_names = has_vllm_names
        counter, counters, histogram = metrics.counter, metrics.counters, metrics.histogram
        self.outcomes = counters(
            "baton_requests",
            "Sequences by outcome and error code",
            "outcome",
            "code",
            preset=[("finished", ""), ("cancelled", "Cancelled"), ("failed", "InternalError")],
        )
        # Refused before a sequence existed.
        self.refusals = counters(
            "baton_refusals",
            "Requests refused at the door, by error code",
            "code",
            preset=_each("Overloaded", "RateLimited", "TooLate", "Shed", "Unavailable", "InvalidRequest"),
        )
        self.connections_closed = counters(
            "baton_http_connections_closed",
            "Clients' HTTP connections that the router closed, by reason",
            "reason",
            preset=_each("displaced", "full", "idle", "large_head", "malformed", "slow_head", "stuck"),
        )
        self.malformed = counter("baton_malformed_messages", "Messages over gRPC that could not be parsed")
        self.access_refusals = counter("baton_access_refusals", "Calls refused for want of a key that opens them")
        self.cancellations = counters(
            "baton_cancellations",
            "Sequences cancelled, by the phase they were in",
            "phase",
            preset=_each("queued", "prefilling", "decoding"),
        )
        self.placements = counters(
            "baton_placements",
            "Pairs of nodes chosen, by reason",
            "reason",
            preset=_each(*(reason.value for reason in Reason)),
        )
        self.placement_waits = counters(
            "baton_placement_waits",
            "Fruitless looks for a pair, by obstacle",
            "reason",
            preset=_each("no_node", "no_room"),
        )
        self.reservation_refusals = counters(
            "baton_reservation_refusals",
            "Reservations that a decode node refused, by error code",
            "code",
            preset=_each("NoBlocks"),
        )
        pools = _each(*(role.value for role in Role))
        self.node_losses = counters(
            "baton_node_losses", "Nodes that went down without having said so, by pool", "pool", preset=pools
        )
        self.node_drains = counters(
            "baton_node_drains", "Nodes that left as they had said, by pool", "pool", preset=pools
        )
        self.node_moves = counters(
            "baton_node_moves", "Nodes that left for another pool, by the pool that they left", "pool", preset=pools
        )
        self.migrations = counters(
            "baton_migrations",
            "Moves of running sequences, by why they were to move and what came of it",
            "reason",
            "outcome",
            preset=[(reason.value, outcome.value) for reason in MoveReason for outcome in MoveOutcome],
        )
        self.migration_pause = histogram(
            "baton_migration_pause_seconds",
            "Last token from the node that a sequence left to the first from the node that it moved to",
            LATENCY_BUCKETS_S,
        )
        self.migrated_bytes = counter("baton_migrated_bytes", "KV bytes of sequences that moved, as their nodes said")
        self.defects = counters(
            "baton_defects",
            "Unexpected exceptions, by the place that caught them",
            "where",
            preset=_each("sequence", "message", "membership", "watcher", "record", "link", "registry"),
        )
        self.reruns = counter("baton_reruns", "Attempts after the first, that is after a failure")
        self.recoveries = counter("baton_recoveries", "Finished sequences of which at least one attempt had failed")
        self.recovery = histogram(
            "baton_recovery_seconds", "Last sign of life before a failure to the next token", LATENCY_BUCKETS_S
        )
        self.prompt_tokens = counter("baton_prompt_tokens", "Prompt tokens of sequences that got a token")
        self.cached_tokens = counter("baton_cached_prompt_tokens", "Of these, found in a prefix cache")
        self.generated_tokens = counter("baton_generated_tokens", "Tokens generated")
        self._prompt_lengths = histogram(
            "baton_sequence_prompt_tokens", "Prompt tokens of each sequence that got a token", _LENGTH_BUCKETS
        )
        self._output_lengths = histogram(
            "baton_sequence_generated_tokens", "Tokens generated for each of these", _LENGTH_BUCKETS
        )
        self.ttft = histogram("baton_time_to_first_token_seconds", "Arrival to first token", LATENCY_BUCKETS_S)
        self._stages = [
            histogram(
                "baton_ttft_stage_seconds",
                "Parts of the time to the first token; their sums add up to its sum",
                LATENCY_BUCKETS_S,
                stage=stage,
            )
            for stage in _TTFT_STAGES
        ]
        self.second_token = histogram("baton_second_token_seconds", "First to second token", LATENCY_BUCKETS_S)
        self.tbt = histogram("baton_tbt_seconds", "Time between tokens, every interval", _TBT_BUCKETS_S)
        self.e2e = histogram("baton_request_duration_seconds", "Arrival to the outcome", LATENCY_BUCKETS_S)
        self.objectives = counters(
            "baton_slo_sequences",
            "Sequences by objective and whether they met it; all: every one that they have",
            "objective",
            "result",
            preset=[(name, result) for name in ("ttft", "tbt", "all") for result in ("met", "missed")],
        )
        self.slo_tokens = counter("baton_slo_tokens", "Tokens generated by sequences that met all their objectives")
        self.prediction_errors = {
            sign: histogram(
                "baton_ttft_prediction_error_seconds",
                "Predicted to real time to the first token of requests with an objective for it",
                LATENCY_BUCKETS_S,
                sign=sign,
            )
            for sign in ("early", "late")
        }
        self._finished = {
            reason: counter("baton_finished", "Sequences by finish reason, as vLLM counts them", reason=reason)
            for reason in (*(reason.value for reason in FinishReason), "abort")
        }

    def observe(self, outcome: Outcome, relay: Relay, num_prompt_tokens: int) -> None:
        self.outcomes.add(outcome.kind.value, "" if outcome.error is None else outcome.error.code)
        if outcome.finish_reason is not None:
            self._finished[outcome.finish_reason.value].add()
        elif outcome.kind is OutcomeKind.CANCELLED:
            self._finished["abort"].add()
        self.generated_tokens.add(relay.num_tokens)
        self.reruns.add(relay.attempts - 1)
        if relay.attempts > 1 and outcome.kind is OutcomeKind.FINISHED:
            self.recoveries.add()
        if relay.recovery_s:
            self.recovery.observe(relay.recovery_s)
        self.e2e.observe(relay.e2e_s)
        for move in relay.moves:
            self.migrated_bytes.add(move.num_bytes)
            if move.pause_s:
                self.migration_pause.observe(move.pause_s)
        self._observe_objectives(outcome, relay)
        if relay.num_tokens == 0:
            return
        self.prompt_tokens.add(num_prompt_tokens)
        self.cached_tokens.add(relay.num_cached_tokens)
        self._prompt_lengths.observe(num_prompt_tokens)
        self._output_lengths.observe(relay.num_tokens)
        self.ttft.observe(relay.ttft_s)
        for child, stage in zip(self._stages, relay.ttft_stages, strict=True):
            child.observe(stage.duration_s)
        if relay.num_tokens > 1:
            self.second_token.observe(relay.second_token_s)

    def observe_prediction(self, predicted_s: float, real_s: float) -> None:
        self.prediction_errors["late" if real_s > predicted_s else "early"].observe(abs(real_s - predicted_s))

    def _observe_objectives(self, outcome: Outcome, relay: Relay) -> None:
        """A failed sequence has missed all, whatever its times were."""
        if outcome.kind is OutcomeKind.REJECTED:
            return
        has_failed = outcome.kind is OutcomeKind.FAILED
        found = dict.fromkeys(relay.slo.names, False) if has_failed else relay.objectives
        for name, is_met in found.items():
            self.objectives.add(name, "met" if is_met else "missed")
        if found:
            is_good = all(found.values())
            self.objectives.add("all", "met" if is_good else "missed")
            self.slo_tokens.add(relay.num_tokens if is_good else 0)

    def add_state(
        self,
        phases: Callable[[], Mapping[Phase, int]],
        members: Callable[[], list[Member]],
        is_ready: Callable[[], bool],
    ) -> None:
        """Gauges over state kept elsewhere, read at scrape time."""

        def sequences() -> Mapping[Labels, float]:
            found = phases()
            return {(phase.value,): float(found.get(phase, 0)) for phase in Phase if phase is not Phase.ENDED}

        self._metrics.gauges("baton_sequences", "Sequences in flight, by phase", ("phase",), sequences)
        self._metrics.gauges(
            "baton_nodes", "Nodes the router knows, by pool and state", ("pool", "state"), lambda: _nodes(members())
        )
        self._metrics.gauge("baton_ready", "1 if requests can be served", lambda: float(is_ready()))
        if self._has_vllm_names:
            self._add_vllm_names(phases, members)

    def add_index(self, index: PrefixIndex) -> None:
        self._metrics.gauge(
            "baton_known_blocks",
            "Cached blocks that the router knows of, one for each node that has it",
            lambda: float(index.num_blocks),
        )
        help_text = "Cached blocks that nodes reported beyond the bound of those that the router knows"
        self._metrics.add(
            Family("baton_ignored_blocks", "counter", help_text, (), lambda: {(): float(index.num_ignored)})
        )

    def add_policy(self, policy: PolicyConfig) -> None:
        modes: Mapping[Labels, float] = {(mode,): float(mode == policy.disaggregation) for mode in MODES}
        about = "1 for the way in which requests are split, else 0"
        self._metrics.gauges("baton_disaggregation", about, ("mode",), lambda: modes)

    def _add_vllm_names(self, phases: Callable[[], Mapping[Phase, int]], members: Callable[[], list[Member]]) -> None:
        """After https://docs.vllm.ai/en/latest/design/metrics.html, with our buckets."""

        def show(name: str, kind: str, ours: str, read: Callable[[], float | Histogram]) -> None:
            help_text = f"As {ours}, under vLLM's name"
            self._metrics.add(Family(name, kind, help_text, _VLLM_LABELS, lambda: {("0",): read()}))

        def in_phases(*wanted: Phase) -> float:
            found = phases()
            return float(sum(found.get(phase, 0) for phase in wanted))

        def kv_usage() -> float:
            known = [m.status for m in members() if m.is_up and m.status is not None]
            num_blocks = sum(status.total_blocks for status in known)
            return 1.0 - sum(status.free_blocks for status in known) / num_blocks if num_blocks else 0.0

        show("vllm:time_to_first_token_seconds", "histogram", "baton_time_to_first_token_seconds", lambda: self.ttft)
        show("vllm:inter_token_latency_seconds", "histogram", "baton_tbt_seconds", lambda: self.tbt)
        show("vllm:e2e_request_latency_seconds", "histogram", "baton_request_duration_seconds", lambda: self.e2e)
        show("vllm:prompt_tokens", "counter", "baton_prompt_tokens_total", lambda: self.prompt_tokens.value)
        show("vllm:generation_tokens", "counter", "baton_generated_tokens_total", lambda: self.generated_tokens.value)
        show("vllm:prefix_cache_queries", "counter", "baton_prompt_tokens_total", lambda: self.prompt_tokens.value)
        show("vllm:prefix_cache_hits", "counter", "baton_cached_prompt_tokens_total", lambda: self.cached_tokens.value)
        show("vllm:num_requests_waiting", "gauge", "baton_sequences{phase=queued}", lambda: in_phases(Phase.QUEUED))
        show(
            "vllm:num_requests_running",
            "gauge",
            "baton_sequences in all other phases",
            lambda: in_phases(*(phase for phase in Phase if phase not in (Phase.QUEUED, Phase.ENDED))),
        )
        show("vllm:kv_cache_usage_perc", "gauge", "the share of used KV blocks, 1 is all,", kv_usage)

        def successes() -> Mapping[Labels, float]:
            return {("0", reason): child.value for reason, child in self._finished.items()}

        help_text = "As baton_finished_total, under vLLM's name"
        labels = (*_VLLM_LABELS, "finished_reason")
        self._metrics.add(Family("vllm:request_success", "counter", help_text, labels, successes))


def _each(*values: str) -> list[Labels]:
    return [(value,) for value in values]


def _nodes(members: list[Member]) -> Mapping[Labels, float]:
    """Every pool and state, zeros included: an alert must be able to see an empty pool."""
    found: dict[Labels, float] = {(pool.value, state.value): 0.0 for pool in Role for state in State}
    for member in members:
        if member.home_role is not None:
            found[(member.home_role.value, member.state.value)] += 1
    # The pool of a node that never answered is unknown.
    found[("unknown", State.CONNECTING.value)] = float(sum(m.home_role is None for m in members))
    return found
