"""How a cluster and its ledger look in a terminal. Asks nobody anything."""

from __future__ import annotations

from collections.abc import Iterable

from rich.table import Table
from rich.text import Text

from baton.v1 import common_pb2, node_pb2, router_pb2

_STATE_STYLES = {"ready": "green", "connecting": "yellow", "suspect": "yellow", "draining": "cyan", "lost": "red"}


def seconds(value_s: float) -> str:
    """Three significant digits in the unit that fits: 850 us, 12.3 ms, 1.25 s."""
    if value_s < 0.001:
        return f"{value_s * 1e6:.0f} us"
    if value_s < 1:
        return f"{value_s * 1e3:.3g} ms"
    return f"{value_s:.3g} s"


def _role(role: common_pb2.Role.ValueType) -> str:
    return common_pb2.Role.Name(role).removeprefix("ROLE_").lower()


def cluster_table(status: router_pb2.StatusResponse) -> Table:
    title = f"{status.model} · {status.num_running} running, {status.num_queued} queued at the router"
    table = Table(title=title, title_justify="left")
    for name in ("node", "role", "state", "address", "pid", "device", "kernels"):
        table.add_column(name)
    for name in ("waiting", "running", "prompt tokens queued", "blocks free"):
        table.add_column(name, justify="right")
    for node in status.nodes:
        load = node.status
        role = _role(load.role) if load.role == node.node.home_role else f"{_role(load.role)} (borrowed)"
        table.add_row(
            node.node.node_id,
            role,
            Text(node.state, style=_STATE_STYLES.get(node.state, "")),
            node.node.address,
            str(node.node.pid),
            node.node.device,
            node.node.kernels,
            str(load.num_waiting),
            str(load.num_running),
            str(load.queued_prompt_tokens),
            f"{load.free_blocks} of {load.total_blocks}",
        )
    return table


def ledger_tables(ledger: router_pb2.ClusterLedgerResponse) -> Iterable[Table | Text]:
    """Every block of every node and who owns it; a node whose sums do not match is called out."""
    for node in ledger.nodes:
        yield _ledger_table(node)
    for node_id, reason in sorted(ledger.unreachable.items()):
        yield Text(f"{node_id} did not answer: {reason}", style="red")


def _ledger_table(node: node_pb2.LedgerResponse) -> Table:
    owned = sum(owner.num_blocks for owner in node.owners)
    lost = node.total_blocks - node.free_blocks - owned
    title = f"{node.node_id} · {node.free_blocks} of {node.total_blocks} blocks free"
    if lost:
        title += f" · {lost} blocks without an owner: this is a defect"
    table = Table("owner", "state", title=title, title_justify="left")
    for name in ("blocks", "epoch", "age"):
        table.add_column(name, justify="right")
    for owner in sorted(node.owners, key=lambda o: -o.age_s):
        epoch = str(owner.epoch) if owner.epoch else ""
        table.add_row(owner.owner, owner.state, str(owner.num_blocks), epoch, seconds(owner.age_s))
    return table
