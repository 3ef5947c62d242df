"""A cluster of 2 prefill and 2 decode nodes under a burst of prompts, then a burst of tokens: which pool helps the
other, and when its nodes are home again.

The roles of all nodes are recorded. Token ids must be those of one mixed worker that gets the same requests one by one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench import roles
from bench.serve.turns import Result, Setting, standing
from loadgen.clusters import Shape
from loadgen.compare import Comparison, Measured, Target, measured
from loadgen.figures import Figures
from loadgen.load import Load, closed, same_size
from loadgen.objectives import Limits
from loadgen.report import Shown, table
from loadgen.run import Outcome
from loadgen.run import run as send

_LIMIT_S = 600.0
_CLUSTER = Shape("2+2", ("--prefill", "2", "--decode", "2"))
_ORACLE = Shape("oracle", ("--mixed", "1"))
# Longer than a node's dwell in a role that is not its own.
_QUIET_S = 6.0


@dataclass(frozen=True, slots=True)
class Burst:
    """``many`` requests at once."""

    name: str
    many: int
    prompt_tokens: int
    output_tokens: int

    def load(self, streams: int) -> Load:
        requests = same_size(self.many, self.prompt_tokens, self.output_tokens)
        return closed(self.name, requests, streams, _LIMIT_S)


def bursts(setting: Setting) -> tuple[Burst, ...]:
    return (
        Burst("burst of prompts", setting.count(24), 1024, 4),
        Burst("burst of tokens", setting.count(32), 64, 192),
    )


async def run(setting: Setting) -> Result:
    wanted = bursts(setting)
    with Shown(setting.console) as shown:
        expected = []
        async with standing(setting, _ORACLE, keeps_ids=True) as (oracle, _):
            for burst in wanted:
                load = burst.load(streams=1)
                # The seed is that of the run below.
                seed = f"0/{load.name}/0"
                expected.append(await send(load, oracle.server, oracle.asking, seed, shown.watching(oracle, load)))
        async with standing(setting, _CLUSTER, keeps_ids=True) as (target, cluster):
            with roles.record(cluster.grpc) as seen:
                runs = await _burst(target, wanted, shown, seen)
    comparison = Comparison((target,), None, Limits(), tuple(runs))
    setting.console.print(table(comparison))
    wrong = [mismatches(each.outcome, oracle_of) for each, oracle_of in zip(runs, expected, strict=True)]
    last = seen.samples[-1].nodes.values() if seen.samples else ()
    record = comparison.as_json(has_requests=False) | {
        "failed": sum(len(each.outcome.load.requests) - len(each.outcome.whole) for each in runs),
        "wrong_token_ids": sum(wrong),
        "role_changes": seen.num_changes,
        "is_home_at_the_end": bool(last) and all(node.home == node.acting for node in last),
        "roles": seen.as_json(),
    }
    for key in ("failed", "wrong_token_ids", "role_changes", "is_home_at_the_end"):
        setting.console.print(f"{key}: {record[key]}", highlight=False)
    return Result(record, {"serve-burst-roles": roles.draw(seen)} if seen.samples else {})


async def _burst(target: Target, wanted: Sequence[Burst], shown: Shown, seen: roles.Record) -> list[Measured]:
    """One burst after the other, each with a quiet time behind it."""
    tell = shown.told(lambda each: Figures.of(each.outcome))
    runs = []
    for burst in wanted:
        load = burst.load(streams=burst.many)
        seen.mark(burst.name)
        runs.append(await measured(target, load, 0, "0", shown.watching(target, load)))
        tell(runs[-1])
        seen.mark("quiet")
        await asyncio.sleep(_QUIET_S)
    return runs


def mismatches(found: Outcome, expected: Outcome) -> int:
    """Whole answers whose token ids are not the oracle's, and those that the oracle has no whole answer for."""
    right: dict[int, Any] = {answer.number: answer.token_ids for answer in expected.whole}
    return sum(right.get(answer.number) != answer.token_ids for answer in found.whole)
