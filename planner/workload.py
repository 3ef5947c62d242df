"""What is asked of a cluster: requests with their arrivals and lengths. Pure.

From the Azure traces, which come with `loadgen`, from a CSV file, or drawn as the Splitwise paper draws them.
"""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
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

    def at_rate(self, rate: float) -> Workload:
        """All intervals stretched by one factor, so bursts stay."""
        factor = self.rate / rate
        requests = (replace(each, arrival_s=each.arrival_s * factor) for each in self.requests)
        return Workload(f"{self.name} at {rate:g}/s", tuple(requests))

    def until(self, seconds: float) -> Workload:
        """Without what arrives then or later. Raises BadConfig if nothing is left."""
        kept = tuple(each for each in self.requests if each.arrival_s < seconds)
        if not kept:
            raise BadConfig(
                f"no request of the trace {quoted(self.name)} arrives in its first {seconds:g} seconds, expected one",
                param="seconds",
            )
        return Workload(f"{self.name}, {seconds:g} s", kept)

    def redrawn(self, *, rate: float, seconds: float, seed: int) -> Workload:
        """Poisson arrivals; lengths drawn from these requests, prompt and output independently, with replacement."""
        prompts = [each.num_prompt_tokens for each in self.requests]
        outputs = [each.num_output_tokens for each in self.requests]
        return drawn(
            f"{self.name} drawn at {rate:g}/s for {seconds:g} s, seed {seed}", lambda rng: rng.choice(prompts),
            lambda rng: rng.choice(outputs), rate=rate, seconds=seconds, seed=seed,
        )  # fmt: skip


def read(path: Path) -> Workload:
    """A CSV file in the form of the public simulator or of the Azure traces, also compressed with gzip. Raises
    BadConfig."""
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise BadConfig(
            f"the trace {quoted(str(path))} cannot be read: {error}; expected {' or '.join(traces.NAMES)}, or a CSV "
            "file",
            param="trace",
        ) from error
    table = csv.DictReader(io.StringIO(text))
    if _SIMULATOR_COLUMNS[0] not in (table.fieldnames or ()):
        return replayed(path.name, traces.read(str(path)))
    requests = []
    for line, row in enumerate(table, start=2):
        arrival_s, prompt, output = (_number(row, column, path, line) for column in _SIMULATOR_COLUMNS)
        if not (1 <= prompt < inf and 1 <= output < inf and 0 <= arrival_s < inf):
            raise BadConfig(
                f"line {line} of {quoted(str(path))} has an arrival of {arrival_s:g} s, {prompt:g} prompt and "
                f"{output:g} output tokens; expected an arrival of at least 0 and at least 1 token of each",
                param="trace",
            )
        requests.append((arrival_s, int(prompt), int(output)))
    if not requests:
        raise BadConfig(f"the trace {quoted(str(path))} has no requests", param="trace")
    requests.sort(key=lambda each: each[0])
    return Workload(path.name, tuple(Request(i, *each) for i, each in enumerate(requests)))


def _number(row: Mapping[str, str], column: str, path: Path, line: int) -> float:
    try:
        return float(row[column])
    except (KeyError, TypeError, ValueError) as error:
        raise BadConfig(
            f"line {line} of {quoted(str(path))} has {quoted(str(row.get(column)))} in column {column}, expected a "
            "number",
            param="trace",
        ) from error


def replayed(name: str, rows: Sequence[traces.Row]) -> Workload:
    """A trace with its own lengths and arrivals."""
    lengths = ((row.at_s, row.prompt_tokens, row.output_tokens) for row in rows)
    return Workload(name, tuple(Request(i, *each) for i, each in enumerate(lengths)))


def drawn(
    name: str,
    prompt_tokens: Callable[[Random], int],
    output_tokens: Callable[[Random], int],
    *,
    rate: float,
    seconds: float,
    seed: int,
) -> Workload:
    """Poisson arrivals; both lengths are drawn independently, as the paper's experiments do. Raises BadConfig if none
    arrives."""
    rng, now = Random(seed), 0.0
    requests: list[Request] = []
    while (now := now + rng.expovariate(rate)) < seconds:
        requests.append(Request(len(requests), now, prompt_tokens(rng), output_tokens(rng)))
    if not requests:
        raise BadConfig(
            f"no request arrives in {seconds:g} s at {rate:g} a second with seed {seed}; expected a longer time or a "
            "higher rate",
            param="seconds",
        )
    return Workload(name, tuple(requests))


def like_trace(name: str, *, rate: float, seconds: float, seed: int) -> Workload:
    """Drawn from a trace that comes with Baton."""
    return named(name).redrawn(rate=rate, seconds=seconds, seed=seed)


def named(trace: str) -> Workload:
    """A trace that comes with Baton by its name, or one of a file. Raises BadConfig."""
    return replayed(trace, traces.read(trace)) if trace in traces.NAMES else read(Path(trace))
