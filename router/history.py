"""The last sequences that ended, in bounded memory: what the status page and traces show of the past."""

from __future__ import annotations

from collections import deque
from itertools import islice

from baton.v1 import router_pb2
from router.dispatch import Dispatcher, Ended
from router.wire import relay_to_pb

_MAX_ENDED = 1024


class History:
    """Newest last."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._ended: deque[Ended] = deque(maxlen=_MAX_ENDED)
        dispatcher.watch_ends(self._ended.append)

    def newest(self, count: int) -> list[Ended]:
        """Newest first."""
        return list(islice(reversed(self._ended), count))

    def trace(self, router_id: str, now: float, last_s: float) -> router_pb2.ClusterTraceResponse:
        """What ended in the last seconds, as the router's part of a trace."""
        part = router_pb2.ClusterTraceResponse.RouterTrace(router_id=router_id, now_s=now)
        for ended in self._ended:
            if ended.arrived_s + ended.relay.e2e_s >= now - last_s:
                part.requests.add(
                    request_id=ended.request_id,
                    choice=ended.choice,
                    outcome=ended.outcome.kind.value,
                    arrived_s=ended.arrived_s,
                    relay=relay_to_pb(ended.relay),
                )
        return router_pb2.ClusterTraceResponse(router=part)
