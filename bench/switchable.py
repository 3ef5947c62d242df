"""A router or worker whose observability can be switched at run time, for a bench that compares on with off.

    python -m bench.switchable router|worker OPTIONS

Runs the same program as `python -m cli`, with SIGUSR1 for off, SIGUSR2 for on without spans, and SIGWINCH for on with
spans (--otel). On, all methods are the shipped ones. Off, the methods that count, stamp and record are replaced by one
that returns at once; what is left of their cost is a call each, and a few clock readings and tuples in the callers.
"""

from __future__ import annotations

import importlib.util
import logging
import runpy
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

from baton.metrics import Counter, Counters, Histogram
from baton.observe import Lifeline, Relay

OFF, ON, SPANS = signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH

_NO_RELAY = Relay("", "", 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1)
_Method = Callable[..., Any]


def _nothing(*args: object, **kwargs: object) -> None:
    return None


def _no_relay(lifeline: Lifeline) -> Relay:
    return _NO_RELAY


def _replaced(command: str) -> Iterator[tuple[type, str, _Method]]:
    """The replaced methods; of a lifeline all but those that the flow itself reads: attempts, and whether a transfer
    is known."""
    yield Counter, "add", _nothing
    yield Counters, "add", _nothing
    yield Histogram, "observe", _nothing
    for name in ("queued", "placed", "leased", "sent", "prefilled", "joined", "tokens", "ended"):
        yield Lifeline, name, _nothing
    yield Lifeline, "relay", _no_relay
    if command == "router":
        from router.metrics import RouterMetrics

        yield RouterMetrics, "observe", _nothing
        return
    from baton.timeline import Timeline
    from engine.meter import EngineMeter, StepBook

    for name in ("step", "transfer", "write", "joined"):
        yield Timeline, name, _nothing
    for name in ("step", "outcome"):
        yield EngineMeter, name, _nothing
    for name in ("add", "settle"):
        yield StepBook, name, _nothing


class Switch:
    """Replaces methods on their classes, so that the on state runs the shipped code."""

    def __init__(self, command: str) -> None:
        self._quiet = list(_replaced(command))
        self._loud = [(owner, name, getattr(owner, name)) for owner, name, _ in self._quiet]
        self._has_spans = False

    def to(self, wanted: int) -> None:
        for owner, name, method in self._quiet if wanted == OFF else self._loud:
            setattr(owner, name, method)
        self._has_spans = wanted == SPANS
        # The log line of an ended request.
        logging.getLogger("baton.router").setLevel(logging.WARNING if wanted == OFF else logging.NOTSET)

    def gate_spans(self) -> None:
        """Wraps the bound method that the dispatcher holds, which a replaced class method does not affect."""
        from router.observe.spans import Spans

        on_ended = Spans.on_ended

        def gated(spans: Spans, ended: Any) -> None:
            if self._has_spans:
                on_ended(spans, ended)

        setattr(Spans, "on_ended", gated)  # noqa: B010 - mypy knows it as a method


def main() -> None:
    command = sys.argv[1]
    switch = Switch(command)
    if command == "router" and importlib.util.find_spec("opentelemetry") is not None:
        switch.gate_spans()
    for wanted in (OFF, ON, SPANS):
        signal.signal(wanted, lambda number, _: switch.to(number))
    # The program that `python -m cli` runs; benches do not import it.
    runpy.run_module("cli", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
