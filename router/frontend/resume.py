"""Where a client's copy of a lost answer ends, and the ids of events that say so.

A request has the same tokens wherever and however often it runs, once its seed is fixed. So whatever a router needs to
go on with another one's answer is with the client: the request, the seed, and how much of the answer is there. Nothing
is stored for it, and any router of the model will do.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from baton import errors
from baton.errors import quoted
from baton.types import MAX_COUNT, MAX_REQUEST_ID_CHARS, MAX_SEED

# Behind the number of tokens: all text has been sent, and the finish reason too.
_TEXT_ENDED, _ENDED = "+", "!"
_EVENT_ID = re.compile(
    rf"(?P<request>[A-Za-z0-9._:/+=@-]{{1,{MAX_REQUEST_ID_CHARS}}})\.(?P<created>\d{{1,12}})\.(?P<seed>[0-9a-f]{{1,16}})"
    r"\.(?P<prompt>[0-9a-f]{8})\.(?P<tokens>\d{1,9})(?P<mark>[+!]?)"
)


@dataclass(frozen=True, slots=True)
class Resume:
    """``num_tokens`` of the answer are at the client."""

    seed: int
    num_tokens: int
    # These tokens, where the client says them: all but the last are not generated again.
    token_ids: tuple[int, ...] = ()
    # The text that was held back until the end is there, too.
    has_whole_text: bool = False
    # The finish reason is there, too.
    has_end: bool = False
    # Of an answer over HTTP, which repeats them.
    request_id: str = ""
    created_s: int = 0
    prompt_digest: int | None = None

    @property
    def param(self) -> str:
        """What the client said it with: a header over HTTP, a field over gRPC."""
        return "last-event-id" if self.request_id else "resume"

    def check(self) -> None:
        """Raises InvalidRequest for numbers that no router has given out."""
        if not (0 <= self.seed <= MAX_SEED and 0 <= self.num_tokens <= MAX_COUNT):
            raise errors.InvalidRequest(
                f"{self.param} has seed {quoted(self.seed)} and {quoted(self.num_tokens)} tokens, expected those of "
                "an answer of this model",
                param=self.param,
            )


def prompt_digest(token_ids: Sequence[int]) -> int:
    """By which a router sees that a request is not the one that was answered; 32 bits."""
    return zlib.crc32(struct.pack(f"<{len(token_ids)}I", *token_ids))


def event_id(request_id: str, created_s: int, seed: int, prompt_token_ids: Sequence[int]) -> str:
    """What the ids of an answer's events begin with."""
    return f"{request_id}.{created_s}.{seed:x}.{prompt_digest(prompt_token_ids):08x}"


def mark_of(*, is_text_over: bool = False, is_over: bool = False) -> str:
    """What an event's id ends with."""
    return _ENDED if is_over else _TEXT_ENDED if is_text_over else ""


def resume_of(text: str) -> Resume:
    """From the id of the last event that a client has seen. Raises InvalidRequest."""
    found = _EVENT_ID.fullmatch(text)
    if found is None:
        raise errors.InvalidRequest(
            f"the header last-event-id is {quoted(text)}, expected the id of an event of the lost answer",
            param="last-event-id",
        )
    made = Resume(
        seed=int(found["seed"], 16),
        num_tokens=int(found["tokens"]),
        has_whole_text=found["mark"] != "",
        has_end=found["mark"] == _ENDED,
        request_id=found["request"],
        created_s=int(found["created"]),
        prompt_digest=int(found["prompt"], 16),
    )
    made.check()
    return made
