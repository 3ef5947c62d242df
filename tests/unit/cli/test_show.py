"""What `baton status` and `baton cache` print."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console, Group

from baton.v1 import common_pb2, node_pb2, router_pb2
from cli import show
from cli.doctor import report
from cli.machine import Finding


def printed(*parts: object) -> str:
    console = Console(file=io.StringIO(), width=80, no_color=True)
    console.print(Group(*parts))  # type: ignore[arg-type]
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def node(node_id: str, role: common_pb2.Role.ValueType, state: str) -> router_pb2.StatusResponse.NodeState:
    return router_pb2.StatusResponse.NodeState(
        node=common_pb2.NodeDescription(
            node_id=node_id,
            home_role=common_pb2.Role.ROLE_PREFILL,
            address="127.0.0.1:40000",
            pid=4242,
            device="cpu",
            kernels="cpu",
            model=common_pb2.ModelDescription(dtype="bfloat16"),
        ),
        status=common_pb2.NodeStatus(role=role, total_blocks=100, free_blocks=60, num_running=3),
        state=state,
    )


def test_status_fits_a_narrow_terminal() -> None:
    nodes = [
        node("prefill-0", common_pb2.Role.ROLE_PREFILL, "ready"),
        node("prefill-1", common_pb2.Role.ROLE_MIXED, "lost"),
        node("prefill-2", common_pb2.Role.ROLE_DECODE, "ready"),
        node("prefill-3", common_pb2.Role.ROLE_MIXED, "ready"),
    ]
    nodes[1].status.home_role = common_pb2.Role.ROLE_PREFILL
    nodes[2].status.home_role, nodes[2].status.is_pinned = common_pb2.Role.ROLE_DECODE, True
    nodes[3].status.home_role, nodes[3].status.is_pinned = common_pb2.Role.ROLE_DECODE, True
    text = printed(show.cluster_table(router_pb2.StatusResponse(model="tiny", num_running=3, nodes=nodes)))
    assert "tiny · 3 running, 0 queued at the router · bfloat16 on cpu, kernels cpu" in " ".join(text.split())
    assert "60/100" in text
    assert "127.0.0.1:40000" in text
    # Where they belong now, not where they started.
    for name, role in (("prefill-0", "prefill"), ("prefill-1", "prefill*"), ("prefill-2", "decode!")):
        assert re.search(rf"^{name} +{re.escape(role)} +\w", text, re.MULTILINE), text
    assert re.search(r"^prefill-3 +decode\*! +ready", text, re.MULTILINE), text
    assert "* acts as mixed: has work of the other pool" in text
    assert "! was put there by `baton role`" in text
    plain = printed(show.cluster_table(router_pb2.StatusResponse(model="tiny", nodes=nodes[:1])))
    assert "acts as" not in plain
    assert "baton role" not in plain


def test_a_change_of_role_says_what_was_what_is_and_who_may_change_it() -> None:
    prefill, decode, mixed = common_pb2.ROLE_PREFILL, common_pb2.ROLE_DECODE, common_pb2.ROLE_MIXED
    answer = node_pb2.SetRoleResponse(node_id="n", previous_role=decode, home_role=prefill, role=mixed, is_pinned=True)
    assert show.role_change(answer) == (
        "n was in the pool decode and is in prefill now; it acts as mixed until it has no work of the other pool; "
        "schedulers leave it there"
    )
    answer = node_pb2.SetRoleResponse(node_id="n", previous_role=decode, home_role=decode, role=decode)
    assert show.role_change(answer) == "n stays in the pool decode; schedulers may move it"


def test_workers_on_several_devices_each_say_which() -> None:
    nodes = [node(f"prefill-{i}", common_pb2.Role.ROLE_PREFILL, "ready") for i in range(2)]
    for i, each in enumerate(nodes):
        each.node.device = f"cuda:{i}"
        each.node.kernels = "triton"
    lines = printed(show.cluster_table(router_pb2.StatusResponse(model="tiny", nodes=nodes))).splitlines()
    assert "bfloat16, kernels triton" in " ".join(lines[:2])
    for i in range(2):
        (line,) = (line for line in lines if line.startswith(f"prefill-{i} "))
        assert f" cuda:{i} " in line
        assert "60/100" in line


def test_a_title_is_not_broken_to_the_width_of_its_table() -> None:
    console = Console(file=io.StringIO(), width=200, no_color=True)
    console.print(show.cluster_table(router_pb2.StatusResponse(model="m" * 100)))
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().splitlines()[0].rstrip().endswith("0 running, 0 queued at the router")


def test_what_is_piped_is_neither_cut_nor_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    output = io.StringIO()
    findings = [Finding("short", True, "a"), Finding("much longer", None, "b" * 300, "do this")]
    assert report(findings, show.wide_console(output)) == 0
    nodes = [node("prefill-0", common_pb2.Role.ROLE_PREFILL, "ready")]
    show.wide_console(output).print(show.cluster_table(router_pb2.StatusResponse(model="m" * 200, nodes=nodes)))
    lines = output.getvalue().splitlines()
    assert [line for line in lines if line != line.rstrip()] == []
    assert any(line.endswith("b" * 300) for line in lines)
    assert any("m" * 200 in line for line in lines)
    assert re.search(r"^ok +short +a$", output.getvalue(), re.MULTILINE), "columns stand below each other"
    monkeypatch.setenv("COLUMNS", "50")
    narrow = io.StringIO()
    report(findings, show.wide_console(narrow))
    assert max(map(len, narrow.getvalue().splitlines())) <= 50


def test_ledger_shows_owners_and_calls_out_what_has_none() -> None:
    owner = node_pb2.LedgerResponse.Owner(owner="r1/0/0", state="leased", num_blocks=7, epoch=3, age_s=0.25)
    ledger = router_pb2.ClusterLedgerResponse(
        nodes=[
            node_pb2.LedgerResponse(
                node_id="good",
                total_blocks=10,
                free_blocks=3,
                owners=[owner],
                home_role=common_pb2.ROLE_DECODE,
                role=common_pb2.ROLE_MIXED,
            ),
            node_pb2.LedgerResponse(
                node_id="idle",
                total_blocks=10,
                free_blocks=10,
                home_role=common_pb2.ROLE_PREFILL,
                role=common_pb2.ROLE_PREFILL,
            ),
            node_pb2.LedgerResponse(node_id="bad", total_blocks=10, free_blocks=1, owners=[owner]),
        ],
        unreachable={"gone": "deadline exceeded"},
    )
    text = printed(*show.ledger_tables(ledger))
    assert "r1/0/0" in text
    assert "250 ms" in text
    assert "idle (prefill) · 10 of 10 blocks free, no owners" in text
    assert "good (decode, acts as mixed) · 3 of 10 blocks free" in text
    assert "bad: 2 blocks have no owner" in text
    assert "good: " not in text
    assert "gone did not answer: deadline exceeded" in text


def test_the_ledger_counts_cached_blocks_as_free_like_the_table_of_the_cluster() -> None:
    held = node_pb2.LedgerResponse.Owner(owner="r1/0/0", state="running", num_blocks=7, age_s=0.25)
    cached = node_pb2.LedgerResponse.Owner(owner="prefix cache", state="cached", num_blocks=290)
    node = node_pb2.LedgerResponse(
        node_id="decode-0", total_blocks=300, free_blocks=3, owners=[held, cached],
        home_role=common_pb2.ROLE_DECODE, role=common_pb2.ROLE_DECODE,
    )  # fmt: skip
    text = printed(*show.ledger_tables(router_pb2.ClusterLedgerResponse(nodes=[node])))
    assert "decode-0 (decode) · 293 of 300 blocks free, 290 of them cached" in text
    assert re.search(r"^prefix cache +cached +290 *$", text, re.MULTILINE), "no age: every block has its own"


def test_caches_fit_a_narrow_terminal_and_say_what_is_off_corrupt_or_silent() -> None:
    nodes = [
        node_pb2.CacheResponse(
            node_id=f"prefill-{i}", is_on=True, total_blocks=4096, known_blocks=1500, cached_blocks=1234,
            max_cached_blocks=4096, query_tokens=4000, hit_tokens=1000 * i, stored_blocks=2000, evicted_blocks=500,
            corrupt_blocks=i, dropped_blocks=7,
        )
        for i in range(2)
    ]  # fmt: skip
    nodes.append(node_pb2.CacheResponse(node_id="plain", total_blocks=10))
    caches = router_pb2.ClusterCacheResponse(nodes=nodes, unreachable={"gone:1": "deadline exceeded"})
    title, head, *lines = printed(show.cache_table(caches, has_dropped=True)).splitlines()
    assert title.strip() == "prefix cache · 12.5 % of 8000 tokens found · 14 blocks dropped"
    assert [" ".join(line.split()) for line in (head, *lines)] == [
        "node known unused asked hits stored evicted dropped",
        "prefill-0 1500/4096 1234/4096 4000 0.0 % 2000 500 7",
        "prefill-1 1500/4096 1234/4096 4000 25.0 % 2000 500 7",
        "plain off",
        "prefill-1: the bytes of 1 blocks had changed, and they were not used",
        "gone:1 did not answer: deadline exceeded",
    ]
    text = printed(show.cache_table(router_pb2.ClusterCacheResponse(nodes=nodes[2:]), has_dropped=False))
    assert "prefix cache · - of 0 tokens found" in text
    assert "dropped" not in text


def test_durations_have_the_unit_that_fits() -> None:
    assert [show.seconds(s) for s in (0.0, 0.0004, 0.0123, 1.234)] == ["0 us", "400 us", "12.3 ms", "1.23 s"]
