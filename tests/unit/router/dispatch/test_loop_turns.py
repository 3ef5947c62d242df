"""The event loop turns whatever is asked for: long work goes in pieces, and no turn has more than a few of them."""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from baton.metrics import Metrics
from baton.node_messages import NodeMessage
from baton.observe import Lifeline
from baton.types import FinishReason, NodeDescription, NodeStatus, PositionLogprobs, SamplingParams, TokenLogprob
from baton.v1 import common_pb2, router_pb2
from router.api.whole import WholeAnswer
from router.cluster.breakers import PairBreakers
from router.cluster.config import PolicyConfig
from router.cluster.costs import Costs
from router.cluster.load import Loads, NodeLoad, Placement
from router.cluster.membership import State
from router.cluster.policy import Decision, Demand, Reason, choose
from router.cluster.pools import Pools
from router.cluster.rates import Rates
from router.config import LimitsConfig, LinkConfig, RouterConfig
from router.dispatch.active import Active
from router.dispatch.stream import Backlog, Pacer, TokenStream
from router.face.grpc_messages import overfull
from router.face.http import HttpFace
from router.flow.messages import Outcome, OutcomeKind, Phase, Prompt
from router.nodes.sessions import NodeLink, hello
from router.serve import Router
from router.turns import Turns
from tests.support.fake_nodes import FakeCluster, FakeConfig, expected_tokens
from tests.support.router import VOCAB_SIZE, baseline, quick, router_beside, until, write_model_folder

# So short that every piece of work has to wait for the next turn.
NO_TIME_S = 1e-9
_numbers = itertools.count()


class Counter:
    """Counts the loop's turns."""

    def __init__(self) -> None:
        self.num_turns = 0
        self._handle = asyncio.get_running_loop().call_soon(self._turn)

    def _turn(self) -> None:
        self.num_turns += 1
        self._handle = asyncio.get_running_loop().call_soon(self._turn)

    def stop(self) -> None:
        self._handle.cancel()


async def test_work_waits_only_when_a_turn_has_lasted_long_enough_and_in_order() -> None:
    counter, order = Counter(), []
    idle = Turns(1000.0)
    for _ in range(5):
        await idle.wait()
    assert counter.num_turns == 0

    turns = Turns(NO_TIME_S)

    async def piece(number: int) -> None:
        await turns.wait()
        order.append((number, counter.num_turns))

    tasks = [asyncio.create_task(piece(i)) for i in range(100)]
    await asyncio.sleep(0)
    tasks[50].cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    counter.stop()
    assert [number for number, _ in order] == [i for i in range(100) if i != 50]
    in_turn = [turn for _, turn in order]
    assert max(in_turn.count(turn) for turn in in_turn) <= 10
    assert turns.num_waiting == 0


def position(token_id: int) -> PositionLogprobs:
    return PositionLogprobs(TokenLogprob(token_id, -0.5), 1, (TokenLogprob(token_id, -0.5),))


@pytest.mark.parametrize("has_logprobs", [False, True])
async def test_what_has_piled_up_is_read_in_pieces_and_ends_with_the_last(has_logprobs: bool) -> None:
    kept = Backlog(max_stream_bytes=10**7, max_answer_bytes=10**7, max_bytes=10**7)
    stream = TokenStream(Pacer(0.05, Turns(0.01)), kept)
    ids = tuple(range(2000))
    stream.push(ids, tuple(map(position, ids)) if has_logprobs else ())
    stream.end(Outcome(OutcomeKind.FINISHED, FinishReason.STOP), Lifeline(0.0).relay())
    found: list[int] = []
    while True:
        batch = await stream.next()
        assert 0 < len(batch.token_ids) <= (16 if has_logprobs else 512)
        assert [p.chosen.token_id for p in batch.logprobs] == (batch.token_ids if has_logprobs else [])
        found += batch.token_ids
        if batch.outcome is not None:
            break
    assert found == list(ids)
    assert kept.num_bytes == 0


def test_a_body_leaves_in_pieces_that_are_all_of_it() -> None:
    long = bytearray(b"x" * 300_000)
    answer = WholeAnswer('{"choices":["', [[long, "1"], ["2", bytearray(b"3")]], '"]}')
    pieces = list(answer.pieces())
    assert b"".join(pieces) == b'{"choices":["' + long + b'1,23"]}'
    assert answer.num_bytes == sum(map(len, pieces))
    assert max(map(len, pieces)) < 2 * 65536


class Taken:
    """What an application sends, and in which turn of the loop."""

    def __init__(self, counter: Counter) -> None:
        self._counter = counter
        self.start: dict[str, Any] = {}
        self.pieces: list[bytes] = []
        self.turns: list[int] = []

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.start = message
        else:
            self.pieces.append(message["body"])
            self.turns.append(self._counter.num_turns)


async def asked(router: Router, config: RouterConfig, path: str, body: dict[str, Any], counter: Counter) -> Taken:
    app = HttpFace(router.frontend, router.dispatcher, config, Metrics({}), router.status)
    scope = {"type": "http", "method": "POST", "path": path, "headers": [], "client": ("127.0.0.1", 1)}
    messages = [{"type": "http.request", "body": json.dumps(body).encode()}]
    taken = Taken(counter)

    async def receive() -> Any:
        return messages.pop() if messages else await asyncio.Event().wait()

    await app(scope, receive, taken.send)
    return taken


CHAT = {"messages": [{"role": "user", "content": "the"}], "logprobs": True, "top_logprobs": 20}
TEXT = {"prompt": "the", "logprobs": 20}


@pytest.mark.parametrize(("path", "asks"), [("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)])
async def test_the_loop_turns_between_the_pieces_of_a_long_answer(
    tmp_path: Path, path: str, asks: dict[str, Any]
) -> None:
    folder = write_model_folder(tmp_path / "tiny")
    limits = LimitsConfig(max_turn_s=NO_TIME_S)
    config = FakeConfig(vocab_size=VOCAB_SIZE, max_model_tokens=2048)
    async with (
        FakeCluster(config, prefill=1, decode=1) as cluster,
        router_beside(cluster, model_folder=folder, limits=limits) as router,
    ):
        body = {"max_tokens": 200, "min_tokens": 200, "seed": 1, "n": 3, "return_token_ids": True, **asks}
        settings = RouterConfig(nodes=cluster.addresses)
        counter = Counter()
        taken = await asked(router, settings, path, body, counter)
        counter.stop()
        content = b"".join(taken.pieces)
        assert dict(taken.start["headers"])[b"content-length"] == str(len(content)).encode()
        assert len(taken.pieces) >= 3
        # The first ones of a turn go together, if nothing else waits.
        assert max(taken.turns.count(turn) for turn in taken.turns) <= 2
        # What comes in pieces is what a stream says.
        whole = json.loads(content)
        async with httpx.AsyncClient(base_url=router.http or "", timeout=30) as client:
            streamed = await client.post(path, json=body | {"stream": True})
        for choice in whole["choices"]:
            assert_same(choice, chunks_of(streamed.text, choice["index"]))
        assert whole["usage"]["completion_tokens"] == 600
        assert router.dispatcher.backlog.num_bytes == 0


def chunks_of(text: str, index: int) -> list[dict[str, Any]]:
    lines = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    return [c for line in lines for c in line["choices"] if c["index"] == index]


def assert_same(choice: dict[str, Any], chunks: list[dict[str, Any]]) -> None:
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    said = [c["delta"].get("content", "") if "delta" in c else c["text"] for c in chunks]
    assert text == "".join(said)
    assert choice["token_ids"] == [i for c in chunks for i in c["token_ids"]]
    assert choice["prompt_token_ids"] == chunks[0]["prompt_token_ids"]
    parts = [c["logprobs"] for c in chunks if c["logprobs"]]
    for name, items in choice["logprobs"].items():
        if isinstance(items, list):
            assert items == [x for part in parts for x in part[name]], name
            assert len(items) == 200
    assert choice["finish_reason"] == chunks[-1]["finish_reason"] == "length"


# ── Many sequences ──────────────────────────────────────────────────────────────────────────────────────────────────


def submit(router: Router, count: int, max_tokens: int = 5) -> list[Active]:
    now = router.dispatcher.clock.now()
    sampling = SamplingParams(max_tokens=max_tokens, seed=1)
    request_id = f"r{next(_numbers)}"
    found = [
        router.dispatcher.submit(request_id, i, Prompt((5, 6, 7)), sampling, arrived_s=now, deadline_s=now + 60.0)
        for i in range(count)
    ]
    router.dispatcher.place()
    return found


async def test_many_are_placed_over_many_turns(tmp_path: Path) -> None:
    async with (
        FakeCluster(prefill=1, decode=1) as cluster,
        router_beside(cluster, limits=LimitsConfig(max_turn_s=NO_TIME_S, max_client_running=100)) as router,
    ):
        submit(router, 20)
        queued = []
        while router.dispatcher.scheduler.num_waiting:
            queued.append(router.dispatcher.scheduler.num_waiting)
            await asyncio.sleep(0)
        assert queued[0] == 19
        assert set(queued) == set(range(1, 20))
        await until(lambda: router.dispatcher.scheduler.num_in_flight == 0)
        await baseline(cluster)


async def test_who_leaves_with_all_choices_has_none_of_them_placed_on_the_way() -> None:
    config = FakeConfig(num_blocks=16, block_tokens=16, step_s=0.05)
    async with FakeCluster(config, prefill=1, decode=1) as cluster, router_beside(cluster) as router:
        sequences = submit(router, 40, max_tokens=100)
        await until(lambda: any(x.flow.phase is Phase.DECODING for x in sequences))
        assert router.dispatcher.scheduler.num_waiting > 0
        counted = router.metrics.placements.children
        before = sum(child.value for child in counted.values())
        router.dispatcher.cancel(sequences, "the client left")
        assert router.dispatcher.scheduler.num_in_flight == 0
        assert sum(child.value for child in counted.values()) == before
        await baseline(cluster)


async def test_all_that_wait_hear_that_no_node_is_available_once_and_when_one_is() -> None:
    async with FakeCluster(prefill=1, decode=1) as cluster, router_beside(cluster, timing=quick) as router:
        for node in cluster.nodes.values():
            node.mute()
        await until(lambda: all(m.state is State.SUSPECT for m in router.dispatcher.nodes.members))
        sequences = submit(router, 3)
        sequences += submit(router, 3)
        assert all(x.flow.wake_at_s < x.flow.deadline_s for x in sequences)
        for node in cluster.nodes.values():
            node.resume()
        await until(lambda: router.dispatcher.scheduler.num_in_flight == 0)
        assert {x.flow.outcome.kind for x in sequences if x.flow.outcome} == {OutcomeKind.FINISHED}


async def test_what_ran_on_a_lost_node_is_told_over_many_turns_and_ends_well() -> None:
    config = FakeConfig(step_s=0.03)
    limits = LimitsConfig(max_turn_s=NO_TIME_S, max_client_running=100)
    async with (
        FakeCluster(config, prefill=1, decode=2) as cluster,
        router_beside(cluster, timing=quick, limits=limits) as router,
    ):
        sequences = submit(router, 40, max_tokens=60)
        await until(lambda: all(x.flow.phase is Phase.DECODING for x in sequences), timeout_s=20)

        def num_left() -> int:
            attempts = [router.dispatcher.scheduler.attempt(x) for x in sequences]
            return sum(x is not None and x.placement.decode_id == "decode-0" for x in attempts)

        num_there, left = num_left(), list[int]()
        router.dispatcher.nodes.watch(lambda: left.append(num_left()))
        await cluster["decode-0"].die()
        # Other changes, of a node that was slow to speak, are told as well.
        await until(lambda: left and left[-1] < num_there, timeout_s=20)
        assert next(num for num in left if num < num_there) == num_there - 1
        # It is there again, as another, before all have been told.
        await cluster["decode-0"].start()
        await until(lambda: router.dispatcher.scheduler.num_in_flight == 0, timeout_s=20)
        wanted = expected_tokens((5, 6, 7), 1, 60, config.vocab_size)
        assert all(x.flow.tokens == wanted for x in sequences)
        await baseline(cluster)


class Heard:
    """Counts what is heard in each turn of the loop."""

    def __init__(self, counter: Counter) -> None:
        self._counter = counter
        self.num_welcomed = 0
        self.in_turn: dict[int, int] = {}

    def on_welcome(self, address: str, node: NodeDescription, status: NodeStatus) -> None:
        self.num_welcomed += 1

    def on_messages(self, address: str, messages: Sequence[NodeMessage], status: NodeStatus | None) -> None:
        self.in_turn[self._counter.num_turns] = self.in_turn.get(self._counter.num_turns, 0) + 1

    def on_broken(self, address: str, reason: str, is_orderly: bool = False) -> None:
        raise AssertionError(f"{address}: {reason}")


async def test_what_many_nodes_say_at_once_is_heard_over_many_turns() -> None:
    nodes = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "worker.fake", "--prefill", "15", "--decode", "15",
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert nodes.stdin is not None
    assert nodes.stdout is not None
    counter = Counter()
    heard, turns = Heard(counter), Turns(NO_TIME_S)
    addresses = json.loads(await asyncio.wait_for(nodes.stdout.readline(), 30))
    links = [NodeLink(address, heard, hello("r", 1), LinkConfig(), turns) for address in addresses]
    try:
        for link in links:
            link.dial()
        await until(lambda: heard.num_welcomed == len(links), timeout_s=20)
        heard.in_turn.clear()
        time.sleep(0.5)  # noqa: ASYNC251 (every node has spoken when the loop turns again)
        await until(lambda: sum(heard.in_turn.values()) >= len(links), timeout_s=20)
        # So many are let go in a turn at first, and as many may be read without waiting.
        assert max(heard.in_turn.values()) <= 10
    finally:
        counter.stop()
        for link in links:
            await link.close()
        nodes.stdin.close()
        await nodes.wait()


class Looks(PairBreakers):
    num_looks = 0

    def open_of(self, prefill_id: str, now: float) -> Mapping[str, float]:
        self.num_looks += 1
        return super().open_of(prefill_id, now)


def test_of_ten_thousand_pairs_only_those_of_the_best_prefill_node_are_looked_at() -> None:
    pools, config = Pools(), PolicyConfig()
    cluster = FakeCluster(FakeConfig(num_blocks=100), prefill=100, decode=100)
    for node in cluster.nodes.values():
        pools.put(NodeLoad(node.description, node.status(), Rates(config)))
    looks = Looks(config)
    for decode in ("decode-0", "decode-1"):
        for _ in range(config.breaker_failures):
            looks.failed("prefill-0", decode, 0.0)
    decision = choose(pools, Demand(10), looks, 0.5, config, Costs(Rates(config), 10))
    assert decision == Decision(Placement("prefill-0", "decode-10"), Reason.POOLS), "10 comes before 2 as a name"
    assert looks.num_looks == 1


# ── Messages ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_parts_of_a_message_are_counted_before_it_is_parsed() -> None:
    chat = router_pb2.Chat(messages=[router_pb2.ChatMessage(role="user", content="x" * 50)] * 9)
    sampling = common_pb2.SamplingParams(logit_bias=dict.fromkeys(range(9), 1.0))
    asks = router_pb2.GenerateRequest(chat=chat, model="m")
    # The request's two fields, and nine messages.
    assert overfull(asks.SerializeToString(), 11) is None
    assert overfull(asks.SerializeToString(), 10) == "chat"
    assert overfull(router_pb2.GenerateRequest(sampling=sampling).SerializeToString(), 9) == "sampling"
    assert overfull(router_pb2.GenerateRequest(stop=[""] * 9).SerializeToString(), 8) == "stop"
    # Field 100 is none of the message's.
    assert overfull(b"\xa0\x06\x00" * 9, 8) == "unknown fields"
    ids = router_pb2.TokenIds(token_ids=range(100_000))
    assert overfull(router_pb2.GenerateRequest(prompt_token_ids=ids).SerializeToString(), 1) is None
    for cut in (b"\x80" * 100_000, b"\x2a\xff\xff\xff\xff\x7f\x0a", b"\x09", b"\x0d\x00", b"\x2a"):
        assert overfull(cut, 5) is None


def test_a_node_that_is_back_owes_nothing_to_what_its_predecessor_had() -> None:
    node = FakeCluster(mixed=1)["mixed-0"]
    loads = Loads(Rates(PolicyConfig()))
    loads.add_node(node.description, node.status())
    loads.assign("a", Placement("mixed-0", "mixed-0"), 100)
    loads.remove_node("mixed-0")
    loads.add_node(node.description, node.status())
    loads.assign("b", Placement("mixed-0", "mixed-0"), 30)
    loads.check()
    loads.release("a")
    loads.check()
    load = loads.node("mixed-0")
    assert load is not None
    assert (load.pending_prompt_tokens, load.pending_decode_tokens) == (30, 30)
