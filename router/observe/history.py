"""The last ended sequences in bounded memory, and their lifelines as stages, for the status page and traces."""

from __future__ import annotations

from collections import deque
from itertools import islice

from baton.observe import Relay
from router.dispatch.dispatcher import Dispatcher
from router.dispatch.records import Ended

_MAX_ENDED = 1024


class History:
    """Newest last."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._ended: deque[Ended] = deque(maxlen=_MAX_ENDED)
        dispatcher.records.watch(self._ended.append)

    def newest(self, count: int) -> list[Ended]:
        """Newest first."""
        return list(islice(reversed(self._ended), count))

    def since(self, at_s: float) -> list[Ended]:
        """Those that ended at this time or later, oldest first."""
        return [e for e in self._ended if e.arrived_s + e.relay.e2e_s >= at_s]


def stages(relay: Relay) -> list[tuple[str, float, float]]:
    """Name, start after arrival and length in seconds of each stage, in order; they add up to ``e2e_s``.

    The transfer stage is its part between first and second token. Each length was measured by one clock, and a stage
    starts where the one before it ends, so no two clocks are compared.
    """
    if not relay.num_tokens:
        return [("no token", 0.0, relay.e2e_s)] if relay.e2e_s > 0 else []
    exposed_s = min(relay.transfer.exposed_s, relay.second_token_s) if relay.transfer else 0.0
    parts = [*relay.ttft_stages, ("transfer", exposed_s), ("decode", relay.e2e_s - relay.ttft_s - exposed_s)]
    found: list[tuple[str, float, float]] = []
    at_s = 0.0
    for name, length_s in parts:
        if length_s > 0:
            found.append((name, at_s, length_s))
            at_s += length_s
    return found
