"""The transports that there are, best first, and how a setting names one. Loads a transport when it is used: settings
alone are read by processes that move no KV and have no numpy."""

from __future__ import annotations

import importlib
from typing import cast

from baton.errors import BadConfig, quoted
from kvtransfer.transports.interface import Transport

# The class of each, which is in the module of its name.
_CLASSES = {"cuda_ipc": "CudaIpc", "shm": "Shm", "tcp": "Tcp"}
# Best first.
TRANSPORTS = tuple(_CLASSES)


def transport_name(spec: str) -> str:
    """The transport that a setting means; a faulty one, "fake:corrupt=1,over=tcp", by the one under it. Raises
    BadConfig."""
    name = spec
    if spec.startswith("fake"):
        from kvtransfer.transports.fake import FaultPlan

        name = FaultPlan.parse(spec).over
    if name not in _CLASSES:
        raise BadConfig(
            f"transport {quoted(spec)} is unknown, expected {', '.join(TRANSPORTS)} or fake:...,over=one of them",
            param="transports",
        )
    return name


def transport_of(spec: str) -> Transport:
    """Raises BadConfig for a transport that there is not."""
    name = transport_name(spec)
    module = importlib.import_module(f"kvtransfer.transports.{name}")
    found = cast("Transport", getattr(module, _CLASSES[name])())
    if spec == name:
        return found
    from kvtransfer.transports.fake import FaultPlan, Faulty

    return Faulty(found, FaultPlan.parse(spec))
