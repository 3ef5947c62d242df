"""`baton certs`: what is made is what TLS wants, again and again, and wrong names are refused."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest
from typer.testing import CliRunner

from baton.errors import BadConfig
from cli import certs
from cli.app import app
from tests.support.certificates import make_certificates


def test_one_certificate_for_each_host(tmp_path: Path) -> None:
    make_certificates(tmp_path / "pki")
    done = CliRunner().invoke(app, ["certs", str(tmp_path / "pki"), "--host", "node-a,10.0.0.1", "--host", "node-b"])
    assert done.exit_code == 0, done.output
    first, second = done.output.splitlines()
    assert (
        first
        == f"--tls-cert {tmp_path}/pki/node-a.pem --tls-key {tmp_path}/pki/node-a.key --tls-ca {tmp_path}/pki/ca.pem"
    )
    assert "node-b.pem" in second
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.load_verify_locations(tmp_path / "pki" / "ca.pem")
    (authority,) = context.get_ca_certs()
    assert "serialNumber" in authority
    for name in ("node-a", "node-b"):
        context.load_cert_chain(tmp_path / "pki" / f"{name}.pem", tmp_path / "pki" / f"{name}.key")
    assert not list((tmp_path / "pki").glob(".new-*")), "nothing else is left"
    assert {p.stat().st_mode & 0o077 for p in (tmp_path / "pki").glob("*.key")} == {0}


def test_an_authority_stays_and_a_certificate_is_renewed(tmp_path: Path) -> None:
    ours = make_certificates(tmp_path)
    assert ours.tls_ca is not None
    assert ours.tls_cert is not None
    authority, first = ours.tls_ca.read_bytes(), ours.tls_cert.read_bytes()
    assert make_certificates(tmp_path) == ours
    assert ours.tls_ca.read_bytes() == authority
    assert ours.tls_cert.read_bytes() != first


@pytest.mark.parametrize(
    "host", ["", "a b", "a,", "a/b", "../a", "$HOME", "a\nb", "-a", "fe80::1%eth0", "DNS:a", "a" * 300]
)
def test_wrong_hosts_are_refused_before_anything_is_made(tmp_path: Path, host: str) -> None:
    with pytest.raises(BadConfig, match=r"^--host is .*expected names of hosts or their addresses"):
        certs.make(tmp_path / "pki", ["fine", host], 1)
    assert not (tmp_path / "pki").exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadConfig, match=f"{tmp_path}/file"):
        certs.make(tmp_path / "file" / "pki", ["a"], 1)


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        (["fine", "ca"], r"^--host is 'ca', expected another name before it: the file ca.pem is the authority's"),
        (["ca,fine"], r"^--host is 'ca'"),
        (["a,b", "a,c"], r"^--host begins with 'a' more than once"),
        (["*.a", "_.a"], r"^--host begins with '_.a' more than once"),
    ],
)
def test_no_file_is_written_over_another_one(tmp_path: Path, hosts: list[str], expected: str) -> None:
    make_certificates(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(BadConfig, match=expected):
        certs.make(tmp_path, hosts, 1)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert certs.make(tmp_path, ["b,ca"], 1) == [tmp_path / "b.pem"]


@pytest.mark.parametrize("missing", [certs.CA_CERT, certs.CA_KEY])
def test_half_an_authority_is_not_replaced(tmp_path: Path, missing: str) -> None:
    make_certificates(tmp_path)
    (tmp_path / missing).unlink()
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(BadConfig, match=f"no {missing}, expected both of an authority or neither"):
        certs.make(tmp_path, ["b"], 1)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
