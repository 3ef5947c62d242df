"""Errors in the form of the Messages API."""

from __future__ import annotations

from typing import Any

_TYPES = {401: "authentication_error", 404: "not_found_error", 408: "timeout_error", 413: "request_too_large",
          429: "rate_limit_error", 503: "overloaded_error"}  # fmt: skip


# A client that finds it sends the whole conversation instead, as the tool runner of Anthropic's package does.
_NO_THREAD = {"error_code": "thread_unsupported_request"}


def error_body(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    other = "invalid_request_error" if status < 500 else "api_error"
    error: dict[str, Any] = {"type": _TYPES.get(status, other), "message": message}
    return {"type": "error", "error": error | ({"details": _NO_THREAD} if param == "thread" else {})}
