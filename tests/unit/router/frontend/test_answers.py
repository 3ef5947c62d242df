"""Answers known by heart, over both faces: text that goes on from the prompt, log-probabilities, stops, defaults."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from baton.client import AsyncClient, Options
from baton.errors import BadConfig
from baton.types import PositionLogprobs, SamplingParams, TokenLogprob
from cli.app import app
from router.config import RouterConfig
from router.flow.config import FlowConfig
from router.frontend.request import GenerationRequest
from router.openai.logprobs import LogprobWriter
from router.text.detokenizer import Part, TextStream
from router.text.model_files import load_facts
from router.text.tokenizer import Tokenizer
from tests.support.fake_nodes import FakeCluster, FakeConfig
from tests.support.router import router_beside, until
from tests.support.text_tokenizers import KINDS, llama

INNER = llama()
VOCAB_SIZE = INNER.get_vocab_size()
EOS = INNER.token_to_id("</s>")
EMOJI = list("😀".encode())


def ids_of(*pieces: str) -> list[int]:
    return [INNER.token_to_id(piece) for piece in pieces]


A, X, E_ACUTE, S = ids_of("a", "x", "é", "<s>")
THE, JAM, DOT = ids_of("▁the", "▁jam", ".")
# After "a": a sentence; after "x": a character of four bytes, one that is cut, a hidden token, and "é".
WAYS = [[A, THE, JAM, DOT, EOS], [X, *EMOJI, 0xE2, S, E_ACUTE, EOS]]
FOLLOWING = {before: after for way in WAYS for before, after in pairwise(way)}
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
CONFIG = FakeConfig(vocab_size=VOCAB_SIZE, following=FOLLOWING, model_name="llama")


def write_folder(folder: Path, generation: dict[str, Any] | None = None, eos: str | None = "</s>") -> Path:
    folder.mkdir(exist_ok=True)
    INNER.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {"chat_template": TEMPLATE} | ({} if eos is None else {"eos_token": eos})
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": EOS} | (generation or {})))
    return folder


class Served:
    """A router in front of nodes that know what to say."""

    def __init__(self, http: httpx.AsyncClient, grpc: AsyncClient, address: str, cluster: FakeCluster) -> None:
        self.http = http
        self.address = address
        self.cluster = cluster
        self.grpc = grpc

    async def post(self, path: str, **body: Any) -> dict[str, Any]:
        answer = await self.http.post(f"/v1/{path}", json=body)
        assert answer.status_code == 200, answer.text
        choice: dict[str, Any] = answer.json()["choices"][0]
        return choice

    async def streamed(self, path: str, **body: Any) -> list[dict[str, Any]]:
        answer = await self.http.post(f"/v1/{path}", json=body | {"stream": True})
        lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: {")]
        return [json.loads(line)["choices"][0] for line in lines]

    @property
    def sampling(self) -> SamplingParams:
        """What a node was asked for last."""
        spec = self.cluster.nodes["prefill-0"].script.last_spec
        assert spec is not None
        return spec.sampling


@asynccontextmanager
async def served(folder: Path, **settings: Any) -> AsyncIterator[Served]:
    async with (
        FakeCluster(CONFIG, prefill=1, decode=1) as cluster,
        router_beside(cluster, model_folder=folder, **settings) as router,
        httpx.AsyncClient(base_url=router.http or "", timeout=10) as http,
    ):
        assert router.grpc is not None
        client = AsyncClient(router.grpc)
        yield Served(http, client, router.grpc, cluster)
        await client.close()


async def test_text_goes_on_from_the_prompt(tmp_path: Path) -> None:
    async with served(write_folder(tmp_path / "m")) as server:
        assert (await server.post("completions", prompt=[A]))["text"] == " the jam."
        assert (await server.post("completions", prompt="a", echo=True))["text"] == "a the jam."
        assert (await server.post("completions", prompt=[S, A], echo=True))["text"] == "a the jam."
        assert "".join(c["text"] for c in await server.streamed("completions", prompt="a")) == " the jam."
        chat = await server.post("chat/completions", messages=[{"role": "user", "content": "a"}])
        assert chat["message"]["content"] == " the jam."
        assert (await server.grpc.complete([A])).text == " the jam."
        stopped = await server.post("completions", prompt="a", stop=" the", return_token_ids=True)
        assert (stopped["text"], stopped["stop_reason"], stopped["token_ids"]) == ("", " the", [THE])
        assert (await server.grpc.complete([A], stop=[" the"])).token_ids == (THE,)


async def test_a_cut_character_is_one_replacement_and_spoils_nothing(tmp_path: Path) -> None:
    async with served(write_folder(tmp_path / "m")) as server:
        for max_tokens, text in ((5, "😀\ufffd"), (16, "😀\ufffdé"), (3, "\ufffd")):
            body = {"prompt": [X], "max_tokens": max_tokens}
            assert (await server.post("completions", **body))["text"] == text
            assert "".join(c["text"] for c in await server.streamed("completions", **body)) == text
            assert (await server.grpc.complete([X], max_tokens=max_tokens)).text == text


@pytest.mark.parametrize("max_tokens", [5, 16])
async def test_tokens_of_logprobs_join_to_the_text_at_their_offsets(tmp_path: Path, max_tokens: int) -> None:
    async with served(write_folder(tmp_path / "m")) as server:
        for prompt in ([A], [X]):
            body = {"prompt": prompt, "logprobs": 2, "max_tokens": max_tokens, "echo": False}
            whole = await server.post("completions", **body)
            found, text = whole["logprobs"], whole["text"]
            assert "".join(found["tokens"]) == text
            ends = [*found["text_offset"][1:], len(text)]
            assert [text[a:b] for a, b in zip(found["text_offset"], ends, strict=True)] == found["tokens"]
            assert len(found["tokens"]) == len(found["top_logprobs"])
            chunks = [c["logprobs"] for c in await server.streamed("completions", **body) if c["logprobs"]]
            assert [t for c in chunks for t in c["tokens"]] == found["tokens"]
            assert [t for c in chunks for t in c["text_offset"]] == found["text_offset"]
            chat = await server.post(
                "chat/completions",
                messages=[{"role": "user", "content": INNER.decode(prompt)}],
                logprobs=True,
                top_logprobs=3,
                max_tokens=max_tokens,
            )
            entries, content = chat["logprobs"]["content"], chat["message"]["content"]
            assert "".join(e["token"] for e in entries) == content
            assert b"".join(bytes(e["bytes"]) for e in entries).decode("utf-8", "replace") == content
            assert all(len(e["top_logprobs"]) == 3 for e in entries)


def test_no_entry_of_top_logprobs_is_lost() -> None:
    tokenizer = Tokenizer(INNER)
    # A letter and the byte of the same letter read the same; so do two names of one special kind and none at all.
    same = ord("x")
    top = tuple(TokenLogprob(i, -1.0 - n) for n, i in enumerate([same, X, THE, 0xE2, VOCAB_SIZE + 1, VOCAB_SIZE + 2]))
    for chosen, text, named in ((X, "x", X), (same, "x", same), (THE, " the", same)):
        writer = LogprobWriter(tokenizer, is_chat=False, as_ids=False)
        position = PositionLogprobs(next(t for t in top if t.token_id == chosen), 1, top)
        (found,) = writer.write([position], [text])["top_logprobs"]
        assert len(found) == len(top)
        assert list(found.values()) == [t.logprob for t in top]
        assert found["x"] == next(t.logprob for t in top if t.token_id == named)
        assert found[" the"] == -3.0
        assert found["bytes:\\xe2"] == -4.0
        other = X if named == same else same
        assert found[f"token_id:{other}"] == next(t.logprob for t in top if t.token_id == other)


@pytest.mark.parametrize(
    ("stops", "min_tokens", "expected"),
    [
        ([" the"], 0, ("", " the", 1)),
        ([" the"], 1, (" the jam.", None, 3)),
        # It begins before and ends after.
        (["e jam"], 1, (" th", "e jam", 2)),
        (["e jam"], 2, (" the jam.", None, 3)),
        ([" the", "jam."], 2, (" the ", "jam.", 3)),
        (["he j", " jam"], 1, (" t", "he j", 2)),
        (["."], 3, (" the jam.", None, 3)),
    ],
)
def test_no_stop_string_ends_within_min_tokens(
    stops: list[str], min_tokens: int, expected: tuple[str, str | None, int]
) -> None:
    for sizes in ([3], [1, 1, 1], [2, 1]):
        stream = TextStream(Tokenizer(INNER), prompt_token_ids=[A], stops=stops, min_tokens=min_tokens)
        ids, text, num_tokens, stop = [THE, JAM, DOT], "", 0, None
        for size in sizes:
            part = stream.push(ids[:size])
            ids = ids[size:]
            text += part.text
            num_tokens += len(part.token_ids)
            stop = part.stop
            if stop is not None:
                break
        else:
            text += stream.flush().text
        assert (text, stop, num_tokens) == expected


async def test_min_tokens_over_http(tmp_path: Path) -> None:
    async with served(write_folder(tmp_path / "m")) as server:
        found = await server.post("completions", prompt="a", stop=[" the", "."], min_tokens=2)
        assert (found["text"], found["stop_reason"]) == (" the jam", ".")


async def test_a_stop_string_in_the_last_token_waits_for_no_report_of_the_transfer(tmp_path: Path) -> None:
    flow = FlowConfig(report_timeout_s=60)
    async with served(write_folder(tmp_path / "m"), flow=flow) as server:
        server.cluster.nodes["prefill-0"].drop("handed_off", 4)
        body: dict[str, Any] = {"prompt": "a", "stop": ".", "max_tokens": 3}
        assert (await server.post("completions", **body))["text"] == " the jam"
        assert "".join(c["text"] for c in await server.streamed("completions", **body)) == " the jam"
        two = await server.http.post("/v1/completions", json=body | {"n": 2})
        assert [c["stop_reason"] for c in two.json()["choices"]] == [".", "."], two.text
        server.cluster.nodes["prefill-0"].drop("handed_off")
        assert (await server.grpc.complete("a", stop=["."], max_tokens=3)).text == " the jam"


async def test_what_is_cut_is_the_last_tokens_however_late_the_report_of_the_transfer(tmp_path: Path) -> None:
    flow = FlowConfig(report_timeout_s=0.2)
    body: dict[str, Any] = {"prompt": [X], "max_tokens": 3, "logprobs": 0}
    async with served(write_folder(tmp_path / "m"), flow=flow) as server:
        for num_dropped in (0, 1):
            server.cluster.nodes["prefill-0"].drop("handed_off", num_dropped)
            whole = await server.post("completions", **body)
            server.cluster.nodes["prefill-0"].drop("handed_off", num_dropped)
            chunks = await server.streamed("completions", **body)
            tokens = [token for c in chunks if c["logprobs"] is not None for token in c["logprobs"]["tokens"]]
            assert whole["logprobs"]["tokens"] == tokens == ["", "", "\ufffd"]
            assert whole["text"] == "".join(c["text"] for c in chunks) == "\ufffd"


async def test_a_character_is_whole_where_a_backlog_is_read_in_batches(tmp_path: Path) -> None:
    """With log-probabilities a reader gets 16 tokens at once: the 16th is the first byte of a character."""
    way = [0x40, *range(0x41, 0x50), *EMOJI, EOS]
    config = FakeConfig(vocab_size=VOCAB_SIZE, following=dict(pairwise(way)), model_name="llama")
    async with (
        FakeCluster(config, prefill=1, decode=1) as cluster,
        router_beside(cluster, model_folder=write_folder(tmp_path / "m")) as router,
    ):
        request = GenerationRequest(prompts=((0x40,),), sampling=SamplingParams(logprobs=0, max_tokens=30))
        accepted = await router.frontend.start(request)
        (generation,) = accepted.generations
        await until(lambda: generation.active.flow.is_complete)
        parts = []
        while isinstance(part := await generation.next(), Part):
            parts.append(part)
        assert [len(part.token_ids) for part in parts][:2] == [16, 4]
        assert "".join(part.text for part in parts) == "ABCDEFGHIJKLMNO😀"


async def test_the_tokenizers_end_of_sequence_stops_as_well(tmp_path: Path) -> None:
    async with served(write_folder(tmp_path / "m", {"eos_token_id": [THE, 999_999]})) as server:
        # What generation_config.json lists counts, unless the model has no such token.
        found = await server.post("completions", prompt="a")
        assert (found["text"], found["finish_reason"], found["stop_reason"]) == ("", "stop", None)
        assert set(server.sampling.stop_token_ids) == {THE, EOS}
        found = await server.post("completions", prompt=[THE])
        assert (found["text"], found["finish_reason"], found["stop_reason"]) == (" jam.", "stop", None)
        await server.post("completions", prompt="a", ignore_eos=True)
        assert server.sampling.stop_token_ids == ()
    async with served(write_folder(tmp_path / "n", {"eos_token_id": THE}, eos=None)) as server:
        await server.post("completions", prompt="a")
        assert server.sampling.stop_token_ids == (THE,)


DEFAULTS = {
    "temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.1, "max_new_tokens": 7,
    "do_sample": False,
}  # fmt: skip
NAMES = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
FROM_FILE = (0.6, 0.95, 20, 0.05, 1.1)
NEUTRAL = (1.0, 1.0, 0, 0.0, 1.0)
HELLO = [{"role": "user", "content": "a"}]


def asked(server: Served) -> tuple[float, ...]:
    return tuple(getattr(server.sampling, name) for name in NAMES)


async def test_sampling_defaults_hold_where_a_request_says_nothing(tmp_path: Path) -> None:
    async with served(write_folder(tmp_path / "m", DEFAULTS)) as server:
        await server.post("completions", prompt="a")
        assert (asked(server), server.sampling.max_tokens) == (FROM_FILE, 16)
        await server.post("chat/completions", messages=HELLO)
        assert (asked(server), server.sampling.max_tokens) == (FROM_FILE, 7)
        await server.post("chat/completions", messages=HELLO, max_tokens=9, temperature=None)
        assert (asked(server), server.sampling.max_tokens) == (FROM_FILE, 9)
        neutral = dict(zip(NAMES, NEUTRAL, strict=True))
        await server.post("completions", prompt="a", **neutral)
        assert asked(server) == NEUTRAL
        await server.post("completions", prompt="a", temperature=0, top_k=-1)
        assert asked(server) == (0.0, 0.95, 0, 0.05, 1.1)


async def test_sampling_defaults_over_grpc(tmp_path: Path) -> None:
    async with served(write_folder(tmp_path / "m", DEFAULTS)) as server:
        await server.grpc.complete([A], max_tokens=3)
        assert (asked(server), server.sampling.max_tokens) == (FROM_FILE, 3)
        await server.grpc.complete([("user", "a")])
        assert (asked(server), server.sampling.max_tokens) == (FROM_FILE, 7)
        await server.grpc.complete([A], temperature=0, top_k=0, min_p=0.0)
        assert asked(server) == (0.0, 0.95, 0, 0.0, 1.1)
        # Given whole, it is meant whole.
        await server.grpc.complete([A], Options(SamplingParams(seed=1)), top_k=3)
        assert asked(server) == (1.0, 1.0, 3, 0.0, 1.0)


async def test_commands_leave_what_they_are_not_told_to_the_defaults(tmp_path: Path) -> None:
    async with served(write_folder(tmp_path / "m", DEFAULTS)) as server:

        async def baton(*arguments: str) -> str:
            typed = [*arguments, "--router", server.address]
            said = await asyncio.to_thread(CliRunner().invoke, app, typed, input="a\n", catch_exceptions=False)
            assert said.exit_code == 0, said.output
            return said.output

        assert "the jam." in await baton("chat")
        assert (asked(server), server.sampling.max_tokens) == (FROM_FILE, 7)
        await baton("chat", "--temperature", "0.2", "--top-p", "1", "--top-k", "0", "-n", "9", "--seed", "4")
        assert (asked(server), server.sampling.max_tokens) == ((0.2, 1.0, 0, 0.05, 1.1), 9)
        assert server.sampling.seed == 4
        # The likeliest tokens, and as many as it says in its help.
        assert await baton("generate", "a") == " the jam.\n"
        assert (asked(server), server.sampling.max_tokens) == ((0.0, 0.95, 20, 0.05, 1.1), 128)
        await baton("generate", "-", "--top-k", "3", "--ignore-eos", "-n", "5")
        assert (asked(server)[2], server.sampling.ignore_eos) == (3, True)


async def test_generation_config_none(tmp_path: Path) -> None:
    async with served(write_folder(tmp_path / "m", DEFAULTS), generation_config="none") as server:
        await server.post("chat/completions", messages=HELLO)
        assert asked(server) == NEUTRAL
        assert server.sampling.max_tokens is not None
        assert server.sampling.max_tokens > 1000
        # The end of sequence is not a matter of taste.
        assert server.sampling.stop_token_ids == (EOS,)
    with pytest.raises(BadConfig) as refused:
        RouterConfig(nodes=("a:1",), generation_config="model")
    assert refused.value.param == "generation_config"


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1}, {"temperature": "hot"}, {"top_p": 0}, {"top_k": 2.5}, {"top_k": True},
        {"top_k": float("inf")}, {"min_p": 2}, {"repetition_penalty": float("nan")}, {"max_new_tokens": 0},
        {"temperature": 10**400}, {"top_p": [0.5]},
    ],
)  # fmt: skip
def test_wrong_defaults_stop_the_start(tmp_path: Path, wrong: dict[str, Any]) -> None:
    folder = write_folder(tmp_path / "m", wrong)
    with pytest.raises(BadConfig, match=r"generation_config\.json: .*--generation-config none") as refused:
        load_facts(folder)
    assert next(iter(wrong)).removeprefix("max_new_") in refused.value.message
    assert load_facts(folder, sampling_defaults=False).sampling == SamplingParams()


def test_defaults_that_say_nothing(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", {"temperature": None, "top_k": -1, "top_p": 1, "do_sample": True})
    assert load_facts(folder).sampling == SamplingParams()
    assert load_facts(write_folder(tmp_path / "m", {"top_k": 40.0})).sampling.top_k == 40


@pytest.mark.parametrize("kind", KINDS)
def test_names_of_tokens_of_every_kind(kind: str) -> None:
    tokenizer = Tokenizer(KINDS[kind]())
    for token_id in range(tokenizer.vocab_size + 2):
        raw = tokenizer.token_bytes(token_id)
        name = tokenizer.token_name(token_id)
        if raw.decode("utf-8", "replace").encode() == raw:
            assert name == raw.decode()
        else:
            assert name == "bytes:" + "".join(f"\\x{b:02x}" for b in raw)
