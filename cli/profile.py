"""`baton profile`: measures steps and transfers of a running cluster by requests of chosen shapes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import fmean, median

from rich.console import Console
from rich.table import Table

from baton.client import AsyncClient, Completion
from baton.errors import BadConfig, Unavailable
from baton.v1 import common_pb2, router_pb2
from engine.step import StepShape
from planner.fitted import Measured, Point, fitted, fitted_transfers, write


@dataclass(frozen=True, slots=True)
class Shapes:
    """What is asked for; lengths in tokens. What the model's context does not hold is left out."""

    prompts: tuple[int, ...] = (16, 64, 256, 1024, 2048)
    batches: tuple[int, ...] = (1, 4, 16)
    # Of the requests of a batch: short and long ones tell the sequences' cost from that of their KV.
    contexts: tuple[int, ...] = (16, 256, 1024)
    num_output_tokens: int = 64
    # The median counts.
    repeats: int = 3
    request_timeout_s: float = 120.0


@dataclass(frozen=True, slots=True)
class Asked:
    """One request: when it was sent, by this process's clock, and its answer."""

    sent_s: float
    num_prompt_tokens: int
    answer: Completion

    @property
    def decoding_s(self) -> tuple[float, float]:
        """When its first and its last token came."""
        relay = self.answer.relay
        return self.sent_s + relay.ttft_s, self.sent_s + relay.e2e_s


def profile(address: str, api_key: str, out: Path, shapes: Shapes, console: Console) -> None:
    measured = asyncio.run(_connected(address, api_key, shapes))
    write(out, measured)
    _show(console, measured)
    console.print(f"wrote {out}", markup=False, highlight=False, soft_wrap=True)


async def _connected(address: str, api_key: str, shapes: Shapes) -> Measured:
    async with AsyncClient(address, api_key=api_key) as client:
        return await measure(client, shapes)


async def measure(client: AsyncClient, shapes: Shapes) -> Measured:
    """Raises Unavailable if no node is ready or others use the cluster, BadConfig if its nodes differ."""
    node = _described(await client.status())
    asker = _Asker(client, node.model.vocab_size, shapes)
    most = node.model.max_model_tokens - shapes.num_output_tokens
    alone = [[await asker.ask(n) for _ in range(shapes.repeats)] for n in shapes.prompts if n <= most]
    together = [
        await asyncio.gather(*(asker.ask(n) for _ in range(count)))
        for n in shapes.contexts if n <= most
        for count in shapes.batches
    ]  # fmt: skip
    points = [point for group in alone for point in prompt_points(group)]
    points += [point for group in together for point in decode_points(group)]
    moved = [each.answer.relay.transfer for group in (*alone, *together) for each in group]
    return Measured(
        model=node.model.name,
        device=node.device,
        software_version=node.software_version,
        line=fitted(points),
        points=tuple(points),
        transfers=fitted_transfers([(one.num_bytes, one.total_s) for one in moved if one is not None]),
    )


def _described(status: router_pb2.StatusResponse) -> common_pb2.NodeDescription:
    ready = [state.node for state in status.nodes if state.state.startswith("ready")]
    if not ready:
        raise Unavailable("no node of the cluster is ready, expected at least one; look at `baton status`")
    if busy := status.num_queued + status.num_running:
        raise Unavailable(
            f"the cluster has {busy} requests, expected none: they would be measured too; repeat when it is idle"
        )
    if len(devices := sorted({node.device for node in ready})) > 1:
        raise BadConfig(
            f"the nodes run on {', '.join(devices)}, expected one kind of device: a profile is of one kind of node",
            param="router",
        )
    return ready[0]


class _Asker:
    def __init__(self, client: AsyncClient, vocab_size: int, shapes: Shapes) -> None:
        self._client, self._vocab_size, self._shapes = client, vocab_size, shapes
        # Prompts of a seed: the same ones in each measurement; each with a salt, so that none is held already.
        self._rng = Random(0)
        self._salt = f"profile {time.time_ns()}"
        self._num_asked = 0

    async def ask(self, num_prompt_tokens: int) -> Asked:
        self._num_asked += 1
        prompt = [self._rng.randrange(self._vocab_size) for _ in range(num_prompt_tokens)]
        count, sent_s = self._shapes.num_output_tokens, time.monotonic()
        answer = await self._client.complete(
            prompt, max_tokens=count, min_tokens=count, temperature=0.0, cache_salt=f"{self._salt} {self._num_asked}",
            timeout_s=self._shapes.request_timeout_s,
        )  # fmt: skip
        return Asked(sent_s, num_prompt_tokens, answer)


def prompt_points(group: Sequence[Asked]) -> list[Point]:
    """Of requests one after the other with prompts of one length. Longer ones than a node computes in one step count
    as one step of all: the others' base is in their tokens' time."""
    times = [each.answer.relay.prefill_s for each in group if each.answer.relay.prefill_s > 0]
    return [Point(StepShape().with_prompt(0, group[0].num_prompt_tokens), median(times))] if times else []


def decode_points(group: Sequence[Asked]) -> list[Point]:
    """Of requests at the same time: a step for each node that decoded some, with as many sequences as were there on
    average over the time from its first to its last token."""
    points = []
    for node in sorted({each.answer.relay.decode_node_id for each in group}):
        here = [each for each in group if each.answer.relay.decode_node_id == node]
        spans = [each.decoding_s for each in here]
        whole_s = max(end for _, end in spans) - min(begin for begin, _ in spans)
        step_s = median(each.answer.relay.tbt_mean_s for each in here)
        if whole_s <= 0 or step_s <= 0:
            continue
        batch = max(1, round(sum(end - begin for begin, end in spans) / whole_s))
        context = fmean(each.num_prompt_tokens + len(each.answer.token_ids) / 2 for each in here)
        points.append(Point(StepShape(num_decoding=batch, num_kv_tokens=round(batch * context)), step_s))
    return points


def _show(console: Console, measured: Measured) -> None:
    table = Table("prompt tokens", "sequences", "KV tokens", "measured ms", "predicted ms", "error", box=None)
    for point, error in zip(measured.points, measured.errors, strict=True):
        shape, predicted_s = point.shape, measured.line.step_s(point.shape)
        table.add_row(
            f"{shape.num_prompt_tokens:,}", f"{shape.num_decoding:,}", f"{shape.num_kv_tokens:,}",
            f"{1e3 * point.seconds:.2f}", f"{1e3 * predicted_s:.2f}", f"{error:+.1%}",
        )  # fmt: skip
    console.print(table)
    moved = measured.transfers
    console.print(
        f"{measured.model} on {measured.device}: median error {measured.median_error:.1%}, "
        f"worst {measured.worst_error:+.1%}; "
        + (
            "no KV was moved"
            if moved is None
            else f"transfers {1e3 * moved.latency_s:.2f} ms + {moved.bytes_s / 1e6:,.0f} MB/s"
        ),
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip
