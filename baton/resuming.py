"""A stream that outlives its router: what has come of it, and the request that goes on with it at any router."""

from __future__ import annotations

from dataclasses import dataclass

from baton import errors
from baton.v1 import router_pb2

_FIRST_WAIT_S, _MAX_WAIT_S = 0.1, 1.0


@dataclass(frozen=True, slots=True)
class Loss:
    """How a call failed."""

    # The router is gone or leaves. Else it has answered, and stays.
    is_connection: bool
    retryable: bool


class ResumableStream:
    """The caller sends ``request`` to the router number ``router``, shows every message to `take`, and asks `wait_s`
    when the call has failed."""

    def __init__(self, request: router_pb2.GenerateRequest, num_routers: int, patience_s: float, now: float) -> None:
        """``patience_s``: how long a stream may stand still after it was lost."""
        self.router = 0
        self._request = request
        self._num_routers = num_routers
        self._patience_s = patience_s
        self._began_s = now
        self._accepted: router_pb2.GenerateResponse.Accepted | None = None
        self._token_ids: list[int] = []
        self._has_whole_text = False
        # Since the last message: failures, and when to give up.
        self._num_losses = 0
        self._give_up_s = 0.0

    def request(self, now: float) -> router_pb2.GenerateRequest:
        """What the next router is asked."""
        if self._accepted is None:
            return self._request
        request = router_pb2.GenerateRequest()
        request.CopyFrom(self._request)
        request.request_id = self._accepted.request_id
        request.resume.seed = self._accepted.seed
        request.resume.token_ids.extend(self._token_ids)
        request.resume.has_whole_text = self._has_whole_text
        if request.timeout_s:
            request.timeout_s = max(0.001, request.timeout_s - (now - self._began_s))
        return request

    def take(self, message: router_pb2.GenerateResponse) -> bool:
        """Whether the message is new to the caller. Raises Incompatible for another router's answer to another prompt:
        a chat template may write the date."""
        match message.WhichOneof("message"):
            case "accepted" if self._accepted is None:
                self._accepted = message.accepted
                return True
            case "accepted":
                if self._accepted is not None and message.accepted.prompt_token_ids != self._accepted.prompt_token_ids:
                    raise errors.Incompatible(
                        "the stream was lost, and the next router makes another prompt of the request: its chat "
                        "template depends on the time, or it serves another model"
                    )
                return False
            case "delta":
                self._token_ids += message.delta.token_ids
                self._has_whole_text |= message.delta.has_whole_text
        self._num_losses = 0
        return True

    def wait_s(self, loss: Loss, now: float) -> float | None:
        """Seconds until the next try, at ``router``; None: the call's error is the stream's."""
        if not (loss.is_connection or (self._num_losses and loss.retryable)):
            return None
        self._num_losses += 1
        self.router = (self.router + 1) % self._num_routers
        if self._accepted is None and self._num_routers == 1:
            # Nothing is lost, and an address may be wrong.
            return None
        if self._num_losses == 1:
            self._give_up_s = now + self._patience_s
        if now >= self._give_up_s or self._is_late(now):
            return None
        if self._num_losses < self._num_routers:
            return 0.0
        wait_s = _FIRST_WAIT_S * 2.0 ** min(self._num_losses - self._num_routers, 8)
        return min(wait_s, _MAX_WAIT_S, self._give_up_s - now)

    def _is_late(self, now: float) -> bool:
        return bool(self._request.timeout_s) and now - self._began_s >= self._request.timeout_s
