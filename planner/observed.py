"""What a running cluster did under a load, and what its requests, transfers and nodes' power come to. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from baton.observe import Relay
from baton.types import TransferReport
from planner.fitted import RequestTimes, Transfers, fitted_transfers
from planner.measured import Power
from planner.steps import RecordedStep


@dataclass(frozen=True, slots=True)
class Observed:
    """By the records of its router and its nodes; relays in the order of arrival."""

    steps: tuple[RecordedStep, ...] = ()
    transfers: tuple[TransferReport, ...] = ()
    relays: tuple[Relay, ...] = ()

    @classmethod
    def joined(cls, parts: Sequence[Observed]) -> Observed:
        return cls(
            tuple(step for part in parts for step in part.steps),
            tuple(report for part in parts for report in part.transfers),
            tuple(relay for part in parts for relay in part.relays),
        )


def transfers_of(reports: Sequence[TransferReport], num_layers: int) -> Transfers | None:
    """By what was not hidden behind the prompt: all bytes, or those of the last layer."""
    return fitted_transfers(
        [(one.num_bytes / (num_layers if one.layerwise else 1), one.exposed_s) for one in reports]
    )  # fmt: skip


def layerwise_from_bytes(reports: Sequence[TransferReport]) -> int | None:
    """The least size that was sent layer by layer; None if none was."""
    return min((one.num_bytes for one in reports if one.layerwise and one.num_bytes), default=None)


def request_times(relays: Sequence[Relay], client_ttfts_s: Sequence[float], decode_s: float = 0.0) -> RequestTimes:
    """Of requests one after the other, each of whose second tokens took a step of ``decode_s``. A split one has four
    messages before its first token (reserve, lease, run, token), a whole one two."""
    if not relays or not client_ttfts_s:
        return RequestTimes()
    fixed_s = median(client_ttfts_s) - median(relay.ttft_s - relay.tokenize_s - relay.placement_s for relay in relays)
    messages = [
        (relay.reserve_s + relay.prefill_queue_s + relay.network_s) / (4 if relay.reserve_s > 0 else 2)
        for relay in relays
    ]
    joins_s = [
        relay.second_token_s - relay.transfer.exposed_s - decode_s
        for relay in relays
        if relay.transfer is not None and relay.second_token_s > 0
    ]
    return RequestTimes(max(0.0, fixed_s), median(messages), max(0.0, median(joins_s)) if joins_s else 0.0)


def power_of(
    idle_w: float | None, joules: float | None, elapsed_s: float, steps: Sequence[RecordedStep], num_nodes: int
) -> Power | None:
    """Of a node, from what all of them drew while ``steps`` ran. None without a counter, or if nothing ran."""
    busy_s = sum(step.turn_s for step in steps)
    if idle_w is None or joules is None or not busy_s:
        return None
    idle_s = max(0.0, num_nodes * elapsed_s - busy_s)
    return Power(idle_w, max(idle_w, (joules - idle_w * idle_s) / busy_s))
