"""What is asked of a cluster: requests with their arrivals and lengths. Pure.

From the Azure traces, which come with `loadgen`, from a CSV file, or drawn as the Splitwise paper draws them.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from baton.errors import BadConfig, quoted
from loadgen import traces

# Of a trace in the form of the public simulator: seconds since the start, tokens of the prompt, tokens generated.
_SIMULATOR_COLUMNS = ("arrival_timestamp", "prompt_size", "token_size")


@dataclass(frozen=True, slots=True)
class Request:
    """``num_output_tokens`` counts the first token, which the prompt phase draws."""

    number: int
    arrival_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    priority: int = 0
    # Requests with the same one, which is not empty, begin with the same ``num_prefix_tokens`` tokens.
    prefix: str = ""
    num_prefix_tokens: int = 0
    # Its client leaves so long after its arrival.
    cancelled_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests in the order of their arrival; ``name`` is for reports."""

    name: str
    requests: tuple[Request, ...]

    @property
    def seconds(self) -> float:
        """From the beginning to the last arrival."""
        return self.requests[-1].arrival_s if self.requests else 0.0

    @property
    def rate(self) -> float:
        """Requests a second; 0 if all come at once."""
        return len(self.requests) / self.seconds if self.seconds else 0.0


def read(path: Path) -> Workload:
    """A CSV file in the form of the public simulator or of the Azure traces. Raises BadConfig."""
    try:
        with path.open(newline="") as file:
            is_simulators = "arrival_timestamp" in (csv.DictReader(file).fieldnames or ())
    except (OSError, UnicodeDecodeError) as error:
        raise BadConfig(f"the trace {quoted(str(path))} cannot be read: {error}", param="trace") from error
    if not is_simulators:
        return replayed(str(path), traces.read(str(path)))
    requests = []
    with path.open(newline="") as file:
        for line, row in enumerate(csv.DictReader(file), start=2):
            arrival_s, prompt, output = (_number(row, column, path, line) for column in _SIMULATOR_COLUMNS)
            if prompt < 1 or output < 1 or arrival_s < 0:
                raise BadConfig(
                    f"line {line} of {quoted(str(path))} has an arrival of {arrival_s:g} s, {prompt:g} prompt and "
                    f"{output:g} output tokens; expected an arrival of at least 0 and at least 1 token of each",
                    param="trace",
                )
            requests.append((arrival_s, int(prompt), int(output)))
    if not requests:
        raise BadConfig(f"the trace {quoted(str(path))} has no requests", param="trace")
    requests.sort(key=lambda each: each[0])
    return Workload(path.stem, tuple(Request(i, *each) for i, each in enumerate(requests)))


def _number(row: Mapping[str, str], column: str, path: Path, line: int) -> float:
    try:
        return float(row[column])
    except (KeyError, TypeError, ValueError) as error:
        raise BadConfig(
            f"line {line} of {quoted(str(path))} has {quoted(str(row.get(column)))} in column {column}, expected a "
            "number",
            param="trace",
        ) from error


def replayed(name: str, rows: Sequence[traces.Row], rate: float | None = None) -> Workload:
    """A trace with its own lengths and arrivals; with ``rate`` all intervals are stretched to it, so bursts stay."""
    at_s = [row.at_s for row in rows] if rate is None else traces.arrivals(rows, rate)
    lengths = ((row.prompt_tokens, row.output_tokens) for row in rows)
    return Workload(name, tuple(Request(i, s, *each) for i, (s, each) in enumerate(zip(at_s, lengths, strict=True))))


def drawn(
    name: str,
    prompt_tokens: Callable[[Random], int],
    output_tokens: Callable[[Random], int],
    *,
    rate: float,
    seconds: float,
    seed: int,
) -> Workload:
    """Poisson arrivals; both lengths are drawn independently, as the paper's experiments do."""
    rng, now = Random(seed), 0.0
    requests: list[Request] = []
    while (now := now + rng.expovariate(rate)) < seconds:
        requests.append(Request(len(requests), now, prompt_tokens(rng), output_tokens(rng)))
    return Workload(name, tuple(requests))


def like_trace(name: str, *, rate: float, seconds: float, seed: int) -> Workload:
    """Lengths of a trace's requests, drawn with replacement; Poisson arrivals."""
    rows = traces.read(name)
    prompts, outputs = [row.prompt_tokens for row in rows], [row.output_tokens for row in rows]
    return drawn(
        f"{name} {rate:g}/s", lambda rng: rng.choice(prompts), lambda rng: rng.choice(outputs),
        rate=rate, seconds=seconds, seed=seed,
    )  # fmt: skip
