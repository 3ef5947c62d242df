"""The openai package against a real split cluster, and log-probabilities that the hand-off must not lose or change."""

from __future__ import annotations

from pathlib import Path

import openai
import pytest

from demo.tasks import recall_prompts
from tests.support.cluster import ADMIN_KEY, KEYS, WITH_KEYS, StartCluster
from tests.support.figures import figure
from tests.support.load import Job, run_all

MODEL = "model"
TIMEOUT_S = 60.0


def client_of(base_url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0, timeout=TIMEOUT_S)


def test_openai_client(shared_cluster: StartCluster, demo_model: Path) -> None:
    cluster = shared_cluster(demo_model, prefill=1, decode=1)
    with client_of(cluster.http) as client:
        assert [m.id for m in client.models.list()] == [MODEL]
        chats_stream(client)
        completions_with_everything(client)
        errors_are_proper(client)
    cluster.wait_baseline()


def chats_stream(client: openai.OpenAI) -> None:
    task = recall_prompts(31, 1, num_pairs=12, num_questions=1, kind="chat")[0]
    text, usage = "", None
    for chunk in client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": task.prompt}],
        temperature=0,
        max_tokens=task.num_output_tokens + 4,
        stream=True,
        stream_options={"include_usage": True},
    ):
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
        usage = chunk.usage or usage
    assert task.accepts(text)
    assert usage is not None
    assert usage.completion_tokens == task.num_output_tokens
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def completions_with_everything(client: openai.OpenAI) -> None:
    task = recall_prompts(32, 1, num_pairs=12, num_questions=2)[0]
    whole = client.completions.create(model=MODEL, prompt=task.prompt, temperature=0, max_tokens=24, logprobs=2)
    assert task.accepts(whole.choices[0].text)
    assert whole.choices[0].finish_reason == "stop"
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert len(logprobs.token_logprobs) == task.num_output_tokens
    assert all(lp is not None and lp <= 0 for lp in logprobs.token_logprobs)

    first = task.expected.split(".")[0]
    stopped = client.completions.create(model=MODEL, prompt=task.prompt, temperature=0, max_tokens=24, stop=["."])
    assert (stopped.choices[0].text.strip(), stopped.choices[0].finish_reason) == (first, "stop")

    def sampled(seed: int) -> list[str]:
        made = client.completions.create(
            model=MODEL, prompt="Count from", temperature=2.0, max_tokens=12, seed=seed, n=2, logit_bias={"0": -100}
        )
        assert [c.index for c in made.choices] == [0, 1]
        return [c.text for c in made.choices]

    assert sampled(7) == sampled(7)
    assert sampled(7) != sampled(8)
    assert len(set(sampled(7))) == 2


def errors_are_proper(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="no-such-model"):
        client.completions.create(model="no-such-model", prompt="a")
    with pytest.raises(openai.BadRequestError, match="2048"):
        client.completions.create(model=MODEL, prompt=[5] * 3000, max_tokens=4)
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model=MODEL, prompt="a", temperature=-1)
    assert bad.value.param == "temperature"
    malformed = client._client.post("/completions", content=b'{"model": ', headers={"Content-Type": "application/json"})
    assert malformed.status_code == 400
    assert malformed.json()["error"]["type"] == "invalid_request_error"


async def test_25_logprobs_of_every_token_survive_the_handoff(shared_cluster: StartCluster, demo_model: Path) -> None:
    tasks = recall_prompts(33, 6)
    jobs = [Job(t.prompt, 20, {"logprobs": 3, "temperature": 0.8, "seed": 4, "ignore_eos": True}) for t in tasks]
    found = []
    for roles in ({"prefill": 1, "decode": 1}, {"prefill": 0, "decode": 0, "mixed": 2}):
        cluster = shared_cluster(demo_model, **roles)
        answers = await run_all(cluster.http, jobs, concurrency=6)
        cluster.wait_baseline()
        assert [a.error for a in answers] == [None] * len(jobs)
        found.append([(a.token_ids, a.logprobs) for a in answers])
    assert all(len(logprobs) == len(ids) == 20 for ids, logprobs in found[0])
    # Floats, compared for equality: split and colocated compute the same bits.
    assert found[0] == found[1]
    figure(
        25,
        "log-probabilities equal to those of one node, first tokens' too",
        sum(len(x) for _, x in found[0]),
        "values",
    )


def test_a_cluster_with_api_keys_starts_and_asks_for_them(shared_cluster: StartCluster, demo_model: Path) -> None:
    cluster = shared_cluster(demo_model, prefill=1, decode=1, arguments=WITH_KEYS)
    for key in KEYS:
        with openai.OpenAI(base_url=f"{cluster.http}/v1", api_key=key, max_retries=0, timeout=TIMEOUT_S) as client:
            assert client.completions.create(model=MODEL, prompt="Hello", max_tokens=2).choices[0].text
    with client_of(cluster.http) as stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()
    arguments = Path(f"/proc/{cluster.router_pid}/cmdline").read_text()
    assert not [key for key in (*KEYS, ADMIN_KEY) if key in arguments], "a key must not be in arguments"
