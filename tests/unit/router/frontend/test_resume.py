"""A stream that has lost its router goes on at another one: token for token, text for text, at whatever event."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

import baton
from baton import errors
from baton.client import Accepted, Delta, Finished
from baton.types import MAX_SEED
from baton.v1 import router_pb2, router_pb2_grpc
from router.frontend.resume import Resume, event_id, mark_of, resume_of
from router.serve import Router
from tests.support.fake_nodes import FakeCluster, FakeConfig
from tests.support.router import VOCAB_SIZE, baseline, router_beside, write_model_folder

CONFIG = FakeConfig(vocab_size=VOCAB_SIZE, max_model_tokens=2048)
BODY = {"model": "tiny", "prompt": "the quick brown", "max_tokens": 12, "seed": 11, "stream": True, "ignore_eos": True}
CHAT = {
    "model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 12, "seed": 5, "stream": True,
    "ignore_eos": True,
}  # fmt: skip
# Of an answer: content, ids, finish, usage.
Seen = tuple[str, list[int], str | None, dict[str, int] | None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_folder(tmp_path_factory.mktemp("models") / "tiny")


@asynccontextmanager
async def served(folder: Path) -> AsyncIterator[tuple[Router, FakeCluster]]:
    async with FakeCluster(CONFIG, prefill=1, decode=1) as cluster:
        async with router_beside(cluster, model_folder=folder) as router:
            yield router, cluster
        await baseline(cluster)


# -- over HTTP


async def events(router: Router, path: str, body: dict[str, Any], **headers: str) -> list[tuple[str, str]]:
    """(id, data) of each event of a whole stream."""
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    async with httpx.AsyncClient(base_url=router.http or "", timeout=10) as client:
        answer = await client.post(path, json=body, headers=names)
    assert answer.status_code == 200, answer.text
    found = []
    for event in answer.text.strip().split("\n\n"):
        lines = dict(line.split(": ", 1) for line in event.split("\n"))
        found.append((lines.get("id", ""), lines["data"]))
    return found


def seen(found: list[tuple[str, str]]) -> Seen:
    text, ids, finish, usage = "", [], None, None
    for _, data in found:
        if data == "[DONE]":
            continue
        chunk = json.loads(data)
        usage = chunk.get("usage") or usage
        for choice in chunk["choices"]:
            text += choice["text"] if "text" in choice else choice["delta"].get("content", "")
            ids += choice.get("token_ids") or []
            finish = choice["finish_reason"] or finish
    return text, ids, finish, usage


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", BODY),
        ("/v1/completions", BODY | {"logprobs": 2}),
        ("/v1/completions", BODY | {"stop": ["zzz", "qq"], "temperature": 1.5}),
        ("/v1/completions", BODY | {"max_tokens": 1}),
        ("/v1/chat/completions", CHAT),
        ("/v1/chat/completions", CHAT | {"logprobs": True, "top_logprobs": 1}),
    ],
)
async def test_a_stream_goes_on_behind_each_of_its_events(folder: Path, path: str, body: dict[str, Any]) -> None:
    body = body | {"return_token_ids": True, "stream_options": {"include_usage": True}}
    async with served(folder) as (router, _):
        whole = await events(router, path, body, x_baton_resumable="true")
        text, ids, finish, usage = seen(whole)
        assert finish == "length"
        assert len(ids) == body["max_tokens"]
        for i in range(len(whole) - 2):  # usage and [DONE] have no ids
            last_id, _ = whole[i]
            rest = await events(router, path, body, last_event_id=last_id)
            had, had_ids, had_finish, _ = seen(whole[: i + 1])
            then, then_ids, then_finish, then_usage = seen(rest)
            assert had + then == text, last_id
            assert had_ids + then_ids == ids, last_id
            assert [had_finish, then_finish].count(finish) == 1, last_id
            assert rest[-1] == ("", "[DONE]")
            without_cached = [{k: v for k, v in (u or {}).items() if "details" not in k} for u in (then_usage, usage)]
            assert without_cached[0] == without_cached[1]
            heads = {json.dumps({k: json.loads(d)[k] for k in ("id", "created")}) for _, d in [whole[0], *rest[:-1]]}
            assert len(heads) == 1, "the answer keeps its id and its time"
            if "logprobs" in body and path == "/v1/completions":
                offsets = [o for _, d in [*whole[: i + 1], *rest[:-1]] for o in _offsets(d)]
                assert offsets == [o for _, d in whole[:-1] for o in _offsets(d)]


def _offsets(data: str) -> list[int]:
    return [o for c in json.loads(data)["choices"] if c["logprobs"] for o in c["logprobs"]["text_offset"]]


async def test_a_stop_string_is_found_across_the_cut(folder: Path) -> None:
    async with served(folder) as (router, _):
        text, ids, _, _ = seen(await events(router, "/v1/completions", BODY | {"return_token_ids": True}))
        stop = text[len(text) // 2 : len(text) // 2 + 3]
        body = BODY | {"stop": [stop], "return_token_ids": True}
        whole = await events(router, "/v1/completions", body, x_baton_resumable="true")
        text, ids, finish, _ = seen(whole)
        assert finish == "stop"
        for i in range(len(whole) - 1):
            rest = await events(router, "/v1/completions", body, last_event_id=whole[i][0])
            had, had_ids, had_finish, _ = seen(whole[: i + 1])
            then, then_ids, then_finish, _ = seen(rest)
            assert (had + then, had_ids + then_ids) == (text, ids)
            assert [had_finish, then_finish].count("stop") == 1


async def test_events_have_no_ids_unless_they_are_asked_for(folder: Path) -> None:
    async with served(folder) as (router, _):
        assert {name for name, _ in await events(router, "/v1/completions", BODY)} == {""}


@pytest.mark.parametrize(
    ("path", "change", "headers", "expected"),
    [
        ("/v1/completions", {}, {"last-event-id": "7"}, "expected the id of an event of the lost answer"),
        ("/v1/completions", {"prompt": "the quick"}, {}, "the prompt is not that of the lost answer"),
        ("/v1/completions", {"max_tokens": 3}, {}, "tokens are said to be there, expected at most max_tokens (3)"),
        ("/v1/completions", {"n": 2}, {}, "an answer with 2 choices cannot be resumed"),
        ("/v1/completions", {"echo": True}, {}, "prompts that are repeated or scored cannot be resumed"),
        ("/v1/completions", {"stream": False}, {}, "expected a stream of /v1/chat/completions or /v1/completions"),
        ("/v1/completions", {}, {"x-baton-resumable": "yes"}, "expected true or false"),
    ],
)
async def test_what_cannot_be_resumed_is_refused(
    folder: Path, path: str, change: dict[str, Any], headers: dict[str, str], expected: str
) -> None:
    async with served(folder) as (router, _), httpx.AsyncClient(base_url=router.http or "", timeout=10) as client:
        whole = await events(router, path, BODY, x_baton_resumable="true")
        last = next(name for name, _ in whole if int(name.rpartition(".")[2].rstrip("+!")) > 3)
        answer = await client.post(path, json=BODY | change, headers={"last-event-id": last} | headers)
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert expected in error["message"]
        assert error["param"] in ("last-event-id", "x-baton-resumable")


async def test_ids_of_events_are_refused_by_their_header(folder: Path) -> None:
    async with served(folder) as (router, _), httpx.AsyncClient(base_url=router.http or "", timeout=10) as client:
        answer = await client.post("/v1/completions", json=BODY | {"n": 2}, headers={"x-baton-resumable": "true"})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "x-baton-resumable")


async def test_other_apis_refuse_to_resume(folder: Path) -> None:
    async with served(folder) as (router, _), httpx.AsyncClient(base_url=router.http or "", timeout=10) as client:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "stream": True}
        answer = await client.post("/v1/messages", json=body, headers={"x-baton-resumable": "true"})
        assert answer.status_code == 400
        assert "expected a stream of" in answer.text


def test_an_events_id_says_what_the_client_has() -> None:
    start = event_id("a.b.1:c", 1_700_000_000, 2**63 - 1, (1, 2, 3))
    found = resume_of(f"{start}.17{mark_of(is_text_over=True)}")
    assert (found.request_id, found.created_s) == ("a.b.1:c", 1_700_000_000)
    assert (found.seed, found.num_tokens) == (2**63 - 1, 17)
    assert (found.has_whole_text, found.has_end) == (True, False)
    assert resume_of(f"{start}.17{mark_of(is_over=True)}").has_end
    assert not resume_of(f"{start}.0").has_whole_text


@pytest.mark.parametrize(
    "text", ["", "x", "a.1.2.3", "a.1.zz.00000000.3", f"a.1.{MAX_SEED + 1:x}.00000000.3", "a" * 9999]
)
def test_an_id_that_no_router_gave_is_refused(text: str) -> None:
    with pytest.raises(errors.InvalidRequest, match=r"last-event-id"):
        resume_of(text)


# -- over gRPC


async def messages(router: Router, request: router_pb2.GenerateRequest) -> list[router_pb2.GenerateResponse]:
    async with baton.AsyncClient(router.grpc or "") as client:
        stub: router_pb2_grpc.RouterStub = client._stub
        return [message async for message in stub.Generate(request)]


def asked(**settings: Any) -> router_pb2.GenerateRequest:
    request = router_pb2.GenerateRequest(prompt="the quick brown", **settings)
    request.sampling.CopyFrom(router_pb2.GenerateRequest().sampling)
    request.sampling.max_tokens = 12
    request.sampling.temperature = 1.0
    request.sampling.ignore_eos = True
    return request


async def test_a_stream_goes_on_behind_each_of_its_tokens(folder: Path) -> None:
    async with served(folder) as (router, cluster):
        first, *rest = await messages(router, asked())
        deltas = [m.delta for m in rest if m.HasField("delta")]
        text, ids = "".join(d.text for d in deltas), [i for d in deltas for i in d.token_ids]
        assert first.accepted.seed
        assert deltas[-1].has_whole_text
        assert not any(d.has_whole_text for d in deltas[:-1])
        for count in range(len(deltas) + 1):
            had = deltas[:count]
            again = asked(request_id=first.accepted.request_id)
            again.resume.seed = first.accepted.seed
            again.resume.token_ids.extend(i for d in had for i in d.token_ids)
            again.resume.has_whole_text = any(d.has_whole_text for d in had)
            accepted, *others = await messages(router, again)
            assert accepted.accepted == first.accepted
            then = [m.delta for m in others if m.HasField("delta")]
            assert "".join(d.text for d in [*had, *then]) == text
            assert [i for d in [*had, *then] for i in d.token_ids] == ids
            assert others[-1].finished.usage.completion_tokens == len(ids)
            spec = cluster.nodes["prefill-0"].script.last_spec
            assert spec is not None
            known = [i for d in had for i in d.token_ids]
            assert list(spec.generated_token_ids) == known[:-1], "they are not generated again, but for the last one"


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([5, 6, 7], "are not how this request's answer begins"),
        ([VOCAB_SIZE], "token id 320 in resume.token_ids is out of range"),
        ([2] * 13, "13 tokens are said to be there, expected at most max_tokens"),
    ],
)
async def test_tokens_of_another_request_are_refused(folder: Path, ids: list[int], expected: str) -> None:
    async with served(folder) as (router, _), baton.AsyncClient(router.grpc or "") as client:
        request = asked()
        request.resume.seed = 3
        request.resume.token_ids.extend(ids)
        stub: router_pb2_grpc.RouterStub = client._stub
        with pytest.raises(Exception, match=expected):
            async for _ in stub.Generate(request):
                pass


async def test_tokens_behind_a_stop_token_are_refused(folder: Path) -> None:
    async with served(folder) as (router, _), baton.AsyncClient(router.grpc or "") as client:
        request = asked()
        request.sampling.ignore_eos = False
        request.resume.token_ids.extend([4, 1, 5])
        stub: router_pb2_grpc.RouterStub = client._stub
        with pytest.raises(Exception, match="go on behind a stop token"):
            async for _ in stub.Generate(request):
                pass


async def test_a_client_goes_on_at_the_next_router(folder: Path) -> None:
    slow = FakeConfig(vocab_size=VOCAB_SIZE, max_model_tokens=2048, step_s=0.02)
    async with FakeCluster(slow, prefill=1, decode=1) as cluster:
        async with router_beside(cluster, model_folder=folder) as second:
            parts = []
            first_router = router_beside(cluster, model_folder=folder)
            first = await first_router.__aenter__()
            async with baton.AsyncClient([first.grpc or "", second.grpc or ""]) as client:
                async for part in client.generate("the quick brown", max_tokens=40, seed=9, ignore_eos=True):
                    parts.append(part)
                    if sum(isinstance(p, Delta) for p in parts) == 5:
                        await first_router.__aexit__(None, None, None)
            alone = await _alone(second)
        await baseline(cluster)
    assert [type(p) for p in parts if not isinstance(p, Delta)] == [Accepted, Finished]
    ids = tuple(i for p in parts if isinstance(p, Delta) for i in p.token_ids)
    assert (ids, "".join(p.text for p in parts)) == alone


async def _alone(router: Router) -> tuple[tuple[int, ...], str]:
    async with baton.AsyncClient(router.grpc or "") as client:
        done = await client.complete("the quick brown", max_tokens=40, seed=9, ignore_eos=True)
    return done.token_ids, done.text


def test_numbers_that_no_router_gives_are_refused() -> None:
    for resume in (Resume(-1, 0), Resume(2**64, 0), Resume(0, 2**40)):
        with pytest.raises(errors.InvalidRequest):
            resume.check()
