"""The prefix cache as clients and operators see it: cached tokens, `baton cache`, metrics, and tenants kept apart."""

from __future__ import annotations

import json
import random
import statistics
import time
import urllib.request
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from baton.client import Client, Delta, Finished
from demo.tasks import recall_prompts
from tests.support.cluster import KEYS, WITH_KEYS, Cluster, StartCluster
from tests.support.models import VOCAB_SIZE, ModelCase
from tests.support.recall import baton

BLOCK_TOKENS = 64
TIMEOUT_S = 60.0
# Its prompts take tens of times as long as anything else that a request waits for.
SLOW = ModelCase("tenants", heads=8, kv_heads=4, head_dim=64, hidden=512, intermediate=1536, layers=6)
PROMPT_TOKENS = 1800
NUM_ROUNDS = 5


def full_blocks(num_prompt_tokens: int) -> int:
    """Tokens of the blocks that can be found: the last token is computed."""
    return (num_prompt_tokens - 1) // BLOCK_TOKENS * BLOCK_TOKENS


# ── Figures ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def post(cluster: Cluster, path: str, body: dict[str, Any]) -> tuple[str, dict[str, Any], str]:
    """Text, usage and relay line of an answer, streamed or not."""
    said = json.dumps({"temperature": 0, "max_tokens": 8} | body).encode()
    request = urllib.request.Request(f"{cluster.http}/v1/{path}", said, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
        content, relay = response.read().decode(), response.headers.get("x-baton-relay", "")
    if not body.get("stream"):
        answer = json.loads(content)
        (choice,) = answer["choices"]
        return choice["text"] if "text" in choice else choice["message"]["content"], answer["usage"], relay
    events = [json.loads(x.removeprefix("data: ")) for x in content.split("\n\n") if x and x != "data: [DONE]"]
    choices = [choice for event in events for choice in event["choices"]]
    text = "".join(x["text"] if "text" in x else x["delta"].get("content", "") for x in choices)
    return text, events[-1]["usage"], relay


def test_cached_tokens_of_every_kind_of_answer(shared_cluster: StartCluster, demo_model: Path) -> None:
    cluster = shared_cluster(demo_model, prefill=1, decode=1)
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    texts = [task.prompt for task in recall_prompts(61, 4, num_pairs=40, num_questions=1)]
    asked = [
        ("completions", {"prompt": texts[0]}),
        ("completions", {"prompt": texts[1]} | streamed),
        ("chat/completions", {"messages": [{"role": "user", "content": texts[2]}]}),
        ("chat/completions", {"messages": [{"role": "user", "content": texts[3]}]} | streamed),
    ]
    for path, body in asked:
        first, again = post(cluster, path, body), post(cluster, path, body)
        assert first[0] == again[0], "the same answer from cached blocks"
        num_prompt = first[1]["prompt_tokens"]
        assert num_prompt > 2 * BLOCK_TOKENS
        # The beginning of a chat template may be known from others.
        assert first[1]["prompt_tokens_details"]["cached_tokens"] <= BLOCK_TOKENS
        assert again[1] == first[1] | {"prompt_tokens_details": {"cached_tokens": full_blocks(num_prompt)}}
        if "stream" not in body:
            assert f"({full_blocks(num_prompt)} tokens cached)" in again[2]
    (task,) = recall_prompts(62, 1, num_pairs=40, num_questions=1)
    with Client(cluster.grpc) as client:
        answers = [client.complete(task.prompt, temperature=0, max_tokens=8) for _ in range(2)]
        assert answers[0].token_ids == answers[1].token_ids
        num_prompt = answers[0].usage.prompt_tokens
        assert [x.usage.cached_tokens for x in answers] == [0, full_blocks(num_prompt)]
        assert answers[1].relay.num_cached_tokens == full_blocks(num_prompt)
        salted = [client.complete(task.prompt, temperature=0, max_tokens=8, cache_salt="s") for _ in range(2)]
        assert [x.token_ids for x in salted] == [answers[0].token_ids] * 2
        assert [x.usage.cached_tokens for x in salted] == [0, full_blocks(num_prompt)]
    cluster.wait_baseline()


def metric(cluster: Cluster, node: str, name: str) -> float:
    with urllib.request.urlopen(f"http://{cluster.nodes[node].metrics}/metrics", timeout=TIMEOUT_S) as response:
        text = response.read().decode()
    (line,) = [x for x in text.splitlines() if x.startswith(name) and x[len(name)] in "{ "]
    return float(line.split()[-1])


def test_an_operator_sees_the_caches_and_drops_them(shared_cluster: StartCluster, demo_model: Path) -> None:
    cluster = shared_cluster(demo_model, prefill=1, decode=1)
    prompt = recall_prompts(63, 1, num_pairs=40, num_questions=1)[0].prompt

    def caches(*arguments: str) -> dict[str, dict[str, Any]]:
        found = json.loads(baton("cache", "--router", cluster.grpc, "--json", *arguments))
        assert found["unreachable"] == {}
        return {x["node_id"]: x for x in found["nodes"]}

    with Client(cluster.grpc) as client:
        before = caches()
        # JSON has 64-bit numbers as text.
        hits = int(before["prefill-0"]["hit_tokens"])
        assert hits == metric(cluster, "prefill-0", "baton_prefix_cache_hit_tokens_total")
        client.complete(prompt, temperature=0, max_tokens=8)
        found = client.complete(prompt, temperature=0, max_tokens=8).usage.cached_tokens
        assert found > 0
        after = caches()
        assert {*after} == {"prefill-0", "decode-0"}
        assert all(x["is_on"] and x["known_blocks"] >= found // BLOCK_TOKENS for x in after.values())
        assert sum(int(after[node]["hit_tokens"]) - int(before[node]["hit_tokens"]) for node in after) >= found
        assert int(after["prefill-0"]["query_tokens"]) > int(before["prefill-0"]["query_tokens"])
        assert "prefix cache · " in (table := baton("cache", "--router", cluster.grpc))
        assert all(node in table for node in after)
        dropped = caches("--drop")
        assert all(x["known_blocks"] == 0 < x["dropped_blocks"] for x in dropped.values())
        assert all(x["cached_blocks"] == 0 for x in caches().values())
        assert "blocks dropped" in baton("cache", "--router", cluster.grpc, "--drop")
        assert client.complete(prompt, temperature=0, max_tokens=8).usage.cached_tokens == 0
        assert metric(cluster, "decode-0", "baton_prefix_cache_corrupt_total") == 0
    with urllib.request.urlopen(f"{cluster.http}/metrics", timeout=TIMEOUT_S) as response:
        text = response.read().decode()
    for ours, theirs in (("prompt_tokens", "queries"), ("cached_prompt_tokens", "hits")):
        lines = [x for x in text.splitlines() if x.startswith((f"baton_{ours}_total", f"vllm:prefix_cache_{theirs}_t"))]
        assert len({x.split()[-1] for x in lines}) == 1
        assert len(lines) == 2
    cluster.wait_baseline()


# ── Tenants ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def measured(client: Client, prompt: list[int], salt: str = "") -> tuple[float, int]:
    """Time to the first token, as this client sees it, and the cached tokens."""
    began_s, first_s = time.perf_counter(), 0.0
    for part in client.generate(prompt, temperature=0, max_tokens=2, ignore_eos=True, cache_salt=salt):
        if isinstance(part, Delta) and not first_s:
            first_s = time.perf_counter() - began_s
        if isinstance(part, Finished):
            return first_s, part.usage.cached_tokens
    raise AssertionError("no end")


@pytest.mark.timeout(240)
def test_a_tenant_neither_hits_nor_times_the_blocks_of_another(start_cluster: StartCluster, tmp_path: Path) -> None:
    """Each prompt is asked for by one key, by another, and with a salt; each of them again as the control.

    What is compared are medians of times that differ by tens: a prompt's computation, and nearly nothing.
    """
    cluster = start_cluster(SLOW.save(tmp_path / "slow"), prefill=1, decode=1, arguments=WITH_KEYS)
    rng = random.Random(1)
    first_s: dict[str, list[float]] = defaultdict(list)
    with Client(cluster.grpc, api_key=KEYS[0]) as one, Client(cluster.grpc, api_key=KEYS[1]) as other:
        asking = {"owner": (one, ""), "other key": (other, ""), "other salt": (one, "s")}
        for _ in range(NUM_ROUNDS):
            prompt = [rng.randrange(VOCAB_SIZE) for _ in range(PROMPT_TOKENS)]
            for name, (client, salt) in asking.items():
                took_s, num_cached = measured(client, prompt, salt)
                assert num_cached == 0, f"{name} has another's blocks"
                first_s[name].append(took_s)
            for name, (client, salt) in asking.items():
                took_s, num_cached = measured(client, prompt, salt)
                assert num_cached == full_blocks(PROMPT_TOKENS), f"{name} has not its own blocks"
                first_s[f"{name}, again"].append(took_s)
    medians = {name: statistics.median(times) for name, times in first_s.items()}
    computed_s = medians["owner"]
    for name in asking:
        assert medians[f"{name}, again"] < computed_s / 2, f"the control: a hit is seen in the time, {medians}"
        assert medians[name] > computed_s / 2, f"a hit is seen in the time of {name}: {medians}"
