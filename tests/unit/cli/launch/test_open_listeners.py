"""A worker or a router that other machines reach starts only where callers have something to prove, or if told so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from baton.access import AccessConfig
from baton.errors import BadConfig
from baton.settings import Given, build
from baton.types import Role
from cli import preflight
from cli.launch import cluster
from cli.launch.cluster import kept_secret, with_keys
from cli.launch.options import ClusterOptions
from cli.launch.placement import Place
from router.config import RouterConfig
from tests.support.certificates import make_certificates
from tests.support.root import ROOT
from worker.config import WorkerConfig

KEY = AccessConfig(cluster_key="0123456789abcdef" * 2)
TLS = AccessConfig(tls_cert=Path("c"), tls_key=Path("k"), tls_ca=Path("a"))
BEYOND = ("0.0.0.0:1", "[::]:1", "10.0.0.1:1", "node-a.example:1")


def worker_on(listen: str, access: AccessConfig) -> WorkerConfig:
    given = {"model": Given(Path("m"), "--model"), "role": Given(Role.MIXED, "--role")}
    return build(WorkerConfig, {**given, "listen": Given(listen, "--listen"), "access": Given(access, "")})


@pytest.mark.parametrize("listen", BEYOND)
def test_an_open_worker_stays_on_loopback(listen: str) -> None:
    with pytest.raises(BadConfig, match=r"^--listen is .*--cluster-key .*--tls-ca; or --allow-open"):
        worker_on(listen, AccessConfig())
    for access in (KEY, TLS, AccessConfig(allow_open=True)):
        assert worker_on(listen, access).listen == listen


@pytest.mark.parametrize("listen", ["127.0.0.1:1", "[::1]:1", "localhost:1"])
def test_on_loopback_nothing_is_asked(listen: str) -> None:
    assert worker_on(listen, AccessConfig()).access.is_open


def test_a_worker_has_no_clients_for_a_certificate() -> None:
    with pytest.raises(BadConfig, match="expected --tls-ca beside --tls-cert"):
        worker_on("127.0.0.1:1", AccessConfig(tls_cert=Path("c"), tls_key=Path("k")))
    with pytest.raises(BadConfig, match="expected --tls-cert and --tls-key beside --tls-ca"):
        worker_on("127.0.0.1:1", AccessConfig(tls_ca=Path("a")))


@pytest.mark.parametrize("face", ["http", "grpc"])
def test_a_router_on_other_addresses_needs_a_key_that_guards_its_nodes(face: str) -> None:
    settings: dict[str, Any] = {"nodes": ("h:1",), f"{face}_host": "0.0.0.0"}
    with pytest.raises(BadConfig, match=rf"^{face}_host is '0.0.0.0', .*--admin-key .*--api-key .*--allow-open"):
        # The key of the cluster is for its nodes: clients do not have it.
        RouterConfig(**settings, access=KEY)
    for more in ({"admin_key": "a"}, {"api_keys": ("a",)}, {"access": AccessConfig(allow_open=True)}):
        RouterConfig(**settings, **more)
    RouterConfig(**settings, **{f"{face}_port": None})


def test_up_makes_keys_where_none_are_given() -> None:
    quiet = with_keys(ClusterOptions(model="m"))
    assert len(quiet.access.cluster_key) == 64
    assert "admin_key" not in quiet.router, "on loopback without API keys all is open"
    assert with_keys(ClusterOptions(model="m")).access.cluster_key != quiet.access.cluster_key
    for strange in (ClusterOptions(model="m", host="0.0.0.0"),
                    ClusterOptions(model="m", router={"api_keys": Given(("k",), "--api-key")})):  # fmt: skip
        made = with_keys(strange).router["admin_key"].value
        assert isinstance(made, str)
        assert len(made) == 64
        assert made not in repr(with_keys(strange))
    given = ClusterOptions(model="m", host="0.0.0.0", access=KEY, router={"admin_key": Given("mine", "--admin-key")})
    assert with_keys(given) == given
    assert with_keys(ClusterOptions(model="m", access=TLS)).access == TLS, "certificates are enough"


def test_children_get_keys_by_their_environment_and_operators_keys_are_the_routers_alone() -> None:
    folder = ROOT / "demo" / "model"
    given = {"api_keys": Given(("clients",), "--api-key"), "admin_key": Given("operators", "--admin-key")}
    options = with_keys(ClusterOptions(model=str(folder), router=given))
    key = options.access.cluster_key
    worker = cluster._worker(options, options.worker_config(folder), "d0", "decode", Place("cpu"), 7001, 7002).program
    endpoints = cluster.Endpoints("http://127.0.0.1:1", "127.0.0.1:2")
    router = cluster._router("router", options.router_config(folder, ["127.0.0.1:7001"]), folder, endpoints, 1)
    for program in (worker, router):
        assert not [x for x in (key, "operators", "clients") if x in " ".join(program.command)]
    common = cluster._environment(options)
    assert common["BATON_CLUSTER_KEY"] == key
    assert not [x for x in ("operators", "clients") if x in {**common, **worker.environment}.values()]
    assert (router.environment["BATON_API_KEY"], router.environment["BATON_ADMIN_KEY"]) == ("clients", "operators")


def test_certificates_are_tried_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match=r"cannot read .*c"):
        preflight.certificates(TLS)
    preflight.certificates(KEY)
    preflight.certificates(make_certificates(tmp_path))


def test_a_kept_secret_is_its_users_alone_and_goes(tmp_path: Path) -> None:
    file, victim = tmp_path / "key", tmp_path / "victim"
    victim.write_text("precious")
    file.symlink_to(victim)
    with kept_secret(file, "s3cret") as kept:
        assert kept == file
        assert file.read_text() == "s3cret\n"
        assert file.stat().st_mode & 0o777 == 0o600
    assert not file.exists()
    assert victim.read_text() == "precious", "what a link points to is not touched"
    with kept_secret(file, "") as kept:
        assert kept is None
