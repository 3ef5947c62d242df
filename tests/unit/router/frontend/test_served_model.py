"""What operators decide about a model: its names, its defaults, its tokenizer and template, seeds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from baton.errors import BadConfig
from router.serve import Router
from router.text.model_files import load_tokenizer_facts
from tests.support.fake_nodes import FakeCluster, FakeConfig
from tests.support.router import VOCAB_SIZE, router_beside, write_model_folder

CONFIG = FakeConfig(vocab_size=VOCAB_SIZE, max_model_tokens=512)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model_folder(tmp_path / "tiny")


async def asked(router: Router, body: dict[str, Any], path: str = "completions") -> httpx.Response:
    async with httpx.AsyncClient(base_url=f"{router.http}/v1", timeout=10) as client:
        return await client.post(f"/{path}", json={"max_tokens": 8, "return_token_ids": True} | body)


async def listed(router: Router, name: str = "") -> httpx.Response:
    async with httpx.AsyncClient(base_url=f"{router.http}/v1", timeout=10) as client:
        return await client.get(f"/models/{name}" if name else "/models")


async def test_a_model_has_all_of_its_names_and_answers_have_the_first(folder: Path) -> None:
    names = ("first", "org/second")
    async with (
        FakeCluster(CONFIG, prefill=1, decode=1) as cluster,
        router_beside(cluster, model_folder=folder, model_names=names) as router,
    ):
        assert [card["id"] for card in (await listed(router)).json()["data"]] == list(names)
        for name in (*names, ""):
            answer = (await asked(router, {"prompt": "a", "model": name})).json()
            assert answer["model"] == "first"
        assert (await listed(router, "org/second")).json()["id"] == "org/second"
        for refused in (await asked(router, {"prompt": "a", "model": "tiny"}), await listed(router, "tiny")):
            assert refused.status_code == 404
            assert "this server has 'first' and 'org/second'" in refused.json()["error"]["message"]


async def test_the_defaults_of_generation_config_are_in_the_list_of_models(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.5, "top_k": 5, "max_new_tokens": 9}))
    for choice, expected in (("auto", {"temperature": 0.5, "top_k": 5, "max_tokens": 9}), ("none", {})):
        async with (
            FakeCluster(CONFIG, prefill=1, decode=1) as cluster,
            router_beside(cluster, model_folder=folder, generation_config=choice) as router,
        ):
            (card,) = (await listed(router)).json()["data"]
            assert card["default_sampling_params"] == expected
            assert card["max_model_len"] == 512


async def test_seeds_are_drawn_from_the_one_that_was_given(folder: Path) -> None:
    found = []
    for seed in (5, 5, 6, None):
        async with (
            FakeCluster(CONFIG, prefill=1, decode=1) as cluster,
            router_beside(cluster, model_folder=folder, seed=seed) as router,
        ):
            answers = [await asked(router, {"prompt": "a", "ignore_eos": True}) for _ in range(2)]
            found.append([tuple(x.json()["choices"][0]["token_ids"]) for x in answers])
    assert found[0] == found[1]
    assert found[0][0] != found[0][1]
    assert len({answers[0] for answers in found}) == 3


async def test_another_tokenizer_and_another_template(folder: Path, tmp_path: Path) -> None:
    other = write_model_folder(tmp_path / "other", chat_template=None)
    (tmp_path / "mine.jinja").write_text("{{ bos_token }}{{ messages[0].content }}?")
    (folder / "tokenizer.json").unlink()
    chat = {"messages": [{"role": "user", "content": "the quick"}]}
    async with FakeCluster(CONFIG, prefill=1, decode=1) as cluster:
        settings = {"model_folder": folder, "tokenizer": str(other)}
        async with router_beside(cluster, **settings) as router:
            assert (await asked(router, {"prompt": "the quick"})).status_code == 200
            assert "no chat template" in (await asked(router, chat, "chat/completions")).text
        for template in (str(tmp_path / "mine.jinja"), "{{ bos_token }}{{ messages[0].content }}?"):
            async with router_beside(cluster, **settings, chat_template=template) as router:
                prompt = (await asked(router, {"prompt": "the quick?"})).json()["choices"][0]["prompt_token_ids"]
                assert (await asked(router, chat, "chat/completions")).json()["prompt_token_ids"] == prompt


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tokenizer": "/nowhere"}, "--tokenizer is '/nowhere', which has no tokenizer.json"),
        ({"chat_template": "nowhere.jinja"}, "--chat-template is 'nowhere.jinja', expected the path of a file"),
    ],
)
async def test_what_is_not_there_stops_the_start(folder: Path, settings: dict[str, str], said: str) -> None:
    async with FakeCluster(CONFIG, prefill=1, decode=1) as cluster:
        with pytest.raises(BadConfig, match=said):
            async with router_beside(cluster, model_folder=folder, **settings):
                pass


def test_a_template_in_a_file_of_the_folder_is_not_taken_beside_a_given_one(folder: Path) -> None:
    assert load_tokenizer_facts(folder, "{{ 1 }}").chat_template == "{{ 1 }}"
