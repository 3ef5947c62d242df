"""What the commands that ask a running cluster know of its access: variables, as secrets and their files have no place
among arguments."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

from baton.access import CLUSTER_KEY_VARIABLE, AccessConfig
from baton.tls import dialling_context


def access(variables: Mapping[str, str] = os.environ) -> AccessConfig:
    """To call workers, and the health of any process. Raises BadConfig."""
    found = AccessConfig(
        cluster_key=variables.get(CLUSTER_KEY_VARIABLE, ""),
        tls_cert=_path(variables, "BATON_TLS_CERT"),
        tls_key=_path(variables, "BATON_TLS_KEY"),
        tls_ca=_path(variables, "BATON_TLS_CA"),
        tls_name=variables.get("BATON_TLS_NAME", ""),
    )
    # gRPC would say that the process cannot be reached.
    dialling_context(found)
    return found


class Trust(TypedDict):
    tls_ca: Path | None
    tls_name: str


def trust(variables: Mapping[str, str] = os.environ) -> Trust:
    """How a client of a router knows it."""
    return Trust(tls_ca=_path(variables, "BATON_TLS_CA"), tls_name=variables.get("BATON_TLS_NAME", ""))


def _path(variables: Mapping[str, str], name: str) -> Path | None:
    said = variables.get(name)
    return Path(said) if said else None
