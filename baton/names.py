"""Validates names that operators choose: they appear in logs, metric labels, Redis keys and headers."""

from __future__ import annotations

import re

from baton.errors import BadConfig, quoted

_CLUSTER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MAX_CHARS = 255


def check_cluster(name: str) -> None:
    """Raises BadConfig."""
    if not _CLUSTER.fullmatch(name):
        expected = "up to 64 letters, digits, '.', '_', '-'"
        raise BadConfig(f"cluster is {quoted(name)}, expected {expected}", param="cluster")


def check_node_id(name: str) -> None:
    """Raises BadConfig."""
    if not name.isprintable() or not name or " " in name or len(name) > _MAX_CHARS:
        expected = f"1 to {_MAX_CHARS} printable characters without spaces"
        raise BadConfig(f"node_id is {quoted(name)}, expected {expected}", param="node_id")


def check_model_name(name: str, param: str = "model_name") -> None:
    """Raises BadConfig."""
    if not name.isprintable() or not name.strip() or len(name) > _MAX_CHARS:
        expected = f"1 to {_MAX_CHARS} printable characters; give another --model-name"
        raise BadConfig(f"{param} is {quoted(name)}, expected {expected}", param=param)
