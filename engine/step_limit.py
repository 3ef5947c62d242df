"""How long the next step may take, so that no sequence waits too long for its next token.

Pure. Without ``tbt_target_s`` no step has a limit.
"""

from __future__ import annotations

from engine.scheduler_config import SchedulerConfig
from engine.step import StepShape
from engine.step_times import MeasuredSteps


class StepLimit:
    """Knows who waits for the next steps, and when those under way are predicted to be over."""

    def __init__(self, config: SchedulerConfig, measured: MeasuredSteps) -> None:
        self._config = config
        self._measured = measured
        # Whether a sequence that decodes was not in the two newest plans, because it waited for the host.
        self._sits_out = False, False
        # Leased sequences that will join soon.
        self._expected: set[str] = set()
        # Other nodes compute sequences for this one, which may arrive in the middle of any step.
        self._is_handed_to = False
        # When the first of the sequences joined that are in no step yet; None: there is none.
        self._joined_s: float | None = None
        # When the steps under way are predicted to be over.
        self._over_s = 0.0

    def handed_to(self) -> None:
        """A sequence that another node computes has a lease here."""
        self._is_handed_to = True

    def expect(self, sequence_id: str) -> None:
        self._expected.add(sequence_id)

    def expect_no_more(self, sequence_id: str) -> None:
        self._expected.discard(sequence_id)

    def joined(self, sequence_id: str, now: float) -> None:
        self._expected.discard(sequence_id)
        self._joined_s = now if self._joined_s is None else self._joined_s

    def planned(self, *, sits_out: bool) -> None:
        """``sits_out``: a sequence that decodes is not in the step that is being planned, as it waits for the host."""
        self._sits_out = self._sits_out[1], sits_out

    def decoded(self, num_steps: int) -> None:
        """Steps ran in which all sequences decoded."""
        self._sits_out = (self._sits_out[1], False) if num_steps == 1 else (False, False)
        self._joined_s = None

    def begins_s(self, now: float, *, is_ahead: bool) -> float:
        """``is_ahead``: a step is under way, which the next one has to wait for."""
        return max(now, self._over_s) if is_ahead else now

    def next_s(self, decoding: StepShape, begins_s: float) -> float | None:
        """How long the step may take that begins then and has all that joined; None: no sequence waits for its next
        token, nor may come to.

        A sequence that waits for the host is in every second step only: its gap is two of them.
        """
        joined_s, self._joined_s = self._joined_s, None
        target_s = self._config.tbt_target_s
        if target_s is None:
            return None
        if not (decoding.num_decoding or self._expected or self._sits_out[1]):
            return self._config.prompt_step_targets * target_s if self._is_handed_to else None
        # One that joined while another step was under way has waited for this one.
        waited_s = 0.0 if joined_s is None else begins_s - joined_s
        progress_s = self._measured.step_s(decoding) / (1 - self._config.min_prompt_share)
        return max(progress_s, (target_s / 2 if any(self._sits_out) else target_s) - waited_s)

    def began(self, shape: StepShape, begins_s: float) -> None:
        self._over_s = begins_s + self._measured.step_s(shape)
