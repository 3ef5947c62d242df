"""The launcher's machine: feed events, look at the actions."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cli.launch.supervise import (
    Action,
    Announce,
    Begin,
    Exited,
    Finish,
    Kill,
    Phase,
    Ready,
    Say,
    Spawn,
    StopAsked,
    SuperviseConfig,
    Supervisor,
    Terminate,
    Tick,
)

CONFIG = SuperviseConfig(start_timeout_s=100, stop_grace_s=5, min_backoff_s=1, max_backoff_s=8, stable_s=30)


def running() -> Supervisor:
    machine = Supervisor(["router"], ["a", "b"], CONFIG)
    machine.handle(Begin(), 0)
    for name in ("a", "b", "router"):
        machine.handle(Ready(name), 1)
    assert machine.phase is Phase.RUNNING
    return machine


def test_all_start_together_and_are_announced_once_the_last_is_ready() -> None:
    machine = Supervisor(["router"], ["a", "b"], CONFIG)
    assert machine.handle(Begin(), 0) == [Spawn("a"), Spawn("b"), Spawn("router")]
    assert machine.handle(Ready("router"), 1) == []
    assert machine.handle(Ready("b"), 1) == []
    assert machine.handle(Ready("b"), 1) == []
    assert machine.handle(Ready("a"), 1) == [Announce()]


def test_a_death_at_the_start_ends_everything_with_that_childs_words() -> None:
    machine = Supervisor(["router"], ["a", "b"], CONFIG)
    machine.handle(Begin(), 0)
    assert machine.handle(Exited("a", "UnsupportedModel: gpt2"), 1) == [Terminate("router")]
    assert machine.handle(Exited("router", "exit code 0"), 1) == [Terminate("b")]
    assert machine.handle(Exited("b", "exit code 0"), 1) == [Finish("a did not start: UnsupportedModel: gpt2")]


def test_a_child_that_is_never_ready_ends_everything() -> None:
    machine = Supervisor(["router"], ["a"], CONFIG)
    machine.handle(Begin(), 0)
    machine.handle(Ready("router"), 1)
    assert machine.handle(Tick(), 99) == []
    assert machine.handle(Tick(), 100) == [Terminate("router")]
    machine.handle(Exited("router", ""), 101)
    assert machine.handle(Exited("a", ""), 101) == [Finish("a was not ready after 100 s")]


def test_a_dead_worker_comes_back_later_each_time_it_dies_young() -> None:
    machine, now, delays = running(), 2.0, []
    for _ in range(6):
        machine.handle(Exited("a", "killed"), now)
        due_at = machine.next_due_at
        assert due_at is not None
        delays.append(due_at - now)
        assert machine.handle(Tick(), due_at - 0.01) == []
        assert machine.handle(Tick(), due_at) == [Spawn("a")]
        assert machine.handle(Ready("a"), due_at + 1) == [Say("a is back"), Announce()]
        now = due_at + 2
    assert delays == [1, 2, 4, 8, 8, 8]


def test_a_worker_that_was_stable_comes_back_soon() -> None:
    machine = running()
    for now in (2.0, 100.0):
        machine.handle(Exited("a", "killed"), now)
        assert machine.next_due_at == now + 1
        machine.handle(Tick(), now + 1)
        machine.handle(Ready("a"), now + 2)


def test_a_worker_that_hangs_while_it_comes_back_is_killed_and_tried_again() -> None:
    machine = running()
    machine.handle(Exited("a", "killed"), 2)
    machine.handle(Tick(), 3)
    assert machine.handle(Tick(), 103) == [Kill("a")]
    assert isinstance(machine.handle(Exited("a", "killed"), 103)[0], Say)
    assert machine.handle(Tick(), 105) == [Spawn("a")]


def test_a_dead_router_comes_back_and_the_workers_stay() -> None:
    machine = running()
    assert machine.handle(Exited("router", "exit code 1"), 2) == [
        Say("router ended: exit code 1\nstarting it again in 1 s")
    ]
    assert machine.alive == ["a", "b"]
    assert machine.handle(Tick(), 3) == [Spawn("router")]
    assert machine.handle(Ready("router"), 5) == [Say("router is back"), Announce()]


def test_a_stop_while_the_router_is_down_ends_the_workers() -> None:
    machine = running()
    machine.handle(Exited("router", "killed"), 2)
    assert machine.handle(StopAsked(), 2.5) == [Terminate("a"), Terminate("b")]
    machine.handle(Exited("a", ""), 3)
    assert machine.handle(Exited("b", ""), 3) == [Finish(None)]


def test_a_router_that_was_told_to_end_ends_everything_without_error() -> None:
    for machine in (running(), Supervisor(["router"], ["a", "b"], CONFIG)):
        if machine.phase is Phase.STARTING:
            machine.handle(Begin(), 0)
        said, *told = machine.handle(Exited("router", "exit code 0", is_clean=True), 2)
        assert said == Say("router was told to end: the workers end too")
        assert told == [Terminate("a"), Terminate("b")]
        machine.handle(Exited("a", "exit code 0", is_clean=True), 3)
        assert machine.handle(Exited("b", "exit code 0", is_clean=True), 3) == [Finish(None)]


def test_one_of_several_routers_that_is_told_to_end_is_started_again() -> None:
    machine = Supervisor(["r", "s"], ["a"], CONFIG)
    machine.handle(Begin(), 0)
    for name in ("r", "s", "a"):
        machine.handle(Ready(name), 1)
    assert isinstance(machine.handle(Exited("r", "exit code 0", is_clean=True), 2)[0], Say)
    assert machine.handle(Tick(), 3) == [Spawn("r")]
    assert machine.handle(StopAsked(), 4) == [Terminate("r"), Terminate("s")]
    assert machine.handle(Exited("s", "exit code 0", is_clean=True), 5) == []
    assert machine.handle(Exited("r", "exit code 0", is_clean=True), 5) == [Terminate("a")]
    assert machine.handle(Exited("a", "exit code 0", is_clean=True), 6) == [Finish(None)]


def test_stop_tells_the_router_first_and_ends_without_error() -> None:
    machine = running()
    assert machine.handle(StopAsked(), 2) == [Terminate("router")]
    assert machine.handle(Exited("router", ""), 3) == [Terminate("a"), Terminate("b")]
    assert machine.handle(Exited("b", ""), 3) == []
    assert machine.handle(Exited("a", ""), 3) == [Finish(None)]
    assert machine.handle(Exited("a", ""), 3) == []


def test_those_who_do_not_stop_are_killed() -> None:
    machine = running()
    machine.handle(StopAsked(), 2)
    assert machine.handle(Tick(), 6.9) == []
    assert machine.handle(Tick(), 7) == [Kill("router"), Terminate("a"), Terminate("b")]
    assert machine.handle(Tick(), 12) == [Kill("a"), Kill("b"), Kill("router")]
    assert machine.handle(Tick(), 17) == [Finish("a, b, router cannot be killed")]


def test_a_second_stop_kills_at_once() -> None:
    machine = running()
    machine.handle(StopAsked(), 2)
    assert machine.handle(StopAsked(), 2.1) == [Kill("a"), Kill("b"), Kill("router")]
    for name in ("a", "router", "b"):
        last = machine.handle(Exited(name, ""), 2.2)
    assert last == [Finish(None)]


def test_a_worker_waiting_to_come_back_does_not_come_back_while_stopping() -> None:
    machine = running()
    machine.handle(Exited("a", "killed"), 2)
    machine.handle(StopAsked(), 2)
    assert Spawn("a") not in machine.handle(Tick(), 4)


class AnyOrder(RuleBasedStateMachine):
    """Children live, die and hang at random; the machine is never asked to do the impossible and always ends."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.machine = Supervisor(["router"], ["a", "b"], CONFIG)
        self.alive: set[str] = set()
        self.finished: Finish | None = None
        self.was_running = False
        self.perform(self.machine.handle(Begin(), 0))

    def perform(self, actions: list[Action]) -> None:
        for action in actions:
            assert self.finished is None, "nothing follows Finish"
            match action:
                case Spawn(name):
                    assert name not in self.alive
                    assert self.machine.phase is not Phase.STOPPING
                    self.alive.add(name)
                case Terminate(name) | Kill(name):
                    assert name in self.alive
                case Finish(error):
                    assert not self.alive or (error is not None and "cannot be killed" in error)
                    self.finished = action
                case Announce():
                    self.was_running = True
                    assert self.machine.phase is Phase.RUNNING

    @rule(name=st.sampled_from(["a", "b", "router"]))
    def ready(self, name: str) -> None:
        self.perform(self.machine.handle(Ready(name), self.now))

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def exit(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.alive)))
        self.alive.discard(name)
        self.perform(self.machine.handle(Exited(name, "gone", is_clean=data.draw(st.booleans())), self.now))

    @rule()
    def tick(self) -> None:
        self.now = max(self.now, self.machine.next_due_at or 0.0)
        self.perform(self.machine.handle(Tick(), self.now))

    @rule(seconds=st.floats(0, 50))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def stop(self) -> None:
        self.perform(self.machine.handle(StopAsked(), self.now))

    @invariant()
    def knows_who_lives(self) -> None:
        assert self.machine.phase is Phase.DONE or set(self.machine.alive) == self.alive

    def teardown(self) -> None:
        if self.machine.phase is not Phase.STOPPING:
            self.perform(self.machine.handle(StopAsked(), self.now))
        for _ in range(4):
            if self.machine.next_due_at is not None:
                self.tick()
        assert self.finished is not None


AnyOrder.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestAnyOrder = AnyOrder.TestCase
