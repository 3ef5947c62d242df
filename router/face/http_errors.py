"""Errors in the form of the API that a path belongs to."""

from __future__ import annotations

from typing import Any

from baton.errors import BatonError
from router.messages import errors as messages
from router.openai.response import error_body

_MESSAGES_PATH = "/v1/messages"
# What a path calls the parameter that others call otherwise.
_PARAMS = {("/v1/responses", "messages"): "input", ("/v1/embeddings", "prompt"): "input"}


def body_of(error: BatonError, path: str) -> dict[str, Any]:
    if path.startswith(_MESSAGES_PATH):
        return messages.error_body(error.http_status, error.message, error.param)
    body = error_body(error)
    body["error"]["param"] = _PARAMS.get((path, error.param or ""), error.param)
    return body


def body_of_status(status: int, message: str, code: str | None, path: str) -> dict[str, Any]:
    """Of an error that only HTTP knows, such as a method that a path does not have."""
    if path.startswith(_MESSAGES_PATH):
        return messages.error_body(status, message)
    return {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}
