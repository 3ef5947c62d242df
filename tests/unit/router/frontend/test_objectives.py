"""Service-level objectives of requests over both faces: the router's own, what the relay says, and what is counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import httpx
import pytest

import baton
from baton import errors
from baton.types import Slo
from router.config import RouterConfig, SloConfig
from tests.support.fake_nodes import FakeCluster, FakeConfig
from tests.support.router import router_beside

BODY: dict[str, Any] = {"prompt": [1, 2, 3], "max_tokens": 3, "ignore_eos": True, "return_relay": True}


async def ask(http: httpx.AsyncClient, headers: Mapping[str, str] | Sequence[tuple[str, str]]) -> httpx.Response:
    return await http.post("/v1/completions", json=BODY, headers=headers)


async def test_headers_fields_and_the_routers_own_say_what_a_request_is_judged_by() -> None:
    cases = [
        ({}, {}, Slo(30.0, 40.0)),
        ({"x-slo-ttft-ms": "1500"}, {"slo_ttft_s": 1.5}, Slo(1.5, 40.0)),
        ({"X-SLO-TPOT-MS": "0.25"}, {"slo_tbt_s": 0.00025}, Slo(30.0, 0.00025)),
        ({"x-slo-ttft-ms": "86400000", "x-slo-tpot-ms": "20.5"}, {"slo_ttft_s": 86_400, "slo_tbt_s": 0.0205},
         Slo(86_400.0, 0.0205)),
    ]  # fmt: skip
    async with (
        FakeCluster(mixed=1) as cluster,
        router_beside(cluster, slo=SloConfig(30.0, 40.0)) as router,
        httpx.AsyncClient(base_url=router.http) as http,
        baton.AsyncClient(router.grpc) as client,
    ):
        for headers, fields, slo in cases:
            relay = (await ask(http, headers)).json()["baton"]["relay"]
            assert relay["slo"] == {"ttft_s": slo.ttft_s, "tbt_s": slo.tbt_s}
            answer = await client.complete([1, 2, 3], max_tokens=3, ignore_eos=True, **fields)
            assert answer.relay.slo == slo
            assert answer.relay.objectives["ttft"] is True


async def test_objectives_that_are_none_are_refused_by_name() -> None:
    async with (
        FakeCluster(mixed=1) as cluster,
        router_beside(cluster) as router,
        httpx.AsyncClient(base_url=router.http) as http,
        baton.AsyncClient(router.grpc) as client,
    ):
        for header in ("x-slo-ttft-ms", "x-slo-tpot-ms"):
            for value in ("0", "-1", "soon", "nan", "inf", "1e3", "86400001", "9" * 400, "1,5", "1 5"):
                error = (await ask(http, {header: value})).json()["error"]
                assert (error["param"], error["code"]) == (header, "invalid_request"), (value, error)
                assert error["message"].startswith(f"the header {header} is ")
            for values in (("100", "200"), ("100", "100"), ("nan", "100"), ("100", "")):
                error = (await ask(http, [(header, value) for value in values])).json()["error"]
                assert (error["param"], error["code"]) == (header, "invalid_request"), (values, error)
        for field in ("slo_ttft_s", "slo_tbt_s"):
            for seconds in (-1.0, float("nan"), float("inf"), 86_401.0):
                with pytest.raises(errors.InvalidRequest, match=f"{field} is .*, expected more than 0") as refused:
                    await client.complete([1, 2, 3], max_tokens=1, **{field: seconds})
                assert refused.value.param == field


async def test_what_was_met_and_missed_is_counted_and_shown() -> None:
    async with (
        # Tokens that reach the router at once have no time between them.
        FakeCluster(FakeConfig(step_s=0.05), mixed=1) as cluster,
        router_beside(cluster) as router,
        httpx.AsyncClient(base_url=router.http) as http,
    ):
        for headers in (
            # First: only a node with nothing to do takes it.
            {"x-slo-ttft-ms": "0.000001"},
            {},
            {"x-slo-ttft-ms": "60000", "x-slo-tpot-ms": "60000"},
            {"x-slo-ttft-ms": "60000", "x-slo-tpot-ms": "0.000001"},
        ):
            assert (await ask(http, headers)).status_code == 200
        counted = router.metrics
        assert {labels: child.value for labels, child in counted.objectives.children.items() if child.value} == {
            ("ttft", "met"): 2, ("ttft", "missed"): 1, ("tbt", "met"): 1, ("tbt", "missed"): 1,
            ("all", "met"): 1, ("all", "missed"): 2,
        }  # fmt: skip
        assert counted.slo_tokens.value == 3
        recent = (await http.get("/status/data")).json()["recent"]
        assert [row["missed"] for row in recent] == [["tbt"], [], [], ["ttft"]]


async def test_a_failed_sequence_has_missed_all_its_objectives() -> None:
    async with FakeCluster(mixed=1) as cluster, router_beside(cluster) as router:
        cluster["mixed-0"].runner.hold()
        async with baton.AsyncClient(router.grpc) as client:
            with pytest.raises(errors.DeadlineExceeded):
                await client.complete([1, 2, 3], max_tokens=1, timeout_s=0.2, slo_ttft_s=60.0, slo_tbt_s=60.0)
        cluster["mixed-0"].runner.resume()
        found = router.metrics.objectives.children
        assert [found[name, "missed"].value for name in ("ttft", "tbt", "all")] == [1, 1, 1]


def test_a_routers_objectives_have_a_range() -> None:
    assert RouterConfig(nodes=("h:1",)).slo.default == Slo()
    for value in (0.0, -1.0, float("nan"), 86_401.0):
        with pytest.raises(errors.BadConfig, match=r"slo\.ttft_s is .*, expected more than 0, at most 86,400"):
            RouterConfig(nodes=("h:1",), slo=SloConfig(ttft_s=value))
