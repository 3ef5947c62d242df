"""API keys over both faces: who has none or a wrong one sees 401 or UNAUTHENTICATED, and nothing else of the API."""

from __future__ import annotations

import asyncio

import grpc
import httpx
import openai
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

import baton
from baton import errors
from baton.api_keys import ApiKey, secret_of
from baton.registry import RegistryConfig
from baton.types import Role
from router.clients import client_of, client_of_key
from router.config import RouterConfig
from tests.support.fake_nodes import FakeCluster, FakeConfig
from tests.support.router import router_beside, until

KEYS = ("first-key", "second-key")
BODY = {"model": "fake", "prompt": [1, 2, 3], "max_tokens": 2}


@pytest.mark.parametrize("key", KEYS)
async def test_every_key_opens_both_faces(key: str) -> None:
    async with FakeCluster(mixed=1) as cluster, router_beside(cluster, api_keys=KEYS) as router:
        assert router.grpc is not None
        async with openai.AsyncOpenAI(base_url=f"{router.http}/v1", api_key=key, max_retries=0) as client:
            assert [m.id async for m in client.models.list()] == ["fake"]
        async with baton.AsyncClient(router.grpc, api_key=key) as typed:
            assert len((await typed.complete([1, 2, 3], max_tokens=2)).token_ids) == 2
            assert len((await typed.status()).nodes) == 1


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer first-ke", "Bearer first-key2", "Basic first-key", "first-key", "Bearer ü"],
)
async def test_http_without_a_right_key_is_401_in_the_shape_of_openai(header: str | None) -> None:
    headers = {} if header is None else {b"authorization": header.encode()}
    async with (
        FakeCluster(mixed=1) as cluster,
        router_beside(cluster, api_keys=KEYS) as router,
        httpx.AsyncClient(base_url=router.http or "") as client,
    ):
        for method, path in (("POST", "/v1/completions"), ("POST", "/v1/chat/completions"), ("GET", "/v1/models"),
                             ("GET", "/v1/nothing"), ("GET", "/v1")):  # fmt: skip
            body = BODY if method == "POST" else None
            answer = await client.request(method, path, json=body, headers=headers)  # type: ignore[arg-type]
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer"), path
            error = answer.json()["error"]
            assert (error["code"], error["type"]) == ("invalid_api_key", "invalid_request_error")
            assert "first-key" not in error["message"]
        for path in ("/health", "/ready", "/metrics"):
            assert (await client.get(path, headers=headers)).status_code == 200  # type: ignore[arg-type]
        assert (await client.get("/v12")).status_code == 404, "not an API path"
        assert router.dispatcher.scheduler.num_in_flight == 0


async def test_the_sdk_raises_its_own_error() -> None:
    async with (
        FakeCluster(mixed=1) as cluster,
        router_beside(cluster, api_keys=KEYS) as router,
        openai.AsyncOpenAI(base_url=f"{router.http}/v1", api_key="wrong", max_retries=0) as client,
    ):
        with pytest.raises(openai.AuthenticationError, match="API key"):
            await client.models.list()


@pytest.mark.parametrize("key", ["", "wrong"])
async def test_grpc_without_a_right_key_is_unauthenticated_but_healthy(key: str) -> None:
    async with FakeCluster(mixed=1) as cluster, router_beside(cluster, api_keys=KEYS) as router:
        assert router.grpc is not None
        async with baton.AsyncClient(router.grpc, api_key=key) as client:
            for call in (client.complete([1, 2, 3], max_tokens=2), client.status(), client.ledger(), client.drain("x")):
                with pytest.raises(errors.Unauthenticated, match="API key"):
                    await call
        async with aio.insecure_channel(router.grpc) as channel:
            answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            unknown = channel.unary_unary("/baton.v1.Router/Nothing")
            with pytest.raises(aio.AioRpcError) as refused:
                await unknown(b"")
            assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert router.dispatcher.scheduler.num_in_flight == 0


@pytest.mark.parametrize("bad", ["", "a b", "a\n", "ü"])
def test_bad_keys_stop_the_start_and_are_not_shown(bad: str) -> None:
    with pytest.raises(errors.BadConfig, match="hidden"):
        RouterConfig(nodes=("h:1",), api_keys=("s3cret", bad))
    registry = RegistryConfig("redis://:s3cret@h:1")
    assert "s3cret" not in repr(RouterConfig(registry=registry, api_keys=("s3cret",)))


@pytest.mark.parametrize(
    ("text", "name", "weight", "secret"),
    [
        ("abc", "", 1.0, "abc"),
        ("team-a:3=abc", "team-a", 3.0, "abc"),
        ("a.b_c:0.25=abc==", "a.b_c", 0.25, "abc=="),
        # Keys as they were before they could have a name.
        ("sk-abc==", "", 1.0, "sk-abc=="),
        ("a:b", "", 1.0, "a:b"),
        ("a:b=c", "", 1.0, "a:b=c"),
        (":3=abc", "", 1.0, ":3=abc"),
        ("a:nine=abc", "", 1.0, "a:nine=abc"),
        ("a:1=a:-3=abc", "a", 1.0, "a:-3=abc"),
        ("a:1=b:2=c", "a", 1.0, "b:2=c"),
    ],
)
def test_a_key_may_have_a_name_and_a_weight(text: str, name: str, weight: float, secret: str) -> None:
    key = ApiKey.parse(text)
    assert (key.name, key.weight, key.secret) == (name, weight, secret)
    assert client_of_key(secret.encode()) == client_of("h", f"Bearer {secret}".encode(), has_keys=True)
    assert secret not in repr(key)
    assert secret_of(f"{text} other") == secret


@pytest.mark.parametrize(
    ("text", "limits", "secret"),
    [
        ("a:1/600=abc", (600, 0), "abc"),
        ("a:2.5/600/32=abc", (600, 32), "abc"),
        ("a:1/0/32=abc", (0, 32), "abc"),
        ("a:1=abc", (0, 0), "abc"),
        ("a:1=1/600/32=abc", (0, 0), "1/600/32=abc"),
    ],
)
def test_a_key_may_have_limits(text: str, limits: tuple[int, int], secret: str) -> None:
    key = ApiKey.parse(text)
    assert (key.requests_per_minute, key.max_sequences) == limits
    assert key.secret == secret


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (("",), r"api_keys is '\(hidden\)', expected ASCII without spaces, and not empty"),
        (("a:3=tell not",), r"api_keys is '\(hidden\)', expected ASCII without spaces, and not empty"),
        (("a:0=tell-not",), r"api_keys has weight 0 for a, expected 0.001 to 1000"),
        (("a:0.000000001=tell-not",), r"api_keys has weight 1e-09 for a, expected 0.001 to 1000"),
        (("a:1001=tell-not",), r"api_keys has weight 1001 for a, expected 0.001 to 1000"),
        # What was meant as a name and limits is no key.
        *(
            ((f"a:{said}=tell-not",), r"'\(hidden\)', expected NAME:WEIGHT=KEY or NAME:WEIGHT/REQUESTS/SEQUENCES=KEY")
            for said in ("-3", "1e3", "/60", "1/", "1/600/", "1/-1", "1/600/x", "1/2/3/4", "1/9999999999", "1234567890")
        ),
        (("a:1=",), r"'\(hidden\)', expected NAME:WEIGHT=KEY"),
        # Digits of other alphabets make no weight, and a key is ASCII.
        (("a:\u0663=tell-not",), r"api_keys is '\(hidden\)', expected ASCII without spaces, and not empty"),
        (("a:1=tell-not", "b:2=tell-not"), r"api_keys is '\(hidden\)', expected each key once"),
    ],
)
def test_wrong_keys_are_refused_and_not_shown(keys: tuple[str, ...], message: str) -> None:
    with pytest.raises(errors.BadConfig, match=message) as refused:
        RouterConfig(nodes=("h:1",), api_keys=keys)
    assert "tell" not in refused.value.message


async def test_a_named_key_opens_by_its_secret_alone() -> None:
    keys = ("team:3=first-key", "second-key")
    async with FakeCluster(mixed=1) as cluster, router_beside(cluster, api_keys=keys) as router:
        for key in ("first-key", "second-key"):
            async with baton.AsyncClient(router.grpc, api_key=key) as client:
                assert len((await client.status()).nodes) == 1
        async with baton.AsyncClient(router.grpc, api_key="team:3=first-key") as client:
            with pytest.raises(errors.Unauthenticated):
                await client.status()


async def test_keys_share_the_nodes_by_their_weights() -> None:
    """Each has more waiting than the nodes have room for; one has three times the weight of the other."""
    ended: list[str] = []
    config = FakeConfig(num_blocks=8, block_tokens=16)
    keys = ("many:3=first", "few:1=second")
    async with (
        FakeCluster(config, mixed=1) as cluster,
        router_beside(cluster, api_keys=keys) as router,
        baton.AsyncClient(router.grpc, api_key="first") as first,
        baton.AsyncClient(router.grpc, api_key="second") as second,
        asyncio.TaskGroup() as group,
    ):
        cluster["mixed-0"].runner.hold()

        async def ask(name: str, client: baton.AsyncClient) -> None:
            await client.complete([1, 2, 3], max_tokens=8, ignore_eos=True)
            ended.append(name)

        for _ in range(60):
            group.create_task(ask("many", first))
            group.create_task(ask("few", second))
        await until(lambda: router.dispatcher.scheduler.num_in_flight == 120)
        cluster["mixed-0"].runner.resume()
    # While both had something waiting.
    assert 2.3 < ended[8:64].count("many") / ended[8:64].count("few") < 3.9


async def refused(client: baton.AsyncClient, error: type[errors.BatonError]) -> None:
    for call in (client.ledger(), client.cache(drop=True), client.trace(), client.drain("mixed-0"),
                 client.set_role("mixed-0", Role.DECODE)):  # fmt: skip
        with pytest.raises(error, match="admin key"):
            await call


@pytest.mark.parametrize("admin_key", ["", "operators"])
async def test_a_clients_key_does_not_open_what_is_the_operators(admin_key: str) -> None:
    async with (
        FakeCluster(mixed=1) as cluster,
        router_beside(cluster, api_keys=KEYS, admin_key=admin_key) as router,
        httpx.AsyncClient(base_url=router.http or "") as http,
    ):
        async with baton.AsyncClient(router.grpc or "", api_key=KEYS[0]) as client:
            assert len((await client.complete([1, 2, 3], max_tokens=2)).token_ids) == 2
            assert len((await client.status()).nodes) == 1
            await refused(client, errors.Forbidden)
        async with baton.AsyncClient(router.grpc or "", api_key="operator") as stranger:
            await refused(stranger, errors.Unauthenticated)
        answer = await http.get("/status/data", headers={"x-api-key": KEYS[0]})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden")
        assert (await http.get("/status/data")).status_code == 401
        assert not cluster["mixed-0"].service.status().draining
        assert router.metrics.access_refusals.value == 12


async def test_the_admin_key_opens_everything() -> None:
    async with (
        FakeCluster(mixed=1) as cluster,
        router_beside(cluster, api_keys=KEYS, admin_key="operators") as router,
        baton.AsyncClient(router.grpc or "", api_key="operators") as client,
        httpx.AsyncClient(base_url=router.http or "", headers={"authorization": "Bearer operators"}) as http,
    ):
        assert len((await client.complete([1, 2, 3], max_tokens=2)).token_ids) == 2
        assert len((await client.ledger()).nodes) == len((await client.cache()).nodes) == 1
        assert await client.trace()
        assert (await http.get("/status/data")).status_code == (await http.get("/v1/models")).status_code == 200
        assert (await client.drain("mixed-0")).drain.node_id == "mixed-0"
        assert router.metrics.access_refusals.value == 0


async def test_with_an_admin_key_alone_clients_need_none() -> None:
    async with (
        FakeCluster(mixed=1) as cluster,
        router_beside(cluster, admin_key="operators") as router,
        httpx.AsyncClient(base_url=router.http or "") as http,
    ):
        async with baton.AsyncClient(router.grpc or "") as client:
            assert len((await client.complete([1, 2, 3], max_tokens=2)).token_ids) == 2
            await refused(client, errors.Unauthenticated)
        # A key that nothing asks for, such as the SDKs' placeholder, does no harm.
        async with baton.AsyncClient(router.grpc or "", api_key="none") as client:
            assert len((await client.status()).nodes) == 1
        assert (await http.get("/v1/models", headers={"authorization": "Bearer none"})).status_code == 200
        assert (await http.get("/status/data")).status_code == 401


@pytest.mark.parametrize("bad", ["a b", "ü", "first-key", "a\n"])
def test_a_bad_admin_key_stops_the_start_and_is_not_shown(bad: str) -> None:
    with pytest.raises(errors.BadConfig, match=r"^admin_key is '\(hidden\)'") as wrong:
        RouterConfig(nodes=("h:1",), api_keys=KEYS, admin_key=bad)
    assert bad not in wrong.value.message
    assert "s3cret" not in repr(RouterConfig(nodes=("h:1",), admin_key="s3cret"))
