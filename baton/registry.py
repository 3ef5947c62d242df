"""The cluster's registry in Redis: the addresses of its nodes, each with an expiry. Needs the `router` extra.

Defines the keys and their meaning, for nodes that write them and routers that read them. It caches nothing and retries
nothing. It only tells routers which addresses to dial: a node's state comes from its session.

    baton:{CLUSTER}:node:ADDRESS   hash, one NodeRecord; expires unless renewed
    baton:{CLUSTER}:nodes          set of the registered addresses; expired ones are removed when seen
    baton:{CLUSTER}:changed        channel; carries an address whenever its record is written or deleted

Needs the commands of Redis 6.2; the braces keep a cluster's keys on one shard.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, NoPermissionError, RedisError

from baton.address import is_anywhere, parse_address
from baton.errors import BadConfig, Unavailable, quoted
from baton.names import check_cluster
from baton.settings import check, setting
from baton.types import Role

if TYPE_CHECKING:
    from baton.faults.faults import Faults

_T = TypeVar("_T")

# Upper bound on the nodes that are read, whatever the database contains.
MAX_NODES = 4096
_SCHEMES = ("redis", "rediss", "unix")

# KEYS: record, index. ARGV: incarnation, "1" to take over from another incarnation, ttl in ms, address, channel, then
# the record's fields and values. Returns the incarnation that holds the address instead, or "".
_REGISTER = """
local held = redis.call('HGET', KEYS[1], 'incarnation')
if held and held ~= ARGV[1] and ARGV[2] ~= '1' then return held end
redis.call('HSET', KEYS[1], unpack(ARGV, 6))
redis.call('PEXPIRE', KEYS[1], ARGV[3])
redis.call('SADD', KEYS[2], ARGV[4])
if held ~= ARGV[1] then redis.call('PUBLISH', ARGV[5], ARGV[4]) end
return ''
"""
# KEYS as above. ARGV: incarnation, address, channel.
_LEAVE = """
if redis.call('HGET', KEYS[1], 'incarnation') ~= ARGV[1] then return 0 end
redis.call('DEL', KEYS[1])
redis.call('SREM', KEYS[2], ARGV[2])
redis.call('PUBLISH', ARGV[3], ARGV[2])
return 1
"""
# KEYS as above. ARGV: address. The node may have registered again since it was found missing.
_PRUNE = "if redis.call('EXISTS', KEYS[1]) == 0 then return redis.call('SREM', KEYS[2], ARGV[1]) end return 0"
# KEYS: index. The write has no effect; a Redis that is full, a replica or read-only refuses the first command.
_TRY = "redis.call('SADD', KEYS[1], 'a try') return redis.call('SREM', KEYS[1], 'a try')"


@dataclass(frozen=True, slots=True)
class NodeRecord:
    """A node's facts that are known before it is dialled; the handshake has the rest."""

    node_id: str
    address: str
    incarnation: int
    home_role: Role
    fingerprint: str

    def fields(self) -> dict[str, str]:
        return {
            "node_id": self.node_id,
            "address": self.address,
            "incarnation": str(self.incarnation),
            "home_role": self.home_role.value,
            "fingerprint": self.fingerprint,
        }

    @classmethod
    def parse(cls, fields: Mapping[str, str]) -> NodeRecord:
        """Raises ValueError for a record that no Baton node can have written."""
        try:
            host, _ = parse_address(fields.get("address", ""), "address", lowest_port=1)
        except BadConfig as error:
            raise ValueError(error.message) from error
        if is_anywhere(host):
            raise ValueError(f"address is {quoted(fields['address'])}, which cannot be dialled")
        incarnation = fields.get("incarnation", "")
        if not incarnation.isascii() or not incarnation.isdigit() or len(incarnation) > 20:
            raise ValueError(f"incarnation is {quoted(fields.get('incarnation'))}, expected a number")
        return cls(
            node_id=fields.get("node_id", ""),
            address=fields["address"],
            incarnation=int(fields["incarnation"]),
            home_role=Role(fields.get("home_role", "")),
            fingerprint=fields.get("fingerprint", ""),
        )


@dataclass(frozen=True, slots=True)
class RegistryConfig:
    """``url``: redis://[user:password@]host:port/db, rediss:// for TLS, unix:///path. Empty: there is no registry.

    Raises BadConfig.
    """

    url: str = field(
        default="",
        repr=False,
        metadata=setting(
            "--registry",
            "redis://[user:password@]host:port/db, rediss:// for TLS: where workers register and routers find them.",
            variable="BATON_REGISTRY",
        ),
    )
    # Also what the metrics say, with and without a registry.
    cluster: str = field(
        default="default",
        metadata=setting("--cluster", "Clusters of other names in one Redis do not meet.", variable="BATON_CLUSTER"),
    )
    # Deadline of every call.
    timeout_s: float = 1.0

    def __post_init__(self) -> None:
        if self.url and urlsplit(self.url).scheme not in _SCHEMES:
            expected = "redis://host:port/db, rediss:// for TLS, or unix:///path"
            raise BadConfig(f"url is {self.shown_url!r}, expected {expected}", param="url")
        check_cluster(self.cluster)
        check(self)

    @property
    def is_used(self) -> bool:
        return self.url != ""

    @property
    def shown_url(self) -> str:
        """The URL without password and query, for logs."""
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


class Registry:
    """One cluster's part of a Redis database. Calls raise Unavailable, or BadConfig if Redis does not let us in."""

    def __init__(
        self, config: RegistryConfig, client: redis.asyncio.Redis | None = None, faults: Faults | None = None
    ) -> None:
        """``client`` decodes responses; a fake one in tests."""
        self._config = config
        self._faults = faults
        prefix = f"baton:{{{config.cluster}}}"
        self._index = f"{prefix}:nodes"
        self._channel = f"{prefix}:changed"
        self._record_prefix = f"{prefix}:node:"
        self._redis = client or _connect(config)
        self._register = self._redis.register_script(_REGISTER)
        self._leave = self._redis.register_script(_LEAVE)
        self._prune = self._redis.register_script(_PRUNE)
        self._try = self._redis.register_script(_TRY)

    async def register(self, record: NodeRecord, ttl_s: float, *, takes_over: bool) -> int | None:
        """Write or renew the record. Another incarnation that holds the address is returned, unless it is replaced."""
        fields = [word for item in record.fields().items() for word in item]
        arguments: list[str | int] = [
            record.incarnation,
            int(takes_over),
            int(ttl_s * 1000),
            record.address,
            self._channel,
            *fields,
        ]
        held = await self._call(self._register(keys=self._keys(record.address), args=arguments))
        return int(held) if held else None

    async def leave(self, record: NodeRecord) -> None:
        """Delete the record, if it is still this incarnation's."""
        arguments: list[str | int] = [record.incarnation, record.address, self._channel]
        await self._call(self._leave(keys=self._keys(record.address), args=arguments))

    async def check_writable(self) -> None:
        """Raise unless nodes could register: reading alone does not show that."""
        await self._call(self._try(keys=[self._index], args=[]))

    async def nodes(self) -> tuple[list[NodeRecord], list[str]]:
        """All nodes whose record has not expired, by address, and the reasons for records that were left out."""
        return await self._call(self._nodes())

    async def _nodes(self) -> tuple[list[NodeRecord], list[str]]:
        addresses = sorted(await _awaited(self._redis.smembers(self._index)))
        problems = []
        if len(addresses) > MAX_NODES:
            problems.append(f"{len(addresses)} addresses are registered, only the first {MAX_NODES} count")
            addresses = addresses[:MAX_NODES]
        pipeline = self._redis.pipeline(transaction=False)
        for address in addresses:
            pipeline.hgetall(self._record_prefix + address)
        found: list[NodeRecord] = []
        for address, fields in zip(addresses, await pipeline.execute() if addresses else [], strict=True):
            if not fields:
                await self._prune(keys=self._keys(address), args=[address])
                continue
            try:
                found.append(NodeRecord.parse(fields))
            except ValueError as error:
                problems.append(f"record of {quoted(address)}: {error}")
        return found, problems

    async def changes(self, look_s: float) -> AsyncGenerator[bool, None]:
        """True once subscribed and at every change, False after ``look_s`` without one; close the iterator to end."""
        pubsub = self._redis.pubsub(ignore_subscribe_messages=True)
        try:
            await self._call(pubsub.subscribe(self._channel))
            yield True
            while True:
                message = await self._call(pubsub.get_message(timeout=look_s), extra_s=look_s)
                yield message is not None
        finally:
            with contextlib.suppress(RedisError, OSError):
                await pubsub.aclose()  # type: ignore[no-untyped-call]

    async def close(self) -> None:
        with contextlib.suppress(RedisError, OSError):
            await self._redis.aclose()

    def _keys(self, address: str) -> list[str]:
        return [self._record_prefix + address, self._index]

    async def _call(self, call: Awaitable[_T], extra_s: float = 0.0) -> _T:
        where = self._config.shown_url
        if self._faults is not None:
            await self._struck(self._faults, call)
        try:
            # The socket's own timeout comes first; this one bounds name resolution and several round trips.
            async with asyncio.timeout(3 * self._config.timeout_s + extra_s):
                return await call
        except (AuthenticationError, NoPermissionError) as error:
            raise BadConfig(f"the registry at {where} does not let us in: {error}", param="registry") from error
        except (RedisError, OSError) as error:
            raise Unavailable(f"the registry at {where}: {type(error).__name__}: {error}") from error

    @staticmethod
    async def _struck(faults: Faults, call: Awaitable[object]) -> None:
        """Raises Unavailable if the registry is gone by the schedule of faults; nothing is sent then."""
        try:
            await faults.reach_registry()
        except BaseException:
            if isinstance(call, Coroutine):
                call.close()
            raise


def _connect(config: RegistryConfig) -> redis.asyncio.Redis:
    try:
        client = redis.asyncio.Redis.from_url(
            config.url,
            decode_responses=True,
            socket_timeout=config.timeout_s,
            socket_connect_timeout=config.timeout_s,
            health_check_interval=5,
            # The caller decides whether and when to try again.
            retry=Retry(NoBackoff(), 0),
        )
        # Connects nowhere; options of the URL that do not exist would be noticed by the first call alone.
        client.connection_pool.connection_class(**client.connection_pool.connection_kwargs)
    except (ValueError, TypeError) as error:
        raise BadConfig(f"registry {config.shown_url!r}: {error}", param="registry") from error
    return client


async def _awaited(answer: Any) -> Any:
    """redis-py types its commands for both of its clients at once."""
    return await answer
