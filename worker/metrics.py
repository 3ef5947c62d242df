"""The metrics of a worker. Its parts are read at scrape time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from baton.errors import BatonError
from baton.metrics import LATENCY_BUCKETS_S, Counter, Histogram, Labels, Metrics, add_process
from baton.node_messages import Joined
from baton.types import Lease, NodeDescription, NodeStatus, Role, TransferReport
from engine.blocks import BlockState
from engine.cost import CostModel
from engine.meter import EngineMeter
from engine.prefix_cache import CacheStats
from engine.replica import Replica
from kvtransfer.protocol.receiver_events import Arrived, LeaseNotice, Released
from kvtransfer.receiver import Receiver
from kvtransfer.sender import SenderObserver
from worker.config import Peaks
from worker.energy import EnergySource
from worker.roles import Reason, RoleChanged
from worker.service import LeaseObserver

_TRANSFER_BUCKETS_S = (
    *(0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075),
    *(0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
)
_RATIO_BUCKETS = tuple(i / 10 for i in range(11))
_FREE = "free"
_DEFECTS = ("prefill", "decode", "session", "engine", "transfer", "lease", "record", "health", "registration")


class _TransferMeter(SenderObserver):
    """Transfers that this node sent."""

    def __init__(self, metrics: Metrics, transports: Sequence[str]) -> None:
        self._kinds = {
            (transport, is_layerwise): _Transfers(metrics, transport, "layerwise" if is_layerwise else "whole")
            for transport in transports
            for is_layerwise in (True, False)
        }
        self._failures = metrics.counters(
            "baton_transfer_failures",
            "Transfers that ended without arriving, by error code",
            "code",
            preset=[("TransferFailed",), ("NodeLost",)],
        )

    def pushed(self, report: TransferReport) -> None:
        self._kinds[(report.transport, report.layerwise)].observe(report)

    def failed(self, error: BatonError) -> None:
        self._failures.add(error.code)


class _Transfers:
    """Of one transport and mode."""

    def __init__(self, metrics: Metrics, transport: str, mode: str) -> None:
        def histogram(name: str, help_text: str, bounds: Sequence[float]) -> Histogram:
            return metrics.histogram(name, help_text, bounds, transport=transport, mode=mode)

        self._seconds = histogram(
            "baton_transfer_seconds", "Transfers that arrived: first write to acknowledgement", _TRANSFER_BUCKETS_S
        )
        self._exposed = histogram(
            "baton_transfer_exposed_seconds",
            "Of these, the tail after the end of the prompt's computation",
            _TRANSFER_BUCKETS_S,
        )
        self._overlap = histogram(
            "baton_transfer_overlap_ratio", "Share of a transfer that computation hid, 0 to 1", _RATIO_BUCKETS
        )
        self._bytes = metrics.counter(
            "baton_transfer_bytes", "KV bytes handed over", transport=transport, mode=mode
        )  # fmt: skip
        self._retries = metrics.counter(
            "baton_transfer_rewritten_layers", "Layers written again, their digest being wrong",
            transport=transport, mode=mode,
        )  # fmt: skip

    def observe(self, report: TransferReport) -> None:
        self._seconds.observe(report.total_s)
        self._exposed.observe(report.exposed_s)
        if report.total_s > 0:
            self._overlap.observe(max(0.0, 1.0 - report.exposed_s / report.total_s))
        self._bytes.add(report.num_bytes)
        self._retries.add(report.retransmits)


class _LeaseMeter(LeaseObserver):
    """Leases that this node granted."""

    def __init__(self, metrics: Metrics) -> None:
        def counter(event: str) -> Counter:
            return metrics.counter("baton_leases", "Leases by how far they came", event=event)

        self._granted = counter("granted")
        self._arrived = counter("arrived")
        self._released = counter("released")
        self._wait = metrics.histogram("baton_lease_wait_seconds", "Lease granted to KV verified", LATENCY_BUCKETS_S)

    def told(self, message: Lease | Joined) -> None:
        match message:
            case Lease():
                self._granted.add()
            case Joined(_, wait_s):
                self._wait.observe(wait_s)

    def noticed(self, notice: LeaseNotice) -> None:
        match notice:
            case Arrived():
                self._arrived.add()
            case Released():
                self._released.add()


class _RoleMeter:
    """Changes of this node's roles."""

    def __init__(self, metrics: Metrics) -> None:
        away = [(role, Role.MIXED) for role in (Role.PREFILL, Role.DECODE)]
        moves = [(before, after) for before in Role for after in Role if before is not after]
        pairs = {
            Reason.BORROWED: away,
            Reason.RETURNED: [(mixed, home) for home, mixed in away],
            Reason.SCHEDULER: moves,
            Reason.OPERATOR: moves,
        }
        self._changes = metrics.counters(
            "baton_role_changes",
            "Changes of the acting role (borrowed, returned) and of the home role (scheduler, operator)",
            *("from", "to", "reason"),
            preset=[(a.value, b.value, reason.value) for reason, found in pairs.items() for a, b in found],
        )

    def changed(self, change: RoleChanged) -> None:
        self._changes.add(change.before.value, change.after.value, change.reason.value)


class WorkerMetrics:
    """Made before the worker's parts, which it watches once they are there."""

    def __init__(
        self,
        node: NodeDescription,
        cluster: str,
        cost: CostModel | None,
        peaks: Peaks,
        energy: Sequence[EnergySource],
    ) -> None:
        self._home: Callable[[], Role] = lambda: node.home_role
        # A process has one of each, so that they cost no series; queries need no joins.
        self.metrics = Metrics(
            {
                "cluster": cluster,
                "model_name": node.model.name,
                "node": node.node_id,
                # With the home role it changes: what the node counts from then on counts for the other pool.
                "pool": lambda: self._home().value,
            }
        )
        add_process(self.metrics, "worker")
        self.engine = EngineMeter(self.metrics, cost)
        self.transfers = _TransferMeter(self.metrics, node.transports)
        counter = self.metrics.counter
        self.defects = self.metrics.counters(
            "baton_worker_defects",
            "Unexpected exceptions, by the place that caught them",
            "where",
            preset=[(where,) for where in _DEFECTS],
        )
        self.malformed = counter("baton_malformed_messages", "Messages over gRPC that could not be parsed")
        self.access_refusals = counter("baton_access_refusals", "Calls refused for want of a key that opens them")
        self.leases = _LeaseMeter(self.metrics)
        self.roles = _RoleMeter(self.metrics)
        self._add_info(node)
        self._add_peaks(peaks)
        for source in energy:
            self._add_energy(source)

    def watch(
        self,
        replica: Replica,
        receiver: Receiver,
        status: Callable[[], NodeStatus],
        is_draining: Callable[[], bool],
    ) -> None:
        self._home = lambda: status().home_role
        gauge, counting = self.metrics.gauge, self.metrics.counting
        gauge(
            "baton_prefill_queue_tokens",
            "Prompt tokens accepted and not yet computed",
            lambda: status().queued_prompt_tokens,
        )
        gauge(
            "baton_decode_queue_tokens", "Tokens of sequences that wait for their KV to arrive", replica.leased_tokens
        )
        gauge("baton_decode_running_tokens", "Tokens held in KV by decoding sequences", lambda: status().running_tokens)
        gauge("baton_node_waiting_sequences", "Prompts queued or being computed", lambda: status().num_waiting)
        gauge("baton_node_running_sequences", "Sequences that decode", lambda: status().num_running)
        gauge("baton_engine_stalled_seconds", "Since the last step, while there is work", lambda: replica.stalled_s)
        gauge("baton_node_draining", "1 while the node takes nothing new", lambda: float(is_draining()))
        counting(
            "baton_preemptions",
            "Sequences that lost their KV blocks to older ones",
            lambda: replica.stats().num_preempted,
        )
        counting(
            "baton_digest_failures",
            "Commits refused because bytes had changed on their way here",
            lambda: receiver.num_digest_failures,
        )
        self._add_caps(replica)
        self._add_roles(status)
        self._add_ledger(replica)
        self._add_prefix_cache(replica)

    def _add_caps(self, replica: Replica) -> None:
        config = replica.limits
        gauge = self.metrics.gauge
        gauge("baton_max_batch_tokens", "Prompt tokens of a step at most", lambda: config.max_batch_tokens)
        gauge("baton_max_num_seqs", "Sequences that run at once at most", lambda: config.max_num_seqs)
        gauge(
            "baton_tbt_target_seconds",
            "What a step that decodes beside prompts may take; 0: any time",
            lambda: config.tbt_target_s or 0.0,
        )

    def _add_roles(self, status: Callable[[], NodeStatus]) -> None:
        def acting() -> Mapping[Labels, float]:
            now = status().role
            return {(role.value,): float(role is now) for role in Role}

        about = "1 for the role that the node acts in, else 0"
        self.metrics.gauges("baton_node_role", about, ("role",), acting)
        pinned = "1 while an operator has set its home role"
        self.metrics.gauge("baton_node_pinned", pinned, lambda: float(status().is_pinned))

    def _add_prefix_cache(self, replica: Replica) -> None:
        def counting(name: str, help_text: str, value: Callable[[CacheStats], int]) -> None:
            self.metrics.counting(f"baton_prefix_cache_{name}", help_text, lambda: value(replica.cache_stats()))

        counting("query_tokens", "Known tokens of sequences that began or were reserved for", lambda s: s.query_tokens)
        counting("hit_tokens", "Of these, tokens whose KV was there", lambda s: s.hit_tokens)
        counting("stored_blocks", "Blocks that were found by their content from then on", lambda s: s.stored_blocks)
        counting("evicted_blocks", "Blocks given up for others, or because of the limit", lambda s: s.evicted_blocks)
        counting("corrupt", "Blocks whose bytes had changed, which were computed anew", lambda s: s.corrupt_blocks)
        self.metrics.gauge(
            "baton_prefix_cache_known_blocks",
            "KV blocks that are found by their content, held by sequences or not",
            lambda: float(replica.cache_stats().known_blocks),
        )

    def _add_ledger(self, replica: Replica) -> None:
        def by_state() -> Mapping[Labels, float]:
            _, num_free, owners = replica.ledger()
            found: dict[Labels, float] = {(state.value,): 0.0 for state in BlockState}
            found[(_FREE,)] = float(num_free)
            for line in owners:
                found[(line.state.value,)] += line.num_blocks
            return found

        def mismatch() -> float:
            total, num_free, owners = replica.ledger()
            return float(abs(total - num_free - sum(line.num_blocks for line in owners)))

        def quarantine_age_s() -> float:
            _, _, owners = replica.ledger()
            return max((line.age_s for line in owners if line.state is BlockState.QUARANTINED), default=0.0)

        gauge = self.metrics.gauge
        self.metrics.gauges("baton_kv_blocks", "KV blocks by ledger state", ("state",), by_state)
        gauge("baton_kv_mismatched_blocks", "Blocks without an owner, or with two: always 0", mismatch)
        gauge("baton_kv_quarantine_age_seconds", "Of the blocks longest in quarantine", quarantine_age_s)

    def _add_info(self, node: NodeDescription) -> None:
        labels = {
            "model": node.model.name,
            "dtype": node.model.dtype,
            "device": node.device,
            "kernels": node.kernels,
            "version": node.software_version,
        }
        self.metrics.gauge("baton_node_info", "1; the labels say what runs", lambda: 1.0, **labels)
        block_bytes = float(node.kv_layout.block_bytes * node.kv_layout.num_layers)
        self.metrics.gauge("baton_kv_block_bytes", "Bytes of one KV block, all layers", lambda: block_bytes)

    def _add_peaks(self, peaks: Peaks) -> None:
        """Always a family, so that it can be documented; without a peak it has no value and is not shown."""
        gauge = self.metrics.gauge
        gauge("baton_peak_flops", "Operations per second the hardware can do", lambda: peaks.flops or None)
        gauge("baton_peak_bytes_per_second", "Memory traffic it can do", lambda: peaks.bytes_per_s or None)

    def _add_energy(self, source: EnergySource) -> None:
        labels = {"source": source.source, "device": source.device}
        self.metrics.counting("baton_energy_joules", "Energy drawn since the worker's start", source.joules, **labels)
        self.metrics.gauge("baton_power_watts", "Power drawn now", source.watts, **labels)
