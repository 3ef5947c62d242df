"""Certificates for tests, as `baton certs` makes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from baton.access import AccessConfig
from cli import certs


def make_certificates(folder: Path, host: str = "127.0.0.1,localhost") -> AccessConfig:
    """Of the authority in the folder, which is made if there is none."""
    try:
        (cert,) = certs.make(folder, [host], 1)
    except certs.NoProgram as error:
        pytest.skip(error.message)
    return AccessConfig(tls_cert=cert, tls_key=cert.with_suffix(".key"), tls_ca=folder / certs.CA_CERT)
