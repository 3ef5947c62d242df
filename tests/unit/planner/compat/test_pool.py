"""A pool's least machine is the one that a look at all of them finds."""

from __future__ import annotations

from operator import attrgetter
from typing import cast

from hypothesis import given
from hypothesis import strategies as st

from planner.compat.machine import Machine
from planner.compat.pool import Pool


class Node:
    """What a pool sees of a machine."""

    def __init__(self) -> None:
        self.pool: Pool | None = None
        self.figure = 0


@given(st.lists(st.tuples(st.integers(0, 4), st.sampled_from(["change", "leave", "join"]), st.integers(0, 3))))
def test_the_least_is_the_first_of_those_with_the_least_figure(steps: list[tuple[int, str, int]]) -> None:
    pool, nodes, inside = Pool(attrgetter("figure")), [Node() for _ in range(5)], list[Node]()
    for number, step, figure in steps:
        node = nodes[number]
        machine = cast(Machine, node)
        if step == "join" and node not in inside:
            pool.add(machine)
            inside.append(node)
        elif step == "leave" and node in inside:
            pool.remove(machine)
            inside.remove(node)
        elif step == "change":
            node.figure = figure
            if node.pool is not None:
                node.pool.changed(machine)
        assert list(pool) == inside
        assert pool.least() is (min(inside, key=attrgetter("figure")) if inside else None)
        assert all((node.pool is pool) == (node in inside) for node in nodes)
