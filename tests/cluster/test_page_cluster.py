"""The status page of a real cluster, looked at in a browser."""

from __future__ import annotations

from pathlib import Path

from tests.support.chromium import Browser
from tests.support.cluster import StartCluster
from tests.support.recall import ask_all, recall


def test_the_page_shows_the_cluster_and_what_ran(start_cluster: StartCluster, demo_model: Path, tmp_path: Path) -> None:
    browser = Browser(tmp_path / "profile")
    try:
        cluster = start_cluster(demo_model, prefill=1, decode=1)
        browser.open(f"{cluster.http}/status")
        browser.wait_until("document.querySelectorAll('#nodes tr').length === 2")
        assert browser.evaluate("document.querySelectorAll('#nodes .good').length") == 2
        ask_all(cluster, recall(31, 6))
        browser.wait_until("document.querySelectorAll('#recent tr').length === 6")
        lifelines = browser.evaluate("[...document.querySelectorAll('#recent .life')].map(x => x.title)")
        assert all("prefill" in x for x in lifelines), lifelines
        # A short answer can be complete before the report of its transfer is in.
        assert any("over shm" in x for x in lifelines), lifelines
        cluster.wait_baseline()
        browser.wait_until(
            "[...document.querySelectorAll('#nodes .kv span')].every(x => x.innerText.startsWith('0 %'))"
        )
        assert browser.complaints == []
    finally:
        browser.close()
