"""The load of a running cluster as a workload: its rate, lengths that are drawn from its histograms, prefix hits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from random import Random

from planner.advise.samples import Distribution, Window
from planner.workload import Workload, drawn

# Less of the prompts than this share is not worth simulating caches for, which costs time.
_LEAST_CACHED_SHARE = 0.01


@dataclass(frozen=True, slots=True)
class Load:
    """Of all routers in a window."""

    seconds: float
    # Requests that came, refused ones left out.
    rate: float
    # Tokens of those that ended with at least one.
    prompts: Distribution
    outputs: Distribution
    # Of prompt tokens, those whose KV was there.
    cached_share: float
    num_refused: float
    num_failed: float

    @property
    def count(self) -> int:
        return round(self.prompts.count)

    def workload(self, num_requests: int, seed: int) -> Workload:
        """Poisson arrivals; prompts and outputs are drawn independently of each other."""
        work = drawn(
            f"{self.count} requests of {self.seconds:.3g} s, drawn anew", lengths(self.prompts), lengths(self.outputs),
            rate=self.rate, seconds=num_requests / self.rate, seed=seed,
        )  # fmt: skip
        if self.cached_share < _LEAST_CACHED_SHARE:
            return work
        # As if they all began alike, each with this share of its own length: caches of any size and number of nodes
        # have it, as that of a system prompt.
        shared = (
            replace(each, prefix="all", num_prefix_tokens=int(self.cached_share * each.num_prompt_tokens))
            for each in work.requests
        )
        return replace(work, requests=tuple(shared))


def load_of(routers: Sequence[Window], seconds: float) -> Load:
    def grown(name: str, **labels: str) -> float:
        return sum(window.grown(name, **labels) for window in routers)

    def histogram(name: str) -> Distribution:
        return Distribution.together(window.histogram(name) for window in routers)

    num_came = grown("baton_requests_total") + grown("baton_sequences")
    num_prompt_tokens = grown("baton_prompt_tokens_total")
    return Load(
        seconds=seconds,
        rate=max(0.0, num_came) / seconds,
        prompts=histogram("baton_sequence_prompt_tokens"),
        outputs=histogram("baton_sequence_generated_tokens"),
        cached_share=grown("baton_cached_prompt_tokens_total") / num_prompt_tokens if num_prompt_tokens else 0.0,
        num_refused=grown("baton_refusals_total"),
        num_failed=grown("baton_requests_total", outcome="failed"),
    )


def lengths(seen: Distribution) -> Callable[[Random], int]:
    """Draws whole numbers: of each bucket as many as were seen, evenly within it, and all by a factor that makes their
    mean the one that was seen, which is known exactly."""
    ranges = [(int(low) + 1, max(int(low) + 1, int(high))) for low, high, _ in seen.ranges()]
    counts = [count for _, _, count in seen.ranges()]
    upto = list(accumulate(counts))
    expected = sum(count * (low + high) / 2 for count, (low, high) in zip(counts, ranges, strict=True)) / upto[-1]
    factor = (seen.mean or expected) / expected

    def draw(rng: Random) -> int:
        low, high = rng.choices(ranges, cum_weights=upto)[0]
        return max(1, round(factor * rng.randint(low, high)))

    return draw
