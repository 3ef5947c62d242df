"""What stands in Redis and what routers read of it: over a fake server and a real one, with and without TLS."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import fakeredis
import pytest

from baton.errors import BadConfig, Unavailable
from baton.registry import MAX_NODES, NodeRecord, Registry, RegistryConfig
from baton.types import Role
from tests.support.redis_server import RedisServer

RECORD = NodeRecord("decode-0", "10.0.0.1:50052", 5, Role.DECODE, "abc")
OTHER = NodeRecord("prefill-0", "[fd00::1]:50052", 2**63 - 1, Role.PREFILL, "abc")


@pytest.fixture(params=["fake", "real"])
async def registry(request: pytest.FixtureRequest) -> AsyncIterator[Registry]:
    if request.param == "fake":
        client = fakeredis.FakeAsyncRedis(decode_responses=True)
        found = Registry(RegistryConfig("redis://fake:6379"), client)
    else:
        found = Registry(RegistryConfig(request.getfixturevalue("redis_server").url))
    yield found
    await found.close()


async def addresses(registry: Registry) -> list[str]:
    records, problems = await registry.nodes()
    assert problems == []
    return [record.address for record in records]


async def test_records_come_back_as_they_were_written(registry: Registry) -> None:
    assert await registry.nodes() == ([], [])
    for record in (RECORD, OTHER):
        assert await registry.register(record, 10.0, takes_over=True) is None
    assert await registry.nodes() == ([RECORD, OTHER], [])
    await registry.leave(RECORD)
    await registry.leave(RECORD)
    assert await registry.nodes() == ([OTHER], [])


async def test_a_redis_that_takes_nothing_is_noticed_before_anybody_registers(redis_server: RedisServer) -> None:
    registry = Registry(RegistryConfig(redis_server.url))
    try:
        await registry.check_writable()
        assert await registry.nodes() == ([], [])
        await registry._redis.config_set("maxmemory", "1")
        assert await registry.nodes() == ([], [])
        with pytest.raises(Unavailable, match="OutOfMemoryError"):
            await registry.check_writable()
    finally:
        await registry._redis.config_set("maxmemory", "0")
        await registry.close()


async def test_an_expired_record_is_gone_and_its_address_is_swept_out(registry: Registry) -> None:
    await registry.register(RECORD, 0.1, takes_over=True)
    await registry.register(OTHER, 10.0, takes_over=True)
    await asyncio.sleep(0.2)
    assert await addresses(registry) == [OTHER.address]
    assert await registry._redis.smembers(registry._index) == {OTHER.address}


async def test_a_new_incarnation_replaces_the_old_one_and_is_not_replaced_by_it(registry: Registry) -> None:
    new = replace(RECORD, incarnation=6, home_role=Role.MIXED)
    await registry.register(RECORD, 10.0, takes_over=True)
    assert await registry.register(new, 10.0, takes_over=True) is None
    assert await registry.register(RECORD, 10.0, takes_over=False) == 6
    await registry.leave(RECORD)
    assert await registry.nodes() == ([new], [])


async def next_change(changes: AsyncGenerator[bool, None]) -> None:
    async with asyncio.timeout(5):
        while not await anext(changes):
            pass


async def test_changes_are_announced_and_renewals_are_not(registry: Registry) -> None:
    async with aclosing(registry.changes(0.1)) as changes:
        assert await anext(changes)
        steps = [
            registry.register(RECORD, 10.0, takes_over=True),
            registry.register(replace(RECORD, incarnation=6), 10.0, takes_over=True),
            registry.leave(replace(RECORD, incarnation=6)),
        ]
        for step in steps:
            await step
            await next_change(changes)
        await registry.register(RECORD, 10.0, takes_over=True)
        await next_change(changes)
        await registry.register(RECORD, 10.0, takes_over=False)
        assert [await anext(changes) for _ in range(4)] == [False] * 4


async def test_what_no_node_wrote_is_left_out_and_told(registry: Registry) -> None:
    await registry.register(RECORD, 10.0, takes_over=True)
    bad = {"x": {"address": "x"}, "y:1": {**RECORD.fields(), "home_role": "boss"}, "z:1": {"address": "z:1"}}
    for address, fields in bad.items():
        await registry._redis.sadd(registry._index, address)
        await registry._redis.hset(registry._record_prefix + address, mapping=fields)
    records, problems = await registry.nodes()
    assert records == [RECORD]
    assert len(problems) == 3
    assert "boss" in problems[1]


async def test_clusters_of_other_names_do_not_meet(redis_server: RedisServer) -> None:
    mine, theirs = (Registry(RegistryConfig(redis_server.url, name)) for name in ("a", "b"))
    await mine.register(RECORD, 10.0, takes_over=True)
    assert await addresses(theirs) == []
    await mine.close()
    await theirs.close()


async def test_tls(tmp_path: Path) -> None:
    server = RedisServer(tmp_path, password="s3cret", tls=True)
    try:
        server.start()
        registry = Registry(RegistryConfig(server.url))
        await registry.register(RECORD, 10.0, takes_over=True)
        assert await addresses(registry) == [RECORD.address]
        await registry.close()
        stranger = Registry(RegistryConfig(server.url.partition("?")[0]))
        with pytest.raises(Unavailable, match=r"(?i)certificate"):
            await stranger.nodes()
        await stranger.close()
    finally:
        server.close()


async def test_errors_name_the_place_and_never_the_password(redis_server: RedisServer) -> None:
    for url in (redis_server.url.replace("s3cret", "guess"), redis_server.url.replace(":s3cret@", "")):
        registry = Registry(RegistryConfig(url))
        with pytest.raises(BadConfig, match=f"127.0.0.1:{redis_server.port}/0") as refused:
            await registry.nodes()
        assert "guess" not in refused.value.message
        await registry.close()
    redis_server.kill()
    registry = Registry(RegistryConfig(redis_server.url))
    with pytest.raises(Unavailable, match=f"127.0.0.1:{redis_server.port}/0") as gone:
        await registry.nodes()
    assert "s3cret" not in gone.value.message
    await registry.close()


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"url": "http://x"}, "redis://"),
        ({"url": "redis://h:99999999"}, "99999999"),
        ({"url": "redis://h", "cluster": "a b"}, "cluster"),
        ({"url": "redis://h", "timeout_s": 0.0}, "timeout_s"),
        ({"url": "redis://:secret@h?nonsense=1"}, "h"),
    ],
)
async def test_bad_settings_are_refused_at_once(settings: dict[str, str], word: str) -> None:
    with pytest.raises(BadConfig) as refused:
        Registry(RegistryConfig(**settings))  # type: ignore[arg-type]
    assert word in refused.value.message
    assert "secret" not in refused.value.message


async def test_of_more_addresses_than_a_cluster_has_the_first_count_and_it_is_told(registry: Registry) -> None:
    found = [f"10.0.{number // 250}.{number % 250}:1" for number in range(MAX_NODES + 1)]
    pipeline = registry._redis.pipeline(transaction=False)
    pipeline.sadd(registry._index, *found)
    for address in found:
        pipeline.hset(registry._record_prefix + address, "no", "record")
    await pipeline.execute()
    nodes, problems = await registry.nodes()
    assert nodes == []
    assert problems[0] == f"{MAX_NODES + 1} addresses are registered, only the first {MAX_NODES} count"
    assert len(problems) == MAX_NODES + 1
