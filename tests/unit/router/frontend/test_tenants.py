"""Who shares KV with whom: the salt of a request, by its API key and by what it asks for, as nodes are told it."""

from __future__ import annotations

import itertools
from typing import Any

import httpx
import pytest

import baton
from baton import errors
from baton.types import MAX_CACHE_SALT_BYTES
from router.clients import cache_salt
from router.config import RouterConfig
from tests.support.fake_nodes import FakeCluster
from tests.support.router import router_beside

KEYS = ("first-key", "second-key")
PROMPT = [1, 2, 3]


def test_salts_are_equal_only_for_the_same_tenant_and_words() -> None:
    parts = ["", "a", "b", "ab", "a\0", "key a", "ü"]
    salts = {pair: cache_salt(*pair) for pair in itertools.product(parts, parts)}
    assert len(set(salts.values())) == len(salts)
    assert salts["", ""] == b"", "without a tenant and a salt all share"
    assert all(len(salt) <= MAX_CACHE_SALT_BYTES for salt in salts.values())
    assert cache_salt("a", "b") == cache_salt("a", "b"), "also in another router, or after its restart"


async def salts_of(cluster: FakeCluster, router: Any, requests: list[tuple[str, str]]) -> list[bytes]:
    """What the node is told for requests of (API key, cache_salt); every one is sent over both faces."""
    node, found = cluster["mixed-0"], []
    async with httpx.AsyncClient(base_url=router.http) as http:
        for key, salt in requests:
            async with baton.AsyncClient(router.grpc, api_key=key) as client:
                await client.complete(PROMPT, max_tokens=1, cache_salt=salt)
            assert node.script.last_spec is not None
            by_grpc = node.script.last_spec.cache_salt
            body: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 1} | ({"cache_salt": salt} if salt else {})
            # Other spellings of the same header are the same tenant.
            headers = {"authorization": f"bearer   {key}"} if key else {}
            answer = await http.post("/v1/completions", json=body, headers=headers)
            assert answer.status_code == 200, answer.text
            assert node.script.last_spec.cache_salt == by_grpc
            found.append(by_grpc)
    return found


async def test_each_key_is_a_tenant_by_default() -> None:
    async with FakeCluster(mixed=1) as cluster, router_beside(cluster, api_keys=KEYS) as router:
        requests = [(key, salt) for key in KEYS for salt in ("", "s", "t")]
        salts = await salts_of(cluster, router, [*requests, *requests])
    assert salts[:6] == salts[6:]
    assert len(set(salts[:6])) == 6
    assert b"" not in salts
    assert not any(key.encode() in salt for key in KEYS for salt in salts)


async def test_keys_share_where_the_operator_says_so() -> None:
    async with (
        FakeCluster(mixed=1) as cluster,
        router_beside(cluster, api_keys=KEYS, prefix_cache_scope="all") as router,
    ):
        first, first_salted, second, second_salted = await salts_of(
            cluster, router, [(key, salt) for key in KEYS for salt in ("", "s")]
        )
    assert first == second == b""
    assert first_salted == second_salted != b""


async def test_without_keys_only_the_asked_salt_counts() -> None:
    async with FakeCluster(mixed=1) as cluster, router_beside(cluster) as router:
        salts = await salts_of(cluster, router, [("", ""), ("ignored", ""), ("", "s"), ("ignored", "s")])
    assert salts == [b"", b"", cache_salt("", "s"), cache_salt("", "s")]


async def test_a_second_header_cannot_make_another_tenant() -> None:
    """The key that was checked is the one that counts."""
    async with (
        FakeCluster(mixed=1) as cluster,
        router_beside(cluster, api_keys=KEYS) as router,
        httpx.AsyncClient(base_url=router.http or "") as http,
    ):
        (expected,) = await salts_of(cluster, router, [(KEYS[1], "")])
        headers = [("authorization", "Bearer guessed"), ("authorization", f"Bearer {KEYS[1]}")]
        answer = await http.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 1}, headers=headers)
        assert answer.status_code == 200
        spec = cluster["mixed-0"].script.last_spec
        assert spec is not None
        assert spec.cache_salt == expected
        refused = await http.post("/v1/completions", json={"prompt": PROMPT}, headers=headers[::-1])
        assert refused.status_code == 401


async def test_long_salts_are_refused_by_name_over_both_faces() -> None:
    async with (
        FakeCluster(mixed=1) as cluster,
        router_beside(cluster) as router,
        baton.AsyncClient(router.grpc or "") as client,
        httpx.AsyncClient(base_url=router.http or "") as http,
    ):
        await client.complete(PROMPT, max_tokens=1, cache_salt="ü" * 256)
        with pytest.raises(errors.InvalidRequest, match="257 characters, expected at most 256") as refused:
            await client.complete(PROMPT, max_tokens=1, cache_salt="ü" * 257)
        assert refused.value.param == "cache_salt"
        answer = await http.post("/v1/completions", json={"prompt": PROMPT, "cache_salt": "x" * 257})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "cache_salt")


def test_a_scope_of_keys_needs_keys() -> None:
    with pytest.raises(errors.BadConfig, match="prefix_cache_scope is 'key', expected API keys beside it"):
        RouterConfig(nodes=("h:1",), prefix_cache_scope="key")
    with pytest.raises(errors.BadConfig, match="prefix_cache_scope is 'tenant', expected auto or key or all"):
        RouterConfig(nodes=("h:1",), prefix_cache_scope="tenant")
