"""Token ids reach clients as a node drew them: no text stands between, which could hide that they differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

import baton
from router.text.tokenizer import Tokenizer
from tests.support.fake_nodes import FakeCluster, FakeConfig, expected_tokens
from tests.support.figures import figure
from tests.support.router import VOCAB_SIZE, baseline, router_beside, write_model_folder

CONFIG = FakeConfig(vocab_size=VOCAB_SIZE, max_model_tokens=2048)
PROMPTS = [[7, n, 9] for n in range(2, 26)]
MAX_TOKENS = 24


@pytest.mark.parametrize("pools", [{"prefill": 1, "decode": 1}, {"mixed": 1}], ids=["split", "whole"])
async def test_29_ids_on_every_face_are_the_drawn_ones_where_their_text_would_be_tokenized_otherwise(
    tmp_path: Path, pools: dict[str, int]
) -> None:
    folder = write_model_folder(tmp_path / "tiny")
    tokenizer = Tokenizer.load(folder)
    assert tokenizer is not None
    num_otherwise = 0
    async with (
        FakeCluster(CONFIG, **pools) as cluster,
        router_beside(cluster, model_folder=folder) as router,
        httpx.AsyncClient(base_url=router.http or "", timeout=20) as http,
        baton.AsyncClient(router.grpc or "") as grpc,
    ):
        for seed, prompt in enumerate(PROMPTS):
            drawn = expected_tokens(prompt, seed, MAX_TOKENS, VOCAB_SIZE)
            asked: dict[str, Any] = {"prompt": prompt, "seed": seed, "max_tokens": MAX_TOKENS, "ignore_eos": True}
            asked["return_token_ids"] = True
            whole = (await http.post("/v1/completions", json=asked)).json()["choices"][0]
            assert whole["token_ids"] == drawn
            streamed: list[int] = []
            text = ""
            answer = await http.post("/v1/completions", json=asked | {"stream": True})
            for line in answer.text.splitlines():
                if line.startswith("data: {"):
                    for choice in json.loads(line.removeprefix("data: "))["choices"]:
                        streamed += choice.get("token_ids") or []
                        text += choice.get("text") or ""
            assert streamed == drawn
            assert text == whole["text"]
            done = await grpc.complete(prompt, seed=seed, max_tokens=MAX_TOKENS, ignore_eos=True)
            assert list(done.token_ids) == drawn
            num_otherwise += tokenizer.encode(text, add_special_tokens=False) != tuple(drawn)
        await baseline(cluster)
    figure(29, f"answers of {len(PROMPTS)} whose text has other ids", num_otherwise, "answers")
    assert num_otherwise > len(PROMPTS) // 2, "a comparison of texts would have found the same"
