"""API keys as operators give them: KEY, NAME:WEIGHT=KEY, or NAME:WEIGHT/REQUESTS/SEQUENCES=KEY with limits. No message
shows a key."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from baton.errors import BadConfig

# Beyond these is a slip: one client would have everything, or nothing.
_MIN_WEIGHT, _MAX_WEIGHT = 0.001, 1000
_NAMED = re.compile(
    r"(?P<name>[A-Za-z0-9_.-]{1,64}):(?P<weight>[0-9]{1,9}(?:\.[0-9]{1,9})?)"
    r"(?:/(?P<requests>[0-9]{1,9})(?:/(?P<sequences>[0-9]{1,9}))?)?=(?P<secret>.+)"
)
# A slip in what is before the key would else be a part of the key: no limit, and a key that opens nothing.
_MISSPELT = re.compile(r"[^:=]+:[-+./0-9][^=]*=.*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class ApiKey:
    # What clients send.
    secret: str = field(repr=False)
    name: str = ""
    # Of the work that several clients have waiting, the client with this key gets this share.
    weight: float = 1.0
    # 0: no limit.
    requests_per_minute: int = 0
    # That wait or run at once.
    max_sequences: int = 0

    @classmethod
    def parse(cls, text: str) -> ApiKey:
        """Raises BadConfig."""
        found = _NAMED.fullmatch(text)
        if found is None and _MISSPELT.fullmatch(text):
            raise BadConfig(
                "api_keys is '(hidden)', expected NAME:WEIGHT=KEY or NAME:WEIGHT/REQUESTS/SEQUENCES=KEY, each a number "
                "of at most 9 digits; a key that only looks like that is given as NAME:1=KEY",
                param="api_keys",
            )
        name, weight, secret = (found["name"], float(found["weight"]), found["secret"]) if found else ("", 1.0, text)
        if not secret.isascii() or not secret or any(c.isspace() for c in secret):
            raise BadConfig("api_keys is '(hidden)', expected ASCII without spaces, and not empty", param="api_keys")
        if not _MIN_WEIGHT <= weight <= _MAX_WEIGHT:
            expected = f"{_MIN_WEIGHT} to {_MAX_WEIGHT}"
            raise BadConfig(f"api_keys has weight {weight:g} for {name}, expected {expected}", param="api_keys")
        requests, sequences = (int(found[x] or 0) if found else 0 for x in ("requests", "sequences"))
        return cls(secret, name, weight, requests, sequences)


def secret_of(texts: str) -> str:
    """What to send of the first of several keys, as BATON_API_KEY holds those of a router. Empty if there is none."""
    first = next(iter(texts.split()), "")
    return ApiKey.parse(first).secret if first else ""
