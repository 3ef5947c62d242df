"""The experiment: starts the cluster, asks undisturbed, lets faults begin, asks again, and compares."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from baton.api_keys import secret_of
from baton.client import AsyncClient
from baton.errors import BadConfig, Unavailable
from baton.faults.config import FaultsConfig
from baton.faults.plan import Plan
from cli import demo, preflight
from cli.chaos import report
from cli.chaos.client import Caller, Stream
from cli.chaos.draw import drawn
from cli.chaos.load import Behaviour, Question, behaviour, demo_questions, own_questions
from cli.chaos.options import ChaosOptions
from cli.chaos.report import Asked, Report, Struck
from cli.chaos.verdict import Heard, Outcome, judged, verdict
from cli.chaos.watch import Watch
from cli.environment import Trust
from cli.launch import cluster
from cli.launch.options import ClusterOptions
from loadgen import machine
from loadgen.client import Server, model_of

# Streams that run when the time is up may end for so long; a request's own timeout comes first.
_LAST_S = 150.0
# For nodes to come back, and for blocks.
_BACK_S = 120.0
_SETTLE_S = 90.0
_MAX_RUNS = 10_000


def folder_of(options: ChaosOptions) -> Path:
    """A new one. Raises BadConfig."""
    wanted = (options.out or Path(f"chaos-{options.chaos_seed}")).resolve()
    names = (wanted, *(wanted.with_name(f"{wanted.name}-{i}") for i in range(2, _MAX_RUNS)))
    folder = next((path for path in names if not path.exists()), None)
    if folder is None:
        raise BadConfig(f"--out: {wanted} is there {_MAX_RUNS} times, expected a new folder", param="out")
    preflight.writable_folder(folder, "--out")
    return folder


def run(chaos: ChaosOptions, asked: ClusterOptions, folder: Path, console: Console) -> bool:
    """Whether the run passed. Raises BadConfig, ClusterFailed, and Unavailable if the cluster fails undisturbed."""
    nodes = {**dict(asked.worker_roles()), **dict.fromkeys(asked.router_names, "router")}
    schedule = asked.faults.file
    if schedule is None:
        schedule = folder / "schedule.toml"
        plan = drawn(
            chaos.chaos_seed, nodes, chaos.minutes * 60, rate=chaos.fault_rate, has_registry=asked.registry.is_used
        )
        if not plan.rules:
            raise BadConfig("no fault comes in so short a time, expected more --minutes or a higher --fault-rate")
        schedule.write_text(plan.as_toml())
    plan = Plan.load(schedule)
    faults = FaultsConfig(schedule, asked.faults.record or folder / "drawn", folder / "began.json").of_run()
    # A dead node is to be back soon: the next fault waits for it.
    supervise = replace(asked.supervise, max_backoff_s=min(1.0, asked.supervise.max_backoff_s))
    options = replace(
        asked, faults=faults, supervise=supervise, ready_file=asked.ready_file or folder / "ready.json",
        log_dir=asked.log_dir or folder / "logs",
    )  # fmt: skip
    experiment = _Experiment(chaos, options, plan, console)
    found = asyncio.run(experiment.run())
    facts = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "seed": chaos.chaos_seed,
             "streams": chaos.streams, "model": asked.model, "nodes": nodes, "machine": machine.machine(),
             "versions": machine.versions()}  # fmt: skip
    (folder / "report.json").write_text(json.dumps({**facts, **found.as_json()}, indent=1) + "\n")
    (folder / "report.svg").write_text(report.picture(found))
    report.show(found, console)
    console.print(f"schedule, what was drawn of it, report and logs: {folder}", markup=False, soft_wrap=True)
    console.print(f"the same faults again: --faults {faults.record}", markup=False, soft_wrap=True)
    return found.verdict.passed


class _Experiment:
    """One run. Times are seconds since faults began."""

    def __init__(self, chaos: ChaosOptions, options: ClusterOptions, plan: Plan, console: Console) -> None:
        self._chaos = chaos
        self._options = options
        self._plan = plan
        self._console = console
        self._nodes = tuple(node_id for node_id, _ in options.worker_roles())
        self._course: asyncio.Task[Report] | None = None
        keys = options.router.get("api_keys")
        self._api_key = secret_of(str(keys.value[0])) if keys and isinstance(keys.value, tuple) and keys.value else ""
        self._headers = {"Authorization": f"Bearer {self._api_key}"} if self._api_key else {}
        self._began_s = time.monotonic()
        self._asked: list[Asked] = []
        self._tokens: Counter[int] = Counter()
        is_demo = Path(options.model).expanduser().resolve() == demo.default_model()
        make = demo_questions if is_demo else own_questions
        self._questions: Sequence[Question] = make(chaos.chaos_seed, chaos.questions)

    async def run(self) -> Report:
        try:
            await cluster.up(self._options, self._say, self._on_ready, lambda: self._say("starting the cluster"))
        finally:
            if self._course is not None and not self._course.done():
                # The cluster ended before: told to, or failed.
                self._course.cancel()
                await asyncio.wait([self._course])
        if self._course is None or self._course.cancelled():
            raise Unavailable("the cluster was told to end before the run was over, so there is no verdict")
        return self._course.result()

    def _say(self, message: str) -> None:
        self._console.print(message, markup=False, highlight=False, soft_wrap=True)

    def _on_ready(self, faces: Sequence[cluster.Endpoints], stop: Callable[[], None]) -> None:
        if self._course is None:
            self._course = asyncio.create_task(self._follow(faces, stop))

    async def _follow(self, faces: Sequence[cluster.Endpoints], stop: Callable[[], None]) -> Report:
        try:
            async with AsyncExitStack() as stack:
                access = self._options.access
                trusts = Trust(tls_ca=access.tls_ca, tls_name=access.tls_name)
                clients = [AsyncClient(face.grpc, api_key=self._operators_key(), **trusts) for face in faces]
                routers = [await stack.enter_async_context(client) for client in clients]
                return await self._experiment([Server.parse(face.http, **trusts) for face in faces], routers)
        finally:
            stop()

    def _operators_key(self) -> str:
        """Where clients have keys, ledgers are for operators."""
        assert self._options.ready_file is not None
        file = json.loads(self._options.ready_file.read_text())["admin_key_file"]
        return self._api_key if file is None else Path(file).read_text().strip()

    def _now(self) -> float:
        return time.monotonic() - self._began_s

    async def _experiment(self, servers: Sequence[Server], routers: Sequence[AsyncClient]) -> Report:
        model = await model_of(servers[0], self._headers)
        caller = Caller(servers, self._headers, self._now)
        right = await self._undisturbed(caller, model)
        known = [(q, heard) for q, heard in zip(self._questions, right, strict=True) if q.expected is not None]
        assert self._options.ready_file is not None
        watch = Watch(self._options.ready_file, routers, self._now)
        seconds = self._chaos.minutes * 60
        self._say(f"{len(right)} requests were answered undisturbed; now faults strike for {seconds:.0f} s")
        self._began_s = time.monotonic()
        self._options.faults.begin(self._began_s)
        watching = asyncio.create_task(watch.run())
        try:
            await self._disturbed(caller, model, right, seconds)
            await watch.until_ready(len(self._nodes), _BACK_S)
            ledger = await watch.ledger(len(self._nodes), _SETTLE_S)
            await watch.look()
        finally:
            watching.cancel()
        struck = Struck.of(self._options.faults.folder)
        outcomes = Counter(each.outcome for each in self._asked)
        return Report(
            seconds=seconds, num_planned=len(self._plan.rules), struck=struck, asked=tuple(self._asked),
            num_questions=len(right), num_known=len(known),
            num_known_right=sum(heard.text.strip() == q.expected for q, heard in known), ledger=ledger,
            looks=tuple(watch.looks), nodes=self._nodes, routers=self._options.router_names, tokens=dict(self._tokens),
            verdict=verdict(outcomes, ledger, struck.total),
        )  # fmt: skip

    async def _undisturbed(self, caller: Caller, model: str) -> list[Heard]:
        """The only right answers. Raises Unavailable if one is missing."""
        waiting = enumerate(self._questions)
        found: dict[int, Stream] = {}

        async def stream() -> None:
            for number, question in waiting:
                body = question.bytes_of(model, f"quiet-{number}")
                found[number] = await caller.ask(number, question.path, body, Behaviour())

        async with asyncio.TaskGroup() as group:
            for _ in range(self._chaos.streams):
                group.create_task(stream())
        heard = [found[number].heard for number in range(len(self._questions))]
        for number, each in enumerate(heard):
            if each.error is not None or each.finish_reason is None:
                raise Unavailable(f"undisturbed, request {number} has no answer: {each.error or 'it did not end'}")
        return heard

    async def _disturbed(self, caller: Caller, model: str, right: Sequence[Heard], seconds: float) -> None:
        numbers = itertools.count()

        async def stream() -> None:
            while self._now() < seconds:
                await self._ask(caller, model, next(numbers), right)

        try:
            async with asyncio.timeout(seconds + _LAST_S), asyncio.TaskGroup() as group:
                for _ in range(self._chaos.streams):
                    group.create_task(stream())
        except TimeoutError:
            # What was cut off has no outcome: see _ask.
            pass

    async def _ask(self, caller: Caller, model: str, number: int, right: Sequence[Heard]) -> None:
        which = number % len(self._questions)
        question, took = self._questions[which], behaviour(self._chaos.chaos_seed, number)
        body = question.bytes_of(model, f"chaos-{number}")
        began_s, stream = self._now(), Stream()
        try:
            stream = await caller.ask(number, question.path, body, took)
        finally:
            heard = stream.heard
            outcome = judged(heard, right[which])
            self._tokens.update(int(at_s) for at_s in stream.stamps_s)
            self._asked.append(
                Asked(
                    number, question.kind, outcome, began_s, self._now(), len(stream.token_ids), stream.num_refused,
                    stream.num_resumed, stream.longest_gap_s, _detail(outcome, heard, right[which]),
                )
            )  # fmt: skip


def _detail(outcome: Outcome, heard: Heard, right: Heard) -> str:
    if outcome in (Outcome.WHOLE, Outcome.LEFT):
        return ""
    pairs = zip(heard.token_ids, right.token_ids, strict=False)
    first = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(heard.token_ids), len(right.token_ids)))
    said = f", {heard.error}" if heard.error else ""
    return f"{len(heard.token_ids)} of {len(right.token_ids)} tokens, the same up to {first}{said}"
