"""Extreme values in every field of both faces, beside a load whose answers are known."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import grpc
import httpx
import pytest

from baton.v1 import router_pb2
from demo.tasks import recall_prompts
from tests.support.cluster import Cluster, StartCluster
from tests.support.load import Job, run_all

_log = logging.getLogger(__name__)

# Raw JSON, as no encoder writes some of it.
NUMBERS = (
    *("0", "-0", "1", "-1", "2", "0.0", "-0.0", "0.5", "1.5", "1e-300", "-1e-300", "1e-46", "1e-38", "1e38", "1e39"),
    *("1e300", "-1e300", "1e400", "-1e400", "NaN", "Infinity", "-Infinity", "1E0", "20", "21", "128", "129"),
    *(
        str(sign * (2**bits + more))
        for bits in (15, 31, 32, 53, 63, 64, 128)
        for more in (-1, 0, 1)
        for sign in (1, -1)
    ),
    *("9" * 400, "9" * 5000, "-" + "9" * 5000, "0." + "0" * 5000 + "1", "1" + "0" * 4299 + ".0"),
)
# Which some fields take: what gets through the edge must hurt no one inside either.
USUAL = ("0", "1", "2", "-1", "0.5", "1.0", "5", "20", "null", "false", "2147483647", "4294967296")
OTHERS = ("null", "true", "false", '""', '"1"', '"NaN"', "[]", "{}", "[null]", "[[]]", '{"a": 1}', '"\\u0000"')

COMMON = (
    *("max_tokens", "temperature", "top_p", "n", "stream", "stop", "seed", "presence_penalty", "frequency_penalty"),
    *("logit_bias", "top_k", "min_p", "repetition_penalty", "min_tokens", "ignore_eos", "stop_token_ids", "priority"),
    *("timeout", "metadata", "user", "request_id", "skip_special_tokens", "stream_options", "model", "return_relay"),
    *(
        "prompt_logprobs",
        "length_penalty",
        "truncate_prompt_tokens",
        "best_of",
        "logprobs",
        "service_tier",
        "cache_salt",
    ),
)
COMPLETION = ("prompt", "echo", "suffix")
CHAT = ("messages", "max_completion_tokens", "top_logprobs", "response_format", "tools", "tool_choice")
RESPONSES = (
    *("input", "instructions", "max_output_tokens", "previous_response_id", "tools", "tool_choice", "text"),
    *("reasoning", "include", "truncation", "background", "conversation", "store", "parallel_tool_calls"),
    "top_logprobs",
)
MESSAGES = ("messages", "system", "stop_sequences", "tools", "tool_choice", "thinking", "output_config")
EMBEDDINGS = (
    *("input", "dimensions", "encoding_format", "normalize", "add_special_tokens", "truncate_prompt_tokens"),
    *("truncation_side", "request_id", "cache_salt", "priority", "pooling", "timeout", "user", "model"),
)
TEXT = '"Months from May to July:"'
TURNS = f'[{{"role": "user", "content": {TEXT}}}]'
SHORT = {"max_tokens": "2", "timeout": "20", "temperature": "0"}
SHORT_RESPONSE = {"max_output_tokens": "2", "timeout": "20", "temperature": "0", "input": TEXT}
# Path, a short request, and the names of what may be in it; those that most clients use, more than once.
ENDPOINTS: tuple[tuple[str, dict[str, str], tuple[str, ...]], ...] = (
    ("/v1/completions", {**SHORT, "prompt": TEXT}, COMMON + COMPLETION),
    ("/v1/chat/completions", {**SHORT, "messages": TURNS}, COMMON + CHAT),
    ("/v1/completions", {**SHORT, "prompt": TEXT}, COMMON + COMPLETION),
    ("/v1/responses", SHORT_RESPONSE, COMMON + RESPONSES),
    ("/v1/messages", {**SHORT, "messages": TURNS}, COMMON + MESSAGES),
    ("/v1/embeddings", {"input": TEXT, "timeout": "20"}, EMBEDDINGS),
    ("/v1/messages/count_tokens", {"messages": TURNS}, MESSAGES),
    ("/tokenize", {"prompt": TEXT}, (*COMPLETION, "return_token_strs", "add_special_tokens", "model")),
    ("/detokenize", {"tokens": "[5, 6]"}, ("tokens", "model")),
)


def bodies(rng: Random, count: int) -> Iterator[tuple[str, bytes]]:
    """Path and body: of each path the short request first; then one to three fields have an extreme value."""
    for number in range(count):
        turn, at = divmod(number, len(ENDPOINTS))
        path, usual, names = ENDPOINTS[at]
        # Each field in turn with each value, so that none is left to chance; the others are drawn.
        fields = dict(usual)
        if turn:
            fields[names[turn % len(names)]] = shaped(rng, names[turn % len(names)])
            for name in rng.sample(names, min(len(names), rng.choice((0, 0, 0, 1, 2)))):
                fields[name] = shaped(rng, name)
        text = "{" + ", ".join(f'"{name}": {value}' for name, value in fields.items()) + "}"
        yield path, text.encode()


def shaped(rng: Random, name: str) -> str:
    """A value as it is, or where the field holds several, inside of what it holds."""
    value = rng.choice(rng.choices((USUAL, NUMBERS, OTHERS), (5, 4, 1))[0])
    if rng.random() < 0.5:
        return value
    match name:
        case "logit_bias" if rng.random() < 0.5:
            return f'{{"{rng.choice(NUMBERS)}": 1}}'
        case "logit_bias" | "metadata" | "stream_options" | "response_format":
            key = {"stream_options": "include_usage", "response_format": "type"}.get(name, "5")
            return f'{{"{key}": {value}}}'
        case "stop_token_ids" | "stop" | "stop_sequences" | "tools" | "include" | "tokens":
            return f"[{value}]"
        case "output_config" | "text" | "reasoning" | "thinking" | "tool_choice":
            key = {"output_config": "format", "text": "format", "reasoning": "effort"}.get(name, "type")
            return f'{{"{key}": {value}}}'
        case "prompt" | "input":
            return rng.choice((f"[{value}]", f"[[{value}]]", f"[5, {value}]", f'["a", {value}]'))
        case "messages":
            inner = rng.choice(("content", "role", "name", "tool_calls", "weight"))
            return f'[{{"role": "user", "content": "a", "{inner}": {value}}}]'
        case _:
            return value


async def send_all(url: str, rng: Random, count: int) -> tuple[Counter[tuple[str, int]], list[tuple[bytes, str]]]:
    """Paths and status codes, and the bodies whose answer was 5xx or no JSON, with the answer."""
    statuses: Counter[tuple[str, int]] = Counter()
    bad: list[tuple[bytes, str]] = []
    todo = bodies(rng, count)
    headers = {"content-type": "application/json"}

    async def lane(client: httpx.AsyncClient) -> None:
        for path, body in todo:
            response = await client.post(path, content=body, headers=headers)
            statuses[path, response.status_code] += 1
            is_events = response.headers["content-type"].startswith("text/event-stream")
            if response.status_code >= 500 or len(response.text) > 20_000:
                bad.append((path.encode() + b" " + body[:300], response.text[:300]))
            elif response.status_code != 200:
                assert response.json()["error"]["message"], body
            elif is_events and '"InternalError"' in response.text:
                bad.append((body[:300], response.text[-300:]))

    async with httpx.AsyncClient(base_url=url, timeout=90.0) as client, asyncio.TaskGroup() as group:
        for _ in range(12):
            group.create_task(lane(client))
    return statuses, bad


INTEGERS = (0, 1, 2, 20, 21, 2**15, 2**31 - 1, 2**31, 2**32 - 1)
FLOATS = (0.0, -0.0, -1.0, 0.5, 1.0, 2.0, 1e-300, -1e-300, 1e-46, 1e39, 1e300, -1e300, math.inf, -math.inf, math.nan)


def messages(rng: Random, count: int) -> Iterator[router_pb2.GenerateRequest]:
    """Requests of the gRPC face; one to three fields have an extreme value that their type can hold."""
    draws: tuple[tuple[str, tuple[float, ...]], ...] = (
        *((n, FLOATS) for n in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty")),
        *((n, FLOATS) for n in ("frequency_penalty", "timeout_s", "logit_bias")),
        *((n, INTEGERS) for n in ("top_k", "max_tokens", "min_tokens", "stop_token_ids", "logprobs", "bias_key")),
        *((n, INTEGERS) for n in ("prompt_token_ids",)),
        ("seed", (*INTEGERS, 2**63, 2**64 - 1)),
    )
    for number in range(count):
        chosen = {draws[number % len(draws)], *rng.sample(draws, rng.randrange(3))}
        request = router_pb2.GenerateRequest(prompt="Months from May to July:", timeout_s=20.0)
        sampling = request.sampling
        sampling.temperature, sampling.max_tokens = 0.0, 2
        for name, values in chosen:
            value: Any = rng.choice(values)
            match name:
                case "timeout_s":
                    request.timeout_s = value
                case "prompt_token_ids":
                    request.prompt_token_ids.token_ids.append(value)
                case "logit_bias":
                    sampling.logit_bias[5] = value
                case "bias_key":
                    sampling.logit_bias[value] = 1.0
                case "stop_token_ids":
                    sampling.stop_token_ids.append(value)
                case _:
                    setattr(sampling, name, value)
        yield request


def generate_all(cluster: Cluster, rng: Random, count: int) -> Counter[str]:
    """How each ended; fails for an end that no request may have."""
    codes: Counter[str] = Counter()
    for request in messages(rng, count):
        code, details = "OK", ""
        try:
            for _ in cluster.stub().Generate(request, timeout=60.0):
                pass
        except grpc.RpcError as error:
            code, details = error.code().name, error.details()
        assert code in ("OK", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"), (request, code, details)
        codes[code] += 1
    return codes


def frozen_node_is_noticed(cluster: Cluster, node_id: str) -> None:
    pid = cluster.nodes[node_id].pid
    os.kill(pid, signal.SIGSTOP)
    try:
        cluster.wait_until(lambda: state_of(cluster, node_id) != "ready", f"{node_id} noticed", 10.0)
    finally:
        os.kill(pid, signal.SIGCONT)
    cluster.wait_until(lambda: state_of(cluster, node_id) == "ready", f"{node_id} back", 15.0)


def state_of(cluster: Cluster, node_id: str) -> str:
    return next(n.state for n in cluster.status().nodes if n.node.node_id == node_id)


async def fuzz(cluster: Cluster, count: int) -> dict[str, Any]:
    """``count`` bodies over HTTP and a tenth of it over gRPC, beside a load that repeats itself until they are over."""
    tasks = recall_prompts(seed=31, count=16, num_pairs=(20, 80), num_questions=(1, 6))
    jobs = [Job(task.prompt, task.num_output_tokens + 4) for task in tasks]
    expected = [a.token_ids for a in await run_all(cluster.http, jobs, 4)]
    over = asyncio.Event()
    rounds = 0

    async def known_load() -> None:
        nonlocal rounds
        while not over.is_set():
            answers = await run_all(cluster.http, jobs, 4)
            assert [a.error for a in answers] == [None] * len(jobs)
            assert [a.token_ids for a in answers] == expected
            rounds += 1

    async with asyncio.TaskGroup() as group:
        group.create_task(known_load())
        statuses, bad = await send_all(cluster.http, Random(7), count)
        codes = await asyncio.to_thread(generate_all, cluster, Random(8), count // 10)
        over.set()
    assert not bad, bad[:5]
    assert rounds > 0
    cluster.wait_baseline()
    status = cluster.status()
    assert (status.num_queued, status.num_running) == (0, 0)
    assert [n.state for n in status.nodes] == ["ready"] * 2
    frozen_node_is_noticed(cluster, "prefill-0")
    frozen_node_is_noticed(cluster, "decode-0")
    for path, _, _ in ENDPOINTS:
        assert statuses[path, 200] > 0, path
        assert statuses[path, 400] > 0, path
    assert codes["OK"] > 0
    assert codes["INVALID_ARGUMENT"] > 0
    return {"statuses": dict(statuses), "codes": dict(codes), "rounds": rounds}


async def test_extreme_values_hurt_no_one(shared_cluster: StartCluster, demo_model: Path) -> None:
    await fuzz(shared_cluster(demo_model, prefill=1, decode=1, disaggregation="auto"), 400)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("arguments", [(), ("--kv-mib", "5")], ids=["room", "full"])
async def test_10000_bodies_of_extreme_values_hurt_no_one(
    start_cluster: StartCluster, demo_model: Path, arguments: tuple[str, ...]
) -> None:
    """Once with room for everyone, once with nodes so small that most requests have to wait first."""
    _log.info("%s", await fuzz(start_cluster(demo_model, prefill=1, decode=1, arguments=arguments), 10_000))
