"""Hostile peers at every port of a worker: none crashes or hangs it, keeps a block, or changes an answer of others.

Each example brings several visits; then both nodes have all of their blocks back and relay a sequence token for token.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import AsyncExitStack
from random import Random

import hypothesis.strategies as st
import pytest
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, given, settings

from baton.errors import BatonError
from tests.support.hostile import Visitor
from tests.support.node import spec
from tests.support.relay import Pair, oracle, pair

_log = logging.getLogger(__name__)
VISITS = st.tuples(st.sampled_from(("prefill", "decode")), st.sampled_from(Visitor.PORTS), st.integers(0, 2**32))


class _Mishaps(logging.Handler):
    """Tracebacks of a worker that are not of a peer's making."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        is_refusal = isinstance(error, BatonError | DecodeError)
        if not is_refusal and (error is not None or record.name == "asyncio"):
            self.found.append(f"{record.getMessage()}: {error!r}")


class Attacked:
    """A pair of workers, kept between examples; their loop runs during them alone."""

    def __init__(self, runner: asyncio.Runner, relay: Pair) -> None:
        self._runner = runner
        self._relay = relay
        prefill, decode = relay.prefill_worker.address, relay.decode_worker.address
        self.visitors = {"prefill": Visitor(prefill, [decode]), "decode": Visitor(decode, [prefill])}
        self._numbers = itertools.count()
        self.mishaps = _Mishaps()

    def outlives(self, visits: list[tuple[str, str, int]]) -> None:
        self._runner.run(self._outlive(visits))
        found, self.mishaps.found = self.mishaps.found, []
        assert found == []

    async def _outlive(self, visits: list[tuple[str, str, int]]) -> None:
        for side, port, seed in visits:
            await self.visitors[side].visit(port, Random(seed))
        await self._relay.settled(20.0)
        self._relay.forget()
        number = next(self._numbers)
        sequence = spec(f"known{number}", 20 + number % 50, max_tokens=4)
        assert await self._relay.relay(sequence) == oracle(sequence)
        await self._relay.settled()

    @property
    def outcomes(self) -> Counter[tuple[str, str]]:
        return sum((v.outcomes for v in self.visitors.values()), Counter[tuple[str, str]]())

    @property
    def num_inputs(self) -> int:
        return sum(n for (_, outcome), n in self.outcomes.items() if outcome == "sent")


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attacked]:
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()
        relay = runner.run(stack.enter_async_context(pair(tmp_path_factory.mktemp("attacked"))))
        found = Attacked(runner, relay)
        logging.getLogger().addHandler(found.mishaps)
        try:
            yield found
            runner.run(relay.unharmed())
        finally:
            logging.getLogger().removeHandler(found.mishaps)
            runner.run(stack.aclose())


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(visits=st.lists(VISITS, min_size=1, max_size=6))
def test_no_hostile_peer_harms_a_worker(attacked: Attacked, visits: list[tuple[str, str, int]]) -> None:
    attacked.outlives(visits)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_fifty_thousand_hostile_inputs_harm_no_worker(attacked: Attacked) -> None:
    @settings(max_examples=1_000, suppress_health_check=list(HealthCheck), database=None)
    @given(visits=st.lists(VISITS, min_size=10, max_size=10))
    def outlives(visits: list[tuple[str, str, int]]) -> None:
        attacked.outlives(visits)

    while attacked.num_inputs < 50_000:
        outlives()
    for (port, outcome), count in sorted(attacked.outcomes.items()):
        _log.info("%-10s %-22s %d", port, outcome, count)
