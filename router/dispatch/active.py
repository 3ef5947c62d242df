"""A sequence in flight: its flow, the stream to its client, and its timer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from baton.clock import catch_up_s
from router.cluster.admission import Prediction
from router.cluster.policy import Demand
from router.dispatch.records import Origin
from router.dispatch.stream import TokenStream
from router.flow.machine import Flow


class Active:
    """Compared by identity. It is what the scheduler places."""

    __slots__ = ("_patient_until_s", "_timer", "_timer_s", "client", "fingerprint", "flow", "is_leading", "origin",
                 "prediction", "stream")  # fmt: skip

    def __init__(
        self, flow: Flow, stream: TokenStream, origin: Origin, client: str, prediction: Prediction | None = None
    ) -> None:
        self.flow = flow
        self.stream = stream
        self.origin = origin
        # The client that its turns are counted for.
        self.client = client
        # Of its time to the first token, until that is known.
        self.prediction = prediction
        # Other choices of its prompt may wait for what it leaves at the nodes.
        self.is_leading = flow.prompt.num_choices > 1
        # The model that its tokens come from: no other model may continue it. Empty before the first token.
        self.fingerprint = ""
        self._timer: asyncio.TimerHandle | None = None
        self._timer_s = 0.0
        # Nothing is judged before: the timer fired too late.
        self._patient_until_s = 0.0

    @property
    def sequence_id(self) -> str:
        return self.flow.sequence_id

    @property
    def has_tokens(self) -> bool:
        return bool(self.flow.tokens)

    def can_move_from(self, node_id: str) -> bool:
        placement = self.flow.placement
        return placement is not None and placement.decode_id == node_id and self.flow.can_move

    def demand(self, now: float) -> Demand:
        return self.flow.demand(now)

    def arm(self, now: float, on_timer: Callable[[Active], None]) -> None:
        """One timer per sequence; a deadline that moves back costs nothing, `is_due` looks again when it fires."""
        if self.flow.has_ended:
            return
        wake_s = self._wake_at_s
        if self._timer is not None:
            if self._timer_s <= wake_s:
                return
            self._timer.cancel()
        self._timer_s = wake_s
        self._timer = asyncio.get_running_loop().call_later(max(0.0, wake_s - now), on_timer, self)

    def is_due(self, now: float) -> bool:
        """The timer has fired. Whether the flow gets its tick; else the timer is to be armed again."""
        self._timer = None
        if self.flow.has_ended:
            return False
        if more_s := catch_up_s(now - self._timer_s):
            # The router itself is late: what nodes sent meanwhile waits in the sockets, and is read first.
            self._patient_until_s = now + more_s
        return now >= self._wake_at_s

    def disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    @property
    def _wake_at_s(self) -> float:
        return max(self.flow.wake_at_s, self._patient_until_s)
