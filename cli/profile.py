"""`baton profile`: measures steps, transfers and requests of a running cluster by requests of chosen shapes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from baton.client import AsyncClient
from baton.errors import Unavailable
from cli.environment import trust
from cli.observe import Live, live
from cli.processors import Processors, Taken, num_cores
from engine.step import StepShape
from loadgen import counters
from loadgen.client import Answer, Asking, model_of
from loadgen.job import headers_of
from loadgen.load import Load, Request, closed, same_size
from loadgen.run import run
from planner.measured import Measured, write
from planner.observed import Observed, layerwise_from_bytes, power_of, request_times, transfers_of
from planner.overhead import LoopTimes, Spent, busy_of, overhead
from planner.steps import found_in

_IDLE_S = 2.0
# Lengths of answers in a row: eighths of the longest, in an order in which neighbours differ.
_LENGTHS, _STRIDE = 8, 3
# Of the energy that GPUs count, each by its own node; processors count that of all nodes of their host.
_ENERGY, _OF_GPU = "baton_energy_joules_total", "source=nvml"


@dataclass(frozen=True, slots=True)
class Shapes:
    """What is asked for; lengths in tokens. What the model's context does not hold is left out."""

    prompts: tuple[int, ...] = (16, 64, 256, 512, 1024, 2048)
    # Requests at a time, and how long each one's prompt is: short and long ones tell the sequences' cost from that of
    # their KV, and many at a time make nodes compute beside each other and steps of both phases.
    batches: tuple[tuple[int, int], ...] = ((1, 16), (1, 1024), (4, 16), (4, 512), (16, 16), (16, 128), (32, 64))
    # Requests at a time, prompt tokens of each, and how many of them in a row: all but the first come to nodes that
    # compute. One in a row: none is sent. Two at a time: a request waits for a node that computes, and not for others
    # that came with it.
    in_a_row: tuple[int, int, int] = (2, 64, 12)
    # Of a prompt alone: enough that its KV is moved.
    num_alone_tokens: int = 4
    num_output_tokens: int = 64
    repeats: int = 5
    # Between requests alone.
    pause_s: float = 0.2
    limit_s: float = 600.0

    def alone(self, max_model_tokens: int) -> list[Load]:
        """One request each."""
        lengths = [n for n in self.prompts if n + self.num_alone_tokens <= max_model_tokens]
        requests = [Request(n, self.num_alone_tokens) for _ in range(self.repeats) for n in lengths]
        return [closed(f"{each.prompt_tokens} tokens alone", (each,), 1, self.limit_s) for each in requests]

    def together(self, max_model_tokens: int) -> Iterator[Load]:
        for streams, n in self.batches:
            if n + self.num_output_tokens <= max_model_tokens:
                sizes = same_size(streams, n, self.num_output_tokens)
                yield closed(f"{streams} at a time", sizes, streams, self.limit_s)

    def overlapping(self, max_model_tokens: int) -> Iterator[Load]:
        streams, n, count = self.in_a_row
        half = max_model_tokens // 2
        if count > 1:
            most = min(self.num_output_tokens, half)
            # Of many lengths, so that they do not come and go together.
            sizes = tuple(
                replace(each, output_tokens=max(2, most * (_STRIDE * number % _LENGTHS + 1) // _LENGTHS))
                for number, each in enumerate(same_size(streams * count, min(n, half), most))
            )
            yield closed(f"{streams} at a time, {count} in a row", sizes, streams, self.limit_s)


def profile(address: str, api_key: str, out: Path, shapes: Shapes, console: Console) -> None:
    measured = asyncio.run(_connected(address, api_key, shapes, console))
    write(out, measured)
    show(console, measured)
    console.print(f"wrote {out}", markup=False, highlight=False, soft_wrap=True)


async def _connected(address: str, api_key: str, shapes: Shapes, console: Console) -> Measured:
    async with AsyncClient(address, api_key=api_key, **trust()) as client:
        return await measure(await live(client, address), headers_of((), api_key), shapes, console)


async def measure(cluster: Live, headers: Mapping[str, str], shapes: Shapes, console: Console) -> Measured:
    """Raises Unavailable if a request fails."""
    asking = Asking(await model_of(cluster.server, headers), headers, {})
    idle_j = await _joules(cluster)
    if idle_j is not None:
        await asyncio.sleep(_IDLE_S)
    before_j, began_s = await _joules(cluster), time.monotonic()
    meter = _Meter(cluster)
    processors = num_cores(cluster)
    max_model_tokens = cluster.nodes[0].model.max_model_tokens
    single: list[Answer] = []
    await meter.begin()
    for load in shapes.alone(max_model_tokens):
        # As in an open loop at a low rate: processes have gone to sleep.
        await asyncio.sleep(shapes.pause_s)
        single += await _sent(cluster, asking, load)
    parts = [await meter.end(single)]
    ttfts_s = [answer.stamps_s[0] - answer.sent_s for answer in single]
    console.print(f"measured {len(single)} single requests", highlight=False)
    overlap = Observed()
    for load in (*shapes.together(max_model_tokens), *shapes.overlapping(max_model_tokens)):
        await meter.begin()
        parts.append(await meter.end(await _sent(cluster, asking, load)))
        if len(load.requests) > load.streams:
            overlap = parts[-1]
        console.print(f"measured {load.name}", highlight=False)
    elapsed_s, after_j = time.monotonic() - began_s, await _joules(cluster)
    node, alone, everything = cluster.nodes[0], parts[0], Observed.joined(parts)
    count = len(cluster.nodes)
    found = found_in(everything.steps)
    spent = [
        Spent(
            each.num_requests, each.num_steps, each.num_tokens, each.took.elapsed_s, each.took.router_s,
            each.took.client_s, each.took.nodes_s, sum(found.line.step_s(shape) for shape in each.shapes),
        ) for each in meter.loads
    ]  # fmt: skip
    second_s = found.line.step_s(StepShape(num_decoding=1, num_kv_tokens=1)) + found.wake.decode_s
    idle_w = None if idle_j is None or before_j is None else (before_j - idle_j) / _IDLE_S / count
    drawn_j = None if before_j is None or after_j is None else after_j - before_j
    requests = request_times(alone.relays, ttfts_s, second_s)
    busy = busy_of(overlap.relays[shapes.in_a_row[0] :], overlap.steps, found.line)
    return Measured(
        model=node.model.name,
        device=node.device,
        software_version=node.software_version,
        kv_layout=node.kv_layout,
        line=found.line,
        points=found.points,
        wake=found.wake,
        pace=found.pace,
        sharing=found.sharing,
        transfers=transfers_of(alone.transfers, node.kv_layout.num_layers),
        layerwise_from_bytes=layerwise_from_bytes(everything.transfers),
        requests=requests,
        overhead=overhead(spent, busy, requests, processors),
        other_cores=sum(each.took.other_s or 0.0 for each in meter.loads)
        / max(1e-9, sum(each.took.elapsed_s for each in meter.loads)),
        power=power_of(idle_w, drawn_j, elapsed_s, everything.steps, count),
    )


@dataclass(frozen=True, slots=True)
class _Measured:
    """Of one load. ``num_steps``: those that decoded; ``shapes``: of all."""

    took: Taken
    num_requests: int
    num_steps: int
    num_tokens: int
    shapes: tuple[StepShape, ...]


class _Meter:
    """Of one load after the other: what nodes recorded, and what it took of the processors, where processes say."""

    def __init__(self, cluster: Live) -> None:
        self._cluster = cluster
        self._processors = Processors(cluster)
        self.loads: list[_Measured] = []

    async def begin(self) -> None:
        await self._processors.begin()

    async def end(self, answers: Sequence[Answer]) -> Observed:
        took = await self._processors.end()
        found = await self._cluster.since(self._processors.began_s)
        if took is not None:
            shapes = tuple(step.shape for step in found.steps)
            num_tokens = sum(len(answer.stamps_s) for answer in answers)
            num_steps = sum(shape.num_decoding > 0 for shape in shapes)
            self.loads.append(_Measured(took, len(answers), num_steps, num_tokens, shapes))
        return found


async def _sent(cluster: Live, asking: Asking, load: Load) -> tuple[Answer, ...]:
    """With other prompts each time, so that none is held already."""
    outcome = await run(load, cluster.server, asking, f"profile {time.time_ns()}")
    if failed := [answer for answer in outcome.answers if answer.error is not None]:
        raise Unavailable(f"{len(failed)} of {len(outcome.load.requests)} requests failed: {failed[0].error}")
    if outcome.num_cut:
        raise Unavailable(f"{outcome.num_cut} requests took longer than {outcome.load.limit_s:g} s")
    return outcome.answers


def _loop(times: LoopTimes) -> str:
    return (
        f"{1e3 * times.request_s:.2f} ms for a request, {1e6 * times.step_s:.0f} us for the tokens of a step and "
        f"{1e6 * times.token_s:.0f} us for each"
    )


async def _joules(cluster: Live) -> float | None:
    """Of all GPUs; None if a node has no counter."""
    counted = await counters.counted(cluster.server) or {}
    found = [value for name, value in counted.items() if name.startswith(_ENERGY) and _OF_GPU in name]
    return sum(found) if found else None


def show(console: Console, measured: Measured) -> None:
    table = Table("prompt tokens", "sequences", "KV tokens", "steps", "measured ms", "predicted ms", "error", box=None)
    for point, error in zip(measured.points, measured.errors, strict=True):
        shape, predicted_s = point.shape, measured.line.step_s(point.shape)
        table.add_row(
            f"{shape.num_prompt_tokens:,}", f"{shape.num_decoding:,}", f"{shape.num_kv_tokens:,}", f"{point.count}",
            f"{1e3 * point.seconds:.2f}", f"{1e3 * predicted_s:.2f}", f"{error:+.1%}",
        )  # fmt: skip
    console.print(table)
    moved, requests, sharing, more = measured.transfers, measured.requests, measured.sharing, measured.overhead
    factors = [f"{kind} {' / '.join(f'{x:.2f}' for x in of) or '-'}"
               for kind, of in (("prompts", sharing.prompt), ("decodes", sharing.decode))]  # fmt: skip
    for line in (
        f"{measured.model} on {measured.device}: median error {measured.median_error:.1%}, worst "
        f"{measured.worst_error:+.1%}",
        "transfers: none" if moved is None
        else f"transfers: {1e3 * moved.latency_s:.2f} ms + {moved.bytes_s / 1e6:,.0f} MB/s",
        f"a request: {1e3 * requests.fixed_s:.2f} ms, {1e3 * requests.message_s:.2f} ms for each message, "
        f"{1e3 * requests.join_s:.2f} ms for its hand-over",
        f"a step after idleness: {1e3 * measured.wake.prompt_s:.2f} ms more with prompts, "
        f"{1e3 * measured.wake.decode_s:.2f} ms without",
        f"all steps with what interrupts them: {measured.pace.prompt:.2f} times as long with prompts, "
        f"{measured.pace.decode:.2f} times without",
        f"a step beside 1 / 2 / ... nodes of its host: {', '.join(factors)} times as long",
        f"a message of a node that computes: {1e3 * more.busy_message_s:.2f} ms more, a hand-over to it "
        f"{1e3 * more.busy_join_s:.2f} ms more",
        f"processor time of the router: {_loop(more.router)}; of this client: {_loop(more.client)}",
        "processors: each process has its own" if not more.num_cores
        else f"processors: {more.num_cores:g} for all processes; a node that computes uses {more.node_cores:.1f}; "
        f"other work took {measured.other_cores:.2f} meanwhile",
        "power: no counter" if measured.power is None
        else f"power of a node: {measured.power.idle_w:.0f} W idle, {measured.power.busy_w:.0f} W busy",
    ):  # fmt: skip
        console.print(line, markup=False, highlight=False, soft_wrap=True)
