"""The status page: what its data says, that it stays bounded, who may read it; and the page itself in a browser."""

from __future__ import annotations

import asyncio
import re
import time
from asyncio import to_thread
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import httpx
import pytest

import baton
from baton.observe import Lifeline
from baton.types import Role, TransferReport
from router.observe.history import stages
from router.observe.rolling import Histogram, Window
from router.serve import Router
from tests.support.chromium import Browser
from tests.support.fake_nodes import FakeCluster, FakeConfig
from tests.support.router import router_beside, until

SLOW = FakeConfig(step_s=0.01, transfer_s=0.01)
# Without spaces: no node may have one in its name.
EVIL = "<img/src=x/onerror=document.title='owned'>\"'&"


async def ask(router: Router, count: int, max_tokens: int = 5) -> None:
    assert router.grpc is not None
    async with baton.AsyncClient(router.grpc) as client:
        await asyncio.gather(*(client.complete([1, 2, i], max_tokens=max_tokens, seed=i) for i in range(count)))


async def data_of(router: Router, **headers: str) -> dict[str, Any]:
    async with httpx.AsyncClient(base_url=router.http or "") as client:
        answer = await client.get("/status/data", headers=headers)
        answer.raise_for_status()
        found: dict[str, Any] = answer.json()
        return found


# ── Data ────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_data_names_pools_nodes_and_what_ended() -> None:
    async with FakeCluster(prefill=1, decode=2) as cluster, router_beside(cluster) as router:
        await ask(router, 3)
        found = await data_of(router)
        assert [(p["role"], p["num_ready"], p["num_nodes"]) for p in found["pools"]] == [
            ("prefill", 1, 1),
            ("decode", 2, 2),
        ]
        assert [n["id"] for n in found["nodes"]] == ["decode-0", "decode-1", "prefill-0"]
        assert abs(found["at_s"] - time.time()) < 60
        assert found["relay"] == {"queue": 0, "prefill": 0, "transfer": 0, "decode": 0}
        assert len(found["recent"]) == 3
        for request in found["recent"]:
            assert (request["outcome"], request["detail"], request["num_tokens"]) == ("finished", "length", 5)
            total_s = sum(length_s for _, _, length_s in request["stages"])
            assert total_s == pytest.approx(request["e2e_s"], abs=1e-5), "stages fill the whole lifeline"
            assert request["transfer"]["transport"] == "fake"


async def test_stages_of_requests_in_flight_and_blocks_by_state() -> None:
    config = FakeConfig(step_s=0.01, prefill_token_s=0.05, transfer_s=0.3)
    async with FakeCluster(config, prefill=1, decode=1) as cluster, router_beside(cluster) as router:
        running = asyncio.create_task(ask(router, 2, max_tokens=40))
        seen: set[str] = set()
        held: set[str] = set()
        while not running.done():
            found = router_snapshot(router)
            seen |= {x["stage"] for x in found["in_flight"]}
            assert sum(found["relay"].values()) == found["router"]["num_active"]
            for node in found["nodes"]:
                blocks = dict(node["blocks"])
                total, free = blocks.pop("total"), blocks.pop("free")
                assert total - free == sum(blocks.values())
                held |= {state for state, count in blocks.items() if count}
            await asyncio.sleep(0.01)
        assert seen >= {"prefill", "transfer", "decode"}
        assert held == {"prompt", "sending", "leased", "running"}


def router_snapshot(router: Router) -> dict[str, Any]:
    return router.status.snapshot(router.dispatcher.clock.now())


async def test_a_dead_node_says_so_and_comes_first() -> None:
    async with FakeCluster(prefill=1, decode=2) as cluster, router_beside(cluster) as router:
        await cluster["prefill-0"].die()
        await until(lambda: any(m.state.value == "lost" for m in router.dispatcher.nodes.members))
        found = router_snapshot(router)
        dead = found["nodes"][0]
        assert (dead["id"], dead["state"], "blocks" in dead) == ("prefill-0", "lost", False)
        assert dead["reason"]
        assert found["pools"][0] | {"role": "prefill", "num_ready": 0, "num_nodes": 1} == found["pools"][0]


async def test_what_is_kept_and_sent_is_bounded() -> None:
    async with FakeCluster(prefill=1, decode=1) as cluster, router_beside(cluster) as router:
        await ask(router, 60, max_tokens=2)
        assert len(router_snapshot(router)["recent"]) == 40
        router.status._made_s = float("-inf")
        async with httpx.AsyncClient(base_url=router.http or "") as client:
            first, second = await client.get("/status/data"), await client.get("/status/data")
            assert first.content == second.content, "made once for all who ask within a moment"


async def test_the_data_needs_a_key_and_the_page_does_not() -> None:
    async with (
        FakeCluster(mixed=1) as cluster,
        router_beside(cluster, api_keys=("client",), admin_key="right") as router,
        httpx.AsyncClient(base_url=router.http or "") as client,
    ):
        for path in ("/status", "/status/status.css", "/status/status.js"):
            page = await client.get(path)
            assert page.status_code == 200
            assert "mixed-0" not in page.text
            assert page.headers["content-security-policy"].startswith("default-src 'none'")
        assert (await client.get("/status/data")).status_code == 401
        assert (await client.get("/status/data", headers={"authorization": "Bearer wrong"})).status_code == 401
        assert (await client.get("/status/data", headers={"authorization": "Bearer client"})).status_code == 403
        assert (await data_of(router, authorization="Bearer right"))["num_nodes"] == 1


def test_the_page_asks_no_other_host_and_writes_no_markup() -> None:
    for file in (resources.files("router.observe") / "page").iterdir():
        text = file.read_text()
        assert not re.search(r"""(https?:)?//[\w-]+\.\w""", text), f"{file.name} names another host"
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|style=", text), file.name


# ── Stages and windows ──────────────────────────────────────────────────────────────────────────────────────────────


def test_stages_put_the_exposed_transfer_between_first_and_second_token() -> None:
    line = Lifeline(10.0)
    line.queued(10.1)
    line.placed("p", "d", 10.2)
    line.leased(10.3)
    line.sent(10.3)
    line.prefilled(0.2, 0.5, 0)
    line.tokens(1, 11.0)
    line.transferred(TransferReport("shm", True, 1, 1, 0.6, 0.25), 11.3)
    line.tokens(1, 11.5)
    line.ended(12.0)
    found = stages(line.relay())
    assert [name for name, _, _ in found] == [
        *("tokenize", "placement", "reserve", "prefill_queue", "prefill"),
        *(("network",) if found[5][0] == "network" else ()),
        *("transfer", "decode"),
    ]
    by_name = {name: (start_s, length_s) for name, start_s, length_s in found}
    assert by_name["transfer"] == (pytest.approx(1.0), pytest.approx(0.25))
    assert sum(length_s for _, _, length_s in found) == pytest.approx(2.0)
    unlucky = Lifeline(5.0)
    unlucky.ended(6.0)
    assert stages(unlucky.relay()) == [("no token", 0.0, 1.0)]


def test_histogram_is_within_its_buckets() -> None:
    histogram = Histogram()
    assert histogram.quantile(0.5) is None
    for i in range(1, 1001):
        histogram.add(i / 1000)
    for share in (0.1, 0.5, 0.95):
        assert histogram.quantile(share) == pytest.approx(share, rel=0.1)
    histogram.add(0.0)
    histogram.add(1e9)
    assert histogram.quantile(1.0) is not None


def test_window_forgets_and_leaves_out_the_slice_that_fills() -> None:
    window = Window(slice_s=1.0, num_slices=3)
    for second in range(10):
        window.current(second + 0.5).num_tokens += second
    assert [x.num_tokens if x else None for x in window.slices(9.9)] == [6, 7, 8]
    assert [x.num_tokens if x else None for x in window.slices(11.0)] == [8, 9, None]
    assert window.slices(100.0) == [None, None, None]


# ── In a browser ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("chromium") / "profile")
    try:
        yield browser
    finally:
        browser.close()


async def test_browser_shows_load_then_a_dead_node(browser: Browser, tmp_path: Path) -> None:
    async with FakeCluster(SLOW, prefill=2, decode=2) as cluster, router_beside(cluster) as router:
        await to_thread(browser.open, f"{router.http}/status")
        await to_thread(browser.wait_until, "document.querySelectorAll('#nodes tr').length === 4")
        assert await text(browser, "#no-recent") == "Nothing has ended yet."
        await ask(router, 6)
        await to_thread(browser.wait_until, "document.querySelectorAll('#recent tr').length === 6")
        # From 0 to what, and from when to when; the newest slice is drawn once it is full.
        scale = r"\d\d:\d\d\n?\d\d:\d\d$/.test(document.querySelectorAll('#series figure')[{}].innerText.trim())"
        for number, highest in ((0, r"\d (µs|ms|s)"), (1, r"\d (µs|ms|s)"), (2, r"[\d.]+"), (3, r"[\d.]+")):
            await to_thread(browser.wait_until, rf"/\n?{highest}\n0\n" + scale.format(number))
        assert re.fullmatch(r"as of \d\d:\d\d:\d\d, your local time", await text(browser, "#as-of"))
        ids = "[...document.querySelectorAll('tbody')].map(x => x.id)"
        assert await to_thread(browser.evaluate, ids) == ["pools", "nodes", "flight", "recent"]
        bars = "[...document.querySelectorAll('#recent .life')].every(x => /decode/.test(x.getAttribute('aria-label')))"
        assert await to_thread(browser.evaluate, bars)
        running = asyncio.create_task(ask(router, 4, max_tokens=200))
        await to_thread(browser.wait_until, "document.querySelectorAll('#flight tr').length === 4")
        await running
        await cluster["decode-1"].die()
        await to_thread(browser.wait_until, "/decode-1[^]*✕ dead/.test(document.querySelector('#nodes').innerText)")
        await to_thread(browser.wait_until, "/1 not ready/.test(document.querySelector('#node-count').innerText)")
        for width, is_dark in ((1200, False), (380, False), (1200, True)):
            await to_thread(browser.size, width, 1000, is_dark=is_dark)
            overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
            assert await to_thread(browser.evaluate, overflow) <= 0, f"{width} pixels are too few"
            png = await to_thread(browser.screenshot, tmp_path / f"{width}-{is_dark}.png")
            assert len(png) > 10_000
        colour = "getComputedStyle(document.body).backgroundColor"
        assert await to_thread(browser.evaluate, colour) == "rgb(19, 21, 24)"
        assert browser.complaints == []


async def text(browser: Browser, selector: str) -> str:
    found: str = await to_thread(browser.evaluate, f"document.querySelector({selector!r}).innerText")
    return found


async def test_browser_shows_what_is_cached(browser: Browser) -> None:
    async with FakeCluster(FakeConfig(num_cached_blocks=2), mixed=1) as cluster, router_beside(cluster) as router:
        async with baton.AsyncClient(router.grpc or "") as client:
            await client.complete([*range(2, 42)], max_tokens=1)
        await to_thread(browser.open, f"{router.http}/status")
        await to_thread(browser.wait_until, "/32 cached, 40 [+] 1/.test(document.querySelector('#recent').innerText)")
        bar = "document.querySelector('#nodes .bar').getAttribute('aria-label')"
        await to_thread(browser.wait_until, f"{bar} === '2 cached, 1022 free of 1024 blocks'")
        assert await to_thread(browser.evaluate, "document.querySelectorAll('#nodes .kv-cached').length") == 1
        assert "0 % of 1024" in await text(browser, "#nodes"), "cached blocks are not in use"
        share = r"/Cached prompt tokens\s+80 %/.test(document.querySelectorAll('#series figure')[4].innerText)"
        await to_thread(browser.wait_until, share)
        assert browser.complaints == []


async def test_browser_shows_home_and_acting_roles(browser: Browser) -> None:
    async with (
        FakeCluster(prefill=1, decode=1) as cluster,
        router_beside(cluster) as router,
        baton.AsyncClient(router.grpc or "") as client,
    ):
        await client.set_role("prefill-0", Role.DECODE)
        await to_thread(browser.open, f"{router.http}/status")
        shown = "document.querySelector('#{}').innerText"
        await to_thread(browser.wait_until, rf"/decode\s+2 of 2\s/.test({shown.format('pools')})")
        await to_thread(browser.wait_until, rf"/prefill-0\s+decode, set by hand\s/.test({shown.format('nodes')})")
        assert re.search(r"decode-0\s+decode\s", await text(browser, "#nodes"))
        for node in cluster.nodes.values():
            node.runner.hold()
        # No node is left whose work prompts are.
        running = asyncio.create_task(client.complete([1, 2], max_tokens=2))
        await to_thread(browser.wait_until, rf"/decode\s+2 of 2, 1 borrowed\s/.test({shown.format('pools')})")
        await to_thread(browser.wait_until, rf"/decode(, set by hand)?, acts as mixed/.test({shown.format('nodes')})")
        for node in cluster.nodes.values():
            node.runner.resume()
        await running
        assert browser.complaints == []


async def test_browser_shows_names_as_text(browser: Browser) -> None:
    async with FakeCluster(FakeConfig(model_name=EVIL)) as cluster:
        await cluster.add(EVIL, Role.MIXED).start()
        async with router_beside(cluster) as router:
            await ask(router, 1)
            await to_thread(browser.open, f"{router.http}/status")
            await to_thread(browser.wait_until, "document.querySelectorAll('#recent tr').length === 1")
            assert await text(browser, "#model") == EVIL
            assert EVIL in await text(browser, "#nodes")
            assert await to_thread(browser.evaluate, "document.images.length") == 0
            assert "owned" not in (await to_thread(browser.evaluate, "document.title")).split("<")[0]


async def test_browser_asks_for_the_key(browser: Browser) -> None:
    async with FakeCluster(mixed=1) as cluster, router_beside(cluster, admin_key="right") as router:
        await to_thread(browser.open, f"{router.http}/status")
        give = "document.querySelector('#key').value = '{}'; document.querySelector('#key-form').requestSubmit()"
        shown = "!document.querySelector('#key-form').hidden"
        await to_thread(browser.wait_until, shown)
        await to_thread(browser.evaluate, give.format("wrong"))
        await to_thread(browser.wait_until, "/not its admin/.test(document.querySelector('#key-error').innerText)")
        assert await to_thread(browser.evaluate, "document.querySelector('main').hidden")
        await to_thread(browser.evaluate, give.format("right"))
        await to_thread(browser.wait_until, "document.querySelectorAll('#nodes tr').length === 1")
        assert await to_thread(browser.evaluate, "document.querySelector('#key-form').hidden")


async def test_browser_shows_200_nodes_and_one(browser: Browser) -> None:
    for num_prefill, num_decode in ((60, 140), (0, 1)):
        async with (
            FakeCluster(prefill=num_prefill, decode=num_decode) as cluster,
            router_beside(cluster, all_up=False) as router,
        ):
            await until(lambda: sum(m.is_up for m in router.dispatcher.nodes.members) == len(cluster.nodes), 30.0)
            await to_thread(browser.open, f"{router.http}/status")
            count = f"document.querySelectorAll('#nodes tr').length === {num_prefill + num_decode}"
            await to_thread(browser.wait_until, count, 20.0)
            assert await to_thread(browser.evaluate, "document.querySelectorAll('#pools tr').length") == (
                2 if num_prefill else 1
            )
            if num_prefill:
                pick = "(s => { s.value = 'prefill'; s.dispatchEvent(new Event('change')); })"
                await to_thread(browser.evaluate, f"{pick}(document.querySelector('#node-filter'))")
                await to_thread(browser.wait_until, "document.querySelectorAll('#nodes tr').length === 60")
