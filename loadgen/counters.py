"""What a Baton cluster counted during a run: the counters of its router and of all its workers, before and after."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping

from prometheus_client.parser import text_string_to_metric_families

from loadgen.client import Server, get

# Which process it was does not matter here.
_IDENTITY = frozenset({"cluster", "model_name", "node", "pool", "engine"})
_PROCESSOR_S = "process_cpu_seconds_total"
_BUSY = ("vllm:num_requests_running", "vllm:num_requests_waiting")
_LOOK_EVERY_S = 0.2
_CALL_S = 10.0
# What a server cannot answer, and what is no answer.
_UNREADABLE = (OSError, ValueError, TimeoutError)
Counters = Mapping[str, float]


async def counted(server: Server) -> Counters | None:
    """Every counter of Baton's by name and labels, summed over processes; None of a server that is not Baton."""
    texts = await _texts(server)
    if texts is None:
        return None
    found: dict[str, float] = {}
    for family in (family for text in texts.values() for family in text_string_to_metric_families(text)):
        for sample in family.samples if family.type == "counter" else ():
            if sample.name.startswith("baton_") and sample.name.endswith("_total"):
                labels = ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()) if k not in _IDENTITY)
                key = f"{sample.name}{{{labels}}}" if labels else sample.name
                found[key] = found.get(key, 0.0) + sample.value
    return found


async def processor_s(server: Server) -> dict[str, float] | None:
    """Seconds that processors have worked for each process: the router by an empty name, workers by their addresses;
    None if one does not say."""
    texts = await _texts(server)
    if texts is None:
        return None
    found = {}
    for name, text in texts.items():
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == _PROCESSOR_S:
                    found[name] = sample.value
    return found if found.keys() == texts.keys() else None


async def _texts(server: Server) -> dict[str, str] | None:
    """Metrics of the router, by an empty name, and of its workers by their addresses."""
    try:
        async with asyncio.timeout(_CALL_S):
            workers = json.loads(await get(server, "/metrics/targets"))
            texts = {"": (await get(server, "/metrics")).decode()}
            for address in (address for group in workers for address in group["targets"]):
                texts[address] = (await get(Server.parse(f"http://{address}"), "/metrics")).decode()
    except _UNREADABLE:
        return None
    return texts


def during(before: Counters | None, after: Counters | None) -> dict[str, float]:
    """What was counted in between, without what stayed as it was."""
    if before is None or after is None:
        return {}
    grown = {key: value - before.get(key, 0.0) for key, value in after.items()}
    return {key: value for key, value in sorted(grown.items()) if value}


async def until_idle(server: Server, limit_s: float) -> bool:
    """Waits until the server says that it has no request; at once True if it does not say how many it has."""
    try:
        async with asyncio.timeout(limit_s):
            # A server has no event for it.
            while await _num_requests(server):  # noqa: ASYNC110
                await asyncio.sleep(_LOOK_EVERY_S)
    except TimeoutError:
        return False
    return True


async def _num_requests(server: Server) -> float:
    try:
        text = (await get(server, "/metrics")).decode()
        families = list(text_string_to_metric_families(text))
    except (OSError, ValueError):
        return 0.0
    return sum(sample.value for family in families for sample in family.samples if sample.name in _BUSY)
