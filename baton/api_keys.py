"""API keys as operators give them: KEY, or NAME:WEIGHT=KEY. No message shows a key."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from baton.errors import BadConfig

# More is a slip: one client would have everything.
_MAX_WEIGHT = 1000
_NAMED = re.compile(r"(?P<name>[A-Za-z0-9_.-]{1,64}):(?P<weight>\d{1,9}(?:\.\d{1,9})?)=(?P<secret>.+)")


@dataclass(frozen=True, slots=True)
class ApiKey:
    # What clients send.
    secret: str = field(repr=False)
    name: str = ""
    # Of the work that several clients have waiting, the client with this key gets this share.
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> ApiKey:
        """Raises BadConfig."""
        found = _NAMED.fullmatch(text)
        name, weight, secret = (found["name"], float(found["weight"]), found["secret"]) if found else ("", 1.0, text)
        if not secret.isascii() or not secret or any(c.isspace() for c in secret):
            raise BadConfig("api_keys is '(hidden)', expected ASCII without spaces, and not empty", param="api_keys")
        if not 0 < weight <= _MAX_WEIGHT:
            expected = f"more than 0 and at most {_MAX_WEIGHT}"
            raise BadConfig(f"api_keys has weight {weight:g} for {name}, expected {expected}", param="api_keys")
        return cls(secret, name, weight)


def secret_of(texts: str) -> str:
    """What to send of the first of several keys, as BATON_API_KEY holds those of a router. Empty if there is none."""
    first = next(iter(texts.split()), "")
    return ApiKey.parse(first).secret if first else ""
