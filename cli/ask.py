"""Terminal commands of a running router: generate, chat, status, ledger, cache. Starts and stops no process."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import closing

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from rich.console import Console, Group, RenderableType
from rich.live import Live

from baton.chat import ChatMessage
from baton.client import Client, Delta, Finished, Options, Prompt
from baton.errors import InvalidRequest
from cli.show import cache_table, cluster_table, ledger_tables
from cli.usage import program

_ANSWER_TIMEOUT_S = 10.0


def generate(
    client: Client,
    prompt: Prompt,
    options: Options,
    write: Callable[[str], None],
    think: Callable[[str], None] | None = None,
    **sampling: object,
) -> Finished:
    """Streams the text to ``write`` as it comes, and what the model reasons before it to ``think``. Leaving early, by
    any exception, cancels the request.

    ``sampling`` are fields of SamplingParams; None leaves one to the model's defaults.
    """
    finished: Finished | None = None
    given = {name: value for name, value in sampling.items() if value is not None}
    with closing(client.generate(prompt, options, **given)) as parts:
        for part in parts:
            if isinstance(part, Delta):
                if think is not None and part.reasoning:
                    think(part.reasoning)
                write(part.text)
            elif isinstance(part, Finished):
                finished = part
    assert finished is not None, "the client raises if a stream ends without Finished"
    return finished


def chat(
    client: Client, console: Console, options: Options, *, system: str, show_relay: bool, **sampling: object
) -> None:  # fmt: skip
    """Reads lines until end of input. Ctrl-C during an answer ends that answer, which stays in the conversation.

    ``sampling`` as in ``generate``. Raises InvalidRequest at once if the router would refuse every message.
    """
    if refusal := client.status(_ANSWER_TIMEOUT_S).chat_refusal:
        raise InvalidRequest(
            f"this router serves no conversations: {refusal} (`{program()} generate` takes any prompt)"
        )
    conversation: list[ChatMessage | tuple[str, str]] = [("system", system)] if system else []
    while True:
        try:
            line = console.input("[bold]> [/bold]").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if not line:
            continue
        conversation.append(("user", line))
        turn = _Turn(console)
        try:
            finished = generate(client, conversation, options, turn.write, turn.think, **sampling)
            console.print()
            if show_relay:
                print_relay(console, finished)
        except KeyboardInterrupt:
            console.print(" (stopped)", style="dim")
        conversation.append(turn.message)


class _Turn:
    """Shows what the model says, and keeps it for the conversation."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._text = ""
        self._thoughts = ""

    def write(self, text: str) -> None:
        if text and self._thoughts and not self._text:
            self._console.print()
        self._text += text
        write_raw(self._console, text)

    def think(self, text: str) -> None:
        self._thoughts += text
        self._console.print(text, style="dim", end="", highlight=False, markup=False, soft_wrap=True)

    @property
    def message(self) -> ChatMessage:
        return ChatMessage("assistant", self._text, reasoning=self._thoughts or None)


def print_relay(console: Console, finished: Finished) -> None:
    for line in (finished.relay.line(), *(failure.line() for failure in finished.relay.failures)):
        console.print(line, style="dim", highlight=False, markup=False, soft_wrap=True)


def write_raw(console: Console, text: str) -> None:
    """The model's own characters, untouched by markup, at once."""
    console.file.write(text)
    console.file.flush()


def show_status(client: Client, console: Console, *, with_ledger: bool, as_json: bool, watch_s: float | None) -> None:
    """Prints the cluster once, or every ``watch_s`` seconds until interrupted (one JSON object per line with JSON)."""
    if as_json:
        while True:
            write_raw(console, json.dumps(_as_dict(client, with_ledger)) + "\n")
            if watch_s is None:
                return
            time.sleep(watch_s)
    if watch_s is None:
        console.print(_as_tables(client, with_ledger))
        return
    with Live(_as_tables(client, with_ledger), console=console, auto_refresh=False) as live:
        while True:
            time.sleep(watch_s)
            live.update(_as_tables(client, with_ledger), refresh=True)


def _as_dict(client: Client, with_ledger: bool) -> dict[str, object]:
    found = _plain(client.status(_ANSWER_TIMEOUT_S))
    if with_ledger:
        found["ledger"] = _plain(client.ledger(_ANSWER_TIMEOUT_S))
    return found


def _plain(message: Message) -> dict[str, object]:
    return MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


def _as_tables(client: Client, with_ledger: bool) -> RenderableType:
    shown: list[RenderableType] = [cluster_table(client.status(_ANSWER_TIMEOUT_S))]
    if with_ledger:
        shown += ledger_tables(client.ledger(_ANSWER_TIMEOUT_S))
    return Group(*shown)


def show_caches(client: Client, console: Console, *, drop: bool, as_json: bool) -> bool:
    """Whether every node answered, and so has dropped its cache if that was asked for."""
    caches = client.cache(drop=drop, timeout_s=_ANSWER_TIMEOUT_S)
    if as_json:
        write_raw(console, json.dumps(_plain(caches)) + "\n")
    else:
        console.print(cache_table(caches, has_dropped=drop))
    return not caches.unreachable
