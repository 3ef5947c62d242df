"""What the client refuses before anything is sent: every failure is an error of baton.errors."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import baton
from baton import errors
from tests.support.fake_nodes import FakeCluster
from tests.support.router import router_beside

# Python has bytes of a command line that are not UTF-8 as such halves of surrogate pairs.
HALF = "\udcff"


@pytest.mark.parametrize(
    ("prompt", "settings"),
    [
        (HALF, {}),
        ([("user", HALF)], {}),
        ([(HALF, "x")], {}),
        ("x", {"cache_salt": HALF}),
        ("x", {"stop": ["a", HALF]}),
        ("x", {"model": HALF}),
        ("x", {"request_id": HALF}),
    ],
)
def test_text_that_is_not_unicode_is_refused_in_every_field(prompt: Any, settings: dict[str, Any]) -> None:
    expected = "a text of the request cannot be sent as UTF-8: surrogates not allowed"
    with baton.Client("127.0.0.1:1") as client, pytest.raises(errors.InvalidRequest, match=expected):
        client.complete(prompt, **settings)

    async def ask() -> None:
        async with baton.AsyncClient("127.0.0.1:1") as client:
            await client.complete(prompt, **settings)

    with pytest.raises(errors.InvalidRequest, match=expected):
        asyncio.run(ask())


@pytest.mark.parametrize(
    ("prompt", "settings"),
    [
        ([-1], {}),
        ([2**32], {}),
        ([1.5], {}),
        (None, {}),
        ([("user", 1)], {}),
        ("x", {"cache_salt": 1}),
        ("x", {"priority": 2**31}),
        ("x", {"priority": 0.5}),
        ("x", {"cache_salt": ["a"]}),
        ("x", {"timeout_s": "soon"}),
        ("x", {"stop": [1]}),
    ],
)
def test_what_a_message_cannot_hold_is_refused(prompt: Any, settings: dict[str, Any]) -> None:
    with (
        baton.Client("127.0.0.1:1") as client,
        pytest.raises(errors.InvalidRequest, match="the request has a value of a wrong type or size: "),
    ):
        client.complete(prompt, **settings)


def test_a_node_name_that_is_not_unicode_is_no_node() -> None:
    async def ask() -> None:
        async with baton.AsyncClient("127.0.0.1:1") as client:
            await client.drain(HALF)

    with baton.Client("127.0.0.1:1") as client, pytest.raises(errors.InvalidRequest):
        client.drain(HALF)
    with pytest.raises(errors.InvalidRequest):
        asyncio.run(ask())


@pytest.mark.parametrize("key", ["ü", "a\n", HALF, "\0"])
def test_a_key_that_no_header_can_carry_is_refused(key: str) -> None:
    with pytest.raises(errors.InvalidRequest, match="printable ASCII") as refused:
        baton.Client("127.0.0.1:1", api_key=key)
    assert refused.value.param == "api_key"


async def test_what_is_too_large_for_grpc_is_not_for_a_second_try() -> None:
    async with FakeCluster(mixed=1) as cluster, router_beside(cluster) as router:
        for key, num_chars in (("", 3_000_000), ("", 70_000_000), ("x" * 20_000, 1)):
            async with baton.AsyncClient(router.grpc or "", api_key=key) as client:
                with pytest.raises(errors.InvalidRequest, match=r"larger than max|exceeds") as refused:
                    await client.complete("x" * num_chars)
                assert not refused.value.retryable
