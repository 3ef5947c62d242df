"""Measures the prefix cache: clusters with and without it run side by side and get the same prompts in turn.

``turns``: users who talk with one model behind a common system prompt; a turn's prompt is all that was said before.
``unique``: prompts that no request had before, where the cache can only cost; a second cluster without it shows how far
two equal clusters are apart. ``placement``: where requests go by what nodes have, and by load alone. ``choices``:
several answers to one prompt. Answers of all clusters are compared: a wrong one ends the run.

    python -m bench prefix
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from bench import model as bench_model
from bench.cluster import NO_PREFIX_CACHE, Cluster, cluster
from bench.measure import percent_more
from bench.prefix_load import DEMO, Choices, Groups, Round, Talks, Unique, choices, grouped, talk, unique
from loadgen.samples import Samples

ON, OFF = ("--prefix-cache", "on"), NO_PREFIX_CACHE
# A router that remembers no block places by load alone.
_BY_LOAD = "[router.policy]\nmax_known_blocks = 0\n"
_TOPOLOGIES = {
    "1 + 1": ("--prefill", "1", "--decode", "1"),
    "2 + 2": ("--prefill", "2", "--decode", "2"),
    "1 mixed": ("--mixed", "1"),
}
# Four workers of each of two clusters share the machine's memory.
_KV_MIB = "512"


@dataclass(frozen=True, slots=True)
class _Effort:
    talks: Talks
    topologies: tuple[str, ...]
    num_rounds: int
    # On the demo's model; a round of the bench model is as long with a few requests.
    unique: Unique
    num_unique_rounds: int
    groups: Groups
    hot: Groups
    num_group_rounds: int
    choices: Choices


_WHOLE = _Effort(Talks(), tuple(_TOPOLOGIES), 2, Unique(), 24, Groups(num_groups=6), Groups(num_groups=1), 2, Choices())
_QUICK = _Effort(
    Talks(num_users=3, num_turns=3), ("1 + 1",), 1, Unique(requests_each=1), 3,
    Groups(num_groups=3, num_requests=9), Groups(num_groups=1, num_requests=6), 1, Choices(num_choices=3),
)  # fmt: skip


def run(quick: bool) -> dict[str, Any]:
    """``turns`` by topology; ``unique`` on the bench model and on the demo's, whose steps are very short."""
    return asyncio.run(_measure(_QUICK if quick else _WHOLE))


async def _measure(effort: _Effort) -> dict[str, Any]:
    folder = bench_model.bench_model()
    results: dict[str, Any] = {"model": bench_model.NAME, "talks": str(effort.talks), "turns": {}}
    for name in effort.topologies:
        results["turns"][name] = await _turns(effort, folder, _TOPOLOGIES[name])
    large = Unique(requests_each=1)
    results["unique"] = {
        "demo model": await _unique(effort.unique, effort.num_unique_rounds, DEMO),
        bench_model.NAME: await _unique(large, effort.num_unique_rounds // 3, folder),
    }
    results["placement"] = {
        "many prefixes": await _placement(effort.groups, effort.num_group_rounds, folder),
        "one hot prefix": await _placement(effort.hot, effort.num_group_rounds, folder),
    }
    results["choices"] = await _choices(effort.choices, folder)
    return results


@asynccontextmanager
async def _clusters(folder: Path, options: Mapping[str, Sequence[str]]) -> AsyncIterator[dict[str, Cluster]]:
    """One cluster by name, all at once."""
    async with contextlib.AsyncExitStack() as stack:
        run_dir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="baton-bench-")))
        yield {
            name: await stack.enter_async_context(cluster(name, ("--kv-mib", _KV_MIB, *given), folder, run_dir))
            for name, given in options.items()
        }


async def _interleaved(
    clusters: Mapping[str, Cluster], num_rounds: int, one_round: Callable[[Cluster, int], Any]
) -> dict[str, list[Any]]:
    """Rounds by cluster; each round is the same work for all, in an order that turns round."""
    taken: dict[str, list[Any]] = {name: [] for name in clusters}
    names = list(clusters)
    for number in range(num_rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            taken[name].append(await one_round(clusters[name], number))
    return taken


# ── Turns ───────────────────────────────────────────────────────────────────────────────────────────────────────────


async def _turns(effort: _Effort, folder: Path, topology: Sequence[str]) -> dict[str, Any]:
    async with _clusters(folder, {"off": (*topology, *OFF), "on": (*topology, *ON)}) as clusters:
        for where in clusters.values():
            await talk(where, -1, Talks(num_users=1, num_turns=1, system_tokens=70))
        taken = await _interleaved(clusters, effort.num_rounds, partial(talk, talks=effort.talks))
    _refuse_differences(taken)
    rows = {name: _turns_row(rounds) for name, rounds in taken.items()}
    on, off = rows["on"], rows["off"]
    return {
        "compared": {
            "later_ttft_p50_on_over_off": on["later_ttft_p50_ms"] / off["later_ttft_p50_ms"],
            "later_ttft_p99_on_over_off": on["later_ttft_p99_ms"] / off["later_ttft_p99_ms"],
            "first_ttft_p50_on_over_off": on["first_ttft_p50_ms"] / off["first_ttft_p50_ms"],
            "moved_on_over_off": on["moved_mb"] / off["moved_mb"] if off["moved_mb"] else None,
            "computed_on_over_off": on["computed_tokens"] / off["computed_tokens"],
            "tokens_per_s_on_over_off": on["tokens_per_s"] / off["tokens_per_s"],
        },
        "rows": [{"prefix cache": name, **row} for name, row in rows.items()],
        "samples": {name: [r.samples() for r in rounds] for name, rounds in taken.items()},
    }


def _turns_row(rounds: Sequence[Round]) -> dict[str, Any]:
    first = Samples.of(t.ttft_s for r in rounds for lane in r.lanes for t in lane[:1])
    later = Samples.of(t.ttft_s for r in rounds for lane in r.lanes for t in lane[1:])
    return {
        **_common(rounds),
        "first_ttft_p50_ms": first.median * 1e3,
        "first_ttft_p99_ms": first.percentile(0.99) * 1e3,
        "later_ttft_p50_ms": later.median * 1e3,
        "later_ttft_p99_ms": later.percentile(0.99) * 1e3,
    }


def _common(rounds: Sequence[Round]) -> dict[str, Any]:
    """Sums over the rounds; ``hit_share``: of the prompts' tokens, those that the node of the prompt had."""
    asked = sum(r.num_prompt_tokens for r in rounds)
    return {
        "requests": sum(len(lane) for r in rounds for lane in r.lanes),
        "prompt_tokens": asked,
        "hit_share": sum(t.num_cached_tokens for r in rounds for lane in r.lanes for t in lane) / asked,
        "computed_tokens": sum(r.computed_tokens for r in rounds),
        "moved_mb": sum(r.moved_bytes for r in rounds) / 1e6,
        "tokens_per_s": sum(r.num_output_tokens for r in rounds) / sum(r.wall_s for r in rounds),
    }


def _refuse_differences(taken: Mapping[str, Sequence[Round]]) -> None:
    answers = {name: [r.token_ids() for r in rounds] for name, rounds in taken.items()}
    first = next(iter(answers))
    different = [name for name in answers if answers[name] != answers[first]]
    if different:
        raise RuntimeError(f"the answers of {', '.join(different)} are not those of {first} to the same prompts")


# ── Unique prompts ──────────────────────────────────────────────────────────────────────────────────────────────────


async def _unique(load: Unique, num_rounds: int, folder: Path) -> dict[str, Any]:
    """Tokens a second beside ``off``; the twin is off as well."""
    shape = _TOPOLOGIES["1 mixed"]
    options = {"off": (*shape, *OFF), "on": (*shape, *ON), "off, twin": (*shape, *OFF)}
    async with _clusters(folder, options) as clusters:
        await _interleaved(clusters, 1, lambda where, _: unique(where, -1, load))
        taken = await _interleaved(clusters, num_rounds, partial(unique, load=load))
    _refuse_differences(taken)
    rates = {name: [r.num_output_tokens / r.wall_s for r in rounds] for name, rounds in taken.items()}
    rows = []
    for name in rates:
        more, low, high = percent_more(rates[name], rates["off"])
        rows.append(
            {
                "prefix cache": name,
                "tokens_per_s": Samples.of(rates[name]).median,
                "more %": more,
                "from %": low,
                "to %": high,
                "cached_tokens": sum(t.num_cached_tokens for r in taken[name] for lane in r.lanes for t in lane),
            }
        )
    return {"load": str(load), "rows": rows, "samples": rates}


# ── Placement ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def _placement(load: Groups, num_rounds: int, folder: Path) -> dict[str, Any]:
    shape = _TOPOLOGIES["2 + 2"]
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        file.write(_BY_LOAD)
        file.flush()
        options = {"by load": (*shape, *ON, "--config", file.name), "by prefix and load": (*shape, *ON)}
        async with _clusters(folder, options) as clusters:
            for where in clusters.values():
                await talk(where, -1, Talks(num_users=4, num_turns=1, system_tokens=70))
            taken = await _interleaved(clusters, num_rounds, partial(grouped, load=load))
    _refuse_differences(taken)
    return {
        "load": str(load),
        "rows": [{"placement": name, **_placement_row(rounds)} for name, rounds in taken.items()],
        "samples": {name: [r.samples() for r in rounds] for name, rounds in taken.items()},
    }


def _placement_row(rounds: Sequence[Round]) -> dict[str, Any]:
    timings = [t for r in rounds for lane in r.lanes for t in lane]
    ttft = Samples.of(t.ttft_s for t in timings)
    return {
        **_common(rounds),
        "ttft_p50_ms": ttft.median * 1e3,
        "ttft_p99_ms": ttft.percentile(0.99) * 1e3,
        # 0.5 is an even spread over two nodes.
        "prefill_largest_share": _largest_share([t.prefill_node_id for t in timings]),
        "decode_largest_share": _largest_share([t.decode_node_id for t in timings]),
        "colocated_share": sum(t.prefill_node_id == t.decode_node_id for t in timings) / len(timings),
    }


def _largest_share(node_ids: Sequence[str]) -> float:
    return max(node_ids.count(node_id) for node_id in set(node_ids)) / len(node_ids)


# ── Choices ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def _choices(load: Choices, folder: Path) -> dict[str, Any]:
    """One request of n choices, beside n single requests, with and without the cache."""
    rows = []
    for name in ("1 + 1", "1 mixed"):
        shape = _TOPOLOGIES[name]
        async with _clusters(folder, {"off": (*shape, *OFF), "on": (*shape, *ON)}) as clusters:
            found = {which: await choices(where, load, Random(name).random()) for which, where in clusters.items()}
        answers = {tuple(map(tuple, f.token_ids)) for f in found.values()}
        singles = {tuple(map(tuple, f.single_token_ids)) for f in found.values()}
        if len(answers | singles) != 1:
            raise RuntimeError(f"{name}: {load.num_choices} choices are not what {load.num_choices} requests answer")
        rows += [
            {
                "cluster": name,
                "prefix cache": which,
                "computed_tokens": f.computed_tokens,
                "blocks_held": f.most_blocks,
                "moved_mb": f.moved_bytes / 1e6,
                "seconds": f.seconds,
            }
            for which, f in found.items()
        ]
    return {"load": str(load), "rows": rows}
