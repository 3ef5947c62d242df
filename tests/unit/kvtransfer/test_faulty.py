"""Transfers under a schedule of faults: damage is found, loss is noticed, and bytes arrive whole or not at all."""

from __future__ import annotations

import asyncio
import signal

import pytest

from baton.errors import BatonError, NodeLost, TransferFailed
from baton.faults.kinds import FaultKind
from kvtransfer.config import TransferConfig
from kvtransfer.faulty import _corrupted
from kvtransfer.protocol.messages import Abort, Commit
from kvtransfer.protocol.receiver import ReceiverConfig
from kvtransfer.protocol.receiver_events import Arrived, Released
from kvtransfer.protocol.sender import SenderConfig
from kvtransfer.sender import Push
from tests.support.faults import Striking
from tests.support.transfer import LAYOUT, Pair, pair, token, until

SOURCE = [4, 2, 0]
# A lost message is noticed by a deadline: short ones, of which the test waits for one.
SENDER = SenderConfig(begin_timeout_s=1.0, commit_timeout_s=1.0, lease_grace_s=1.0, stop_timeout_s=0.2)
RECEIVER = ReceiverConfig(revoke_timeout_s=0.5)


def config(transport: str) -> TransferConfig:
    return TransferConfig(
        transports=(transport,), layerwise_from_bytes={transport: 0}, sender=SENDER, receiver=RECEIVER
    )  # fmt: skip


def schedule(layer: str, fault: str, kind: str = "*", *, nth: str = "1", more: str = "") -> Striking:
    return Striking(
        f'[[fault]]\nlayer = "{layer}"\nkind = "{kind}"\nfault = "{fault}"\nnth = {nth}\n{more}\n', node="both"
    )


def begin(p: Pair, name: str = "r/0/1") -> Push:
    lease = p.receiver.grant(name, [1, 2, 3, 9], ttl_s=3)
    push = p.sender.begin(lease, SOURCE, num_known_tokens=3 * LAYOUT.block_tokens)
    for layer in range(LAYOUT.num_layers):
        push.layer_ready(layer, 3)
    return push


async def arrives(p: Pair, push: Push, name: str = "r/0/1") -> int:
    """The number of layers that were written again."""
    async with asyncio.timeout(10):
        report = await push.commit(token(name))
        await p.inbox.wait(Arrived, name)
    p.check_copied(LAYOUT, SOURCE, p.receiver._layout, (1, 2, 3))
    return report.retransmits


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize(
    ("layer", "fault", "kind", "is_repaired"),
    [
        ("data", "corrupt", "*", True),
        ("data", "drop", "*", True),
        ("data", "duplicate", "*", False),
        ("data", "delay", "*", False),
        ("data", "slow", "*", False),
        ("control", "corrupt", "commit", True),
        ("control", "duplicate", "commit", False),
        ("control", "duplicate", "begin", False),
        ("control", "duplicate", "ack", False),
        ("control", "delay", "commit", False),
        ("control", "stall", "begin", False),
        ("control", "drop", "heartbeat", False),
        ("control", "freeze", "commit", False),
    ],
)
async def test_a_transfer_arrives_through_a_fault(
    transport: str, layer: str, fault: str, kind: str, is_repaired: bool
) -> None:
    more = "seconds = 0.02" if fault in ("delay", "stall", "slow") else ""
    more = "seconds = 0" if fault == "freeze" else more
    faults = schedule(layer, fault, kind, more=more)
    async with pair(sender_config=config(transport), receiver_config=config(transport), faults=faults) as p:
        retransmits = await arrives(p, begin(p))
    assert (retransmits > 0) == is_repaired
    if fault == "freeze":
        assert faults.signals == [signal.SIGSTOP]
    elif kind != "heartbeat":
        assert [strike.fault.value for strike in faults.strikes] == [fault]


@pytest.mark.parametrize(
    ("transport", "layer", "fault", "kind"),
    [
        ("shm", "data", "disconnect", "*"),
        ("tcp", "data", "disconnect", "*"),
        ("shm", "control", "disconnect", "commit"),
        ("tcp", "control", "disconnect", "commit"),
        ("shm", "control", "disconnect", "ack"),
        ("tcp", "control", "disconnect", "ack"),
        # Over tcp data opens a lease whose Begin was lost.
        ("shm", "control", "drop", "begin"),
        ("shm", "control", "drop", "begun"),
        ("shm", "control", "drop", "commit"),
        ("tcp", "control", "drop", "commit"),
        ("tcp", "control", "drop", "ack"),
    ],
)
async def test_a_transfer_that_is_cut_fails_in_time_and_the_next_one_arrives(
    transport: str, layer: str, fault: str, kind: str
) -> None:
    faults = schedule(layer, fault, kind, more='request = "r"')
    async with pair(sender_config=config(transport), receiver_config=config(transport), faults=faults) as p:
        push = begin(p)
        with pytest.raises((NodeLost, TransferFailed)):
            async with asyncio.timeout(10):
                await push.commit(token("r/0/1"))
        await ended(p, "r/0/1")
        assert [strike.fault.value for strike in faults.strikes] == [fault]
        p.target[:] = 0xEE
        await arrives(p, begin(p, "s/0/1"), "s/0/1")
        assert p.receiver._machine.num_leases == 0


async def ended(p: Pair, name: str) -> None:
    """The lease is over: given back, or taken over before its acknowledgement was lost."""
    await until(lambda: bool({"Arrived", "Released"} & set(p.inbox.of(name))))


@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_an_abort_through_a_lane_that_stands_still(transport: str) -> None:
    faults = schedule("data", "stall", more="seconds = 600")
    async with pair(sender_config=config(transport), receiver_config=config(transport), faults=faults) as p:
        push = begin(p)
        async with asyncio.timeout(10):
            await push.abort("not wanted")
            await p.inbox.wait(Released, "r/0/1")


@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_many_transfers_under_drawn_faults_arrive_whole_or_fail(transport: str) -> None:
    faults = Striking(
        """
        seed = 3
        [[fault]]
        layer = "data"
        probability = 0.1
        fault = "corrupt"
        [[fault]]
        layer = "data"
        probability = 0.05
        fault = "drop"
        [[fault]]
        layer = "data"
        probability = 0.02
        fault = "disconnect"
        [[fault]]
        layer = "control"
        kind = "[!h]*"
        probability = 0.1
        fault = "reorder"
        seconds = 0.01
        [[fault]]
        layer = "control"
        kind = "[!h]*"
        probability = 0.1
        fault = "duplicate"
        """,
        node="both",
    )
    num_arrived = 0
    async with pair(sender_config=config(transport), receiver_config=config(transport), faults=faults) as p:
        for i in range(40):
            name = f"r{i}/0/1"
            try:
                await arrives(p, begin(p, name), name)
                num_arrived += 1
            except BatonError:
                await ended(p, name)
            p.target[:] = 0xEE
        assert p.receiver._machine.num_leases == 0
    assert num_arrived >= 20
    assert {strike.fault for strike in faults.strikes} >= {FaultKind.CORRUPT, FaultKind.DROP, FaultKind.DUPLICATE}


def test_only_a_commit_with_digests_can_be_corrupted() -> None:
    commit = Commit("r", 1, 1, 3, (b"ab", b"cd"), token("r"))
    assert _corrupted(commit, 3).layer_digests == (b"ab", bytes([ord("c") ^ 0xFF]) + b"d")
    bare = Commit("r", 1, 1, 3, (), token("r"))
    assert _corrupted(bare, 3) is bare
    abort = Abort("r", 1, "why")
    assert _corrupted(abort, 0) is abort
