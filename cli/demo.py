"""`make demo`: starts a cluster, sends prompts through both APIs, prints a relay line for each, and stops it.

Owns the prompts and their presentation; the cluster is that of `baton up`.
"""

from __future__ import annotations

import asyncio
import json
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

import demo as demo_package
from baton.client import Client, Options
from baton.types import SamplingParams
from cli import ask
from cli.launch import cluster
from cli.launch.options import ClusterOptions
from cli.show import seconds
from cli.usage import program
from demo import tasks

_NUM_PREFILL = 2
_NUM_DECODE = 2
_RUSH = 16
# Of the demo model's answers are right, on prompts it never saw. Fewer means that KV was damaged on its way.
_PROMISED_SHARE = 0.95
_SHOWN_PROMPT_CHARS = 110
_REQUEST_TIMEOUT_S = 120.0
_OWN_MODEL_PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village at the edge of a great forest, there lived",
    "Prefill reads the prompt, decode writes the answer. " * 12 + "In one sentence:",
)


@dataclass(frozen=True, slots=True)
class Prompt:
    """``expected`` is the only right answer, where there is one."""

    text: str
    max_tokens: int
    is_chat: bool = False
    expected: str | None = None


@dataclass(slots=True)
class Answer:
    """What came back, and the line that says how it ran."""

    text: str = ""
    relay: str = ""


def default_model() -> Path:
    return Path(demo_package.__file__).resolve().parent / "model"


def run(model: str, console: Console) -> int:
    """Returns the exit code: 0 if every prompt was answered, and as many of them right as the demo's model promises."""
    prompts = own_prompts() if model else demo_prompts()
    options = ClusterOptions(
        model=model or str(default_model()), num_prefill=_NUM_PREFILL, num_decode=_NUM_DECODE, grpc_port=0, http_port=0
    )
    performance = _Performance(prompts, console, has_answers=not model)
    asyncio.run(performance.play(options))
    num_right = performance.num_asked - performance.num_wrong
    if not model and num_right < _PROMISED_SHARE * performance.num_asked:
        console.print(f"[red]only {num_right} of {performance.num_asked} answers were right[/red]")
        return 1
    shown = model or "demo/model"
    console.print(
        "\nAll of it has ended: no process, socket or shared memory is left. To keep a cluster running:\n"
        f"  {program()} up --model {shown} --prefill {_NUM_PREFILL} --decode {_NUM_DECODE}\n"
        "and your own model, a Hugging Face folder or hub id (Llama, Mistral, Qwen2, Qwen3):\n"
        "  make demo MODEL=Qwen/Qwen3-0.6B",
        highlight=False,
        soft_wrap=True,
    )
    return 0


def demo_prompts() -> list[Prompt]:
    return [
        Prompt(task.prompt, task.num_output_tokens + 4, is_chat=task.kind == "chat", expected=task.expected)
        for task in tasks.demo_prompts()
    ]


def own_prompts() -> list[Prompt]:
    return [Prompt(text, 48) for text in _OWN_MODEL_PROMPTS]


class _Performance:
    """The demo's course: wait for the cluster, ask one by one, then all at once, stop the cluster."""

    def __init__(self, prompts: list[Prompt], console: Console, *, has_answers: bool) -> None:
        self._prompts = prompts
        self._console = console
        self._has_answers = has_answers
        self._show: asyncio.Task[None] | None = None
        self.num_asked = 0
        self.num_wrong = 0

    async def play(self, options: ClusterOptions) -> None:
        workers = ", ".join(node_id for node_id, _ in options.worker_roles())
        started = time.monotonic()
        with self._console.status(f"starting the router, {workers}") as spinner:

            def on_ready(routers: Sequence[cluster.Endpoints], stop: Callable[[], None]) -> None:
                if self._show is None:
                    spinner.stop()
                    self._console.print(
                        f"router, {workers}: ready in {time.monotonic() - started:.1f} s", highlight=False
                    )
                    self._show = asyncio.create_task(self._ask_all(routers[0], stop))

            await cluster.up(options, lambda message: self._console.print(message, markup=False), on_ready)
        if self._show is not None:
            await self._show

    async def _ask_all(self, endpoints: cluster.Endpoints, stop: Callable[[], None]) -> None:
        try:
            await asyncio.to_thread(self._one_by_one, endpoints)
            if self._has_answers:
                await asyncio.to_thread(self._all_at_once, endpoints)
        finally:
            stop()

    def _one_by_one(self, endpoints: cluster.Endpoints) -> None:
        with Client(endpoints.grpc) as client:
            for i, prompt in enumerate(self._prompts):
                if i % 2 == 1 or prompt.is_chat:
                    self._announce(prompt, "OpenAI HTTP API")
                    self._judge(prompt, _over_http(endpoints.http, prompt, self._write))
                else:
                    self._announce(prompt, "gRPC")
                    self._judge(prompt, self._over_grpc(client, prompt))

    def _over_grpc(self, client: Client, prompt: Prompt) -> Answer:
        parts: list[str] = []

        def write(text: str) -> None:
            parts.append(text)
            self._write(text)

        finished = ask.generate(client, prompt.text, _options(prompt), write)
        return Answer("".join(parts), finished.relay.line())

    def _announce(self, prompt: Prompt, api: str) -> None:
        text = prompt.text
        if len(text) > _SHOWN_PROMPT_CHARS:
            half = _SHOWN_PROMPT_CHARS // 2
            text = f"{text[:half]} [... {len(text.split())} words ...] {text[-half:]}"
        self._console.print(Text.assemble((f"\n{api}: ", "bold"), text))
        self._console.print("  > ", end="", style="cyan")

    def _write(self, text: str) -> None:
        self._console.print(Text(text, style="cyan"), end="", soft_wrap=True)

    def _judge(self, prompt: Prompt, answer: Answer) -> None:
        self.num_asked += 1
        self._console.print()
        if prompt.expected is not None:
            is_right = answer.text.strip() == prompt.expected
            self.num_wrong += not is_right
            verdict = "[green]right[/green]" if is_right else f"[red]wrong, expected[/red] {prompt.expected}"
            self._console.print(f"  {verdict}", highlight=False, soft_wrap=True)
        self._console.print(f"  {answer.relay}", style="dim", highlight=False, markup=False, soft_wrap=True)

    def _all_at_once(self, endpoints: cluster.Endpoints) -> None:
        """A rush of recall prompts: every wrong answer would be a lost, garbled or misplaced piece of KV."""
        prompts = [
            Prompt(task.prompt, task.num_output_tokens + 4, expected=task.expected)
            for task in tasks.recall_prompts(7, _RUSH)
        ]
        started = time.monotonic()
        with Client(endpoints.grpc) as client, ThreadPoolExecutor(_RUSH) as pool:
            answers = list(pool.map(lambda prompt: client.complete(prompt.text, _options(prompt)), prompts))
        took_s = time.monotonic() - started
        num_right = sum(a.text.strip() == p.expected for a, p in zip(answers, prompts, strict=True))
        self.num_asked += _RUSH
        self.num_wrong += _RUSH - num_right
        num_tokens = sum(a.usage.prompt_tokens + a.usage.completion_tokens for a in answers)
        shares = Counter(node_id for a in answers for node_id in (a.relay.prefill_node_id, a.relay.decode_node_id))
        self._console.print(
            f"\n[bold]{_RUSH} recall prompts at once:[/bold] {num_right} right; "
            f"{num_tokens} tokens in {seconds(took_s)}; "
            + ", ".join(f"{node_id} ran {count}" for node_id, count in sorted(shares.items())),
            highlight=False,
            soft_wrap=True,
        )


def _options(prompt: Prompt) -> Options:
    sampling = SamplingParams(temperature=0, max_tokens=prompt.max_tokens)
    return Options(sampling, timeout_s=_REQUEST_TIMEOUT_S)


def _over_http(base: str, prompt: Prompt, write: Callable[[str], None]) -> Answer:
    body: dict[str, object] = {
        "temperature": 0,
        "max_tokens": prompt.max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_relay": True,
    }
    if prompt.is_chat:
        path, body["messages"] = "/v1/chat/completions", [{"role": "user", "content": prompt.text}]
    else:
        path, body["prompt"] = "/v1/completions", prompt.text
    answer = Answer()
    for event in _server_sent_events(base + path, body):
        for choice in event["choices"]:
            piece = choice["delta"].get("content") if prompt.is_chat else choice["text"]
            if piece:
                answer.text += piece
                write(piece)
        if "baton" in event:
            answer.relay = event["baton"]["relay"]["line"]
    return answer


def _server_sent_events(url: str, body: dict[str, object]) -> Iterator[dict[str, Any]]:
    request = urllib.request.Request(  # noqa: S310 - always our own http:// address
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=_REQUEST_TIMEOUT_S) as response:  # noqa: S310
        for line in response:
            if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
                yield json.loads(line[6:])
