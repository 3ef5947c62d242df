"""Several routers over one set of nodes: does the work spread as evenly as with one, and do roles stay calm?

Routers do not talk to each other: each knows its own requests at once and those of the others by the nodes' statuses.
The nodes are real ones without a model (`worker/fake.py`), whose steps take a time; all runs in this process. Requests
arrive by a Poisson process, in turn at each router, so that the load is the same for any number of routers.

    python -m bench.routers --seconds 30
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
import urllib.request
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from baton.client import AsyncClient, Completion
from baton.types import Role
from loadgen.samples import Samples
from router.cluster.config import PolicyConfig
from router.config import RouterConfig
from router.serve import Router, running
from worker.fake import FakeCluster, FakeConfig
from worker.roles import Reason

# A prompt takes 0.2 s, its answer 2 s: a prompt on a decode node makes a dozen others wait.
_PROMPT_TOKENS, _OUTPUT_TOKENS = 200, 100
_NODES = FakeConfig(step_s=0.02, prefill_token_s=0.001, status_s=0.2)
_READY_S = 20.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one run."""

    num_routers: int
    # Of what the prefill pool can compute.
    load: float
    num_requests: int
    num_failed: int
    # Prompts and answers by node.
    prompts: Mapping[str, int]
    answers: Mapping[str, int]
    ttft_p50_s: float
    ttft_p99_s: float
    # Of placements, by the rule that made them.
    reasons: Mapping[str, int]
    # Changes of the acting role by node, and of home roles.
    num_changes: Mapping[str, int]
    num_moves: int

    @property
    def spread(self) -> float:
        """Most prompts of a prefill node over the mean of these nodes; 1: all have the same."""
        own = [count for node_id, count in self.prompts.items() if node_id.startswith(Role.PREFILL.value)]
        return max(own) / (sum(own) / len(own))

    def line(self) -> str:
        prompts = ", ".join(f"{name} {count}" for name, count in sorted(self.prompts.items()))
        most = max(self.num_changes.values(), default=0)
        return (
            f"{self.num_routers} routers, load {self.load:.2f}: {self.num_requests} requests, {self.num_failed} fail; "
            f"prompts {prompts} (spread {self.spread:.2f}); "
            f"TTFT p50 {self.ttft_p50_s * 1e3:.0f} ms, p99 {self.ttft_p99_s * 1e3:.0f} ms; "
            f"{', '.join(f'{reason} {count}' for reason, count in self.reasons.items())}; "
            f"changes of acting roles {sum(self.num_changes.values())} ({most} of one node), of homes {self.num_moves}"
        )


async def run(
    num_routers: int,
    load: float,
    seconds: float,
    *,
    policy: PolicyConfig | None = None,
    per_pool: int = 2,
    num_output_tokens: int = _OUTPUT_TOKENS,
    seed: int = 0,
) -> Outcome:
    """``load``: prompts that arrive, as a share of what the prefill pool can compute."""
    policy = policy or PolicyConfig()
    rate_s = load * per_pool / (_PROMPT_TOKENS * _NODES.prefill_token_s)
    async with AsyncExitStack() as stack:
        cluster = await stack.enter_async_context(FakeCluster(_NODES, prefill=per_pool, decode=per_pool))
        # Each with an id of its own.
        configs = [RouterConfig(nodes=cluster.addresses, policy=policy) for _ in range(num_routers)]
        routers = [await stack.enter_async_context(running(config)) for config in configs]
        clients = [await stack.enter_async_context(AsyncClient(await _ready(router))) for router in routers]
        answers = await _arrivals(clients, rate_s, seconds, num_output_tokens, random.Random(seed))
        done = [x for x in answers if isinstance(x, Completion)]
        reasons = await asyncio.to_thread(_reasons, routers)
        changes = [(name, change) for name, node in cluster.nodes.items() for change in node.role_changes]
    ttft = Samples.of(x.relay.ttft_s for x in done)
    moves = [x for _, x in changes if x.reason in (Reason.SCHEDULER, Reason.OPERATOR)]
    return Outcome(
        num_routers=num_routers,
        load=load,
        num_requests=len(answers),
        num_failed=len(answers) - len(done),
        prompts=dict.fromkeys(cluster.nodes, 0) | Counter(x.relay.prefill_node_id for x in done),
        answers=dict.fromkeys(cluster.nodes, 0) | Counter(x.relay.decode_node_id for x in done),
        ttft_p50_s=ttft.median,
        ttft_p99_s=ttft.percentile(0.99),
        reasons=reasons,
        num_changes=Counter(name for name, x in changes if x not in moves),
        num_moves=len(moves),
    )


def _reasons(routers: Sequence[Router]) -> dict[str, int]:
    """As the routers count them."""
    found: Counter[str] = Counter()
    for router in routers:
        with urllib.request.urlopen(f"{router.http}/metrics", timeout=_READY_S) as answer:
            text = answer.read().decode()
        for family in text_string_to_metric_families(text):
            if family.name == "baton_placements":
                found.update({x.labels["reason"]: int(x.value) for x in family.samples if x.value})
    return dict(found)


async def _ready(router: Router) -> str:
    """Its gRPC address, once it sees every node."""
    assert router.grpc is not None
    async with asyncio.timeout(_READY_S):
        # A router has no event for it.
        while not all(member.is_up for member in router.dispatcher.nodes.members):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    return router.grpc


async def _arrivals(
    clients: list[AsyncClient], rate_s: float, seconds: float, num_output_tokens: int, rng: random.Random
) -> list[Completion | Exception]:
    found: list[Completion | Exception] = []

    async def ask(number: int) -> None:
        prompt = [rng.randrange(1, _NODES.vocab_size) for _ in range(_PROMPT_TOKENS)]
        try:
            client = clients[number % len(clients)]
            found.append(await client.complete(prompt, max_tokens=num_output_tokens, seed=number, ignore_eos=True))
        except Exception as error:
            found.append(error)

    due_s, ends_s, number = time.monotonic(), time.monotonic() + seconds, 0
    async with asyncio.TaskGroup() as tasks:
        while (due_s := due_s + rng.expovariate(rate_s)) < ends_s:
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            tasks.create_task(ask(number))
            number += 1
    return found


async def _all(loads: list[float], counts: list[int], seconds: float, **settings: Any) -> None:
    for load in loads:
        for count in counts:
            print((await run(count, load, seconds, **settings)).line(), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=30.0, help="of each run")
    parser.add_argument("--load", type=float, action="append", help="of the prefill pool's capacity")
    parser.add_argument("--routers", type=int, action="append")
    parser.add_argument("--borrow-after", type=float, default=PolicyConfig().borrow_after_s)
    parser.add_argument("--repurpose-after", type=float, default=None, help="seconds; default: never")
    parser.add_argument("--output-tokens", type=int, default=_OUTPUT_TOKENS)
    parser.add_argument("--per-pool", type=int, default=2, help="nodes")
    arguments = parser.parse_args()
    window_s = arguments.repurpose_after or PolicyConfig().repurpose_window_s
    policy = PolicyConfig(
        borrow_after_s=arguments.borrow_after,
        repurpose_after_s=arguments.repurpose_after,
        repurpose_window_s=window_s,
    )
    asyncio.run(
        _all(
            arguments.load or [0.7, 1.4], arguments.routers or [1, 2], arguments.seconds,
            policy=policy, per_pool=arguments.per_pool, num_output_tokens=arguments.output_tokens,
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
