"""API keys for the two faces of the router, checked in wrappers around the applications.

As in vLLM: with keys set, paths under /v1 need `Authorization: Bearer KEY`, or `x-api-key: KEY` as Anthropic's clients
send it; health and metrics stay open. Of the gRPC services the router's own needs the same words as metadata; health
and reflection stay open.

Operators have a key of their own. With any key set, a client's does not open what is theirs: drain, roles, ledgers,
prefix caches, traces, and the status page's data, which names requests and machines. The page itself stays open. The
admin key opens all that clients' keys open too.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Mapping, Sequence
from typing import NoReturn

from starlette.types import ASGIApp, Receive, Scope, Send

from baton import errors
from baton.api_keys import ApiKey
from baton.guard import Refusals
from router.clients import authorization_of, key_in
from router.face.http_errors import body_of

_CLIENT_PATHS = ("/v1", "/tokenize", "/detokenize")
_ADMIN_PATHS = ("/status/data",)
# A method that is not named here is the operators'.
_CLIENT_METHODS = ("Generate", "Status")


class Keys:
    """Stores digests, not keys: they have equal length, so that a comparison takes the same time for any input."""

    def __init__(self, keys: Sequence[ApiKey], admin_key: str = "") -> None:
        self._digests = [_digest(key.secret.encode()) for key in keys]
        self._admin_digest = _digest(admin_key.encode()) if admin_key else None

    def __bool__(self) -> bool:
        """Whether anything is asked of any caller."""
        return bool(self._digests) or self._admin_digest is not None

    def check(self, authorization: bytes, *, is_admin_call: bool = False) -> None:
        """Raises Unauthenticated unless the header's value is `Bearer` and a key, Forbidden if it is one of a client's
        where the admin key is needed."""
        if not self or not (is_admin_call or self._digests):
            return
        asked = _digest(key_in(authorization))
        # Every key is compared, so that the time does not depend on the key.
        matches = [hmac.compare_digest(asked, digest) for digest in self._digests]
        is_admin = self._admin_digest is not None and hmac.compare_digest(asked, self._admin_digest)
        if is_admin or (any(matches) and not is_admin_call):
            return
        if is_admin_call:
            self._refuse_operation(authorization, is_client=any(matches))
        if not authorization:
            raise errors.Unauthenticated(
                "no API key was given, expected the header 'Authorization: Bearer KEY' (BATON_API_KEY for `baton`)"
            )
        raise errors.Unauthenticated("the API key is not one of this router's, expected 'Authorization: Bearer KEY'")

    def _refuse_operation(self, authorization: bytes, *, is_client: bool) -> NoReturn:
        where = (
            " (BATON_ADMIN_KEY for `baton`)" if self._admin_digest else ", which it lacks: start it with --admin-key"
        )
        expected = f"expected the router's admin key{where}"
        if is_client:
            raise errors.Forbidden(f"a client's API key does not open this, {expected}")
        given = "the API key is not the admin's" if authorization else "no API key was given"
        raise errors.Unauthenticated(f"{given}, {expected}")

    def check_call(self, method: str, metadata: Mapping[str, str | bytes]) -> None:
        """Of the router's gRPC service; raises as `check`."""
        said = metadata.get("authorization", b"")
        is_admin_call = method.rpartition("/")[2] not in _CLIENT_METHODS
        self.check(said.encode() if isinstance(said, str) else said, is_admin_call=is_admin_call)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class HttpGuard:
    """An ASGI application that wraps another."""

    def __init__(self, app: ASGIApp, keys: Keys, refusals: Refusals) -> None:
        self._app = app
        self._keys = keys
        self._refusals = refusals

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Browsers send preflight requests without a key.
        if scope["type"] == "http" and scope["method"] != "OPTIONS":
            path, is_admin_call = scope["path"], _is_under(scope["path"], _ADMIN_PATHS)
            try:
                if is_admin_call or _is_under(path, _CLIENT_PATHS):
                    self._keys.check(authorization_of(scope), is_admin_call=is_admin_call)
            except (errors.Unauthenticated, errors.Forbidden) as error:
                self._refusals.refused(scope["client"][0] if scope["client"] else "", path, error)
                await _refuse(error, path, send)
                return
        await self._app(scope, receive, send)


def _is_under(path: str, guarded: Sequence[str]) -> bool:
    return any(path == start or path.startswith(f"{start}/") for start in guarded)


async def _refuse(error: errors.BatonError, path: str, send: Send) -> None:
    body = json.dumps(body_of(error, path)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if error.http_status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": error.http_status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
