"""The roles of a node by hand-turned time, and as routers see them."""

from __future__ import annotations

import grpc.aio
import pytest

from baton.errors import Conflict, InvalidRequest
from baton.machine import Tick
from baton.types import Role
from baton.v1 import common_pb2, node_pb2, node_pb2_grpc
from tests.support.node import arrive, fill, running_node, session, spec
from worker.roles import Reason, RoleChanged, Roles, RolesConfig, SetRole, Work
from worker.session import SessionConfig

P, D, M = Role.PREFILL, Role.DECODE, Role.MIXED
CONFIG = RolesConfig(dwell_s=2.0, min_home_s=30.0)
IDLE = Work(has_prompts=False, has_decodes=False)
PROMPTS = Work(has_prompts=True, has_decodes=False)
DECODES = Work(has_prompts=False, has_decodes=True)
BOTH = Work(has_prompts=True, has_decodes=True)


def changed(before: Role, after: Role, reason: Reason) -> list[RoleChanged]:
    return [RoleChanged(before, after, reason)]


@pytest.mark.parametrize(
    ("home", "work", "acting"),
    [
        *((P, work, P) for work in (IDLE, PROMPTS)), *((P, work, M) for work in (DECODES, BOTH)),
        *((D, work, D) for work in (IDLE, DECODES)), *((D, work, M) for work in (PROMPTS, BOTH)),
        *((M, work, M) for work in (IDLE, PROMPTS, DECODES, BOTH)),
    ],
)  # fmt: skip
def test_work_of_the_other_pool_makes_a_node_act_as_mixed(home: Role, work: Work, acting: Role) -> None:
    roles = Roles(home, CONFIG)
    assert roles.handle(work, 0.0) == ([] if acting is home else changed(home, acting, Reason.BORROWED))
    assert (roles.home, roles.acting, roles.wake_at_s) == (home, acting, None)


@pytest.mark.parametrize(("home", "foreign", "own"), [(D, PROMPTS, DECODES), (P, DECODES, PROMPTS)])
def test_it_goes_home_after_the_dwell(home: Role, foreign: Work, own: Work) -> None:
    roles = Roles(home, CONFIG)
    roles.handle(foreign, 0.0)
    assert roles.handle(own, 5.0) == []
    assert (roles.acting, roles.wake_at_s) == (M, 7.0)
    # More of its own work does not keep it away, and the end of all work does not either.
    assert roles.handle(IDLE, 6.0) == []
    assert roles.wake_at_s == 7.0
    assert roles.handle(Tick(), 6.9) == []
    assert roles.handle(Tick(), 7.0) == changed(M, home, Reason.RETURNED)
    assert (roles.acting, roles.wake_at_s) == (home, None)


def test_work_during_the_dwell_keeps_it_and_no_change_is_told() -> None:
    roles = Roles(D, CONFIG)
    roles.handle(PROMPTS, 0.0)
    roles.handle(IDLE, 1.0)
    assert roles.handle(PROMPTS, 2.0) == []
    assert roles.wake_at_s is None
    assert roles.handle(Tick(), 3.0) == []
    roles.handle(IDLE, 4.0)
    assert roles.handle(Tick(), 6.0) == changed(M, D, Reason.RETURNED)


@pytest.mark.parametrize("home", [P, D, M])
@pytest.mark.parametrize("role", [P, D, M])
def test_an_operator_is_always_obeyed_and_pins(home: Role, role: Role) -> None:
    roles = Roles(home, CONFIG)
    expected = [] if home is role else changed(home, role, Reason.OPERATOR)
    assert roles.handle(SetRole(role), 0.0) == expected
    assert (roles.home, roles.acting, roles.is_pinned) == (role, role, True)
    with pytest.raises(Conflict, match="operator"):
        roles.handle(SetRole(home, expected=role), 1000.0)
    assert (roles.home, roles.is_pinned) == (role, True)
    # Auto: where it started, and free again.
    assert roles.handle(SetRole(None), 1001.0) == ([] if home is role else changed(role, home, Reason.OPERATOR))
    assert (roles.home, roles.acting, roles.is_pinned) == (home, home, False)


def test_a_scheduler_compares_and_sets() -> None:
    roles = Roles(D, CONFIG)
    with pytest.raises(Conflict, match="home role is decode, expected prefill"):
        roles.handle(SetRole(M, expected=P), 0.0)
    assert roles.handle(SetRole(P, expected=D), 0.0) == changed(D, P, Reason.SCHEDULER)
    assert (roles.home, roles.acting, roles.is_pinned) == (P, P, False)
    # Another router decided on the same state: it hears that the state is another one, not that it is obeyed twice.
    with pytest.raises(Conflict, match="home role is prefill, expected decode"):
        roles.handle(SetRole(P, expected=D), 0.1)
    with pytest.raises(InvalidRequest, match="role"):
        roles.handle(SetRole(None, expected=P), 100.0)


def test_schedulers_leave_a_node_in_a_pool_for_a_minimum_time() -> None:
    roles = Roles(D, CONFIG)
    roles.handle(SetRole(P, expected=D), 10.0)
    with pytest.raises(Conflict, match=r"again in 1\.0 s") as refused:
        roles.handle(SetRole(D, expected=P), 39.0)
    assert refused.value.retry_after_s == pytest.approx(1.0)
    assert roles.handle(SetRole(D, expected=P), 40.0) == changed(P, D, Reason.SCHEDULER)
    # An operator need not wait, and what he sets free stays for the minimum time as well.
    assert roles.handle(SetRole(P), 41.0) == changed(D, P, Reason.OPERATOR)
    assert roles.handle(SetRole(None), 42.0) == changed(P, D, Reason.OPERATOR)
    with pytest.raises(Conflict, match="again in"):
        roles.handle(SetRole(P, expected=D), 71.0)


def test_a_new_home_makes_present_work_that_of_the_other_pool() -> None:
    roles = Roles(D, CONFIG)
    roles.handle(DECODES, 0.0)
    assert roles.handle(SetRole(P), 1.0) == changed(D, P, Reason.OPERATOR)
    assert (roles.home, roles.acting) == (P, M)
    roles.handle(IDLE, 9.0)
    assert roles.handle(Tick(), 11.0) == changed(M, P, Reason.RETURNED)


def test_a_borrowed_node_that_is_given_to_the_borrower_is_at_home() -> None:
    roles = Roles(D, CONFIG)
    roles.handle(PROMPTS, 0.0)
    assert roles.handle(SetRole(P), 1.0) == changed(D, P, Reason.OPERATOR)
    assert (roles.acting, roles.wake_at_s) == (P, None)


# ── On a node ───────────────────────────────────────────────────────────────────────────────────────────────────────

SOON = RolesConfig(dwell_s=0.1, min_home_s=30.0)


async def set_role(address: str, role: Role | None, expected: Role | None = None) -> node_pb2.SetRoleResponse:
    numbers = {None: 0, P: 1, D: 2, M: 3}
    async with grpc.aio.insecure_channel(address) as channel:
        request = node_pb2.SetRoleRequest(role=numbers[role], expected_role=numbers[expected])
        return await node_pb2_grpc.NodeStub(channel).SetRole(request)


async def test_a_decode_node_with_a_prompt_acts_as_mixed_until_it_is_computed() -> None:
    async with running_node(role=D, roles_config=SOON, step_delay_s=0.02) as node, session(node.address) as router:
        welcome = await router.hello()
        assert (welcome.status.role, welcome.status.home_role) == (common_pb2.ROLE_DECODE, common_pb2.ROLE_DECODE)
        await router.run(spec("a", 60, max_tokens=100))
        await node.until(lambda: node.service.status().role is M)
        await router.until("prefills")
        # Its tokens are the pool's own work.
        await node.until(lambda: node.service.status().role is D)
        assert node.service.num_sequences == 1
        await router.cancel("a")
        told = [(m.status.role, m.status.home_role) for m in router.messages if m.HasField("status")]
        assert {home for _, home in told} == {common_pb2.ROLE_DECODE}
        assert common_pb2.ROLE_MIXED in [role for role, _ in told]


@pytest.mark.parametrize("how", ["stays", "is handed to it"])
async def test_a_prefill_node_that_decodes_acts_as_mixed(how: str) -> None:
    async with running_node(role=P, roles_config=SOON, step_delay_s=0.02) as node, session(node.address) as router:
        await router.hello()
        sequence = spec("a", 9, max_tokens=100)
        if how == "stays":
            await router.run(sequence)
            await router.until("prefills")
        else:
            await router.reserve(sequence)
            await router.next("reserved")
            assert node.service.status().role is M
            arrive(node, fill(node, sequence))
        await node.until(lambda: node.service.status().role is M)
        await router.cancel("a")
        await node.until(lambda: node.service.status().role is P)


async def test_a_prefill_node_with_a_prompt_acts_in_its_home() -> None:
    async with running_node(role=P, step_delay_s=0.02) as node, session(node.address) as router:
        await router.hello()
        await router.run(spec("a", 60, max_tokens=1))
        await router.until("tokens")
        assert {m.status.role for m in router.messages if m.HasField("status")} == {common_pb2.ROLE_PREFILL}
        assert node.service.roles.acting is P


async def test_a_change_is_told_to_every_router_at_once() -> None:
    async with (
        running_node(role=D, session_config=SessionConfig(status_interval_s=600.0)) as node,
        session(node.address) as one,
        session(node.address) as other,
    ):
        await one.hello("r1")
        await other.hello("r2")
        answer = await set_role(node.address, P)
        assert (answer.node_id, answer.previous_role, answer.home_role, answer.role, answer.is_pinned) == (
            "n0", common_pb2.ROLE_DECODE, common_pb2.ROLE_PREFILL, common_pb2.ROLE_PREFILL, True,
        )  # fmt: skip
        for router in (one, other):
            await node.until(lambda r=router: r.messages[-1].status.home_role == common_pb2.ROLE_PREFILL)
            assert router.messages[-1].status.is_pinned
        # To be pinned where it is already is news as well.
        assert not (await set_role(node.address, None)).is_pinned
        assert (await set_role(node.address, D)).previous_role == common_pb2.ROLE_DECODE
        await node.until(lambda: one.messages[-1].status.is_pinned)


async def test_a_refused_scheduler_hears_why() -> None:
    async with running_node(role=D) as node:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await set_role(node.address, D, expected=P)
        assert refused.value.code() is grpc.StatusCode.ABORTED
        assert refused.value.details() == "the home role is decode, expected prefill; decide again"
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            async with grpc.aio.insecure_channel(node.address) as channel:
                await node_pb2_grpc.NodeStub(channel).SetRole(node_pb2.SetRoleRequest(role=9))
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert node.service.status().home_role is D
