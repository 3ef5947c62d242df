"""Circuit breakers per (prefill, decode) pair: a path that fails is avoided, and tried again later. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from router.cluster.config import PolicyConfig


class _Breaker:
    __slots__ = ("failures", "open_s", "open_until_s", "trial_until_s")

    def __init__(self) -> None:
        self.failures = 0
        self.open_s = 0.0
        self.open_until_s = 0.0
        # A half-open breaker lets one request through and waits for its result until then.
        self.trial_until_s = 0.0

    @property
    def reopens_at_s(self) -> float:
        return max(self.open_until_s, self.trial_until_s)


class PairBreakers:
    """A breaker only orders preferences: when every pair is open, the policy uses the one that reopens first. So no
    failure shuts a pair out for good.
    """

    def __init__(self, config: PolicyConfig) -> None:
        self._config = config
        # By prefill node, then by decode node.
        self._breakers: dict[str, dict[str, _Breaker]] = {}

    def open_of(self, prefill_id: str, now: float) -> Mapping[str, float]:
        """The decode nodes whose pair with this prefill node is open, and when each reopens."""
        found = self._breakers.get(prefill_id)
        if found is None:
            return {}
        return {x: breaker.reopens_at_s for x, breaker in found.items() if now < breaker.reopens_at_s}

    def used(self, prefill_id: str, decode_id: str, now: float) -> None:
        """A request goes over this pair; if the breaker is half-open, it is the trial."""
        breaker = self._breakers.get(prefill_id, {}).get(decode_id)
        if breaker is not None and breaker.open_s > 0 and now >= breaker.open_until_s:
            breaker.trial_until_s = now + breaker.open_s

    def failed(self, prefill_id: str, decode_id: str, now: float) -> None:
        breaker = self._breakers.setdefault(prefill_id, {}).setdefault(decode_id, _Breaker())
        breaker.failures += 1
        breaker.trial_until_s = 0.0
        if breaker.failures >= self._config.breaker_failures and now >= breaker.open_until_s:
            doubled = breaker.open_s * 2 if breaker.open_s else self._config.breaker_open_s
            breaker.open_s = min(doubled, self._config.breaker_max_open_s)
            breaker.open_until_s = now + breaker.open_s

    def worked(self, prefill_id: str, decode_id: str) -> None:
        self._remove(prefill_id, decode_id)

    def forget(self, node_id: str) -> None:
        """The node is gone or is another incarnation: its history says nothing any more."""
        self._breakers.pop(node_id, None)
        for prefill_id in list(self._breakers):
            self._remove(prefill_id, node_id)

    def _remove(self, prefill_id: str, decode_id: str) -> None:
        found = self._breakers.get(prefill_id)
        if found is not None:
            found.pop(decode_id, None)
            if not found:
                del self._breakers[prefill_id]
