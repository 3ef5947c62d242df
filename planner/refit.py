"""A profile after a measured run: each part is taken from the run where it fits the run better. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import median

from loadgen.client import Answer
from planner.fitted import NO_PACE, Sharing, Transfers
from planner.measured import Measured
from planner.observed import Observed, transfers_of
from planner.overhead import busy_of, busy_share, expected, waits
from planner.steps import Found, found_in, paced, predicted_s

# A part is taken if it explains so much more of the time.
_LEAST_GAIN = 0.01


@dataclass(frozen=True, slots=True)
class Change:
    """``before`` and ``after``: the time of the run that the part did not explain, in that measured."""

    part: str
    before: float
    after: float

    @property
    def is_taken(self) -> bool:
        return self.after < self.before - _LEAST_GAIN


def refitted(
    measured: Measured, runs: Sequence[tuple[Observed, Sequence[Answer]]]
) -> tuple[Measured, tuple[Change, ...]]:
    """All parts that the runs have something to say about, taken or not. Raises BadConfig if they have too few
    steps."""
    changes: list[Change] = []
    observed = Observed.joined([of for of, _ in runs])
    # All steps may have become slower or faster: what was measured before then says how shapes compare.
    old = Found(measured.line, measured.points, measured.wake, measured.sharing, measured.pace)
    calm = old._replace(pace=NO_PACE)
    slower = median(took_s / said_s for said_s, took_s in predicted_s(calm, observed.steps))
    new = found_in(observed.steps, [replace(point, seconds=point.seconds * slower) for point in measured.points])
    # Beside more nodes than this run had, what was measured before holds.
    sharing = Sharing(*(
        (*ours, *theirs[len(ours):]) for ours, theirs in
        ((new.sharing.prompt, old.sharing.prompt), (new.sharing.decode, old.sharing.decode))
    ))  # fmt: skip
    # Step by step, without what interrupts some of them.
    new = new._replace(sharing=sharing, pace=NO_PACE)
    steps = Change("steps", *(_missed(predicted_s(found, observed.steps)) for found in (calm, new)))
    changes.append(steps)
    if steps.is_taken:
        measured = replace(measured, line=new.line, points=new.points, wake=new.wake, sharing=sharing)
    # What interrupts them is known in all alone.
    kept = new if steps.is_taken else old
    with_pace = paced(kept, observed.steps)
    pace = Change("interruptions", *(_missed_in_all(predicted_s(found, observed.steps)) for found in (kept, with_pace)))
    changes.append(pace)
    if pace.is_taken or steps.is_taken:
        measured = replace(measured, pace=with_pace.pace)
    transfers = transfers_of(observed.transfers, measured.kv_layout.num_layers)
    if transfers is not None:
        num_layers = measured.kv_layout.num_layers
        change = Change(
            "transfers", _missed_moves(observed, measured.transfers, num_layers),
            _missed_moves(observed, transfers, num_layers),
        )  # fmt: skip
        changes.append(change)
        if change.is_taken:
            measured = replace(measured, transfers=transfers)
    measured, found = _with_waits(measured, runs)
    changes += found
    fixed_s = [seconds for run in runs for seconds in _fixed_s(*run)]
    if fixed_s:
        before_s, after_s = measured.requests.fixed_s, max(0.0, median(fixed_s))
        change = Change(
            "requests", *(_missed([(said_s, took_s) for took_s in fixed_s]) for said_s in (before_s, after_s))
        )
        changes.append(change)
        if change.is_taken:
            measured = replace(measured, requests=replace(measured.requests, fixed_s=after_s))
    return measured, tuple(changes)


def _with_waits(
    measured: Measured, runs: Sequence[tuple[Observed, Sequence[Answer]]]
) -> tuple[Measured, list[Change]]:  # fmt: skip
    """What messages and hand-overs wait for nodes that compute, by the run whose nodes did so for most of the time."""
    busy = max((busy_of(of.relays, of.steps, measured.line) for of, _ in runs), key=lambda each: busy_share(each.steps))
    if not busy.is_telling:
        return measured, []
    message_s, join_s = waits(busy, measured.requests)
    new = replace(measured.overhead, busy_message_s=message_s, busy_join_s=join_s)
    change = Change("messages", *(_missed(expected(of, measured.requests, busy)) for of in (measured.overhead, new)))
    return replace(measured, overhead=new) if change.is_taken else measured, [change]


def _missed(found: Sequence[tuple[float, float]]) -> float:
    """Of (predicted, measured)."""
    total_s = sum(abs(took_s) for _, took_s in found)
    return sum(abs(said_s - took_s) for said_s, took_s in found) / total_s if total_s else 0.0


def _missed_in_all(found: Sequence[tuple[float, float]]) -> float:
    total_s = sum(took_s for _, took_s in found)
    return abs(sum(said_s for said_s, _ in found) - total_s) / total_s if total_s else 0.0


def _missed_moves(observed: Observed, transfers: Transfers | None, num_layers: int) -> float:
    reports = observed.transfers
    return _missed([
        (0.0 if transfers is None else transfers.seconds(one.num_bytes / (num_layers if one.layerwise else 1)),
         one.exposed_s) for one in reports
    ])  # fmt: skip


def _fixed_s(observed: Observed, answers: Sequence[Answer]) -> Iterable[float]:
    """Of each request, in the order they were sent: what its client waited for beyond what the router counted. Nothing
    if the router did not keep all of them."""
    whole = sorted((answer for answer in answers if answer.error is None), key=lambda answer: answer.sent_s)
    if len(whole) == len(observed.relays):
        for answer, relay in zip(whole, observed.relays, strict=True):
            yield answer.stamps_s[0] - answer.sent_s - relay.ttft_s + relay.tokenize_s
