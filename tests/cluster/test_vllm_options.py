"""A cluster that is started with the options of `vllm serve`: what they say holds in every process."""

from __future__ import annotations

from pathlib import Path

import httpx

from tests.support.cluster import StartCluster

PROMPT = "Months from May to July:"


def test_what_the_options_say_holds(start_cluster: StartCluster, demo_model: Path, tmp_path: Path) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text("{{ messages[0].content }}")
    words = (
        "--served-model-name one two --max-model-len 512 --block-size 32 --max-num-batched-tokens 256 --dtype float "
    )
    words += f"-tp 1 --trust-remote-code --chat-template {template}"
    cluster = start_cluster(demo_model, prefill=1, decode=1, arguments=(*words.split(), "--allowed-origins", '["*"]'))
    with httpx.Client(base_url=cluster.http, timeout=60, headers={"origin": "https://a.example"}) as client:
        cards = client.get("/v1/models").json()["data"]
        assert [(card["id"], card["max_model_len"]) for card in cards] == [("one", 512), ("two", 512)]
        asked = {"model": "two", "temperature": 0, "max_tokens": 16}
        completion = client.post("/v1/completions", json=asked | {"prompt": PROMPT})
        assert completion.json()["model"] == "one"
        assert completion.headers["access-control-allow-origin"] == "*"
        chat = client.post("/v1/chat/completions", json=asked | {"messages": [{"role": "user", "content": PROMPT}]})
        # The template adds nothing, so both prompts are one.
        text = completion.json()["choices"][0]["text"]
        assert chat.json()["choices"][0]["message"]["content"] == text == " May June July."
        refused = client.post("/v1/completions", json={"prompt": [5] * 512, "max_tokens": 1})
        assert refused.json()["error"]["code"] == "context_length_exceeded"
    assert {node.node.kv_layout.block_tokens for node in cluster.status().nodes} == {32}
    assert {node.node.model.dtype for node in cluster.status().nodes} == {"float32"}
