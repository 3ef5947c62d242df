"""Three times the requests that a cluster can serve: a refusal is heard at once, and what is served is served in time.

First what a closed loop gets out of the cluster, then the goodput at rates that rise until it falls; the best of these
is the capacity.
Then three times the capacity for a minute, and at once a rate that is easily served, until requests meet the objective
again. The same without an objective that the router knows, for comparison.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from baton.errors import Unavailable
from bench.serve.turns import Result, Setting, standing
from loadgen.chart import Line, Panel, Point, draw
from loadgen.client import Answer
from loadgen.clusters import Shape
from loadgen.compare import Target, measured
from loadgen.figures import Figures
from loadgen.load import Load, Request, closed, poisson, same_size
from loadgen.objectives import Limits
from loadgen.report import Shown
from loadgen.run import Outcome
from loadgen.samples import Percentiles

_PROMPT, _OUTPUT = 512, 32
_STREAMS = 16
# The first rate beside the closed loop's, the factor from one to the next, and how many there are at most.
_FIRST, _STEP, _MAX_RATES = 0.6, 1.3, 8
_TIMES, _AFTERWARDS = 3.0, 0.5
_OBJECTIVE_S = 4.0
_LIMIT_S = 120.0
_SHAPE = ("--prefill", "1", "--decode", "1", "--tbt-target-ms", "100")
_TOLD = ("--slo-ttft-ms", f"{_OBJECTIVE_S * 1e3:g}")
WITH, WITHOUT = Shape("admission by objective", (*_SHAPE, *_TOLD)), Shape("no objective", _SHAPE)
# A refusal is heard in less; the time that a cluster has until all requests are good again.
_HEARD_S, _RECOVERED_S = 0.1, 5.0


@dataclass(frozen=True, slots=True)
class Phases:
    """Seconds of the overload and of the time after it; the rates."""

    over_s: float
    after_s: float
    capacity: float

    def load(self) -> Load:
        over = _part(_TIMES * self.capacity, self.over_s, 0.0, "over")
        after = _part(_AFTERWARDS * self.capacity, self.after_s, self.over_s, "after")
        return Load("overload", (*over, *after), rate=_TIMES * self.capacity, limit_s=_LIMIT_S)


def _part(rate: float, seconds: float, from_s: float, seed: str) -> tuple[Request, ...]:
    count = max(1, round(rate * seconds))
    load = poisson("", same_size(count, _PROMPT, _OUTPUT), rate, 0.0, seed)
    timed = (replace(request, due_s=from_s + request.due_s) for request in load.requests)
    return tuple(request for request in timed if request.due_s < from_s + seconds)


async def run(setting: Setting) -> Result:
    limits = Limits(ttft_s=_OBJECTIVE_S)
    with Shown(setting.console) as shown:
        async with standing(setting, WITH) as (target, _):
            closed_s = await _closed_loop(setting, target, shown)
            sweep = [await _goodput(setting, target, _FIRST * closed_s, limits, shown)]
            while not has_peaked(sweep) and len(sweep) < _MAX_RATES:
                sweep.append(await _goodput(setting, target, sweep[-1]["rate"] * _STEP, limits, shown))
            best = max(row["goodput_requests_s"] for row in sweep)
            if not best:
                raise Unavailable(f"at no rate did a request get its first token within {_OBJECTIVE_S:g} s")
            phases = Phases(setting.seconds, setting.seconds / 2, best)
            outcomes = {WITH.name: await _overloaded(target, phases, shown)}
        async with standing(setting, WITHOUT) as (target, _):
            outcomes[WITHOUT.name] = await _overloaded(target, phases, shown)
    rows = [judged(name, outcome, phases, best, limits) for name, outcome in outcomes.items()]
    for row in rows:
        setting.console.print(row, highlight=False)
    lines = (Line(name, _over_time(outcome), is_joined=False) for name, outcome in outcomes.items())
    panel = Panel("TTFT of answered requests", "sent at, s", "s", tuple(lines), is_log=True)
    what = f"{_TIMES:g} times the capacity for {phases.over_s:g} s, then {_AFTERWARDS:g} times"
    title = f"{what}; objective: {_OBJECTIVE_S:g} s to the first token"
    record = {
        "objective_s": _OBJECTIVE_S, "closed_loop_requests_s": closed_s, "sweep": sweep,
        "best_goodput_requests_s": best, "overload": rows,
    }  # fmt: skip
    return Result(record, {"serve-overload": draw(title, [panel])})


def has_peaked(sweep: Sequence[Mapping[str, Any]]) -> bool:
    """At two higher rates the goodput was smaller."""
    goodput = [row["goodput_requests_s"] for row in sweep]
    return len(goodput) - goodput.index(max(goodput)) > 2


async def _overloaded(target: Target, phases: Phases, shown: Shown) -> Outcome:
    load = phases.load()
    return (await measured(target, load, 0, "0", shown.watching(target, load))).outcome


async def _closed_loop(setting: Setting, target: Target, shown: Shown) -> float:
    """Requests a second with as many in flight as it can take; without the objective, which would refuse them."""
    free = replace(target, asking=replace(target.asking, headers={"x-slo-ttft-ms": "600000"}))
    load = closed("closed loop", same_size(setting.count(48), _PROMPT, _OUTPUT), _STREAMS, _LIMIT_S)
    found = await measured(free, load, 0, "0", shown.watching(target, load))
    return Figures.of(found.outcome).requests_s


async def _goodput(setting: Setting, target: Target, rate: float, limits: Limits, shown: Shown) -> dict[str, Any]:
    requests = same_size(max(2, round(rate * setting.seconds / 2)), _PROMPT, _OUTPUT)
    load = poisson(f"{rate:.3g}/s", requests, rate, _LIMIT_S, "0")
    found = await measured(target, load, 0, "0", shown.watching(target, load))
    # The rate of good ones while requests came: the last answers take longer.
    good = sum(map(limits.is_met, found.outcome.whole)) / max(load.last_due_s, 1e-9)
    return {"rate": rate, **Figures.of(found.outcome, None, limits).as_json(), "goodput_requests_s": good}


def judged(name: str, outcome: Outcome, phases: Phases, best: float, limits: Limits) -> dict[str, Any]:
    during = [answer for answer in outcome.answers if answer.due_s < phases.over_s]
    after = [answer for answer in outcome.answers if answer.due_s >= phases.over_s]
    good = sum(answer.error is None and limits.is_met(answer) for answer in during) / phases.over_s
    refused = [answer.ended_s - answer.sent_s for answer in during if answer.status == 429]
    recovery = recovery_s(after, phases.over_s, limits)
    heard = Percentiles.of(refused)
    return {
        "admission": name,
        "requests": len(during),
        "refused": len(refused),
        "goodput_requests_s": good,
        "share_of_best": good / best if best else None,
        "refusal_p50_s": heard.p50, "refusal_p99_s": heard.p99, "refusal_max_s": heard.max,
        "recovery_s": recovery,
        "cut": outcome.num_cut,
        "aims": {
            "goodput": bool(best) and good >= 0.9 * best,
            "refusals": heard.p99 is not None and heard.p99 < _HEARD_S,
            "recovery": recovery is not None and recovery <= _RECOVERED_S,
        },
    }  # fmt: skip


def recovery_s(after: Sequence[Answer], over_at_s: float, limits: Limits) -> float | None:
    """From the end of the overload until a request was sent from which on all were good; None: not seen."""
    bad = [answer.due_s for answer in after if answer.error is not None or not limits.is_met(answer)]
    if not bad:
        return 0.0 if after else None
    good = [answer.due_s for answer in after if answer.due_s > max(bad)]
    return min(good) - over_at_s if good else None


def _over_time(outcome: Outcome) -> tuple[Point, ...]:
    return tuple(Point(answer.due_s, answer.ttft_s) for answer in outcome.whole)
