"""What a node says of itself."""

from __future__ import annotations

from baton import PROTOCOL_VERSION
from baton.types import KvLayout, ModelDescription, NodeDescription, NodeStatus, Role

STATUS = NodeStatus(Role.DECODE)
NODE = NodeDescription(
    "n0", 1, Role.DECODE, "a:1", ModelDescription("m", "f", "float32", 100, 10),
    KvLayout(1, 100, 1, 8, 16, "float32"), PROTOCOL_VERSION, 1, "h", (), "cpu", "none", "0",
)  # fmt: skip
