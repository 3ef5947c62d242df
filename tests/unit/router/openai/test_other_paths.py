"""Paths beside those that generate: /tokenize and /detokenize, /version, /ping, and the document of all of them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest

from baton import __version__
from router.serve import Router
from router.text.tokenizer import Tokenizer
from tests.support.fake_nodes import FakeCluster, FakeConfig
from tests.support.router import VOCAB_SIZE, router_beside, write_model_folder

CONFIG = FakeConfig(vocab_size=VOCAB_SIZE, max_model_tokens=64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    loaded = Tokenizer.load(folder)
    assert loaded is not None
    return loaded


@asynccontextmanager
async def served(folder: Path | None, **settings: Any) -> AsyncIterator[tuple[Router, httpx.AsyncClient]]:
    async with (
        FakeCluster(CONFIG, prefill=1, decode=1) as cluster,
        router_beside(cluster, model_folder=folder, **settings) as router,
        httpx.AsyncClient(base_url=router.http or "", timeout=10) as client,
    ):
        yield router, client


async def test_ids_of_a_prompt_and_of_a_conversation(folder: Path, tokenizer: Tokenizer) -> None:
    async with served(folder) as (_, client):
        for body, text, has_special in (
            ({"prompt": "the quick"}, "the quick", True),
            ({"prompt": "the quick", "add_special_tokens": False}, "the quick", False),
            # Longer than the context: it is counted, not served.
            ({"prompt": "the quick brown fox " * 2000}, "the quick brown fox " * 2000, True),
            ({"messages": [{"role": "user", "content": "hi"}]}, "<s><|user|>hi</s><|assistant|>", False),
            (
                {"messages": [{"role": "user", "content": "hi"}], "add_generation_prompt": False},
                "<s><|user|>hi</s>",
                False,
            ),
        ):
            found = await client.post("/tokenize", json=body)
            ids = list(tokenizer.encode(text, add_special_tokens=has_special))
            assert found.json() == {"count": len(ids), "max_model_len": 64, "tokens": ids, "token_strs": None}
            back = await client.post("/detokenize", json={"tokens": ids})
            assert back.json() == {"prompt": tokenizer.decode(ids, skip_special_tokens=False)}
        found = await client.post("/tokenize", json={"prompt": "the", "return_token_strs": True})
        assert found.json()["token_strs"] == [tokenizer.piece(token_id) for token_id in found.json()["tokens"]]
        assert (await client.post("/detokenize", json={"tokens": []})).json() == {"prompt": ""}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": ["a", "b"]}, "prompt"),
        ("/tokenize", {"prompt": "a", "model": "none"}, "model"),
        ("/tokenize", {"prompt": "a", "frobnicate": 1}, "frobnicate"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"prompt": "a b c", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ("/tokenize", {"prompt": "a b c", "truncate_prompt_tokens": -5}, "truncate_prompt_tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/detokenize", {"tokens": [1, -1]}, "tokens"),
        ("/detokenize", {"tokens": [True]}, "tokens"),
        ("/detokenize", {"tokens": [VOCAB_SIZE]}, "tokens"),
        ("/detokenize", {"tokens": [1], "model": "none"}, "model"),
    ],
)
async def test_what_cannot_be_tokenized_is_refused_by_name(
    folder: Path, path: str, body: dict[str, Any], param: str
) -> None:
    async with served(folder) as (_, client):
        refused = await client.post(path, json=body)
        assert refused.status_code in (400, 404)
        assert refused.json()["error"]["param"] == param


async def test_without_a_tokenizer_there_are_no_words(folder: Path) -> None:
    async with served(None) as (_, client):
        for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
            refused = await client.post(path, json=body)
            assert refused.status_code == 400
            assert "tokenizer" in refused.json()["error"]["message"]


async def test_what_tokenizes_needs_a_key_and_health_does_not(folder: Path) -> None:
    async with served(folder, api_keys=("secret",)) as (_, client):
        for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
            assert (await client.post(path, json=body)).status_code == 401
            key = {"authorization": "Bearer secret"}
            assert (await client.post(path, json=body, headers=key)).status_code == 200
        for method in ("GET", "POST", "HEAD"):
            assert (await client.request(method, "/ping")).status_code == 200
        assert (await client.get("/version")).json() == {"version": __version__}


async def test_the_document_is_true_to_what_is_served(folder: Path) -> None:
    async with served(folder) as (_, client):
        document = (await client.get("/openapi.json")).json()
        assert document["openapi"].startswith("3.1")
        num_paths = 0
        for path, operations in document["paths"].items():
            asked = path.replace("{name}", "tiny").replace("{response_id}", "resp_1")
            if asked == "/":
                continue
            allowed = set((await client.options(asked)).headers["allow"].split(", ")) - {"OPTIONS", "HEAD"}
            assert allowed == {method.upper() for method in operations}, path
            for method in operations:
                answer = await client.request(method, asked, json={} if method == "post" else None)
                assert answer.status_code != 405, path
                # Of a response that is not there the API says so.
                assert answer.status_code != 404 or "resp_1" in answer.text, path
                num_paths += 1
                if method == "post" and path != "/ping":
                    content = operations[method]["requestBody"]["content"]["application/json"]
                    assert content["schema"]["anyOf"], path
        assert num_paths > 12
        assert {"/v1/completions", "/v1/chat/completions", "/tokenize", "/v1/models/{name}"} <= document["paths"].keys()


@pytest.mark.parametrize(
    ("path", "body", "is_good"),
    [
        ("/v1/completions", {"prompt": "a", "max_tokens": 1}, True),
        ("/v1/completions", {"prompt": "a", "max_tokens": 1, "use_beam_search": False, "length_penalty": 1.0}, True),
        ("/v1/completions", {"prompt": "a", "max_tokens": 1, "use_beam_search": True}, False),
        ("/v1/completions", {"max_tokens": 1}, False),
        ("/v1/completions", {"prompt": "a", "temperature": "hot"}, False),
        ("/v1/completions", {"prompt": "a", "frobnicate": 1}, False),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}, True),
        ("/v1/chat/completions", {"prompt": "a"}, False),
        ("/detokenize", {"tokens": [1, 2]}, True),
        ("/tokenize", {"prompt": "a"}, True),
        ("/tokenize", {"messages": [{"role": "user", "content": "a"}]}, True),
    ],
)
async def test_the_schemas_take_what_the_server_takes(
    folder: Path, path: str, body: dict[str, Any], is_good: bool
) -> None:
    async with served(folder) as (_, client):
        document = (await client.get("/openapi.json")).json()
        schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        validator = jsonschema.Draft202012Validator(schema | {"components": document["components"]})
        assert validator.is_valid(body) is is_good
        assert ((await client.post(path, json=body)).status_code == 200) is is_good
