"""Today's cluster in simulated time beside what was measured, its neighbours, and which of them pays. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from baton.errors import Unavailable
from planner.advise.cluster import Watched, measured_of, setup_of, simulator
from planner.advise.load import Load, load_of
from planner.advise.predict import Predicted
from planner.advise.samples import Distribution
from planner.advise.setup import Neighbour, Setup, neighbours
from planner.machines import Machine
from planner.search.slos import Slo

# Metrics of the planner, and the histograms of a router that measure them.
HISTOGRAMS = {
    "TTFT_s": "baton_time_to_first_token_seconds", "TBT_s": "baton_tbt_seconds",
    "E2E_s": "baton_request_duration_seconds",
}  # fmt: skip
# More tokens than requests that ended have may be of requests that are still there.
_OTHERS_FACTOR = 1.5
_PARTS = ("mean", "p50", "p99")
# Compared between setups.
_COMPARED = tuple(product(HISTOGRAMS, ("p50", "p99")))


@dataclass(frozen=True, slots=True)
class AdviceConfig:
    """When a model fits, and when a change pays."""

    # A 99th percentile of fewer says nothing.
    min_requests: int = 100
    # Of each simulated run.
    num_requests: int = 2000
    seed: int = 0
    # Largest errors of a model that fits: of means and medians, and of 99th percentiles. Histograms have buckets that
    # are half as wide as their values.
    max_error: float = 0.25
    max_p99_error: float = 0.5
    # A figure is better if it is less by this share, and by so many seconds; worse from this share on. Runs of other
    # requests of the same kind differ by a few percent.
    min_gain: float = 0.1
    min_gain_s: float = 1e-3
    tolerance: float = 0.05


@dataclass(frozen=True, slots=True)
class Fit:
    """One figure of today's cluster; of percentiles both are read off a histogram with the router's buckets."""

    name: str
    measured: float
    predicted: float
    limit: float

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1

    @property
    def is_good(self) -> bool:
        return abs(self.error) <= self.limit


@dataclass(frozen=True, slots=True)
class Option:
    """``reason``: why it pays, or why not."""

    about: str
    setup: Setup
    predicted: Predicted
    pays: bool
    reason: str
    # Sum of the shares by which the compared figures are less.
    gain: float


@dataclass(frozen=True, slots=True)
class Advice:
    load: Load
    setup: Setup
    today: Predicted
    fits: tuple[Fit, ...]
    # Today's missed objectives.
    missed: tuple[str, ...]
    options: tuple[Option, ...]
    warnings: tuple[str, ...] = ()

    @property
    def does_fit(self) -> bool:
        return all(fit.is_good for fit in self.fits)

    @property
    def verdict(self) -> str:
        """On the model."""
        if self.does_fit:
            return "the model fits today's cluster"
        bad = ", ".join(f"{fit.name} {fit.error:+.0%}" for fit in self.fits if not fit.is_good)
        return (
            f"the model does NOT fit today's cluster ({bad}): take what follows for a hint; watch it for longer, and "
            "at a load that it can carry"
        )

    @property
    def best(self) -> tuple[Option, ...]:
        """Those that pay: with the fewest nodes first, then those that gain most."""
        paying = [option for option in self.options if option.pays]
        return tuple(sorted(paying, key=lambda option: (option.setup.num_nodes, -option.gain)))


_Tick = Callable[[float, float], None]


def advised(
    watched: Watched,
    slos: Sequence[Slo] = (),
    price: Machine | None = None,
    config: AdviceConfig | None = None,
    tick: _Tick = lambda done, total: None,
) -> Advice:
    """``price``: the machine that a node is. Raises Unavailable: too little was seen."""
    config = config or AdviceConfig()
    load = load_of(watched.routers, watched.seconds)
    num_came = round(load.rate * load.seconds)
    if min(load.count, num_came) < config.min_requests:
        raise Unavailable(
            f"{num_came} requests came and {load.count} ended in {watched.seconds:.3g} s, expected at least "
            f"{config.min_requests}: percentiles of fewer say little; ask again under load, or for more --seconds"
        )
    setup, unseen = setup_of(watched)
    simulate = simulator(measured_of(watched), watched, load, config.num_requests, config.seed, price)
    measured = {
        name: Distribution.together(window.histogram(histogram) for window in watched.routers)
        for name, histogram in HISTOGRAMS.items()
    }
    found = compared(load, setup, measured, simulate, slos, config, tick)
    return replace(found, warnings=(*unseen, *_warnings(watched, load)))


def _warnings(watched: Watched, load: Load) -> Iterator[str]:
    if load.num_refused:
        yield f"{load.num_refused:.0f} requests were refused at the door; the simulated load is without them"
    if load.num_failed:
        yield f"{load.num_failed:.0f} requests failed; simulated nodes do not fail"
    computed = sum(window.grown("baton_computed_tokens_total", phase="decode") for window in watched.metrics.values())
    if computed > _OTHERS_FACTOR * load.outputs.total:
        yield (
            f"the nodes generated {computed:,.0f} tokens, and the requests that ended have {load.outputs.total:,.0f}: "
            "name all routers by --router, and watch for longer than requests take"
        )
    if len(watched.hosts) > 1 and not watched.observed.transfers:
        yield "no KV was moved while the cluster was watched: simulated transfers take no time"


def compared(
    load: Load,
    today: Setup,
    measured: Mapping[str, Distribution],
    simulate: Callable[[Setup], Predicted],
    slos: Sequence[Slo],
    config: AdviceConfig,
    tick: _Tick,
) -> Advice:
    """``measured`` of today's cluster, by metric; ``simulate`` runs the load on a setup."""
    others = list(neighbours(today, measured["TBT_s"].quantile(0.5)))
    base = simulate(today)
    options = []
    for number, other in enumerate(others, start=1):
        tick(number, 1 + len(others))
        options.append(_option(other, simulate(other.setup), today, base, slos, config))
    found = tuple(fits(load, measured, base, config))
    return Advice(load, today, base, found, missed_slos(base, slos), tuple(options))


def fits(load: Load, measured: Mapping[str, Distribution], base: Predicted, config: AdviceConfig) -> Iterator[Fit]:
    for name, seen in measured.items():
        ours = Distribution.of(base.values[name], seen.bounds)
        pairs = (seen.mean, ours.mean), *((seen.quantile(share), ours.quantile(share)) for share in (0.5, 0.99))
        for part, (theirs, mine) in zip(_PARTS, pairs, strict=True):
            if theirs and mine is not None:
                yield Fit(f"{name} {part}", theirs, mine, config.max_p99_error if part == "p99" else config.max_error)
    if load.outputs.total:
        yield Fit("tokens/s", load.outputs.total / load.seconds, base.tokens_s, config.max_error)


def missed_slos(found: Predicted, slos: Iterable[Slo]) -> tuple[str, ...]:
    left_out = (f"{found.num_left_out} requests not served",) if found.num_left_out else ()
    return (*left_out, *(slo.name for slo in slos if _value(found, slo.metric, slo.part) > slo.limit))


def _value(found: Predicted, metric: str, part: str) -> float:
    value: float | None = getattr(found.metrics[metric], part)
    return 0.0 if value is None else value


def _option(
    other: Neighbour, found: Predicted, today: Setup, base: Predicted, slos: Sequence[Slo], config: AdviceConfig
) -> Option:
    better, worse, gain = _compared(found, base, config)
    more_nodes = other.setup.num_nodes - today.num_nodes
    missed, missed_today = missed_slos(found, slos), missed_slos(base, slos)
    pays, reason = _verdict(better, worse, more_nodes, missed, missed_today, bool(slos))
    return Option(other.about, other.setup, found, pays, reason, gain)


def _compared(found: Predicted, base: Predicted, config: AdviceConfig) -> tuple[list[str], list[str], float]:
    """Figures that are better, and those that are worse."""
    better, worse, gain = [], [], 0.0
    for metric, part in _COMPARED:
        ours, theirs = _value(base, metric, part), _value(found, metric, part)
        share = theirs / ours - 1 if ours else 0.0
        gain -= share
        said = f"{metric.removesuffix('_s')} {part} {share:+.0%}"
        if share <= -config.min_gain and ours - theirs >= config.min_gain_s:
            better.append(said)
        elif share > config.tolerance and theirs - ours >= config.min_gain_s:
            worse.append(said)
    share = found.tokens_s / base.tokens_s - 1 if base.tokens_s else 0.0
    if share >= config.min_gain:
        better.append(f"tokens/s {share:+.0%}")
    elif share < -config.tolerance:
        worse.append(f"tokens/s {share:+.0%}")
    return better, worse, gain


def _verdict(
    better: list[str],
    worse: list[str],
    more_nodes: int,
    missed: tuple[str, ...],
    missed_today: tuple[str, ...],
    has_slos: bool,
) -> tuple[bool, str]:
    if missed and (has_slos or len(missed) > len(missed_today)):
        return False, f"misses {', '.join(missed)}"
    if missed_today:
        return True, f"misses no objective; today misses {', '.join(missed_today)}"
    if has_slos and more_nodes < 0:
        return True, "meets the objectives with fewer nodes"
    if more_nodes > 0:
        keeps_up = [each for each in better if each.startswith("tokens/s")]
        if keeps_up:
            return True, f"carries more: {', '.join(better)}"
        return False, f"costs a node: {', '.join(better) or 'nothing is better'}"
    if worse:
        return False, f"worse: {', '.join(worse)}" + (f"; better: {', '.join(better)}" if better else "")
    if more_nodes < 0:
        return True, "fewer nodes, and no figure is worse" + (f"; {', '.join(better)}" if better else "")
    if better:
        return True, f"better: {', '.join(better)}"
    return False, "nothing differs by as much as runs do"
