"""What one API key may have: requests a minute, and sequences at once. Pure.

Each key with a rate has a bucket of as many requests as its minute has, which fills up evenly: so many may come at
once, and no more than twice as many in any minute.
"""

from __future__ import annotations

from collections.abc import Mapping

from baton.api_keys import ApiKey
from baton.errors import InvalidRequest, RateLimited

# When a sequence of the key ends is not known.
_SEQUENCE_S = 1.0


class KeyLimits:
    def __init__(self, keys: Mapping[str, ApiKey], now: float) -> None:
        """``keys`` by the client's name, as in `clients`. Clients without a key here have no limit."""
        self._keys = keys
        # By client: requests that may come, at that time.
        self._buckets = {client: (float(key.requests_per_minute), now) for client, key in keys.items()}

    def take(self, client: str, now: float) -> None:
        """One request. Raises RateLimited with the time until there may be another."""
        key = self._keys.get(client)
        if key is None or not key.requests_per_minute:
            return
        left, since_s = self._buckets[client]
        per_s = key.requests_per_minute / 60.0
        left = min(float(key.requests_per_minute), left + max(0.0, now - since_s) * per_s)
        if left < 1.0:
            self._buckets[client] = (left, now)
            raise RateLimited(
                f"the API key{_named(key)} may send {key.requests_per_minute} requests a minute; try again later",
                retry_after_s=(1.0 - left) / per_s,
            )
        self._buckets[client] = (left - 1.0, now)

    def check_running(self, client: str, num_running: int, num_more: int) -> None:
        """Raises RateLimited if so many more sequences beside those that it has are too many for the key, and
        InvalidRequest if they always are."""
        key = self._keys.get(client)
        if key is None or not key.max_sequences:
            return
        if num_more > key.max_sequences:
            raise InvalidRequest(
                f"the API key{_named(key)} may have {key.max_sequences} sequences at once, and {num_more} were asked "
                "for in one request; ask for fewer (n times the number of prompts)",
                param="n",
            )
        if num_running + num_more > key.max_sequences:
            raise RateLimited(
                f"the API key{_named(key)} may have {key.max_sequences} sequences at once, {num_running} are there and "
                f"{num_more} more were asked for; try again later",
                retry_after_s=_SEQUENCE_S,
            )


def _named(key: ApiKey) -> str:
    return f" {key.name}" if key.name else ""
