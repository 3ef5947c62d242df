"""What a path that generates is made of: how its bodies are read, and how its answers and errors are written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from baton.errors import BatonError
from router.answer import Form
from router.frontend import Accepted, Caller, GenerationRequest

ErrorBody = Callable[[BatonError], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Asked:
    """A body that was read."""

    request: GenerationRequest
    wants_stream: bool
    # The form of the answer, once the request is admitted.
    form: Callable[[Accepted], Form]


@dataclass(frozen=True, slots=True)
class Endpoint:
    # Raises InvalidRequest. Runs in a thread for large bodies.
    read: Callable[[bytes, Caller], Asked]
    error_body: ErrorBody
