"""Commands that ask a router with TLS: they believe its authority on both faces, and say so where they do not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

import baton
from baton.access import AccessConfig
from baton.errors import BadConfig
from cli import environment
from cli.app import app
from cli.observe import live
from loadgen.client import Server, get, model_of
from router.serve import Router
from tests.support.certificates import make_certificates
from tests.support.fake_nodes import FakeCluster
from tests.support.router import router_beside

TRUST = ("BATON_TLS_CA", "BATON_TLS_NAME")


@pytest.fixture
def access(tmp_path: Path) -> AccessConfig:
    return make_certificates(tmp_path / "pki")


@asynccontextmanager
async def serving(access: AccessConfig) -> AsyncIterator[Router]:
    faces = AccessConfig(tls_cert=access.tls_cert, tls_key=access.tls_key)
    async with FakeCluster(mixed=1) as cluster, router_beside(cluster, access=faces) as router:
        yield router


def asks(*words: str, **variables: object) -> tuple[int, str]:
    """Exit code and output, with these variables and no others of TLS."""
    env = {**dict.fromkeys(TRUST), **{name: str(value) for name, value in variables.items()}}
    done = CliRunner().invoke(app, words, env=env)
    return done.exit_code, f"{done.output} {done.exception}"


async def test_tools_speak_http_with_the_routers_authority(
    access: AccessConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BATON_TLS_CA", str(access.tls_ca))
    async with serving(access) as router:
        trust = environment.trust()
        ours = Server.parse(router.http or "", **trust)
        assert await model_of(ours, {}) == "fake"
        named = ours.__class__("localhost", ours.port, is_tls=True, tls_ca=access.tls_ca, tls_name="127.0.0.1")
        assert await get(named, "/health") == b'{"status":"ok"}'
        with pytest.raises(OSError, match="CERTIFICATE_VERIFY_FAILED"):
            await get(Server.parse(router.http or ""), "/health")
        async with baton.AsyncClient(router.grpc or "", **trust) as client:
            cluster = await live(client, router.grpc or "")
        assert cluster.server == ours, "profile, advise and validate ask this one"
        words = ("bench", "serve", "--url", router.http or "", "--requests", "2", "--streams", "1", "--prompt-tokens",
                 "4", "--output-tokens", "2")  # fmt: skip
        _, said = await asyncio.to_thread(asks, *words, BATON_TLS_CA=access.tls_ca)
        assert "HTTP 400" in said, "the fake model has fewer ids than prompts are drawn from, and was asked"


async def test_a_router_that_is_not_believed_or_speaks_otherwise_is_called_so(
    access: AccessConfig, tmp_path: Path
) -> None:
    other = make_certificates(tmp_path / "other")
    async with serving(access) as router, FakeCluster(mixed=1) as cluster, router_beside(cluster) as plain:
        http = (router.http or "").removeprefix("https://")
        for address, variables, expected in (
            (router.grpc, {}, "speaks otherwise; is it the gRPC port of a router? One with TLS needs BATON_TLS_CA"),
            (http, {"BATON_TLS_CA": access.tls_ca}, "speaks otherwise; is it the gRPC port of a router with TLS?"),
            (router.grpc, {"BATON_TLS_CA": other.tls_ca}, f"BATON_TLS_CA ({other.tls_ca}) vouches for"),
            (router.grpc, {"BATON_TLS_CA": access.tls_ca, "BATON_TLS_NAME": "b"}, "names another host"),
            (plain.grpc, {"BATON_TLS_CA": access.tls_ca}, "speaks no TLS"),
        ):
            code, said = await asyncio.to_thread(asks, "status", "--router", address or "", **variables)
            assert code != 0
            assert expected in said, said


def test_files_that_are_no_certificates_are_named_before_a_call(tmp_path: Path) -> None:
    file = tmp_path / "ca.pem"
    file.write_text("no PEM")
    for command in (
        ["status"],
        ["health", "127.0.0.1:1"],
        ["bench", "serve", "--url", "https://127.0.0.1:1", "--streams", "1"],
    ):
        code, said = asks(*command, BATON_TLS_CA=file)
        assert code != 0
        assert f"{file} holds no certificate in PEM" in said, said
    with pytest.raises(BadConfig, match="holds no certificate"):
        baton.Client("127.0.0.1:1", tls_ca=file)
