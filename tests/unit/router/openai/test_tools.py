"""Tool calls and reasoning through the router: chat over HTTP and with the openai client, streamed and whole."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import openai
import pytest
from rich.console import Console

from baton.chat import CallMode, ChatMessage, Tool, ToolCall, ToolChoice
from baton.client import AsyncClient, Client, Delta, Finished, Options
from baton.errors import InvalidRequest
from baton.grpc_errors import error_of
from baton.v1 import router_pb2, router_pb2_grpc
from cli import ask
from router.frontend.request import Caller
from router.openai.request import ChatBody, parse
from router.serve import Router
from tests.support.fake_nodes import FakeCluster, FakeConfig
from tests.support.replies import write_speaking_folder
from tests.support.router import VOCAB_SIZE, router_beside, write_model_folder
from tests.support.tool_templates import TOOL_TEMPLATES

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
OPENED = "<|im_start|>assistant\n"
CALL = ["I look.", "\n\n", "<tool_call>", "\n{", '"name": ', '"weather", ', '"arguments": ', '{"city": "Par', 'is"}',
        "}\n", "</tool_call>"]  # fmt: skip
PARIS = '{"city": "Paris"}'
USER = {"role": "user", "content": "Is it warm in Paris?"}


class Speaking:
    """A router whose model gives known replies."""

    def __init__(self, router: Router, http: httpx.AsyncClient, client: openai.AsyncOpenAI) -> None:
        self.router = router
        self.http = http
        self.client = client

    async def choice(self, **body: Any) -> dict[str, Any]:
        got = await self.http.post("/v1/chat/completions", json={"messages": [USER], "max_tokens": 60} | body)
        assert got.status_code == 200, got.text
        found: dict[str, Any] = got.json()["choices"][0] | {"usage": got.json()["usage"]}
        return found

    async def refusal(self, **body: Any) -> dict[str, Any]:
        got = await self.http.post("/v1/chat/completions", json={"messages": [USER]} | body)
        assert got.status_code == 400, got.text
        found: dict[str, Any] = got.json()["error"]
        return found

    async def reassembled(self, **body: Any) -> dict[str, Any]:
        """The message of a stream, put together, with its finish reason and the largest number of calls in a chunk."""
        body = {"messages": [USER], "max_tokens": 60, "stream": True, "stream_options": {"include_usage": True}} | body
        got = await self.http.post("/v1/chat/completions", json=body)
        lines = [line.removeprefix("data: ") for line in got.text.splitlines() if line.startswith("data: {")]
        message: dict[str, Any] = {"content": "", "tool_calls": [], "usage": json.loads(lines[-1])["usage"]}
        for line in lines[:-1]:
            (choice,) = json.loads(line)["choices"]
            delta = choice["delta"]
            message["finish_reason"] = choice["finish_reason"]
            for name in ("content", "reasoning", "reasoning_content"):
                if name in delta:
                    message[name] = message.get(name, "") + delta[name]
            for call in delta.get("tool_calls", ()):
                if call["index"] == len(message["tool_calls"]):
                    message["tool_calls"].append({"id": call["id"], "type": call["type"], "function": call["function"]})
                else:
                    message["tool_calls"][call["index"]]["function"]["arguments"] += call["function"]["arguments"]
        return message


@asynccontextmanager
async def speaking(
    folder: Path, ways: list[list[str]], template: str = "hermes", specials: tuple[str, ...] = (), **settings: Any
) -> AsyncIterator[Speaking]:
    following = write_speaking_folder(folder, TOOL_TEMPLATES.get(template, template), ways, specials)
    config = FakeConfig(vocab_size=1 + max(*following, *following.values()), following=following)
    async with (
        FakeCluster(config, prefill=1, decode=1) as cluster,
        router_beside(cluster, model_folder=folder, **settings) as router,
        httpx.AsyncClient(base_url=str(router.http), timeout=20) as http,
        openai.AsyncOpenAI(base_url=f"{router.http}/v1", api_key="none", max_retries=0) as client,
    ):
        yield Speaking(router, http, client)


async def test_a_call_whole_and_streamed(tmp_path: Path) -> None:
    async with speaking(tmp_path / "m", [[OPENED, *CALL]]) as model:
        whole = await model.choice(tools=[WEATHER])
        message = whole["message"]
        (call,) = message["tool_calls"]
        assert (message["content"], call["type"]) == ("I look.", "function")
        assert call["function"] == {"name": "weather", "arguments": PARIS}
        assert call["id"].startswith("call_")
        assert whole["finish_reason"] == "tool_calls"
        assert whole["usage"]["completion_tokens"] == len(CALL) + 1
        streamed = await model.reassembled(tools=[WEATHER])
        assert streamed["content"] == "I look."
        assert [c["function"] for c in streamed["tool_calls"]] == [call["function"]]
        assert streamed["finish_reason"] == "tool_calls"
        assert streamed["usage"] == whole["usage"]


async def test_the_openai_client_runs_a_loop(tmp_path: Path) -> None:
    ways = [[OPENED, *CALL[2:]], ["12 degrees\n</tool_response><|im_end|>\n<|im_start|>assistant\n", "Yes", ", warm."]]
    async with speaking(tmp_path / "m", ways) as model:
        messages: list[Any] = [USER]
        tools: Any = [WEATHER]
        first = await model.client.chat.completions.create(model="m", messages=messages, tools=tools, max_tokens=40)
        assert first.choices[0].message.content is None
        assert first.choices[0].message.tool_calls is not None
        async with model.client.chat.completions.stream(model="m", messages=messages, tools=tools) as stream:
            final = await stream.get_final_completion()
        (call,) = final.choices[0].message.tool_calls or []
        assert json.loads(call.function.arguments) == {"city": "Paris"}
        messages += [
            first.choices[0].message.model_dump(),
            {"role": "tool", "tool_call_id": call.id, "content": "12 degrees"},
        ]
        second = await model.client.chat.completions.create(model="m", messages=messages, tools=tools, max_tokens=40)
        assert second.choices[0].message.content == "Yes, warm."
        assert second.choices[0].finish_reason == "stop"


async def test_several_choices_each_have_their_calls(tmp_path: Path) -> None:
    async with speaking(tmp_path / "m", [[OPENED, *CALL]]) as model:
        done = await model.client.chat.completions.create(
            model="m", messages=[USER], tools=[WEATHER], n=3, max_tokens=40  # type: ignore[list-item]
        )  # fmt: skip
        calls = [call for choice in done.choices for call in choice.message.tool_calls or []]
        assert len({call.id for call in calls}) == 3


async def test_tools_that_may_not_be_called_are_not_shown(tmp_path: Path) -> None:
    async with speaking(tmp_path / "m", [[OPENED, *CALL]]) as model:
        without = await model.choice(return_token_ids=True)
        never = await model.choice(tools=[WEATHER], tool_choice="none", return_token_ids=True)
        assert never["prompt_token_ids"] == without["prompt_token_ids"]
        assert never["message"] == without["message"]
        assert "<tool_call>" in never["message"]["content"]
        assert never["finish_reason"] == "stop"


async def test_one_call_alone(tmp_path: Path) -> None:
    second = ["\n<tool_call>\n", '{"name": "second", "arguments": {}}', "\n</tool_call>"]
    async with speaking(tmp_path / "m", [[OPENED, *CALL, *second]]) as model:
        both = await model.choice(tools=[WEATHER])
        assert [c["function"]["name"] for c in both["message"]["tool_calls"]] == ["weather", "second"]
        one = await model.choice(tools=[WEATHER], parallel_tool_calls=False)
        assert [c["function"]["name"] for c in one["message"]["tool_calls"]] == ["weather"]
        assert one["message"]["content"] == "I look."


async def test_an_answer_that_is_cut_says_so_first(tmp_path: Path) -> None:
    async with speaking(tmp_path / "m", [[OPENED, *CALL]]) as model:
        cut = await model.choice(tools=[WEATHER], max_tokens=8)
        assert cut["finish_reason"] == "length"
        assert cut["message"]["tool_calls"][0]["function"]["arguments"] == '{"city": "Par'
        assert (await model.reassembled(tools=[WEATHER], max_tokens=8))["finish_reason"] == "length"
        stopped = await model.choice(tools=[WEATHER], stop="I look")
        assert stopped["message"] == {"role": "assistant", "content": "", "refusal": None}


async def test_marks_that_are_special_tokens_are_seen_and_not_shown(tmp_path: Path) -> None:
    way = ["[/INST]", "[TOOL_CALLS]", ' [{"name": "weather", ', '"arguments": ', PARIS, "}]", "[OTHER]"]
    specials = ("[TOOL_CALLS]", "[OTHER]")
    async with speaking(tmp_path / "m", [way], "mistral", specials) as model:
        found = await model.choice(tools=[WEATHER])
        (call,) = found["message"]["tool_calls"]
        assert call["function"] == {"name": "weather", "arguments": PARIS}
        assert len(call["id"]) == 9
        assert call["id"].isalnum()
        assert found["message"]["content"] is None
        plain = await model.choice()
        assert "[TOOL_CALLS]" not in plain["message"]["content"]


async def test_the_older_form_of_tools(tmp_path: Path) -> None:
    functions = [WEATHER["function"], {"name": "now"}]
    second = ["\n<tool_call>\n", '{"name": "now", "arguments": {}}', "\n</tool_call>"]
    async with speaking(tmp_path / "m", [[OPENED, *CALL, *second]]) as model:
        found = await model.choice(functions=functions, return_token_ids=True)
        assert found["message"] == {
            "role": "assistant", "content": "I look.", "refusal": None,
            "function_call": {"name": "weather", "arguments": PARIS},
        }  # fmt: skip
        assert found["finish_reason"] == "function_call"
        as_tools = await model.choice(tools=[WEATHER, NOW], parallel_tool_calls=False, return_token_ids=True)
        assert found["prompt_token_ids"] == as_tools["prompt_token_ids"]
        assert found["token_ids"] == as_tools["token_ids"]
        stream = await model.client.chat.completions.create(
            model="m", messages=[USER], functions=functions, stream=True, max_tokens=60  # type: ignore[call-overload]
        )  # fmt: skip
        choices = [chunk.choices[0] async for chunk in stream]
        calls = [choice.delta.function_call for choice in choices if choice.delta.function_call is not None]
        assert [call.name for call in calls if call.name] == ["weather"]
        assert "".join(call.arguments or "" for call in calls) == PARIS
        assert choices[-1].finish_reason == "function_call"
        assert not any(choice.delta.tool_calls for choice in choices)
        never = await model.choice(functions=functions, function_call="none")
        assert "<tool_call>" in never["message"]["content"]


async def test_calls_and_answers_of_the_older_form_in_the_history(tmp_path: Path) -> None:
    call = {"name": "weather", "arguments": PARIS}
    older = [
        USER,
        {"role": "assistant", "content": None, "function_call": call, "refusal": None, "tool_calls": None},
        {"role": "function", "name": "weather", "content": "12"},
    ]
    newer = [
        USER,
        {"role": "assistant", "tool_calls": [{"id": "000000001", "type": "function", "function": call}]},
        {"role": "tool", "name": "weather", "tool_call_id": "000000001", "content": "12"},
    ]
    for template in ("hermes", "mistral"):
        way = ["[/INST]" if template == "mistral" else OPENED, "Yes."]
        async with speaking(tmp_path / template, [way], template) as model:
            ids = [(await model.choice(messages=turns, return_token_ids=True))["prompt_token_ids"] for turns in
                   (older, newer)]  # fmt: skip
            assert ids[0] == ids[1]


DEEPSEEK = (
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁calls▁end｜>",
)


@pytest.mark.parametrize("are_special", [False, True])
async def test_a_deepseeks_calls(tmp_path: Path, are_special: bool) -> None:
    begin, call, separator, end, last = DEEPSEEK
    specials = DEEPSEEK if are_special else ()
    fenced = [call, "function", separator, "weather\n```json\n", '{"city": "Par', 'is"}', "\n```", end]
    way = ["<think>\n", "Hm.", "</think>", "\n\n", "I look.", begin, *fenced, last]
    async with speaking(tmp_path / "r1", [way], "deepseek_r1", specials) as model:
        found = await model.choice(tools=[WEATHER])
        assert (found["message"]["content"], found["message"]["reasoning"]) == ("I look.", "Hm.")
        functions = [c["function"] for c in found["message"]["tool_calls"]]
        assert functions == [{"name": "weather", "arguments": PARIS}]
        assert found["finish_reason"] == "tool_calls"
        streamed = await model.reassembled(tools=[WEATHER])
        assert [c["function"] for c in streamed["tool_calls"]] == functions
    bare = ["<｜Assistant｜></think>", begin, call, "weather", separator, '{"city": "Par', 'is"}', end, last]
    async with speaking(tmp_path / "v31", [bare], "deepseek_v31", specials) as model:
        found = await model.choice(tools=[WEATHER])
        assert found["message"]["content"] is None
        assert [c["function"] for c in found["message"]["tool_calls"]] == functions


THOUGHT = [OPENED, "<think>", "\nIs it", " warm?\n", "</think>", "\n\n", "Yes."]


async def test_reasoning_is_told_from_the_answer(tmp_path: Path) -> None:
    closed = [f"{OPENED}<think>\n\n</think>\n\n", "No."]
    async with speaking(tmp_path / "m", [THOUGHT, closed], "qwen3") as model:
        found = await model.choice()
        assert found["message"] == {
            "role": "assistant", "content": "Yes.", "refusal": None, "reasoning": "Is it warm?",
            "reasoning_content": "Is it warm?",
        }  # fmt: skip
        assert found["usage"]["completion_tokens_details"] == {"reasoning_tokens": 4}
        streamed = await model.reassembled()
        assert streamed["content"] == "Yes."
        assert streamed["reasoning"] == streamed["reasoning_content"] == "Is it warm?"
        assert streamed["usage"] == found["usage"]
        hidden = await model.choice(include_reasoning=False)
        assert "reasoning" not in hidden["message"]
        assert "reasoning" not in await model.reassembled(include_reasoning=False)
        for body in ({"reasoning_effort": "none"}, {"chat_template_kwargs": {"enable_thinking": False}}):
            off = await model.choice(**body)
            assert off["message"] == {"role": "assistant", "content": "No.", "refusal": None}
            assert off["usage"]["completion_tokens_details"] == {"reasoning_tokens": 0}
        assert (await model.choice(reasoning_effort="high"))["message"]["reasoning"] == "Is it warm?"


async def test_reasoning_in_the_history_reaches_the_template(tmp_path: Path) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": PARIS}}
    turn = {"role": "assistant", "content": None, "tool_calls": [call]}
    answer = {"role": "tool", "tool_call_id": "call_1", "content": "12"}
    async with speaking(tmp_path / "m", [THOUGHT], "qwen3") as model:
        ids = [
            (await model.choice(messages=[USER, turn | thought, answer], return_token_ids=True))["prompt_token_ids"]
            for thought in ({}, {"reasoning": "hm"}, {"reasoning_content": "hm"})
        ]
        assert ids[1] == ids[2] != ids[0]


async def test_reasoning_and_a_call(tmp_path: Path) -> None:
    async with speaking(tmp_path / "m", [[*THOUGHT[:6], *CALL[2:]]], "qwen3") as model:
        found = await model.choice(tools=[WEATHER])
        assert found["message"]["content"] is None
        assert found["message"]["reasoning"] == "Is it warm?"
        assert found["message"]["tool_calls"][0]["function"]["arguments"] == PARIS
        streamed = await model.reassembled(tools=[WEATHER], logprobs=True)
        assert streamed["reasoning"] == "Is it warm?"
        assert streamed["tool_calls"][0]["function"]["arguments"] == PARIS


async def test_the_operator_names_the_formats(tmp_path: Path) -> None:
    way = [OPENED, "<think>a</think>", '<tool_call>{"name": "f", "arguments": {}}</tool_call>']
    async with speaking(tmp_path / "a", [way], "qwen3", tool_call_parser="none", reasoning_parser="none") as model:
        assert (await model.choice())["message"]["content"] == "".join(way[1:])
        assert (await model.refusal(tools=[WEATHER]))["param"] == "tools"
    plain = "{% for m in messages %}{{ m.content }}{% endfor %}{{ '<|im_start|>assistant\\n' }}"
    async with speaking(tmp_path / "b", [way], plain) as model:
        assert (await model.choice())["message"]["content"] == "".join(way[1:])
        refused = await model.refusal(tools=[WEATHER])
        assert "--tool-call-parser" in refused["message"]
        assert (await model.refusal(reasoning_effort="high"))["param"] == "reasoning_effort"
    async with speaking(tmp_path / "c", [way], plain, tool_call_parser="hermes", reasoning_parser="qwen3") as model:
        found = await model.choice(tools=[WEATHER])
        assert found["message"]["tool_calls"][0]["function"]["name"] == "f"
        assert found["message"]["reasoning"] == "a"


BOUNDED = {
    "type": "function",
    "function": {
        "name": "pick",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"enum": ["Paris", "Köln"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
NOW = {"type": "function", "function": {"name": "now"}}


@pytest.mark.parametrize("template", ["hermes", "llama3", "mistral", "qwen3_coder", "deepseek_v31"])
async def test_required_and_named_calls_are_guaranteed(tmp_path: Path, template: str) -> None:
    """Of a model that draws any allowed token."""
    folder = write_model_folder(tmp_path / "m", chat_template=TOOL_TEMPLATES[template])
    config = FakeConfig(vocab_size=VOCAB_SIZE, tokenizer_file=folder / "tokenizer.json")
    async with (
        FakeCluster(config, prefill=1, decode=1) as cluster,
        router_beside(cluster, model_folder=folder) as router,
        httpx.AsyncClient(base_url=str(router.http), timeout=20) as http,
        openai.AsyncOpenAI(base_url=f"{router.http}/v1", api_key="none", max_retries=0) as client,
        AsyncClient(str(router.grpc)) as grpc_client,
    ):
        model = Speaking(router, http, client)
        asked: dict[str, Any] = {"tools": [BOUNDED, NOW], "tool_choice": "required", "max_tokens": 400}
        choices = ["required", *({"type": "function", "function": {"name": name}} for name in ("pick", "now"))]
        for seed, choice in enumerate(choices):
            single = asked | {"seed": seed, "parallel_tool_calls": False, "tool_choice": choice}
            found = await model.choice(**single)
            (call,) = found["message"]["tool_calls"]
            assert (found["message"]["content"], found["finish_reason"]) == (None, "tool_calls")
            name, arguments = call["function"]["name"], json.loads(call["function"]["arguments"])
            assert choice in ("required", {"type": "function", "function": {"name": name}})
            if name == "now":
                assert arguments == {}
            else:
                assert arguments["city"] in ("Paris", "Köln")
                assert 1 <= arguments["days"] <= 9
            streamed = await model.reassembled(**single)
            assert [c["function"] for c in streamed["tool_calls"]] == [call["function"]]
        function = BOUNDED["function"]
        named = {"functions": [function], "function_call": {"name": "pick"}, "max_tokens": 400, "seed": 1}
        older = await model.choice(**named)
        assert older["message"]["function_call"]["name"] == "pick"
        assert json.loads(older["message"]["function_call"]["arguments"])["city"] in ("Paris", "Köln")
        assert older["finish_reason"] == "function_call"
        # A form of the answer has no text to hold for.
        both = await model.choice(**asked, seed=1, response_format={"type": "json_object"})
        assert both["message"]["tool_calls"]
        tools = [Tool("now")]
        over_grpc = await grpc_client.complete(
            [("user", "x")], tools=tools, tool_choice=ToolChoice(CallMode.REQUIRED, is_parallel=False), max_tokens=400
        )
        assert [(c.name, json.loads(c.arguments)) for c in over_grpc.tool_calls] == [("now", {})]
        wrong = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
        bad = {"type": "function", "function": {"name": "bad", "parameters": wrong, "strict": True}}
        refused = await model.refusal(tools=[bad], tool_choice="required")
        assert refused["param"].startswith("tools")


TOOL = Tool("weather", "Of a city.", WEATHER["function"]["parameters"])  # type: ignore[index]


async def test_the_grpc_client_gets_the_same(tmp_path: Path) -> None:
    way = [*THOUGHT[:6], "I look.", "\n", *CALL[2:]]
    async with speaking(tmp_path / "m", [way], "qwen3") as model, AsyncClient(str(model.router.grpc)) as client:
        over_http = await model.choice(tools=[WEATHER], return_token_ids=True)
        question = ChatMessage("user", USER["content"])
        first = await client.complete([question], tools=[TOOL], max_tokens=60)
        assert list(first.prompt_token_ids) == over_http["prompt_token_ids"]
        assert (first.text, first.reasoning) == ("I look.", "Is it warm?")
        (call,) = first.tool_calls
        assert (call.name, call.arguments) == ("weather", PARIS)
        assert first.usage.reasoning_tokens == 4
        parts = [part async for part in client.generate([question], tools=[TOOL], max_tokens=60)]
        assert "".join(part.text for part in parts if isinstance(part, Delta)) == "I look."
        assert isinstance(parts[-1], Finished)
        assert parts[-1].has_tool_calls
        never = ToolChoice(CallMode.NONE)
        plain = await client.complete([question], tools=[TOOL], tool_choice=never, max_tokens=60)
        assert plain.tool_calls == ()


async def test_a_conversation_is_the_same_prompt_over_grpc(tmp_path: Path) -> None:
    async with speaking(tmp_path / "m", [THOUGHT], "qwen3") as model, AsyncClient(str(model.router.grpc)) as client:
        call = ToolCall("call_1", "weather", PARIS)
        talk: list[ChatMessage | tuple[str, str]] = [
            ("user", USER["content"]),
            ChatMessage("assistant", None, reasoning="hm", tool_calls=(call,)),
            ChatMessage("tool", "12", tool_call_id="call_1"),
        ]
        over_http = [
            USER,
            {"role": "assistant", "content": None, "reasoning": "hm", "tool_calls": [
                {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": PARIS}}
            ]},
            {"role": "tool", "content": "12", "tool_call_id": "call_1"},
        ]  # fmt: skip
        found = await client.complete(talk, tools=[TOOL], max_tokens=3)
        same = await model.choice(messages=over_http, tools=[WEATHER], return_token_ids=True, max_tokens=3)
        assert list(found.prompt_token_ids) == same["prompt_token_ids"]
        ways: list[dict[str, Any]] = [
            {},
            {"reasoning_effort": "none"},
            {"template_variables": {"enable_thinking": False}},
        ]
        ids = [(await client.complete([talk[0]], max_tokens=3, **way)).prompt_token_ids for way in ways]
        assert ids[1] == ids[2] != ids[0]
        with pytest.raises(InvalidRequest):
            await client.complete("text", tools=[TOOL])


async def test_a_talk_in_a_terminal_shows_what_the_model_thinks(tmp_path: Path) -> None:
    class Terminal(Console):
        lines = iter([USER["content"]])

        def input(self, *_: Any, **__: Any) -> str:
            try:
                return next(self.lines)
            except StopIteration:
                raise EOFError from None

    shown = io.StringIO()
    async with speaking(tmp_path / "m", [THOUGHT], "qwen3") as model:

        def talk() -> None:
            with Client(str(model.router.grpc)) as client:
                ask.chat(client, Terminal(file=shown, width=200), Options(), system="", show_relay=False, max_tokens=40)

        await asyncio.to_thread(talk)
    assert shown.getvalue() == "Is it warm?\nYes.\n\n"


BAD_OVER_GRPC: list[tuple[dict[str, Any], str]] = [
    ({"tools": [{"name": "f", "parameters": "{"}]}, "tools.0.parameters"),
    ({"tools": [{"name": "f", "parameters": "[]"}]}, "tools.0.parameters"),
    ({"tools": [{"name": "f", "parameters": "[" * 5000}]}, "tools.0.parameters"),
    ({"tools": [{"name": "f", "parameters": "[{}," * 20_000}]}, ""),
    ({"tools": [{"name": ""}]}, "tools"),
    ({"tools": [{"name": "f"}] * 1025}, "tools"),
    ({"tools": [{"name": "f"}], "tool_choice": {"mode": 9}}, "tool_choice"),
    ({"tools": [{"name": "f"}], "tool_choice": {"names": ["g"]}}, "tool_choice"),
    ({"variables": "7"}, "variables"),
    ({"variables": '{"messages": []}'}, "chat_template_kwargs"),
    ({"reasoning_effort": "very"}, "reasoning_effort"),
]


async def test_wrong_conversations_over_grpc(tmp_path: Path) -> None:
    async with (
        speaking(tmp_path / "m", [THOUGHT], "qwen3") as model,
        grpc.aio.insecure_channel(str(model.router.grpc)) as channel,
    ):
        stub = router_pb2_grpc.RouterStub(channel)
        for fields, param in BAD_OVER_GRPC:
            chat = router_pb2.Chat(messages=[router_pb2.ChatMessage(role="user", content="x")], **fields)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await anext(aiter(stub.Generate(router_pb2.GenerateRequest(chat=chat))))
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT, fields
            assert (error_of(refused.value).param or "") == param, fields


BAD: list[tuple[dict[str, Any], str]] = [
    ({"tools": [{"type": "retrieval"}]}, "tools.0.type"),
    ({"tools": ["weather"]}, "tools.0.type"),
    ({"tools": [WEATHER, {"type": "function"}]}, "tools.1.function"),
    ({"tools": [{"type": "function", "function": {}}]}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]}, "tools.0.function.parameters"),
    ({"tools": [{"type": "function", "function": {"name": "f", "strict": 1}}]}, "tools.0.function.strict"),
    ({"tools": [WEATHER, WEATHER]}, "tools"),
    ({"tools": [WEATHER] * 1025}, "tools"),
    ({"tools": [WEATHER], "tool_choice": "any"}, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": {"type": "function"}}, "tool_choice.function"),
    ({"reasoning_effort": "very"}, "reasoning_effort"),
    (
        {"messages": [USER, {"role": "assistant", "tool_calls": [{"type": "function"}]}]},
        "messages.1.tool_calls.0.function",
    ),
    (
        {"messages": [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}]},
        "messages.1.tool_calls.0.function.arguments",
    ),
]  # fmt: skip


async def test_wrong_tools_are_refused_by_parameter(tmp_path: Path) -> None:
    async with speaking(tmp_path / "m", [[OPENED, *CALL]]) as model:
        for body, param in BAD:
            assert (await model.refusal(**body))["param"] == param, body


def test_a_choice_of_several_tools() -> None:
    def named(name: str) -> dict[str, Any]:
        return {"type": "function", "function": {"name": name}}

    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [named("f"), named("g")]}}
    body = {"messages": [USER], "tools": [named("f"), named("g"), named("h")], "tool_choice": allowed}
    (conversation,) = parse(ChatBody, json.dumps(body).encode()).request(Caller()).prompts
    assert conversation.tool_choice.names == ("f", "g")  # type: ignore[union-attr]
