"""A worker's lease in the registry: the pure machine by hand-turned time, then over Redis."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace

import pytest

from baton.clock import MonotonicClock
from baton.errors import BadConfig
from baton.machine import Tick
from baton.registry import NodeRecord, Registry, RegistryConfig
from baton.types import Role
from tests.support.redis_server import RedisServer
from worker import registration as r

CONFIG = r.LeaseConfig(ttl_s=9.0)
RECORD = NodeRecord("decode-0", "10.0.0.1:50052", 5, Role.DECODE, "abc")


def test_it_registers_and_renews_three_times_a_lease() -> None:
    machine = r.LeaseKeeper(CONFIG)
    assert machine.handle(r.Begin(), 0.0) == [r.Register(takes_over=True)]
    assert machine.handle(Tick(), 5.0) == [], "an answer is awaited"
    assert machine.handle(r.Accepted(), 0.1) == [r.Say(logging.INFO, "registered")]
    assert machine.wake_at_s == pytest.approx(3.1)
    assert machine.handle(Tick(), 3.0) == []
    assert machine.handle(Tick(), 3.1) == [r.Register(takes_over=False)]
    assert machine.handle(r.Accepted(), 3.2) == []
    assert machine.handle(r.Withdraw(), 4.0) == [r.Leave()]
    assert machine.handle(Tick(), 99.0) == []


def test_a_registry_that_is_gone_is_told_once_and_tried_ever_less_often_but_within_a_renewal() -> None:
    machine = r.LeaseKeeper(CONFIG)
    machine.handle(r.Begin(), 0.0)
    (said,) = machine.handle(r.Failed("refused"), 0.0)
    assert isinstance(said, r.Say)
    now, gaps = 0.0, []
    for _ in range(10):
        assert machine.wake_at_s is not None
        gaps.append(machine.wake_at_s - now)
        now = machine.wake_at_s
        assert machine.handle(Tick(), now) == [r.Register(takes_over=True)], "it was never accepted"
        assert machine.handle(r.Failed("refused"), now) == []
    assert gaps[0] == pytest.approx(0.1)
    assert gaps[-1] == pytest.approx(3.0)
    machine.handle(Tick(), now + 3.0)
    (again,) = machine.handle(r.Accepted(), now + 3.0)
    assert isinstance(again, r.Say)
    assert f"{now + 3.0:.1f} s" in again.message


def test_who_was_replaced_stays_away() -> None:
    machine = r.LeaseKeeper(CONFIG)
    machine.handle(r.Begin(), 0.0)
    machine.handle(r.Accepted(), 0.0)
    machine.handle(Tick(), 3.0)
    (said,) = machine.handle(r.Superseded(77), 3.1)
    assert isinstance(said, r.Say)
    assert (said.level, "77" in said.message) == (logging.ERROR, True)
    assert machine.wake_at_s is None
    assert machine.handle(r.Withdraw(), 4.0) == [], "the record is another's"


@pytest.mark.parametrize("ttl_s", [0.0, -1.0, float("nan"), 1e9])
def test_bad_leases_are_refused(ttl_s: float) -> None:
    with pytest.raises(BadConfig, match="ttl_s is "):
        r.LeaseConfig(ttl_s=ttl_s)


def registration(server: RedisServer, record: NodeRecord = RECORD, ttl_s: float = 0.6) -> r.Registration:
    registry = Registry(RegistryConfig(server.url, timeout_s=0.3))
    return r.Registration(registry, record, r.LeaseConfig(ttl_s), MonotonicClock())


class ScriptedRegistry:
    """Answers each registration as told; keeps what it was asked."""

    def __init__(self, *answers: Exception | asyncio.Event | None) -> None:
        self.asked: list[str] = []
        self._answers = list(answers)

    async def register(self, record: NodeRecord, ttl_s: float, *, takes_over: bool) -> int | None:
        self.asked.append("take over" if takes_over else "renew")
        answer = self._answers.pop(0) if self._answers else None
        if isinstance(answer, asyncio.Event):
            await answer.wait()
        elif answer is not None:
            raise answer
        return None

    async def leave(self, record: NodeRecord) -> None:
        self.asked.append("leave")

    async def close(self) -> None:
        self.asked.append("close")


def scripted(registry: ScriptedRegistry) -> r.Registration:
    return r.Registration(registry, RECORD, r.LeaseConfig(0.15), MonotonicClock())  # type: ignore[arg-type]


async def test_a_defect_or_refused_access_later_on_does_not_end_the_registration(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "baton.worker.registry")
    registry = ScriptedRegistry(None, RuntimeError("planted"), BadConfig("does not let us in"), None)
    mine = scripted(registry)
    await mine.start()
    async with asyncio.timeout(10):
        while len(registry.asked) < 6:  # noqa: ASYNC110 - what the timer brings about
            await asyncio.sleep(0.01)
    await mine.close()
    assert registry.asked[:6] == ["take over", *["renew"] * 5]
    assert registry.asked[-2:] == ["leave", "close"]
    assert "defect in registration" in caplog.text
    assert "registered again" in caplog.text


async def test_a_record_under_way_is_taken_back_after_it_was_written() -> None:
    is_written = asyncio.Event()
    registry = ScriptedRegistry(None, is_written)
    mine = scripted(registry)
    await mine.start()
    async with asyncio.timeout(10):
        while len(registry.asked) < 2:  # noqa: ASYNC110 - what the timer brings about
            await asyncio.sleep(0.01)
    withdrawing = [asyncio.create_task(mine.withdraw()) for _ in range(2)]
    await asyncio.sleep(0.05)
    assert registry.asked == ["take over", "renew"]
    is_written.set()
    await asyncio.gather(*withdrawing)
    assert registry.asked == ["take over", "renew", "leave"]


async def listed(server: RedisServer) -> list[NodeRecord]:
    registry = Registry(RegistryConfig(server.url))
    try:
        return (await registry.nodes())[0]
    finally:
        await registry.close()


async def test_the_lease_is_renewed_and_the_record_leaves_with_the_worker(redis_server: RedisServer) -> None:
    mine = registration(redis_server)
    await mine.start()
    await asyncio.sleep(1.5)
    assert await listed(redis_server) == [RECORD]
    await mine.withdraw()
    assert redis_server.keys() == []
    await mine.close()


async def test_the_record_has_the_new_home_role_from_the_next_renewal_on(redis_server: RedisServer) -> None:
    mine = registration(redis_server)
    await mine.start()
    mine.change_home(Role.MIXED)
    async with asyncio.timeout(5):
        while await listed(redis_server) != [replace(RECORD, home_role=Role.MIXED)]:  # noqa: ASYNC110 - its renewal
            await asyncio.sleep(0.02)
    await mine.close()
    assert redis_server.keys() == []


async def test_it_starts_without_redis_and_comes_back_after_redis_forgot_everything(redis_server: RedisServer) -> None:
    redis_server.kill()
    mine = registration(redis_server)
    await mine.start()
    for _ in range(2):
        redis_server.start()
        async with asyncio.timeout(5):
            while await listed(redis_server) != [RECORD]:  # noqa: ASYNC110 - another process
                await asyncio.sleep(0.02)
        redis_server.kill()
    async with asyncio.timeout(5):
        await mine.close()


async def test_a_redis_that_hangs_does_not_hold_a_worker_up(redis_server: RedisServer) -> None:
    mine = registration(redis_server)
    await mine.start()
    redis_server.pause()
    try:
        async with asyncio.timeout(5):
            await mine.close()
    finally:
        redis_server.resume()


async def test_of_two_workers_with_one_address_the_later_one_stays(
    redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = registration(redis_server), registration(redis_server, replace(RECORD, incarnation=6))
    await first.start()
    await second.start()
    async with asyncio.timeout(5):
        while "two workers advertise one address" not in caplog.text:  # noqa: ASYNC110 - the other's next renewal
            await asyncio.sleep(0.02)
    await first.close()
    assert [x.incarnation for x in await listed(redis_server)] == [6]
    await second.close()


async def test_a_wrong_password_stops_the_start(redis_server: RedisServer) -> None:
    registry = Registry(RegistryConfig(redis_server.url.replace("s3cret", "wrong")))
    mine = r.Registration(registry, RECORD, CONFIG, MonotonicClock())
    with pytest.raises(BadConfig, match="does not let us in") as failed:
        await mine.start()
    assert "wrong" not in failed.value.message.replace("wrong number", "")
    await registry.close()
