"""Fields that change what a prompt is, and names of requests: given by a client, honoured or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from baton.chat import ChatMessage, Tool
from baton.client import AsyncClient
from baton.errors import InvalidRequest, PromptTooLong
from router.serve import Router
from router.text.chat import ChatTemplate, Conversation
from router.text.tokenizer import Tokenizer
from tests.support.fake_nodes import FakeCluster, FakeConfig
from tests.support.router import VOCAB_SIZE, router_beside, write_model_folder

CONFIG = FakeConfig(vocab_size=VOCAB_SIZE, max_model_tokens=64)
TEXT = "the quick brown fox jumps over the lazy dog " * 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_folder(tmp_path_factory.mktemp("models") / "tiny")


async def posted(router: Router, body: dict[str, Any], *, path: str = "completions", **headers: str) -> httpx.Response:
    async with httpx.AsyncClient(base_url=f"{router.http}/v1", timeout=10, headers=headers) as client:
        return await client.post(f"/{path}", json={"max_tokens": 4, "seed": 1, "return_token_ids": True} | body)


async def test_a_long_prompt_is_cut_on_the_side_that_was_asked_for(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    assert tokenizer is not None
    ids = list(tokenizer.encode(TEXT, add_special_tokens=True))
    assert len(ids) > 100
    async with (
        FakeCluster(CONFIG, prefill=1, decode=1) as cluster,
        router_beside(cluster, model_folder=folder) as router,
    ):
        for fields, expected in (
            ({"truncate_prompt_tokens": 7}, ids[-7:]),
            ({"truncate_prompt_tokens": 7, "truncation_side": "left"}, ids[-7:]),
            ({"truncate_prompt_tokens": 7, "truncation_side": "right"}, ids[:7]),
            ({"truncate_prompt_tokens": -1}, ids[-60:]),
            ({"truncate_prompt_tokens": -1, "max_tokens": None}, ids[-48:]),
            ({"truncate_prompt_tokens": -1, "max_tokens": None, "min_tokens": 20}, ids[-44:]),
            ({"truncate_prompt_tokens": 60, "prompt": ids}, ids[-60:]),
        ):
            answered = await posted(router, {"prompt": TEXT} | fields)
            assert answered.status_code == 200, answered.text
            assert answered.json()["choices"][0]["prompt_token_ids"] == expected, fields
        short = await posted(router, {"prompt": "the fox", "truncate_prompt_tokens": 50})
        short_ids = list(tokenizer.encode("the fox", add_special_tokens=True))
        assert short.json()["choices"][0]["prompt_token_ids"] == short_ids
        echoed = await posted(router, {"prompt": TEXT, "truncate_prompt_tokens": 7, "echo": True})
        assert echoed.json()["choices"][0]["text"].startswith(tokenizer.decode(ids[-7:], skip_special_tokens=True))
        chat = {"messages": [{"role": "user", "content": TEXT}], "truncate_prompt_tokens": -1}
        answered = await posted(router, chat, path="chat/completions")
        assert len(answered.json()["prompt_token_ids"]) == 60


async def test_prompts_are_cut_and_messages_continued_over_grpc(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    assert tokenizer is not None
    ids = tokenizer.encode(TEXT, add_special_tokens=True)
    async with (
        FakeCluster(CONFIG, prefill=1, decode=1) as cluster,
        router_beside(cluster, model_folder=folder) as router,
        AsyncClient(str(router.grpc)) as client,
    ):
        asked: dict[str, Any] = {"max_tokens": 4, "seed": 1}
        for prompt in (TEXT, list(ids)):
            for fields, expected in (
                ({"truncate_prompt_tokens": 7}, ids[-7:]),
                ({"truncate_prompt_tokens": 7, "truncate_prompt_end": True}, ids[:7]),
                ({"truncate_prompt_tokens": -1}, ids[-60:]),
            ):
                answer = await client.complete(prompt, **asked, **fields)
                assert answer.prompt_token_ids == expected, fields
        for count in (-2, 62):
            with pytest.raises((InvalidRequest, PromptTooLong)) as refused:
                await client.complete(list(ids), **asked, truncate_prompt_tokens=count)
            assert isinstance(refused.value, PromptTooLong) is (count > 0)
        with pytest.raises(PromptTooLong):
            await client.complete(list(ids), **asked)
        talk = [("user", "a"), ("assistant", "the quick ")]
        continued = await client.complete(talk, **asked, continue_final_message=True)
        expected = tokenizer.encode("<s><|user|>a</s><|assistant|>the quick ", add_special_tokens=False)
        assert continued.prompt_token_ids == expected
        with pytest.raises(InvalidRequest, match="for conversations"):
            await client.complete("a", continue_final_message=True)


@pytest.mark.parametrize("count", [0, -2, 2**40])
async def test_a_length_that_cannot_be_kept_is_refused(folder: Path, count: int) -> None:
    async with (
        FakeCluster(CONFIG, prefill=1, decode=1) as cluster,
        router_beside(cluster, model_folder=folder) as router,
    ):
        refused = await posted(router, {"prompt": "a", "truncate_prompt_tokens": count})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "truncate_prompt_tokens")
        # Kept, it does not fit: as without the field.
        refused = await posted(router, {"prompt": TEXT, "truncate_prompt_tokens": 62})
        assert refused.json()["error"]["code"] == "context_length_exceeded"


async def test_a_request_has_the_name_that_its_client_gave(folder: Path) -> None:
    async with (
        FakeCluster(CONFIG, prefill=1, decode=1) as cluster,
        router_beside(cluster, model_folder=folder) as router,
    ):
        for headers, body, expected in (
            ({"x-request-id": "gateway/1+2="}, {}, "gateway/1+2="),
            ({"x-request-id": "gateway"}, {"request_id": "own"}, "gateway"),
            ({}, {"request_id": "own"}, "own"),
        ):
            whole = await posted(router, {"prompt": "a"} | body, **headers)
            assert whole.headers["x-request-id"] == expected
            assert whole.json()["id"] == f"cmpl-{expected}"
            streamed = await posted(router, {"prompt": "a", "stream": True} | body, **headers)
            assert streamed.headers["x-request-id"] == expected
        refused = await posted(router, {"prompt": "a"}, **{"x-request-id": "two words"})
        assert refused.status_code == 400
        assert "x-request-id" in refused.json()["error"]["message"]


async def test_an_answer_continues_the_last_message(folder: Path) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "the quick "}]
    tokenizer = Tokenizer.load(folder)
    assert tokenizer is not None
    async with (
        FakeCluster(CONFIG, prefill=1, decode=1) as cluster,
        router_beside(cluster, model_folder=folder) as router,
    ):
        answered = await posted(
            router, {"messages": messages, "continue_final_message": True}, path="chat/completions"
        )  # fmt: skip
        expected = tokenizer.encode("<s><|user|>a</s><|assistant|>the quick ", add_special_tokens=False)
        assert answered.json()["prompt_token_ids"] == list(expected)


def test_a_template_that_leaves_the_last_message_out_cannot_continue_it() -> None:
    template = ChatTemplate("{{ messages[0].content }}", {})
    conversation = Conversation((ChatMessage("user", "a"), ChatMessage("assistant", "b")), continues_final=True)
    with pytest.raises(InvalidRequest) as refused:
        template.render(conversation)
    assert refused.value.param == "continue_final_message"


async def test_half_of_a_surrogate_pair_is_the_clients_fault(tmp_path: Path) -> None:
    """JSON can write one, and no text can have it; a model that was cut off in a tool call writes it, too."""
    template = (
        "{% for m in messages %}{{ m.content or '' }}{{ m.tool_calls[0].function.arguments | tojson }}{% endfor %}"
    )
    folder = write_model_folder(tmp_path / "tiny", chat_template=template)
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": "\\ud83d"}'}}
    async with (
        FakeCluster(CONFIG, prefill=1, decode=1) as cluster,
        router_beside(cluster, model_folder=folder) as router,
        AsyncClient(str(router.grpc)) as client,
    ):
        body = {"messages": [{"role": "assistant", "tool_calls": [call]}]}
        assert (await posted(router, body, path="chat/completions")).status_code == 200
        schema = {"properties": {"\ud83d": {}}}
        for param, options in (
            ("variables", {"template_variables": {"a": "\udc00"}}),
            ("tools.0.parameters", {"tools": [Tool("f", "", schema)]}),
        ):
            with pytest.raises(InvalidRequest, match="surrogates not allowed") as refused:
                await client.complete([("user", "x")], max_tokens=2, **options)
            assert refused.value.param == param
