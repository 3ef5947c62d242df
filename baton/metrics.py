"""Counters, gauges and histograms of a process, exported in the Prometheus text format. Opens no port.

Children are bound once and written by one thread each, without locks: an observation in a hot loop costs a bisection
and two additions. prometheus-client turns them into text at scrape time, and only then.
"""

from __future__ import annotations

import platform
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING

from baton import PROTOCOL_VERSION, __version__
from baton.errors import BadConfig

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

# Upper bounds in seconds: fine where people wait for a token, coarse where requests end.
LATENCY_BUCKETS_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5),
    *(1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0),
)
# A label whose values come from outside gets no more than these; the rest is counted together.
_MAX_CHILDREN = 64
OTHER = "other"

Labels = tuple[str, ...]


class Counter:
    """Only grows. One writing thread."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def add(self, amount: float = 1.0) -> None:
        self.value += amount


class Histogram:
    """How often which sizes were seen. One writing thread; a scrape meanwhile may miss the last observation."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        if list(bounds) != sorted(set(bounds)) or not bounds:
            raise BadConfig(f"histogram bounds are {bounds}, expected rising numbers")
        self.bounds = tuple(bounds)
        # One more than bounds: what is above all of them.
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += count
        self.total += value * count

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative, as Prometheus wants them."""
        names = [*(repr(float(bound)) for bound in self.bounds), "+Inf"]
        return list(zip(names, map(float, accumulate(self.counts)), strict=True))


class Counters:
    """Counters whose label values are found at run time. Bounded: past the limit all values count as OTHER."""

    def __init__(self, num_labels: int, max_children: int = _MAX_CHILDREN) -> None:
        self._others = (OTHER,) * num_labels
        self._max_children = max_children
        self.children: dict[Labels, Counter] = {}

    def add(self, *values: str, amount: float = 1.0) -> None:
        child = self.children.get(values)
        if child is None:
            if len(self.children) >= self._max_children:
                values = self._others
            child = self.children.setdefault(values, Counter())
        child.add(amount)


@dataclass(frozen=True, slots=True)
class Family:
    """One metric: its children share name, help and label names."""

    name: str
    kind: str
    help_text: str
    label_names: Labels
    # Called at scrape time; an empty mapping means that no value is known.
    read: Callable[[], Mapping[Labels, float | Histogram]]

    @property
    def exposed_name(self) -> str:
        """As queries name it; a histogram's series add _bucket, _sum and _count."""
        return f"{self.name}_total" if self.kind == "counter" else self.name


class Metrics:
    """The families of one process and the labels of all its series. A collector of prometheus-client.

    A label's value may be a function, called at scrape time, if it is not known at the start.
    """

    def __init__(self, constant: Mapping[str, str | Callable[[], str]] | None = None) -> None:
        self._constant = dict(constant or {})
        self.families: dict[str, Family] = {}

    def counter(self, name: str, help_text: str, **labels: str) -> Counter:
        """One child; the same name with other label values is another child of the same family."""
        child = Counter()
        self._child(name, "counter", help_text, labels, lambda: child.value)
        return child

    def counters(self, name: str, help_text: str, *label_names: str, preset: Iterable[Labels] = ()) -> Counters:
        """``preset`` children exist from the start: rate() misses the first increment of a series that appears at 1."""
        found = Counters(len(label_names))
        for values in preset:
            found.add(*values, amount=0.0)
        read = found.children
        self.add(Family(name, "counter", help_text, label_names, lambda: {k: c.value for k, c in list(read.items())}))
        return found

    def histogram(self, name: str, help_text: str, bounds: Sequence[float], **labels: str) -> Histogram:
        child = Histogram(bounds)
        self._child(name, "histogram", help_text, labels, lambda: child)
        return child

    def counting(self, name: str, help_text: str, read: Callable[[], float | None], **labels: str) -> None:
        """A counter whose value is kept elsewhere; None: not known."""
        self._child(name, "counter", help_text, labels, read)

    def gauge(self, name: str, help_text: str, read: Callable[[], float | None], **labels: str) -> None:
        """``read`` is called at scrape time; None: not known, and not exported."""
        self._child(name, "gauge", help_text, labels, read)

    def gauges(
        self, name: str, help_text: str, label_names: Labels, read: Callable[[], Mapping[Labels, float]]
    ) -> None:
        """Several children read by one call. The caller bounds their number."""
        self.add(Family(name, "gauge", help_text, label_names, read))

    def add(self, family: Family) -> None:
        assert family.name not in self.families, f"{family.name} is there already"
        self.families[family.name] = family

    def _child(
        self,
        name: str,
        kind: str,
        help_text: str,
        labels: Mapping[str, str],
        read: Callable[[], float | Histogram | None],
    ) -> None:
        label_names, values = tuple(labels), tuple(labels.values())
        family = self.families.get(name)
        if family is None:
            readers: dict[Labels, Callable[[], float | Histogram | None]] = {}
            family = Family(name, kind, help_text, label_names, _Children(readers))
            self.add(family)
        children = family.read
        assert isinstance(children, _Children), f"{name} has children of its own already"
        assert (family.kind, family.label_names) == (kind, label_names), f"{name} is {family.kind} by other labels"
        assert values not in children.readers, f"{name}{values} is there already"
        children.readers[values] = read

    def describe(self) -> Iterable[Metric]:
        """Empty: registration must not call readers whose state does not exist yet."""
        return []

    def collect(self) -> Iterator[Metric]:
        from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        names = tuple(self._constant)
        constant = tuple(value if isinstance(value, str) else value() for value in self._constant.values())
        for family in self.families.values():
            labels = (*family.label_names, *names)
            made: CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily
            if family.kind == "histogram":
                made = HistogramMetricFamily(family.name, family.help_text, labels=labels)
            elif family.kind == "counter":
                made = CounterMetricFamily(family.name, family.help_text, labels=labels)
            else:
                made = GaugeMetricFamily(family.name, family.help_text, labels=labels)
            for values, found in family.read().items():
                if isinstance(found, Histogram):
                    assert isinstance(made, HistogramMetricFamily)
                    made.add_metric((*values, *constant), found.buckets(), found.total)
                else:
                    assert not isinstance(made, HistogramMetricFamily)
                    made.add_metric((*values, *constant), found)
            if made.samples:
                yield made


class _Children:
    """The readers of a family's children, called one by one."""

    __slots__ = ("readers",)

    def __init__(self, readers: dict[Labels, Callable[[], float | Histogram | None]]) -> None:
        self.readers = readers

    def __call__(self) -> Mapping[Labels, float | Histogram]:
        found = {values: read() for values, read in self.readers.items()}
        return {values: value for values, value in found.items() if value is not None}


def add_process(metrics: Metrics, component: str) -> None:
    """The metrics of every Baton process: its build; memory, processor time and files from /proc if there is one."""
    metrics.gauge(
        "baton_build_info",
        "1; the labels say which program of which build this is",
        lambda: 1.0,
        component=component,
        version=__version__,
        protocol=str(PROTOCOL_VERSION),
        python=platform.python_version(),
    )
    process = _Process()
    for name, (kind, help_text) in _PROCESS_FAMILIES.items():
        metrics.add(Family(name, kind, help_text, (), partial(process.read, name)))


# In the order of reading; the names are prometheus-client's, which existing dashboards use.
_PROCESS_FAMILIES = {
    "process_virtual_memory_bytes": ("gauge", "Virtual memory"),
    "process_resident_memory_bytes": ("gauge", "Resident memory; shared memory that was touched counts"),
    "process_start_time_seconds": ("gauge", "Start of the process, seconds since 1970"),
    "process_cpu_seconds": ("counter", "Processor time, user and system, of all threads"),
    "process_max_fds": ("gauge", "Limit of open file descriptors"),
    "process_open_fds": ("gauge", "Open file descriptors, sockets included"),
}


class _Process:
    """Reads /proc once for all families of a scrape, when the first of them is read."""

    def __init__(self) -> None:
        from prometheus_client import ProcessCollector

        self._collector = ProcessCollector(registry=None)
        self._found: dict[str, float] = {}

    def read(self, name: str) -> Mapping[Labels, float]:
        if name == next(iter(_PROCESS_FAMILIES)):
            self._found = {m.name: sample.value for m in self._collector.collect() for sample in m.samples}
        return {(): self._found[name]} if name in self._found else {}


def exposition(metrics: Metrics) -> bytes:
    """All metrics in the Prometheus text format."""
    from prometheus_client import CollectorRegistry, generate_latest

    registry = CollectorRegistry()
    registry.register(metrics)
    return generate_latest(registry)
