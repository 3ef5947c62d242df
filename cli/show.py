"""Formats a cluster's status, its ledger and its prefix caches for the terminal."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Mapping
from typing import TextIO, cast

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from baton.v1 import common_pb2, node_pb2, router_pb2

_STATE_STYLES = {
    "ready": "green",
    "connecting": "yellow",
    "suspect": "yellow",
    "draining": "cyan",
    "left": "cyan",
    "lost": "red",
}

# The state of blocks that no sequence holds, in the ledger.
_CACHED = "cached"

# Behind the home pool of a node.
_ROLE_MARKS = {
    "*": "* acts as mixed: has work of the other pool",
    "!": "! was put there by `baton role`: schedulers leave it there",
}

# Width of output that does not go to a terminal.
_NO_WIDTH = 10_000


def wide_console(output: TextIO | None = None) -> Console:
    """Tables are cut to a terminal's width; where there is no terminal, to none, and lines end with what they say."""
    output = output or sys.stdout
    if output.isatty():
        return Console(file=output)
    width = None if "COLUMNS" in os.environ else _NO_WIDTH
    return Console(file=cast(TextIO, _Unpadded(output)), width=width)


class _Unpadded:
    """As much of a file as a console asks of one, without blanks at the ends of lines. A table comes in one piece."""

    def __init__(self, output: TextIO) -> None:
        self._output = output

    def write(self, text: str) -> int:
        self._output.write(re.sub(r" +(?=\n)", "", text))
        return len(text)

    def flush(self) -> None:
        self._output.flush()

    def isatty(self) -> bool:
        return False


def seconds(value_s: float) -> str:
    """Three significant digits in the unit that fits: 850 us, 12.3 ms, 1.25 s."""
    if value_s < 0.001:
        return f"{value_s * 1e6:.0f} us"
    if value_s < 1:
        return f"{value_s * 1e3:.3g} ms"
    return f"{value_s:.3g} s"


def _table(left: Iterable[str], right: Iterable[str]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in left:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _role(role: common_pb2.Role.ValueType) -> str:
    return common_pb2.Role.Name(role).removeprefix("ROLE_").lower()


def cluster_table(status: router_pb2.StatusResponse) -> RenderableType:
    """Fits 80 columns: what runs where, and how busy it is."""
    title = f"{status.model} · {status.num_running} running, {status.num_queued} queued at the router"
    models = {(n.node.model.dtype, n.node.kernels) for n in status.nodes if n.node.device}
    devices = {n.node.device for n in status.nodes if n.node.device}
    if len(models) == 1:
        dtype, kernels = models.pop()
        where = f" on {next(iter(devices))}" if len(devices) == 1 else ""
        title += f" · {dtype}{where}, kernels {kernels}"
    # Where there are several, each node says which.
    device_column = ("device",) if len(devices) > 1 else ()
    marks = "".join(_roles(node.status) for node in status.nodes)
    table = _table(("node", "role", "state", "address", *device_column, "pid"), ("queued", "active", "free blocks"))
    for node in status.nodes:
        load = node.status
        table.add_row(
            node.node.node_id,
            _roles(load),
            Text(node.state, style=_STATE_STYLES.get(node.state, "")),
            node.node.address,
            *((node.node.device,) if device_column else ()),
            str(node.node.pid),
            str(load.num_waiting),
            str(load.num_running),
            f"{load.free_blocks}/{load.total_blocks}",
        )
    notes = [about for mark, about in _ROLE_MARKS.items() if mark in marks]
    table.caption, table.caption_justify = "\n".join(notes) or None, "left"
    return _titled(title, table)


def _roles(status: common_pb2.NodeStatus) -> str:
    """The home pool, and what is particular about it."""
    home = status.home_role or status.role
    return _role(home) + ("*" if status.role != home else "") + ("!" if status.is_pinned else "")


def role_change(answer: node_pb2.SetRoleResponse) -> str:
    """What `baton role` says."""
    home, before = _role(answer.home_role), _role(answer.previous_role)
    text = (
        f"{answer.node_id} was in the pool {before} and is in {home} now"
        if home != before
        else (f"{answer.node_id} stays in the pool {home}")
    )
    if answer.role != answer.home_role:
        text += f"; it acts as {_role(answer.role)} until it has no work of the other pool"
    return text + ("; schedulers leave it there" if answer.is_pinned else "; schedulers may move it")


# A table's own title would be broken to the table's width.
def _titled(title: str, table: Table) -> RenderableType:
    return Group(Text(title, style="bold"), table)


def ledger_tables(ledger: router_pb2.ClusterLedgerResponse) -> Iterable[RenderableType]:
    """Every block of every node and who owns it; a node whose sums do not match is called out."""
    for node in ledger.nodes:
        yield from _ledger_of(node)
    yield from _silent(ledger.unreachable)


def _silent(unreachable: Mapping[str, str]) -> Iterable[RenderableType]:
    for address, reason in sorted(unreachable.items()):
        yield Text(f"{address} did not answer: {reason}", style="red")


def _ledger_of(node: node_pb2.LedgerResponse) -> Iterable[RenderableType]:
    owned = sum(owner.num_blocks for owner in node.owners)
    cached = sum(owner.num_blocks for owner in node.owners if owner.state == _CACHED)
    # As in the table of the cluster, where cached blocks are free too.
    home, acting = _role(node.home_role), _role(node.role)
    roles = home if acting == home else f"{home}, acts as {acting}"
    title = f"{node.node_id} ({roles}) · {node.free_blocks + cached} of {node.total_blocks} blocks free"
    if cached:
        title += f", {cached} of them cached"
    if not node.owners:
        yield Text(f"{title}, no owners", style="bold")
    else:
        table = _table(("owner", "state"), ("blocks", "epoch", "age"))
        for owner in sorted(node.owners, key=lambda o: -o.age_s):
            epoch = str(owner.epoch) if owner.epoch else ""
            age = "" if owner.state == _CACHED else seconds(owner.age_s)
            table.add_row(owner.owner, owner.state, str(owner.num_blocks), epoch, age)
        yield _titled(title, table)
    if unowned := node.total_blocks - node.free_blocks - owned:
        yield Text(f"{node.node_id}: {unowned} blocks have no owner, which is a defect", style="red")


def cache_table(caches: router_pb2.ClusterCacheResponse, *, has_dropped: bool) -> RenderableType:
    """Fits 80 columns. Blocks that are known by their content, of the whole pool, and those of them that no sequence
    uses, of as many as may be; since each worker's start, tokens that were asked for and blocks."""
    right = ("known", "unused", "asked", "hits", "stored", "evicted")
    table = _table(("node",), (*right, "dropped") if has_dropped else right)
    for node in caches.nodes:
        if not node.is_on:
            table.add_row(node.node_id, "off")
            continue
        table.add_row(
            node.node_id,
            f"{node.known_blocks}/{node.total_blocks}",
            f"{node.cached_blocks}/{node.max_cached_blocks}",
            str(node.query_tokens),
            share(node.hit_tokens, node.query_tokens),
            str(node.stored_blocks),
            str(node.evicted_blocks),
            *((str(node.dropped_blocks),) if has_dropped else ()),
        )
    found, asked = sum(x.hit_tokens for x in caches.nodes), sum(x.query_tokens for x in caches.nodes)
    title = f"prefix cache · {share(found, asked)} of {asked} tokens found"
    if has_dropped:
        title += f" · {sum(x.dropped_blocks for x in caches.nodes)} blocks dropped"
    corrupt = [
        Text(f"{x.node_id}: the bytes of {x.corrupt_blocks} blocks had changed, and they were not used", style="red")
        for x in caches.nodes
        if x.corrupt_blocks
    ]
    return Group(_titled(title, table), *corrupt, *_silent(caches.unreachable))


def share(part: int, whole: int) -> str:
    """In percent; a dash of nothing."""
    return f"{100 * part / whole:.1f} %" if whole else "-"
