"""Baton: disaggregated serving of large language models. This package is what every process and client shares.

`baton.Client` and `baton.AsyncClient` are loaded on first use, so that importing a type does not load gRPC.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from baton.client import AsyncClient, Client

__version__ = "0.1.0"
PROTOCOL_VERSION = 4

__all__ = ["PROTOCOL_VERSION", "AsyncClient", "Client", "__version__"]


def __getattr__(name: str) -> object:
    if name in ("AsyncClient", "Client"):
        from baton import client

        return getattr(client, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
