"""What is sent and when: a list of requests, and a process that says when each is due. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

from loadgen import traces

# Ids that every model has; 0 is often a special token.
VOCAB_SIZE = 2000


@dataclass(frozen=True, slots=True)
class Request:
    """``due_s``: when to send it, in seconds from the beginning of the run; 0 in a closed loop."""

    prompt_tokens: int
    output_tokens: int
    due_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Load:
    """Requests in the order of their arrival. ``streams``: in a closed loop, how many are in flight at a time; 0 is an
    open loop, which sends each request when it is due, whether earlier ones are answered or not."""

    name: str
    requests: tuple[Request, ...]
    streams: int = 0
    # Requests a second, offered; 0 in a closed loop.
    rate: float = 0.0
    # All answers must be there this long after the last request was due; what is not is cut off.
    limit_s: float = 180.0

    @property
    def last_due_s(self) -> float:
        return self.requests[-1].due_s if self.requests else 0.0


def same_size(count: int, prompt_tokens: int, output_tokens: int) -> tuple[Request, ...]:
    return (Request(prompt_tokens, output_tokens),) * count


def of_trace(rows: Sequence[traces.Row], scale: traces.Scale) -> tuple[Request, ...]:
    """The sizes of a trace's requests; prompt and output of a request stay together."""
    return tuple(Request(*scale.apply(row)) for row in rows)


def replayed(name: str, rows: Sequence[traces.Row], scale: traces.Scale, rate: float, limit_s: float) -> Load:
    """An open loop with a trace's sizes and arrivals, at another mean rate."""
    return _at(name, of_trace(rows, scale), traces.arrivals(rows, rate), rate, limit_s)


def poisson(name: str, requests: Sequence[Request], rate: float, limit_s: float, seed: str) -> Load:
    """An open loop in which the intervals are independent and exponential; the first request is due at once."""
    rng, due = Random(f"poisson {seed}"), [0.0]
    for _ in requests[1:]:
        due.append(due[-1] + rng.expovariate(rate))
    return _at(name, requests, due, rate, limit_s)


def closed(name: str, requests: Sequence[Request], streams: int, limit_s: float) -> Load:
    return Load(name, tuple(requests), streams=streams, limit_s=limit_s)


def _at(name: str, requests: Sequence[Request], due_s: Sequence[float], rate: float, limit_s: float) -> Load:
    timed = (replace(request, due_s=at) for request, at in zip(requests, due_s, strict=True))
    return Load(name, tuple(timed), rate=rate, limit_s=limit_s)


def prompts(seed: str, lengths: Sequence[int], vocab_size: int = VOCAB_SIZE) -> list[list[int]]:
    """Random prompts of these lengths, the same for one seed; no two share a beginning."""
    rng = Random(seed)
    return [rng.choices(range(1, vocab_size), k=length) for length in lengths]
