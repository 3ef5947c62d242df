"""The same schedule strikes the same again: in any order of other points, and from what was written down."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from baton.faults.faults import replaying
from baton.faults.injector import Injector, Point, Strike
from baton.faults.kinds import DEFAULT_S, KINDS, TAKES, FaultKind, Layer, has_length
from baton.faults.plan import Plan, Rule

NODE, ROLE = "decode-[0]", "decode"
LAYERS = (Layer.SESSION, Layer.CONTROL, Layer.DATA, Layer.ENGINE)


@st.composite
def rules(draw: st.DrawFn) -> Rule:
    layer = draw(st.sampled_from(LAYERS))
    fault = draw(st.sampled_from(TAKES[layer]))
    has_nth = draw(st.booleans())
    of_requests = layer is not Layer.ENGINE
    return Rule(
        layer,
        fault,
        kind=draw(st.sampled_from(("*", *KINDS[layer][:2]))),
        node=draw(st.sampled_from(("*", "decode-*", "prefill-*"))),
        peer=draw(st.sampled_from(("*", "router"))) if of_requests else "*",
        request=draw(st.sampled_from(("*", "a", "b/0/1"))) if of_requests else "*",
        nth=tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))) if has_nth else (),
        probability=None if has_nth else draw(st.sampled_from((0.0, 0.3, 1.0))),
        seconds=(0.5 * DEFAULT_S[fault], DEFAULT_S[fault]) if has_length(layer, fault) else (0.0, 0.0),
    )


@st.composite
def points(draw: st.DrawFn) -> Point:
    layer = draw(st.sampled_from(LAYERS))
    kind = draw(st.sampled_from(KINDS[layer][:2]))
    if layer is Layer.ENGINE:
        return Point(layer, kind)
    return Point(layer, kind, "router", draw(st.sampled_from(("a/0/1", "b/0/1", "b/0/2"))))


def decided(plan: Plan, asked: Sequence[Point]) -> list[Strike]:
    injector = Injector(plan, NODE, ROLE)
    return [strike for point in asked if (strike := injector.decide(point, None)) is not None]


def address(strike: Strike) -> tuple[str, Point, int]:
    return strike.fault.value, strike.point, strike.number


plans = st.builds(Plan, st.integers(0, 2**53), st.lists(rules(), max_size=5).map(tuple))


@given(plans, st.lists(points(), max_size=40), st.randoms(use_true_random=False))
def test_the_same_faults_in_any_interleaving(plan: Plan, asked: list[Point], rng: object) -> None:
    shuffled = list(asked)
    rng.shuffle(shuffled)  # type: ignore[attr-defined]

    def whole(strike: Strike) -> tuple[object, ...]:
        return (*address(strike), strike.seconds, strike.position, strike.rule)

    assert sorted(map(whole, decided(plan, asked))) == sorted(map(whole, decided(plan, shuffled)))


@given(plans, st.lists(points(), max_size=40))
def test_what_was_drawn_strikes_again_in_the_same_order(plan: Plan, asked: list[Point]) -> None:
    drawn = decided(plan, asked)
    text = Plan(0, tuple(replaying(strike, NODE, 1, None) for strike in drawn)).as_toml()
    again = decided(Plan.parse(text, "drawn"), asked)
    assert list(map(address, again)) == list(map(address, drawn))
    assert [strike.seconds for strike in again] == [strike.seconds for strike in drawn]
    corrupt = [s.position for s in drawn if s.fault is FaultKind.CORRUPT]
    assert [s.position for s in again if s.fault is FaultKind.CORRUPT] == corrupt
    other = Injector(Plan.parse(text, "drawn"), NODE, ROLE, life=2)
    assert not [p for p in asked if p.layer is Layer.ENGINE and other.decide(p, None)]
