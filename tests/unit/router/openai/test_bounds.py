"""Every number that a client may send, at its extremes, on both faces: refused by name, or taken and right."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from grpc import aio

from baton import codec, errors
from baton.types import MAX_COUNT, MAX_LOGIT_BIASES, MAX_STOP_TOKEN_IDS, Lease, SamplingParams
from baton.v1 import common_pb2, router_pb2, router_pb2_grpc
from router.frontend.request import Caller
from router.openai.request import CompletionBody
from router.serve import Router
from tests.support.fake_nodes import FakeCluster, FakeConfig, expected_tokens
from tests.support.router import VOCAB_SIZE, baseline, router_beside, until, write_model_folder

CONFIG = FakeConfig(vocab_size=VOCAB_SIZE, max_model_tokens=2048)

INTEGERS = [0, 1, -1, -2, 20, 21, 2**31 - 1, 2**31, 2**32, 2**63, 2**64 - 1, 2**64, -(2**63), -(2**63) - 1, 10**30]
HUGE = [int("9" * 4299), -int("9" * 4299)]
FLOATS = [0.0, 1.5, 1e-300, 5e-324, 1e-6, 1e300, -1e300, math.nan, math.inf, -math.inf]
OTHERS: list[Any] = [True, False, "5", [], {}, [[]], "x" * 100_000]
VALUES = [*INTEGERS, *HUGE, *FLOATS, *OTHERS]


def is_int(low: int, high: float) -> Callable[[Any], bool]:
    return lambda v: type(v) is int and low <= v <= high


def is_number(low: float, high: float) -> Callable[[Any], bool]:
    return lambda v: type(v) in (int, float) and low <= v <= high


ROOM = 2048 - len("the")  # any bound between one token and the context will do for the values above
COMMON: dict[str, Callable[[Any], bool]] = {
    "temperature": is_number(0, 100),
    "top_p": lambda v: is_number(0, 1)(v) and v > 0,
    "top_k": is_int(-1, math.inf),
    "min_p": is_number(0, 1),
    "repetition_penalty": is_number(0.01, 100),
    "presence_penalty": is_number(-2, 2),
    "frequency_penalty": is_number(-2, 2),
    "seed": is_int(-(2**63), 2**64 - 1),
    "max_tokens": is_int(1, ROOM),
    "min_tokens": is_int(0, ROOM),
    "n": is_int(1, 128),
    "priority": is_int(-1_000_000, 1_000_000),
    "timeout": lambda v: is_number(0, 3600)(v) and v > 0,
}
BY_PATH: dict[str, dict[str, Callable[[Any], bool]]] = {
    "completions": COMMON | {"logprobs": is_int(0, 20), "best_of": is_int(1, 1)},
    "chat/completions": COMMON | {"max_completion_tokens": is_int(1, ROOM), "top_logprobs": is_int(0, 20)},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_folder(tmp_path_factory.mktemp("models") / "tiny")


@asynccontextmanager
async def served(folder: Path, config: FakeConfig = CONFIG) -> AsyncIterator[tuple[Router, FakeCluster]]:
    async with FakeCluster(config, prefill=1, decode=1) as cluster:
        async with router_beside(cluster, model_folder=folder) as router:
            yield router, cluster
            assert all(m.is_up for m in router.dispatcher.nodes.members)
        await baseline(cluster)


def body_of(path: str, name: str, value: Any) -> bytes:
    body: dict[str, Any] = {"ignore_eos": True, "max_tokens": 2, "seed": 1}
    body |= {"prompt": "the"} if path == "completions" else {"messages": [{"role": "user", "content": "the"}]}
    if name == "top_logprobs":
        body["logprobs"] = True
    if name == "max_completion_tokens":
        del body["max_tokens"]
    if name == "min_tokens":
        # More than any value that is taken; what a chat is given by default fills the context.
        body["max_tokens"] = 32
    return json.dumps(body | {name: value}).encode()


async def post(client: httpx.AsyncClient, path: str, body: bytes) -> httpx.Response:
    return await client.post(f"/v1/{path}", content=body, headers={"content-type": "application/json"})


@pytest.mark.parametrize("path", sorted(BY_PATH))
async def test_every_number_over_http_is_taken_or_refused_by_its_name(folder: Path, path: str) -> None:
    async with served(folder) as (router, _):
        assert router.http is not None
        async with httpx.AsyncClient(base_url=router.http, timeout=30) as client:
            for name, is_good in BY_PATH[path].items():
                for value in VALUES:
                    got = await post(client, path, body_of(path, name, value))
                    shown = (name, repr(value)[:40] if type(value) is not int or value < 2**70 else "huge", got.text)
                    if is_good(value):
                        # Too short a time to answer in is the client's wish.
                        assert got.status_code == (408 if name == "timeout" and value < 1e-3 else 200), shown
                    else:
                        assert (got.status_code, got.json()["error"]["param"]) == (400, name), shown
                        assert len(got.text) < 500, shown


LISTS: list[tuple[str, Any, str | None]] = [
    ("stop_token_ids", [2**32], "stop_token_ids"),
    ("stop_token_ids", [-1], "stop_token_ids"),
    ("stop_token_ids", [VOCAB_SIZE], "stop_token_ids"),
    ("stop_token_ids", [True], "stop_token_ids"),
    ("stop_token_ids", [1.0], "stop_token_ids"),
    ("stop_token_ids", [5] * (MAX_STOP_TOKEN_IDS + 1), "stop_token_ids"),
    ("stop_token_ids", [5] * 1000, None),
    ("stop_token_ids", [*HUGE], "stop_token_ids"),
    ("logit_bias", {"4294967296": 1}, "logit_bias"),
    ("logit_bias", {str(VOCAB_SIZE): 1}, "logit_bias"),
    ("logit_bias", {"9" * 5000: 1}, "logit_bias"),
    ("logit_bias", {"-1": 1}, "logit_bias"),
    ("logit_bias", {"²": 1}, "logit_bias"),
    ("logit_bias", {"7": 1, "007": 2}, "logit_bias"),
    ("logit_bias", {"1": 100.5}, "logit_bias"),
    ("logit_bias", {"1": math.nan, "2": 1}, "logit_bias"),
    ("logit_bias", {"1": 1, "2": math.nan}, "logit_bias"),
    ("logit_bias", {"1": -math.inf}, "logit_bias"),
    ("logit_bias", {"1": True}, "logit_bias"),
    ("logit_bias", {"1": HUGE[0]}, "logit_bias"),
    ("logit_bias", {str(i): 1 for i in range(MAX_LOGIT_BIASES + 1)}, "logit_bias"),
    ("logit_bias", {"1": -100, "2": 100}, None),
    ("logit_bias", {"1": 1e-300}, None),
    ("prompt", [2**32], "prompt"),
    ("prompt", [VOCAB_SIZE], "prompt"),
    ("prompt", [[1], [-1]], "prompt"),
    ("prompt", [True], "prompt"),
    ("prompt", [1.0], "prompt"),
    ("prompt", [math.nan], "prompt"),
    ("prompt", HUGE[0], "prompt"),
    ("prompt", [HUGE[0]], "prompt"),
    ("best_of", HUGE[0], "best_of"),
    ("metadata", {"a": [HUGE[0], math.nan]}, None),
]


async def test_every_list_of_numbers_over_http_is_taken_or_refused_by_its_name(folder: Path) -> None:
    async with served(folder) as (router, _):
        assert router.http is not None
        async with httpx.AsyncClient(base_url=router.http, timeout=30) as client:
            for name, value, param in LISTS:
                got = await post(client, "completions", body_of("completions", name, value))
                if param is None:
                    assert got.status_code == 200, (name, got.text)
                else:
                    assert (got.status_code, got.json()["error"]["param"]) == (400, param), (name, got.text)


FIVE_THOUSAND = "9" * 5000
PLACES = [
    '{"prompt": "a", "top_k": %s}',
    '{"prompt": "a", "seed": -%s}',
    '{"prompt": "a", "temperature": %s}',
    '{"prompt": %s}',
    '{"prompt": [%s]}',
    '{"prompt": "a", "metadata": {"a": [[%s]]}}',
    '{"prompt": "a", "user": %s}',
    '{"prompt": "a", "logit_bias": {"1": %s}}',
    '{"prompt": "a", "frobnicate": %s}',
    '{"messages": [{"role": "user", "content": "a", "x": %s}]}',
    '{"messages": [{"role": "user", "content": [{"type": %s}]}]}',
    '{"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"a": %s}}',
    '{"messages": [{"role": "user", "content": "a"}], "tools": [%s], "tool_choice": "none"}',
]


@pytest.mark.parametrize("place", PLACES)
async def test_a_number_of_five_thousand_digits_is_a_mistake_of_the_clients(folder: Path, place: str) -> None:
    path = "chat/completions" if "messages" in place else "completions"
    async with served(folder) as (router, _):
        assert router.http is not None
        async with httpx.AsyncClient(base_url=router.http, timeout=30) as client:
            got = await post(client, path, (place % FIVE_THOUSAND).encode())
            assert got.status_code == 400, got.text
            assert "4300 digits" in got.json()["error"]["message"]
            text = await post(
                client, "completions", json.dumps({"prompt": "3." + "14" * 500, "max_tokens": 1}).encode()
            )
            assert text.status_code == 200, "digits in a text are text"


async def test_extremes_do_not_disturb_those_who_wait(folder: Path) -> None:
    """The node is full: what is asked for while others wait has to be sent to a node only later."""
    config = replace(CONFIG, num_blocks=40, step_s=0.002)
    long: dict[str, Any] = {"prompt": [7] * 500, "max_tokens": 100, "seed": 5, "ignore_eos": True}
    long["return_token_ids"] = True
    right = expected_tokens([7] * 500, 5, 100, VOCAB_SIZE)
    async with served(folder, config) as (router, _):
        assert router.http is not None
        async with httpx.AsyncClient(base_url=router.http, timeout=60) as client:
            waiting = [asyncio.create_task(client.post("/v1/completions", json=long)) for _ in range(3)]
            await until(lambda: router.dispatcher.scheduler.num_in_flight == 3)
            extreme = [
                body_of("completions", name, value)
                for name, is_good in BY_PATH["completions"].items()
                for value in (2**32, 2**64, 1e300, HUGE[0])
                if not is_good(value)
            ]
            taken = [body_of("completions", "top_k", value) for value in (2**32, 2**64, HUGE[0])]
            statuses = [(await post(client, "completions", body)).status_code for body in extreme]
            later = await asyncio.gather(*(post(client, "completions", body) for body in taken))
            assert set(statuses) == {400}
            assert [x.status_code for x in later] == [200] * 3
            for answer in await asyncio.gather(*waiting):
                assert answer.json()["choices"][0]["token_ids"] == right


# ── gRPC ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

PB_EXTREMES: list[tuple[dict[str, Any], str | None]] = [
    *[({name: value}, name) for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty",
                                         "frequency_penalty") for value in (math.nan, math.inf, -1e300, 1e300)],
    ({"repetition_penalty": 1e-300}, "repetition_penalty"),
    ({"temperature": 1e-300}, None),
    ({"top_p": 5e-324}, None),
    ({"top_k": 2**32 - 1}, None),
    ({"top_k": 2**31}, None),
    ({"seed": 2**64 - 1}, None),
    ({"max_tokens": 2**32 - 1}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"min_tokens": 2**32 - 1}, "min_tokens"),
    ({"logprobs": 21}, "logprobs"),
    ({"stop_token_ids": [2**32 - 1]}, "stop_token_ids"),
    ({"stop_token_ids": [1] * (MAX_STOP_TOKEN_IDS + 1)}, "stop_token_ids"),
    ({"logit_bias": {2**32 - 1: 1.0}}, "logit_bias"),
    ({"logit_bias": {1: math.nan}}, "logit_bias"),
    ({"logit_bias": dict.fromkeys(range(MAX_LOGIT_BIASES + 1), 1.0)}, "logit_bias"),
]  # fmt: skip


async def ask(stub: router_pb2_grpc.RouterStub, request: router_pb2.GenerateRequest) -> tuple[str, str | None, str]:
    """Status, the parameter that the trailer names, and the details."""
    call = stub.Generate(request, timeout=20)
    try:
        async for _ in call:
            pass
    except aio.AioRpcError as error:
        trailer = dict(error.trailing_metadata() or ())
        return error.code().name, trailer.get("baton-error-param"), error.details() or ""
    return "OK", None, ""


async def test_every_number_over_grpc_is_taken_or_refused_by_its_name(folder: Path) -> None:
    async with served(folder) as (router, _), aio.insecure_channel(router.grpc or "") as channel:
        stub = router_pb2_grpc.RouterStub(channel)
        for sampling, param in PB_EXTREMES:
            params = common_pb2.SamplingParams(**({"max_tokens": 2, "seed": 1} | sampling))
            status, named, _ = await ask(stub, router_pb2.GenerateRequest(prompt="the", sampling=params))
            assert (status, named) == (("OK", None) if param is None else ("INVALID_ARGUMENT", param)), sampling
        for timeout_s in (math.nan, math.inf, -1.0, 1e300, 3601.0):
            status, named, _ = await ask(stub, router_pb2.GenerateRequest(prompt="the", timeout_s=timeout_s))
            assert (status, named) == ("INVALID_ARGUMENT", "timeout_s"), timeout_s
        ids = router_pb2.TokenIds(token_ids=[2**32 - 1])
        assert (await ask(stub, router_pb2.GenerateRequest(prompt_token_ids=ids)))[:2] == ("INVALID_ARGUMENT", "prompt")


async def test_sizes_over_grpc_are_looked_at_before_anything_is_copied(folder: Path) -> None:
    async with served(folder) as (router, _), aio.insecure_channel(router.grpc or "") as channel:
        stub = router_pb2_grpc.RouterStub(channel)
        many = router_pb2.GenerateRequest(prompt_token_ids=router_pb2.TokenIds(token_ids=[1] * 1_000_000))
        assert (await ask(stub, many))[:2] == ("INVALID_ARGUMENT", "prompt")
        chat = router_pb2.Chat(messages=[router_pb2.ChatMessage()] * 500_000)
        assert (await ask(stub, router_pb2.GenerateRequest(chat=chat)))[:2] == ("INVALID_ARGUMENT", "chat")
        stops = router_pb2.GenerateRequest(prompt="a", stop=[""] * 500_000)
        assert (await ask(stub, stops))[:2] == ("INVALID_ARGUMENT", "stop")
        assert (await ask(stub, router_pb2.GenerateRequest(prompt="a" * 3_000_000)))[0] == "RESOURCE_EXHAUSTED"


@pytest.mark.parametrize("name", ["m" * 9000, "東" * 3000])
async def test_a_long_name_over_grpc_is_not_found_rather_than_too_much_metadata(folder: Path, name: str) -> None:
    async with served(folder) as (router, _), aio.insecure_channel(router.grpc or "") as channel:
        stub = router_pb2_grpc.RouterStub(channel)
        status, named, details = await ask(stub, router_pb2.GenerateRequest(prompt="a", model=name))
        assert (status, named) == ("NOT_FOUND", "model")
        assert f"({len(name)} characters)" in details
        asked = await ask(stub, router_pb2.GenerateRequest(prompt="a", request_id=name))
        assert asked[:2] == ("INVALID_ARGUMENT", "request_id")
        with pytest.raises(aio.AioRpcError) as unknown:
            await stub.Drain(router_pb2.DrainNodeRequest(node=name))
        assert unknown.value.code() is grpc.StatusCode.NOT_FOUND


# ── What both share, and what a node checks again ─────────────────────────────────────────────────────────────────────


def test_each_number_of_the_sampling_parameters_refuses_what_the_wire_or_a_kernel_cannot_hold() -> None:
    others = ("ignore_eos", "stop_token_ids", "logit_bias", "grammar", "allowed_token_ids", "bad_word_ids")
    numbers = [f.name for f in fields(SamplingParams) if f.name not in others]
    for name in numbers:
        for value in (True, "1", math.nan, math.inf, -(2**70), [1]):
            with pytest.raises(errors.InvalidRequest) as refused:
                SamplingParams(**{name: value})
            assert refused.value.param == name, (name, value)


def test_a_top_k_beyond_any_vocabulary_keeps_all_and_a_temperature_near_0_is_greedy() -> None:
    assert SamplingParams(top_k=2**40).top_k == MAX_COUNT
    assert SamplingParams(temperature=1e-300).is_greedy
    assert not SamplingParams(temperature=1e-4).is_greedy


def test_what_is_constructed_can_be_sent() -> None:
    widest = SamplingParams(
        temperature=100, top_k=10**40, seed=2**64 - 1, max_tokens=MAX_COUNT, min_tokens=MAX_COUNT, logprobs=20,
        stop_token_ids=(MAX_COUNT,) * MAX_STOP_TOKEN_IDS, logit_bias={MAX_COUNT: -100},
    )  # fmt: skip
    assert codec.sampling_from_pb(codec.sampling_to_pb(widest)) == widest


@pytest.mark.parametrize(
    ("sampling", "param"),
    [
        ({"repetition_penalty": 1e-300}, "repetition_penalty"),
        ({"temperature": math.nan}, "temperature"),
        ({"max_tokens": 2**32 - 1}, "max_tokens"),
        ({"stop_token_ids": [2**32 - 1]}, "stop_token_ids"),
        ({"logit_bias": {5: math.inf}}, "logit_bias"),
    ],
)
def test_a_node_refuses_what_a_router_should_not_have_sent(sampling: dict[str, Any], param: str) -> None:
    params = common_pb2.SamplingParams(**({"seed": 1, "max_tokens": 1} | sampling))
    sent = common_pb2.Sequence(sequence_id="a", prompt_token_ids=[1], sampling=params)
    with pytest.raises(errors.InvalidRequest) as refused:
        codec.sequence_from_pb(sent)
    assert refused.value.param == param


@pytest.mark.parametrize("ttl_s", [math.nan, math.inf, -1.0, 1e300])
def test_a_lease_without_an_end_is_refused(ttl_s: float) -> None:
    with pytest.raises(errors.InvalidRequest, match="ttl_s"):
        Lease("a", 1, "n", 1, "h:1", (1,), ttl_s)


def test_a_seed_below_the_signed_range_is_told_the_range_of_this_face() -> None:
    body = CompletionBody.model_validate({"prompt": "a", "seed": -(2**63)})
    assert body.request(Caller()).sampling.seed == 2**63
    with pytest.raises(errors.InvalidRequest, match=r"expected -2\^63 to 2\^64-1") as refused:
        CompletionBody.model_validate({"prompt": "a", "seed": -(2**63) - 1}).request(Caller())
    assert refused.value.param == "seed"
