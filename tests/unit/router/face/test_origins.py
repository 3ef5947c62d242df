"""Pages of other origins: only those that the operator names may use the API, with and without API keys."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from router.serve import Router
from tests.support.fake_nodes import FakeCluster, FakeConfig
from tests.support.router import VOCAB_SIZE, router_beside, write_model_folder

CONFIG = FakeConfig(vocab_size=VOCAB_SIZE)
PAGE = "https://chat.example.com"
ASKED = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_folder(tmp_path_factory.mktemp("models") / "tiny")


async def asked(
    router: Router, method: str, origin: str, path: str = "/v1/completions", **headers: str
) -> httpx.Response:
    async with httpx.AsyncClient(
        base_url=router.http or "", timeout=10, headers=headers | {"origin": origin}
    ) as client:
        body = {"prompt": "a", "max_tokens": 2} if method == "POST" else None
        return await client.request(method, path, json=body)


@pytest.mark.parametrize(
    ("origins", "origin", "allowed"),
    [
        ((), PAGE, None),
        ((PAGE,), PAGE, PAGE),
        ((PAGE, "http://localhost:3000"), "http://localhost:3000", "http://localhost:3000"),
        ((PAGE,), "https://other.example.com", None),
        (("*",), "https://other.example.com", "*"),
    ],
)
async def test_the_origins_that_are_named_may_use_the_api(
    folder: Path, origins: tuple[str, ...], origin: str, allowed: str | None
) -> None:
    async with (
        FakeCluster(CONFIG, prefill=1, decode=1) as cluster,
        router_beside(cluster, model_folder=folder, allowed_origins=origins, api_keys=("secret",)) as router,
    ):
        asking = await asked(router, "OPTIONS", origin, **ASKED)
        assert asking.headers.get("access-control-allow-origin") == allowed
        if allowed is not None:
            assert asking.status_code == 200
            assert "POST" in asking.headers["access-control-allow-methods"]
            granted = asking.headers["access-control-allow-headers"].lower()
            assert {"authorization", "content-type"} <= set(granted.replace(" ", "").split(","))
        done = await asked(router, "POST", origin, authorization="Bearer secret")
        assert done.status_code == 200
        # A page that may not ask is told nothing by its browser; one that may sees refusals, too.
        for answer in (done, await asked(router, "POST", origin), await asked(router, "GET", origin, "/nowhere")):
            assert answer.headers.get("access-control-allow-origin") == allowed
        if allowed is not None:
            assert "x-request-id" in done.headers["access-control-expose-headers"]


async def test_options_without_an_origin_says_what_a_path_takes(folder: Path) -> None:
    async with (
        FakeCluster(CONFIG, prefill=1, decode=1) as cluster,
        router_beside(cluster, model_folder=folder, allowed_origins=("*",)) as router,
        httpx.AsyncClient(base_url=router.http or "", timeout=10) as client,
    ):
        answer = await client.options("/v1/completions")
        assert (answer.status_code, answer.headers["allow"]) == (204, "OPTIONS, POST")
