"""Tells clients apart, by their API keys or addresses: for the turns of the queue, and for the prefix cache."""

from __future__ import annotations

import hashlib
import ipaddress

from starlette.types import Scope


def key_in(authorization: bytes) -> bytes:
    """The key in `Bearer KEY`; empty, which is never a key, in anything else."""
    scheme, _, key = authorization.partition(b" ")
    return key.strip() if scheme.lower() == b"bearer" else b""


def authorization_of(scope: Scope) -> bytes:
    """The header that counts if there are several: the same for the check of the key as for `client_of`. Without one
    the key in `x-api-key`, as Anthropic's clients send it."""
    found = {name: value for name, value in scope["headers"] if name in (b"authorization", b"x-api-key")}
    return found.get(b"authorization") or (b"Bearer " + found[b"x-api-key"] if b"x-api-key" in found else b"")


def client_of(address: str, authorization: bytes, *, has_keys: bool) -> str:
    """The client, for the turns of the queue and for the prefix cache: the key if there are keys, else the address; for
    IPv6 the network, since one machine has many addresses. An unchecked key is ignored."""
    if has_keys:
        return client_of_key(key_in(authorization))
    if ":" not in address:
        return address
    try:
        found = ipaddress.IPv6Address(address)
    except ValueError:
        return address
    # A dual-stack socket reports IPv4 addresses as IPv6, all of them in one network.
    return str(found.ipv4_mapped or ipaddress.IPv6Network((found, 64), strict=False))


def client_of_key(key: bytes) -> str:
    """As `client_of` a request with this key."""
    return f"key {hashlib.sha256(key).hexdigest()[:32]}"


def cache_salt(tenant: str, asked: str) -> bytes:
    """What keeps the KV blocks of a tenant's requests apart from all others, and within the tenant those of the salt
    that was asked for. Empty if both are: such requests share blocks with each other."""
    if not tenant and not asked:
        return b""
    digest = hashlib.blake2b(digest_size=32)
    for part in (tenant.encode(), asked.encode()):
        # With its length, so that no two pairs give the same bytes.
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest()
