"""What a path with a body is made of: how bodies are read, and what the answers are."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from router.api.answer import Form
from router.frontend.generation import Accepted
from router.frontend.request import Caller, GenerationRequest


@dataclass(frozen=True, slots=True)
class Asked:
    """A body that was read."""

    request: GenerationRequest
    wants_stream: bool
    # The form of the answer, once the request is admitted.
    form: Callable[[Accepted], Form]


# Both read a body. They raise InvalidRequest, and run in a thread for large bodies.
Endpoint = Callable[[bytes, Caller], Asked]
# Of a path that does not generate: what is to be awaited for the answer's JSON.
Computation = Callable[[bytes, Caller], Callable[[], Awaitable[bytes]]]
