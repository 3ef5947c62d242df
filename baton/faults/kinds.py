"""The layers at which faults strike, the messages of each, and which faults each takes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import StrEnum


class Layer(StrEnum):
    # Messages between a router and a node.
    SESSION = "session"
    # Messages about transfers between two nodes.
    CONTROL = "control"
    # Pieces of KV on their way from node to node.
    DATA = "data"
    # Steps of a node's model.
    ENGINE = "engine"
    # A process as a whole.
    PROCESS = "process"
    # Calls of Redis.
    REGISTRY = "registry"


class FaultKind(StrEnum):
    DROP = "drop"
    DELAY = "delay"
    DUPLICATE = "duplicate"
    REORDER = "reorder"
    CORRUPT = "corrupt"
    STALL = "stall"
    DISCONNECT = "disconnect"
    SLOW = "slow"
    DIE = "die"
    FREEZE = "freeze"


# Of one layer; each message has its kind where it is sent.
KINDS: Mapping[Layer, tuple[str, ...]] = {
    Layer.SESSION: (
        "run", "reserve", "migrate", "cancel",
        "reserved", "refused", "prompt_logprobs", "embedding", "prefill_done", "joined", "tokens", "handed_off",
        "failed", "not_migrated",
    ),
    Layer.CONTROL: (
        "begin", "commit", "abort", "revoked", "heartbeat",
        "begun", "ack", "nack", "revoke",
    ),
    Layer.DATA: ("unit",),
    Layer.ENGINE: ("step",),
    Layer.PROCESS: ("tick",),
    Layer.REGISTRY: ("call",),
}  # fmt: skip

_ENDS = (FaultKind.DIE, FaultKind.FREEZE)
_LATE = (FaultKind.DROP, FaultKind.DELAY, FaultKind.DUPLICATE, FaultKind.STALL, FaultKind.DISCONNECT)
# A session's messages have no checksum but that of TCP or TLS, so no peer could notice one that was changed.
TAKES: Mapping[Layer, tuple[FaultKind, ...]] = {
    Layer.SESSION: (*_LATE, FaultKind.REORDER, *_ENDS),
    Layer.CONTROL: (*_LATE, FaultKind.REORDER, FaultKind.CORRUPT, *_ENDS),
    Layer.DATA: (*_LATE, FaultKind.CORRUPT, FaultKind.SLOW, *_ENDS),
    Layer.ENGINE: (FaultKind.SLOW, FaultKind.STALL, *_ENDS),
    Layer.PROCESS: _ENDS,
    Layer.REGISTRY: (FaultKind.DROP, FaultKind.DELAY, FaultKind.DISCONNECT, *_ENDS),
}

# How long a fault lasts that has a length, unless the rule says so.
DEFAULT_S: Mapping[FaultKind, float] = {
    FaultKind.DELAY: 0.2,
    # At most: until the next message.
    FaultKind.REORDER: 1.0,
    FaultKind.STALL: 2.0,
    FaultKind.SLOW: 0.05,
    FaultKind.FREEZE: 2.0,
    # Of the registry alone; a connection is dialled again when its owner sees fit.
    FaultKind.DISCONNECT: 5.0,
}

# What a message is called here, if not by its class.
_NAMES = {"Lease": "reserved", "TokenChunk": "tokens", "SequenceFailed": "failed"}


def kind_of(message: object) -> str:
    name = type(message).__name__
    return _NAMES.get(name) or re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def has_length(layer: Layer, fault: FaultKind) -> bool:
    return fault in DEFAULT_S and (fault is not FaultKind.DISCONNECT or layer is Layer.REGISTRY)
