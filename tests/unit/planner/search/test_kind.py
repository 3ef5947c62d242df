"""The search over a grid, with designs whose highest rate is known, and with simulated ones."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import BadConfig
from baton.types import Role
from planner.design import Design
from planner.machines import catalogue
from planner.models import BUILT_IN
from planner.results import Profile
from planner.search.kind import Answer, KindSearch
from planner.search.question import Goal, Kind, Limits, Question, Range, kinds
from planner.search.source import Redrawn
from planner.search.trial import Simulations, highest
from tests.support.designs import LENGTHS, Known

KNOWN = catalogue()
A, H = KNOWN["a100-80gb"], KNOWN["h100-80gb"]


def question(**fields: object) -> Question:
    made = Question(Redrawn(LENGTHS, 10.0, 1), Profile.COMPAT, BUILT_IN["bloom-176b"], 8, KNOWN, kinds((A, H), ()))
    return replace(made, **fields)  # type: ignore[arg-type]


def grid(kind: Kind, limits: Limits) -> list[Design]:
    """All of it, by hand."""
    prompts, counts = (0,) if kind.token is None else range(1, limits.prompt.high + 1), range(1, 30)
    prompts = [prompt for prompt in prompts if prompt % limits.prompt_step == 0]
    designs = [kind.design(*place) for place in product(prompts, counts)]
    return [design for design in designs if is_within(design, limits)]


def is_within(design: Design, limits: Limits) -> bool:
    prompt, token, mixed = (design.count(role) for role in (Role.PREFILL, Role.DECODE, Role.MIXED))
    pools = not mixed and not (
        limits.prompt.low <= prompt <= limits.prompt.high and limits.token.low <= token <= limits.token.high
    )
    return (
        not pools
        and limits.machines.low <= design.num_machines <= limits.machines.high
        and (limits.dollars_per_hour is None or design.dollars_per_hour <= limits.dollars_per_hour + 1e-6)
        and (limits.power_units is None or design.power_units <= limits.power_units + 1e-6)
    )


@pytest.mark.parametrize("most", [1, 2, 7, 40])
def test_the_highest_rate_is_that_of_a_scan(most: int) -> None:
    for limit, guess in product(range(most + 1), (1, 3, 100)):
        asked: list[int] = []

        def meets(steps: int, limit: int = limit, asked: list[int] = asked) -> bool:
            asked.append(steps)
            return steps <= limit

        assert highest(meets, most, guess=guess) == limit
        assert len(set(asked)) == len(asked)
        assert all(1 <= steps <= most for steps in asked)


def test_the_highest_rate_of_a_simulated_design_is_that_of_a_scan() -> None:
    run_one, design = Simulations(question()).run, Kind(H, A).design(1, 1)
    scanned = [steps for steps in range(1, 16) if run_one(design, float(steps)).is_met]
    # Else a scan has no one answer.
    assert scanned == list(range(1, len(scanned) + 1))
    assert 0 < len(scanned) < 15
    assert highest(lambda steps: run_one(design, float(steps)).is_met, 15) == len(scanned)


ranges = st.tuples(st.integers(1, 6), st.integers(0, 8)).map(lambda each: Range(each[0], each[0] + each[1]))
limits_of_all_kinds = st.builds(
    Limits,
    st.none() | st.floats(10, 600),
    st.none() | st.floats(20, 700),
    st.tuples(st.integers(1, 6), st.integers(0, 12)).map(lambda each: Range(each[0], each[0] + each[1])),
    ranges,
    ranges,
    prompt_step=st.integers(1, 3),
)
all_kinds = st.sampled_from((Kind(H, A), Kind(A, A), Kind(A, H), Kind(H, None), Kind(A, None)))


@given(all_kinds, limits_of_all_kinds, st.sampled_from(Goal), st.floats(0.3, 9), st.floats(0.3, 9))
def test_the_best_is_that_of_the_whole_grid_and_no_limit_is_passed(
    kind: Kind, limits: Limits, goal: Goal, prompt_rate: float, token_rate: float
) -> None:
    """Failure 28: not even a design that is only tried exceeds a budget or a number of machines."""

    def highest_rate(prompt: int, token: int) -> float:
        if kind.token is None:
            return prompt * min(prompt_rate, token_rate)
        return min(prompt * prompt_rate, token * token_rate, prompt + token)

    run_one = Known(highest_rate)
    rate = None if goal is Goal.THROUGHPUT else 6.0
    answer = KindSearch(question(goal=goal, rate=rate, limits=limits, max_rate=50.0), kind, run_one).answer()
    assert all(is_within(design, limits) for design, _ in run_one.designs)
    whole = grid(kind, limits)
    assert answer.grid == len(whole)
    # No design is run twice at a rate.
    assert len(run_one.designs) == len(set(run_one.designs)) == len(answer.tried)

    def best_of(design: Design) -> float:
        reached = highest_rate(design.num_machines - design.count(Role.DECODE), design.count(Role.DECODE))
        return min(50.0, float(int(reached)))

    def merit(design: Design) -> tuple[float, float, float, float]:
        dollars, power = design.dollars_per_hour, design.power_units
        first, second = (power, dollars) if goal is Goal.POWER else (dollars, power)
        reached = -best_of(design) if goal is Goal.THROUGHPUT else 0.0
        return (reached, first, second, design.num_machines)

    able = [design for design in whole if best_of(design) >= (rate or 1)]
    if not able:
        assert answer.best is None
        return
    assert answer.best is not None
    assert merit(answer.best.design) == min(map(merit, able))
    assert answer.best.rate == (rate or best_of(answer.best.design))


def test_far_fewer_designs_are_run_than_the_grid_has() -> None:
    limits = Limits(power_units=40 * H.power_units)
    run_one = Known(lambda prompt, token: min(4 * prompt, 6 * token))
    answer = KindSearch(question(limits=limits), Kind(H, H), run_one).answer()
    assert answer.best is not None
    assert answer.best.rate == 96.0
    assert answer.best.design.num_machines == 40
    assert answer.grid == 780
    assert len(run_one.designs) < 120


def test_a_simulated_search_finds_the_best_of_the_whole_grid() -> None:
    limits = Limits(machines=Range(1, 4), prompt=Range(1, 3), token=Range(1, 3))
    asked = question(limits=limits, max_rate=12.0)
    kind, simulations = Kind(H, A), Simulations(asked)
    best = {
        design: max((rate for rate in range(1, 13) if simulations.run(design, float(rate)).is_met), default=0)
        for design in grid(kind, limits)
    }
    answer: Answer = KindSearch(asked, kind, simulations).answer()
    assert answer.best is not None
    assert answer.best.rate == max(best.values()) > 0
    reached = [design for design, rate in best.items() if rate == answer.best.rate]
    assert answer.best.design.dollars_per_hour == min(design.dollars_per_hour for design in reached)


def test_progress_comes_to_its_end() -> None:
    parts: list[int] = []
    asked = question(limits=Limits(machines=Range(1, 9)), has_fronts=True)
    search = KindSearch(asked, Kind(H, H), Known(lambda prompt, token: min(prompt, token)), parts.append)
    search.answer()
    assert sum(parts) == search.num_parts
    assert min(parts) >= 0


def test_a_rate_that_no_design_misses_is_told() -> None:
    asked = question(limits=Limits(machines=Range(1, 2)), max_rate=5.0)
    assert KindSearch(asked, Kind(H, H), Known(lambda prompt, token: 100.0)).answer().is_bounded
    assert not KindSearch(asked, Kind(H, H), Known(lambda prompt, token: 4.0)).answer().is_bounded


def test_the_goal_and_its_rate_go_together() -> None:
    with pytest.raises(BadConfig, match="a rate of 1 is given, and the goal throughput") as raised:
        question(goal=Goal.THROUGHPUT, rate=1.0)
    assert raised.value.param == "rate"
    with pytest.raises(BadConfig, match="the goal cost has no rate"):
        question(goal=Goal.COST)
