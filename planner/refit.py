"""A profile after a measured run: each part is taken from the run where it fits the run better. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import median

from loadgen.client import Answer
from planner.fitted import Line, Sharing, Transfers
from planner.measured import Measured
from planner.observed import Observed, transfers_of
from planner.steps import RecordedStep, found_in, nodes_beside

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
    pace = _pace(observed.steps, measured)
    known = [replace(point, seconds=point.seconds * pace) for point in measured.points]
    found = found_in(observed.steps, known)
    # Beside more nodes than this run had, what was measured before holds.
    sharing = Sharing(*(
        (*new, *old[len(new):]) for new, old in
        ((found.sharing.prompt, measured.sharing.prompt), (found.sharing.decode, measured.sharing.decode))
    ))  # fmt: skip
    steps = Change(
        "steps", _missed(observed.steps, measured.line, measured.sharing), _missed(observed.steps, found.line, sharing)
    )
    changes.append(steps)
    if steps.is_taken:
        measured = replace(measured, line=found.line, points=found.points, sharing=sharing)
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
    fixed_s = [seconds for run in runs for seconds in _fixed_s(*run)]
    if fixed_s:
        before_s, after_s = measured.requests.fixed_s, max(0.0, median(fixed_s))
        change = Change("requests", *(_off(fixed_s, [x] * len(fixed_s)) for x in (before_s, after_s)))
        changes.append(change)
        if change.is_taken:
            measured = replace(measured, requests=replace(measured.requests, fixed_s=after_s))
    return measured, tuple(changes)


def _pace(steps: Sequence[RecordedStep], measured: Measured) -> float:
    """Time of the median step in that predicted."""
    beside = nodes_beside(steps)
    line, sharing = measured.line, measured.sharing
    ratios = [
        step.turn_s / (line.step_s(step.shape) * sharing.factor(step.shape, num_beside))
        for step, num_beside in zip(steps, beside, strict=True)
    ]
    return median(ratios) if ratios else 1.0


def _off(found: Sequence[float], predicted: Sequence[float]) -> float:
    total = sum(map(abs, found))
    return sum(abs(a - b) for a, b in zip(found, predicted, strict=True)) / total if total else 0.0


def _missed(steps: Sequence[RecordedStep], line: Line, sharing: Sharing) -> float:
    beside = nodes_beside(steps)
    predicted = [
        line.step_s(step.shape) * sharing.factor(step.shape, num) for step, num in zip(steps, beside, strict=True)
    ]
    return _off([step.turn_s for step in steps], predicted)


def _missed_moves(observed: Observed, transfers: Transfers | None, num_layers: int) -> float:
    reports = observed.transfers
    predicted = [
        0.0 if transfers is None else transfers.seconds(one.num_bytes / (num_layers if one.layerwise else 1))
        for one in reports
    ]
    return _off([one.exposed_s for one in reports], predicted)


def _fixed_s(observed: Observed, answers: Sequence[Answer]) -> Iterable[float]:
    """Of each request, in the order they were sent: what its client waited for beyond what the router counted. Nothing
    if the router did not keep all of them."""
    whole = sorted((answer for answer in answers if answer.error is None), key=lambda answer: answer.sent_s)
    if len(whole) == len(observed.relays):
        for answer, relay in zip(whole, observed.relays, strict=True):
            yield answer.stamps_s[0] - answer.sent_s - relay.ttft_s + relay.tokenize_s
