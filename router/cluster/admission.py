"""Whether a request can be served within its objectives: what cannot is refused at its arrival, not after a wait. Pure.

A prediction of the first token is the wait in the line, by the pace at which it has moved, plus queue and prompt on a
node (`Scheduler.predicted_ttft_s`). It is corrected by what became of earlier predictions. The time between tokens
follows from the step times that nodes measure.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from baton import errors
from router.cluster.config import PolicyConfig
from router.cluster.load import NodeLoad

# Sightings that count: each new one takes so much from those before.
_KEPT = 0.95
# A correction beyond these is a fault of something else.
_LEAST_SLOPE, _MOST_SLOPE = 0.5, 4.0
_MIN_RETRY_AFTER_S = 1.0
_MAX_RETRY_AFTER_S = 30.0
_WHY_SHED = " of which requests of priority above 0 leave a share to the others"


def retry_after_s(expected_s: float) -> float:
    """What a refused client is told, if it is expected to be served after so long."""
    return min(max(_MIN_RETRY_AFTER_S, expected_s), _MAX_RETRY_AFTER_S)


class Pace:
    """Seconds between two sequences that leave the line, measured while more of them wait."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._num_started = 0.0
        # The last start after which the line was not empty.
        self._since_s: float | None = None

    def started(self, num_left: int, now: float) -> None:
        """One has left the line, which has ``num_left`` now."""
        if self._since_s is not None:
            self._seconds = self._seconds * _KEPT + now - self._since_s
            self._num_started = self._num_started * _KEPT + 1
        self._since_s = now if num_left else None

    def left(self, num_left: int) -> None:
        """One has left the line without being started."""
        if not num_left:
            self._since_s = None

    def wait_s(self, num_ahead: int, now: float) -> float:
        """Until so many have left; 0 if nothing was measured."""
        if not num_ahead or not self._num_started:
            return 0.0
        open_s = 0.0 if self._since_s is None else now - self._since_s
        each_s = self._seconds / self._num_started
        # A line that stands still is slower than it was.
        return num_ahead * max(each_s, (self._seconds + open_s) / (self._num_started + 1))


class Prediction(NamedTuple):
    """Of a time to the first token, from arrival."""

    # As computed, and corrected by what became of earlier ones.
    computed_s: float
    ttft_s: float

    def check(self, objective_s: float, *, is_sheddable: bool, config: PolicyConfig) -> None:
        """Raises TooLate if the objective would be missed. Sheddable requests leave a share of it to the others, so
        they are refused first."""
        bound_s = objective_s * (config.sheddable_share if is_sheddable else config.admitted_share)
        if self.ttft_s > bound_s:
            what = f"the first token is predicted in {self.ttft_s:.3g} s"
            raise _late(
                what, objective_s, self.ttft_s - bound_s, "slo_ttft_s, x-slo-ttft-ms", is_sheddable=is_sheddable
            )


class TokenPace(NamedTuple):
    """Predicted times between two tokens of a sequence."""

    # Beside all that will be decoded there, and without any other sequence.
    tbt_s: float
    alone_s: float

    @classmethod
    def of(cls, nodes: Iterable[NodeLoad], num_tokens: int) -> TokenPace:
        """With so many tokens, on the node where it is best; 0 while a node has not been measured."""

        def on(node: NodeLoad) -> TokenPace:
            if not node.is_measured:
                return cls(0.0, 0.0)
            num_sequences = node.num_sequences + node.foreign_sequences + 1
            tbt_s = node.times.step_s(0, num_sequences, node.pending_decode_tokens + num_tokens)
            return cls(tbt_s, node.times.step_s(0, 1, num_tokens))

        return min(map(on, nodes))

    def check(self, objective_s: float, next_end_s: float, *, is_sheddable: bool, config: PolicyConfig) -> None:
        """Raises TooLate if the objective would be missed, and could be met at another time. Sheddable requests leave a
        share of what is beyond ``alone_s`` to the others. ``next_end_s``: until a sequence ends."""
        share = config.sheddable_share if is_sheddable else 1.0
        if self.alone_s <= objective_s and self.tbt_s > self.alone_s + (objective_s - self.alone_s) * share:
            what = f"the time between tokens is predicted to be {self.tbt_s:.3g} s"
            raise _late(what, objective_s, next_end_s, "slo_tbt_s, x-slo-tpot-ms", is_sheddable=is_sheddable)


def _late(what: str, objective_s: float, wait_s: float, names: str, *, is_sheddable: bool) -> errors.TooLate:
    kind, why = (errors.Shed, _WHY_SHED) if is_sheddable else (errors.TooLate, "")
    return kind(
        f"{what}, too late for the objective of {objective_s:.3g} s{why}; try again later, or with a longer one "
        f"({names})",
        retry_after_s=retry_after_s(wait_s),
    )


class Correction:
    """Real times to the first token by computed ones: a line through the newest."""

    def __init__(self) -> None:
        self._slope = 1.0
        self._offset_s = 0.0
        # By weight: sightings, computed times, real times, computed times squared, computed times real times. At first
        # one that was right at nothing, and one at a second.
        self._sums = [2.0, 1.0, 1.0, 1.0, 1.0]

    def prediction(self, computed_s: float) -> Prediction:
        return Prediction(computed_s, max(0.0, self._offset_s + self._slope * computed_s))

    def turned_out(self, prediction: Prediction, real_s: float) -> None:
        computed_s = prediction.computed_s
        seen = (1.0, computed_s, real_s, computed_s * computed_s, computed_s * real_s)
        self._sums = [before * _KEPT + new for before, new in zip(self._sums, seen, strict=True)]
        count, computed, real, squares, products = self._sums
        spread = count * squares - computed * computed
        if spread > 1e-6 * count * count:
            slope = (count * products - computed * real) / spread
            self._slope = min(max(slope, _LEAST_SLOPE), _MOST_SLOPE)
        self._offset_s = (real - self._slope * computed) / count
