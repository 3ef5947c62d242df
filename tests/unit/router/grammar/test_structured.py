"""Structured output from the request to the answer, over fake nodes that draw any allowed token."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import openai
import pytest
from tokenizers import decoders

from baton.client import AsyncClient, StructuredOutput
from baton.errors import InvalidRequest, Overloaded
from router.grammar import grammars
from router.grammar.check import GrammarCheck, GrammarConfig
from router.serve import Router
from router.text.tokenizer import Tokenizer
from tests.support.fake_nodes import FakeCluster, FakeConfig
from tests.support.router import CORPUS, VOCAB_SIZE, baseline, router_beside, until, write_model_folder
from tests.support.text_tokenizers import KINDS, trained_sentence_piece

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "count": {"type": "integer", "minimum": 10, "maximum": 9999},
        "kind": {"enum": ["fox", "dog"]},
        "parts": {"type": "array", "items": {"type": "boolean"}, "minItems": 3, "maxItems": 6},
    },
    "required": ["count", "kind", "parts"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "animal", "schema": SCHEMA, "strict": True}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_folder(tmp_path_factory.mktemp("models") / "tiny")


@asynccontextmanager
async def served(folder: Path, **pools: int) -> AsyncIterator[tuple[Router, FakeCluster]]:
    file = folder / "tokenizer.json"
    config = FakeConfig(vocab_size=VOCAB_SIZE, max_model_tokens=2048, step_s=0.002, tokenizer_file=file)
    async with FakeCluster(config, **(pools or {"prefill": 1, "decode": 1})) as cluster:
        async with router_beside(cluster, model_folder=folder) as router:
            yield router, cluster
        await baseline(cluster)


@asynccontextmanager
async def sdk(router: Router) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{router.http}/v1", api_key="none", max_retries=0) as client:
        yield client


@asynccontextmanager
async def http(router: Router) -> AsyncIterator[httpx.AsyncClient]:
    assert router.http is not None
    async with httpx.AsyncClient(base_url=router.http, timeout=20) as client:
        yield client


async def answer(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    got = await client.post("/v1/completions", json={"prompt": "the fox", "max_tokens": 300, "seed": 4} | body)
    assert got.status_code == 200, got.text
    choice: dict[str, Any] = got.json()["choices"][0]
    return choice


async def test_the_sdk_gets_json_by_the_schema_whole_and_streamed(folder: Path) -> None:
    async with served(folder) as (router, _), sdk(router) as client:
        asked: Any = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "seed": 7, "max_tokens": 400}
        whole = await client.chat.completions.create(**asked, response_format=FORMAT)
        text = whole.choices[0].message.content
        assert text is not None
        jsonschema.validate(json.loads(text), SCHEMA)
        assert whole.choices[0].finish_reason == "stop"
        stream = await client.chat.completions.create(**asked, response_format=FORMAT, stream=True)
        assert "".join([c.choices[0].delta.content or "" async for c in stream if c.choices]) == text


async def test_every_form_of_asking(folder: Path) -> None:
    async with served(folder) as (router, _), http(router) as client:
        for n, fields in enumerate(
            (
                {"response_format": FORMAT},
                {"structured_outputs": {"json": SCHEMA}},
                {"structured_outputs": {"json": json.dumps(SCHEMA), "disable_fallback": False}},
                {"guided_json": SCHEMA, "guided_decoding_backend": "auto"},
            )
        ):
            choice = await answer(client, **fields, seed=n)
            jsonschema.validate(json.loads(choice["text"]), SCHEMA)
            assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", None)
        compact = await answer(client, structured_outputs={"json": SCHEMA, "disable_any_whitespace": True}, seed=9)
        assert compact["text"] == json.dumps(json.loads(compact["text"]))
        for fields, pattern in (
            ({"structured_outputs": {"regex": "[a-f]{4}-[0-9]{2}"}}, "[a-f]{4}-[0-9]{2}"),
            ({"guided_regex": "^(ab)+c$"}, "(ab)+c"),
            ({"structured_outputs": {"choice": ["left", "right"]}}, "left|right"),
            ({"guided_choice": ["left", "right"]}, "left|right"),
            ({"structured_outputs": {"grammar": 'start: "1" ("+" "1")~3'}}, r"1(\+1){3}"),
            ({"guided_grammar": 'root ::= "yes" | "no"'}, "yes|no"),
        ):
            assert re.fullmatch(pattern, (await answer(client, **fields))["text"]), fields
        some_object = await answer(client, response_format={"type": "json_object"}, max_tokens=2, seed=1)
        assert some_object["text"].startswith("{")
        assert (await answer(client, response_format={"type": "text"}, max_tokens=2))["finish_reason"] == "length"


GRPC_FORMS: list[tuple[StructuredOutput, str]] = [
    (StructuredOutput(json_schema=SCHEMA), r'\{\s*"count".*\}'),
    (StructuredOutput(json_schema=json.dumps(SCHEMA)), r'\{\s*"count".*\}'),
    (StructuredOutput(json_schema={"const": 1, "not": {}}, lenient=True), "1"),
    (StructuredOutput(json_schema={"enum": [[1, 2]]}, compact=True), r"\[1, 2\]"),
    (StructuredOutput(regex="[ab]{3}"), "[ab]{3}"),
    (StructuredOutput(choice=["left", "right"]), "left|right"),
    (StructuredOutput(grammar='start: "x"~3'), "xxx"),
]


async def test_every_form_over_grpc(folder: Path) -> None:
    async with served(folder) as (router, _):
        assert router.grpc is not None
        client = AsyncClient(router.grpc)
        async with client:
            for form, pattern in GRPC_FORMS:
                whole = await client.complete("the fox", seed=3, max_tokens=300, structured_output=form)
                assert re.fullmatch(pattern, whole.text, re.DOTALL), (form, whole.text)
            begun = await client.complete(
                "the fox", seed=3, max_tokens=2, structured_output=StructuredOutput(json_object=True)
            )
            assert begun.text.startswith("{")
            for form, param in (
                (StructuredOutput(json_schema={"not": {}}), "structured_output.json_schema"),
                (StructuredOutput(json_schema="{"), "structured_output.json_schema"),
                (StructuredOutput(regex="("), "structured_output.regex"),
                (StructuredOutput(regex="a", choice=["b"]), "structured_output"),
                (StructuredOutput(choice=["b"] * 5000), "structured_output.choice"),
                (StructuredOutput(regex="a", compact=True), "structured_output.compact"),
            ):
                with pytest.raises(InvalidRequest) as refused:
                    await client.complete("x", structured_output=form)
                assert refused.value.param == param
            with pytest.raises(InvalidRequest, match="structured_output") as refused:
                await client.complete("x", grammar='{"grammars": [{"lark_grammar": "start: /a/"}]}')
            assert refused.value.param == "sampling.grammar"


async def test_with_everything_else_that_a_request_may_ask_for(folder: Path) -> None:
    async with served(folder) as (router, _), http(router) as client:
        asked = {"prompt": "the fox", "max_tokens": 300, "seed": 4, "response_format": FORMAT}
        got = await client.post("/v1/completions", json=asked | {"n": 3, "logprobs": 2, "min_tokens": 5})
        choices = got.json()["choices"]
        assert len({choice["text"] for choice in choices}) > 1
        for choice in choices:
            jsonschema.validate(json.loads(choice["text"]), SCHEMA)
            assert "".join(choice["logprobs"]["tokens"]).startswith(choice["text"])
        without_end = await answer(client, response_format=FORMAT, ignore_eos=True)
        jsonschema.validate(json.loads(without_end["text"]), SCHEMA)
        assert without_end["finish_reason"] == "stop"
        stopped = await answer(client, response_format=FORMAT, stop=["kind"])
        assert (stopped["finish_reason"], stopped["stop_reason"]) == ("stop", "kind")
        cut = await answer(client, response_format=FORMAT, max_tokens=3)
        assert cut["finish_reason"] == "length"


async def test_the_tokens_are_the_same_wherever_and_after_whatever(folder: Path) -> None:
    asked = {"response_format": FORMAT, "return_token_ids": True}
    async with served(folder, mixed=1) as (router, _), http(router) as client:
        colocated = [await answer(client, **asked, seed=seed) for seed in range(3)]
    async with served(folder, prefill=1, decode=2) as (router, cluster), http(router) as client:
        split = [await answer(client, **asked, seed=seed) for seed in range(3)]
        assert [c["token_ids"] for c in split] == [c["token_ids"] for c in colocated]
        running = asyncio.create_task(answer(client, **asked, seed=2))
        await until(lambda: any(cluster[f"decode-{i}"].status().num_running for i in range(2)))
        victim = next(n for n in (cluster["decode-0"], cluster["decode-1"]) if n.status().num_running)
        await victim.die()
        assert (await running)["token_ids"] == colocated[2]["token_ids"]


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}},
     "response_format.json_schema.schema", "not"),
    ({"structured_outputs": {"json": {"$ref": "http://example.com/x"}}}, "structured_outputs.json", "example"),
    ({"structured_outputs": {"regex": "(?=a)b"}}, "structured_outputs.regex", "look"),
    ({"guided_grammar": "start: nothing"}, "guided_grammar", "nothing"),
    ({"guided_json": {"type": "object", "properties": {"a": {"type": "unknown"}}}}, "guided_json", "unknown"),
    ({"structured_outputs": {"regex": "a", "disable_any_whitespace": True}},
     "structured_outputs.disable_any_whitespace", "json"),
    ({"structured_outputs": {"json": {}, "disable_any_whitespace": 1}}, "structured_outputs", "whitespace"),
]  # fmt: skip


async def test_what_cannot_be_followed_is_refused_by_its_field(folder: Path) -> None:
    async with served(folder) as (router, _), http(router) as client:
        for fields, param, why in REFUSED:
            got = await client.post("/v1/completions", json={"prompt": "x"} | fields)
            error = got.json()["error"]
            assert (got.status_code, error["param"]) == (400, param), error
            assert why in error["message"]
        lenient = {"name": "x", "schema": {"type": "integer", "not": {}, "maximum": 9, "minimum": 0}, "strict": False}
        choice = await answer(client, response_format={"type": "json_schema", "json_schema": lenient})
        assert choice["text"] in [str(i) for i in range(10)]


DECODERS = {
    "replace": decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    ),
    "metaspace": decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace("▁", "always")]),
}


@pytest.mark.parametrize("decoder", DECODERS)
async def test_with_a_tokenizer_of_sentence_piece(tmp_path: Path, decoder: str) -> None:
    folder = write_model_folder(tmp_path / "tiny")
    inner = trained_sentence_piece(CORPUS, DECODERS[decoder])
    inner.save(str(folder / "tokenizer.json"))
    schema = SCHEMA | {"properties": SCHEMA["properties"] | {"kind": {"enum": ["the fox", "Köln €"]}}}
    config = FakeConfig(vocab_size=inner.get_vocab_size(), step_s=0.002, tokenizer_file=folder / "tokenizer.json")
    async with (
        FakeCluster(config, prefill=1, decode=1) as cluster,
        router_beside(cluster, model_folder=folder) as router,
        http(router) as client,
    ):
        kinds = set()
        for seed in range(6):
            choice = await answer(client, guided_json=schema, seed=seed)
            found = json.loads(choice["text"])
            jsonschema.validate(found, schema)
            kinds.add(found["kind"])
            assert choice["finish_reason"] == "stop"
        assert kinds == {"the fox", "Köln €"}
        assert (await answer(client, guided_regex=" x+ the fox"))["text"].endswith("x the fox")


async def test_a_tokenizer_that_cannot_be_followed_is_named(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "tiny")
    KINDS["wordpiece"]().save(str(folder / "tokenizer.json"))
    async with (
        FakeCluster(prefill=1, decode=1) as cluster,
        router_beside(cluster, model_folder=folder) as router,
        http(router) as client,
    ):
        got = await client.post("/v1/completions", json={"prompt": [5], "guided_regex": "a"})
        assert got.status_code == 400
        assert "WordPiece" in got.json()["error"]["message"]


async def test_without_a_tokenizer_grammars_are_refused(folder: Path) -> None:
    async with FakeCluster(mixed=1) as cluster, router_beside(cluster) as router, http(router) as client:
        got = await client.post("/v1/completions", json={"prompt": [5], "response_format": FORMAT})
        assert got.status_code == 400
        assert got.json()["error"]["param"] == "response_format.json_schema.schema"


async def test_what_a_node_refuses_has_the_clients_name_of_the_field(folder: Path) -> None:
    """Of nodes that cannot follow grammars, unlike the router."""
    config = FakeConfig(vocab_size=VOCAB_SIZE, max_model_tokens=2048)
    async with (
        FakeCluster(config, prefill=1, decode=1) as cluster,
        router_beside(cluster, model_folder=folder) as router,
        http(router) as client,
        AsyncClient(str(router.grpc)) as typed,
    ):
        got = await client.post("/v1/completions", json={"prompt": "x", "guided_regex": "a"})
        assert (got.status_code, got.json()["error"]["param"]) == (400, "guided_regex")
        with pytest.raises(InvalidRequest, match=r"tokenizer\.json") as refused:
            await typed.complete("x", structured_output=StructuredOutput(regex="a"))
        assert refused.value.param == "structured_output.regex"


async def test_hostile_grammars_are_refused_in_bounded_time_and_hold_nothing_up(folder: Path) -> None:
    def exponential(depth: int) -> dict[str, Any]:
        defs: dict[str, Any] = {
            f"d{i}": {"allOf": [{"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}, {"maxLength": i}]} for _ in range(4)]}
            for i in range(depth)
        }
        return {"$defs": defs | {f"d{depth}": {"type": "string"}}, "$ref": "#/$defs/d0"}

    doubling = "start: A0\n" + "\n".join(f"A{i}: A{i + 1} A{i + 1}" for i in range(60)) + '\nA60: "x"'
    huge = {"type": "object", "properties": {f"p{i}": {"type": "string", "maxLength": 9} for i in range(4000)}}
    async with served(folder) as (router, _), http(router) as client:
        assert router.http is not None
        for name, value in (
            ("guided_json", exponential(40)),
            ("guided_json", huge),
            ("guided_json", {"type": "integer", "multipleOf": 999_983}),
            ("guided_grammar", doubling),
            ("guided_regex", "((a{1,9999}){1,9999}){1,9999}(b{9999}){9999}"),
        ):
            begun_s = time.monotonic()
            hostile = asyncio.create_task(client.post("/v1/completions", json={"prompt": "x", name: value}))
            # Others are served meanwhile, and the loop goes on.
            assert (await answer(client, max_tokens=2))["finish_reason"] == "length"
            assert (await client.get("/health")).status_code == 200
            got = await hostile
            assert got.status_code in (200, 400), got.text
            assert time.monotonic() - begun_s < 15


async def test_a_check_that_takes_too_long_is_ended(folder: Path) -> None:
    config = replace(GrammarConfig(), limit_s=0.5)
    check = GrammarCheck(config, folder / "tokenizer.json")
    # The library counts so many states out one by one; requests may not ask for it.
    endless = json.dumps({"grammars": [{"json_schema": {"type": "integer", "multipleOf": 9_999_991}}]})
    good = grammars.of_choice(["yes"], param="p")
    try:
        async with asyncio.timeout(20):
            with pytest.raises(InvalidRequest, match=r"more than 0\.5 s"):
                await check.check(endless, param="p")
            # The next one has a process of its own.
            await check.check(good, param="p")
    finally:
        await check.close()


async def test_checks_are_bounded_and_their_outcome_is_known(folder: Path) -> None:
    config = replace(GrammarConfig(), max_waiting=2, max_known=2)
    check = GrammarCheck(config, folder / "tokenizer.json")
    texts = [grammars.of_choice([f"yes{i}"], param="p") for i in range(3)]
    try:
        async with asyncio.timeout(20):
            first, second = (asyncio.create_task(check.check(text, param="p")) for text in texts[:2])
            await asyncio.sleep(0)
            # The same one again waits with the first.
            same = asyncio.create_task(check.check(texts[0], param="p"))
            with pytest.raises(Overloaded, match="2 grammars"):
                await check.check(texts[2], param="p")
            same.cancel()
            await first
            await second
            await check.check(texts[2], param="p")
            assert check.num_built == 3
            await check.check(texts[2], param="p")
            assert check.num_built == 3
            await check.check(texts[0], param="p")
            assert check.num_built == 4
    finally:
        await check.close()


async def test_clients_take_turns_with_their_grammars(folder: Path) -> None:
    check = GrammarCheck(GrammarConfig(), folder / "tokenizer.json")
    over: list[str] = []

    async def checked(client: str, number: int) -> None:
        await check.check(grammars.of_choice([f"{client}{number}"], param="p"), param="p", client=client)
        over.append(f"{client}{number}")

    asked = [("greedy", number) for number in range(5)] + [("polite", 0), ("other", 0), ("polite", 1)]
    try:
        async with asyncio.timeout(20), asyncio.TaskGroup() as group:
            for client, number in asked:
                group.create_task(checked(client, number))
                await asyncio.sleep(0)
        turns = ["greedy0", "greedy1", "polite0", "other0", "greedy2", "polite1", "greedy3", "greedy4"]
        assert over == turns
    finally:
        await check.close()


async def test_a_check_that_cannot_start_says_so(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    check = GrammarCheck(GrammarConfig(), tmp_path / "tokenizer.json")
    try:
        async with asyncio.timeout(20):
            with pytest.raises(InvalidRequest, match="this model's tokenizer"):
                await check.check(grammars.of_choice(["a"], param="p"), param="p")
    finally:
        await check.close()


async def test_tokens_and_words_that_an_answer_may_have_or_not(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    assert tokenizer is not None
    digits = [token_id for d in "0123456789" for token_id in tokenizer.encode(d, add_special_tokens=False)]
    async with served(folder) as (router, _), http(router) as client:
        numbers = await answer(client, allowed_token_ids=digits, max_tokens=40)
        assert re.fullmatch("[0-9]{40}", numbers["text"])
        without = await answer(client, allowed_token_ids=digits, bad_words=["5", "67"], max_tokens=200)
        assert re.fullmatch("[0-9]{200}", without["text"])
        assert "5" not in without["text"]
        assert "67" not in without["text"]
        both = await answer(client, guided_regex="[0-4]{30}", bad_words=["3", "12"])
        assert re.fullmatch("[0124]{30}", both["text"])
        assert "12" not in both["text"]
        for fields, param in (
            ({"allowed_token_ids": []}, "allowed_token_ids"),
            ({"allowed_token_ids": [10**6]}, "allowed_token_ids"),
            ({"allowed_token_ids": ["a"]}, "allowed_token_ids.0"),
            ({"bad_words": [""]}, "bad_words"),
            ({"bad_words": ["x"] * 1000}, "bad_words"),
        ):
            got = await client.post("/v1/completions", json={"prompt": "x"} | fields)
            assert (got.status_code, got.json()["error"]["param"]) == (400, param)
        nothing = await client.post("/v1/completions", json={"prompt": "x", "guided_regex": "a", "bad_words": ["a"]})
        assert nothing.status_code in (200, 400)
    async with served(folder) as (router, _):
        assert router.grpc is not None
        async with AsyncClient(router.grpc) as grpc:
            whole = await grpc.complete(
                "the fox", seed=4, max_tokens=40, allowed_token_ids=tuple(digits), bad_words=["5", "67"]
            )
            assert re.fullmatch("[0-9]{40}", whole.text)
            assert "5" not in whole.text
            assert "67" not in whole.text
