"""Talk to a running router from a terminal: generate, chat, status, ledger. Starts and stops nothing."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import grpc
from google.protobuf.json_format import MessageToDict
from rich.console import Console, Group, RenderableType
from rich.live import Live

from baton.errors import BatonError, Unavailable
from baton.v1 import router_pb2, router_pb2_grpc
from cli.show import cluster_table, ledger_tables, relay_line

_ANSWER_TIMEOUT_S = 10.0


class RouterFailed(BatonError):
    """The router answered with a gRPC status; the message has its name and details."""


@contextmanager
def router_at(address: str) -> Iterator[router_pb2_grpc.RouterStub]:
    """A stub for the router at host:port. gRPC failures inside the block come out as BatonError."""
    with grpc.insecure_channel(address) as channel:
        try:
            yield router_pb2_grpc.RouterStub(channel)
        except grpc.RpcError as error:
            # Every error of a call is a Call as well and has these.
            code, details = error.code(), error.details()
            if code is grpc.StatusCode.UNAVAILABLE:
                raise Unavailable(
                    f"no answer from a router at {address} ({details}); start one with `baton up`"
                ) from None
            raise RouterFailed(f"{code.name}: {details}") from None


def generate(
    stub: router_pb2_grpc.RouterStub, request: router_pb2.GenerateRequest, write: Callable[[str], None]
) -> tuple[str, router_pb2.GenerateResponse.Finished]:
    """Streams the text to ``write`` as it comes. Leaving early, by any exception, cancels the request."""
    call = stub.Generate(request)
    parts: list[str] = []
    finished = router_pb2.GenerateResponse.Finished()
    try:
        for response in call:
            if response.HasField("delta"):
                parts.append(response.delta.text)
                write(response.delta.text)
            elif response.HasField("finished"):
                finished = response.finished
    finally:
        call.cancel()
    return "".join(parts), finished


def chat(
    stub: router_pb2_grpc.RouterStub,
    console: Console,
    make_request: Callable[[router_pb2.Chat], router_pb2.GenerateRequest],
    *,
    system: str,
    show_relay: bool,
) -> None:
    """Reads lines until end of input. Ctrl-C during an answer ends that answer, which stays in the conversation."""
    conversation = router_pb2.Chat()
    if system:
        conversation.messages.add(role="system", content=system)
    while True:
        try:
            line = console.input("[bold]> [/bold]").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if not line:
            continue
        conversation.messages.add(role="user", content=line)
        parts: list[str] = []

        def write(text: str, parts: list[str] = parts) -> None:
            parts.append(text)
            write_raw(console, text)

        try:
            _, finished = generate(stub, make_request(conversation), write)
            if show_relay:
                console.print()
                print_relay(console, finished)
        except KeyboardInterrupt:
            console.print(" (stopped)", style="dim", end="")
        console.print()
        conversation.messages.add(role="assistant", content="".join(parts))


def print_relay(console: Console, finished: router_pb2.GenerateResponse.Finished) -> None:
    line = relay_line(finished.relay, finished.usage)
    console.print(line, style="dim", highlight=False, markup=False, soft_wrap=True)


def write_raw(console: Console, text: str) -> None:
    """The model's own characters, untouched by markup, at once."""
    console.file.write(text)
    console.file.flush()


def show_status(
    stub: router_pb2_grpc.RouterStub, console: Console, *, with_ledger: bool, as_json: bool, watch_s: float | None
) -> None:
    """Prints the cluster once, or every ``watch_s`` seconds until interrupted (one JSON object per line with JSON)."""
    if as_json:
        while True:
            console.print(json.dumps(_as_dict(stub, with_ledger)), soft_wrap=True, highlight=False, markup=False)
            if watch_s is None:
                return
            time.sleep(watch_s)
    if watch_s is None:
        console.print(_as_tables(stub, with_ledger))
        return
    with Live(_as_tables(stub, with_ledger), console=console, auto_refresh=False) as live:
        while True:
            time.sleep(watch_s)
            live.update(_as_tables(stub, with_ledger), refresh=True)


def _as_dict(stub: router_pb2_grpc.RouterStub, with_ledger: bool) -> dict[str, object]:
    def plain(message: router_pb2.StatusResponse | router_pb2.ClusterLedgerResponse) -> dict[str, object]:
        return MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)

    found = plain(stub.Status(router_pb2.StatusRequest(), timeout=_ANSWER_TIMEOUT_S))
    if with_ledger:
        found["ledger"] = plain(stub.Ledger(router_pb2.ClusterLedgerRequest(), timeout=_ANSWER_TIMEOUT_S))
    return found


def _as_tables(stub: router_pb2_grpc.RouterStub, with_ledger: bool) -> RenderableType:
    shown: list[RenderableType] = [cluster_table(stub.Status(router_pb2.StatusRequest(), timeout=_ANSWER_TIMEOUT_S))]
    if with_ledger:
        shown += ledger_tables(stub.Ledger(router_pb2.ClusterLedgerRequest(), timeout=_ANSWER_TIMEOUT_S))
    return Group(*shown)
