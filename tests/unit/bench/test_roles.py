"""Roles over time: what a record has of a cluster, and what the picture shows of a record."""

from __future__ import annotations

import asyncio
import re
from xml.etree import ElementTree

import pytest

import baton
from baton.types import Role
from bench.roles import NodeState, Record, Sample, draw, record
from tests.support.fake_nodes import FakeCluster
from tests.support.router import router_beside, until

PREFILL = NodeState("prefill", "prefill", 3, 0)
BORROWED = NodeState("decode", "mixed", 1, 4)
DECODE = NodeState("decode", "decode", 0, 8)
GONE = NodeState("", "", 0, 0)


def bands(svg: str, height: float) -> list[str]:
    """The titles of the rectangles of this height, row by row."""
    root = ElementTree.fromstring(svg)
    rects = [x for x in root.iter() if x.tag.endswith("rect") and x.get("height") == f"{height}"]
    return [next(iter(x)).text or "" for x in rects]


def test_a_picture_has_a_band_for_each_stretch_of_a_role() -> None:
    found = Record([
        Sample(0.0, {"p": PREFILL, "d<": DECODE}),
        Sample(1.0, {"p": PREFILL, "d<": BORROWED}),
        Sample(2.0, {"p": PREFILL, "d<": BORROWED}),
        Sample(3.9, {"p": GONE, "d<": DECODE}),
    ], [(0.5, "a burst & more")])  # fmt: skip
    svg = draw(found)
    acting = bands(svg, 30)
    assert acting == [
        "decode, 0.0 to 1.0 s", "mixed, 1.0 to 3.9 s", "decode, 3.9 to 4.0 s",
        "prefill, 0.0 to 3.9 s", "not up, 3.9 to 4.0 s",
    ]  # fmt: skip
    assert bands(svg, 5) == ["decode, 0.0 to 4.0 s", "prefill, 0.0 to 3.9 s", "not up, 3.9 to 4.0 s"]
    assert found.num_changes == 2
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    assert {"d&lt;", "p", "a burst &amp; more", "3 s"} <= set(texts)
    assert any("(top: 8)" in text for text in texts)


def test_nothing_recorded_is_no_picture() -> None:
    with pytest.raises(ValueError, match="nothing was recorded"):
        draw(Record())


async def test_a_record_has_what_the_router_says() -> None:
    async with FakeCluster(prefill=1, decode=1) as cluster, router_beside(cluster) as router:
        assert router.grpc is not None
        with record(router.grpc, every_s=0.02) as found:
            await until(lambda: len(found.samples) > 2)
            found.mark("a change")
            async with baton.AsyncClient(router.grpc) as client:
                await client.set_role("decode-0", Role.MIXED)
            await until(lambda: found.samples[-1].nodes["decode-0"].home == "mixed")
            await cluster["prefill-0"].die()
            await until(lambda: found.samples[-1].nodes["prefill-0"] == GONE)
            num_before = len(found.samples)
        await asyncio.sleep(0.1)
        assert len(found.samples) <= num_before + 2, "it looks no further"
    assert found.samples[0].nodes == {
        "prefill-0": NodeState("prefill", "prefill", 0, 0), "decode-0": NodeState("decode", "decode", 0, 0),
    }  # fmt: skip
    assert found.num_changes == 1
    ((at_s, what),) = found.marks
    assert what == "a change"
    assert 0 < at_s < found.samples[-1].at_s
    assert [sample.at_s for sample in found.samples] == sorted(sample.at_s for sample in found.samples)
