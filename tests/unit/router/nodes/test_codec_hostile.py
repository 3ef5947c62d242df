"""What a peer says is checked before anything counts, logs or keeps it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from baton import codec
from baton.clock import MonotonicClock
from baton.defects import Defects
from baton.errors import BadConfig, InvalidRequest
from baton.types import Role
from baton.v1 import common_pb2 as pb
from baton.v1 import node_pb2
from router.dispatch.dispatcher import Dispatcher
from router.nodes.session_bytes import Reader
from tests.support.fake_nodes import FakeCluster
from tests.support.router import router_beside, until

ROLE = pb.ROLE_DECODE


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -1.0, 1e300])
@pytest.mark.parametrize(
    "read",
    [
        lambda s: codec.report_from_pb(pb.TransferReport(total_s=s)),
        lambda s: codec.report_from_pb(pb.TransferReport(exposed_s=s)),
        lambda s: codec.status_from_pb(pb.NodeStatus(role=ROLE, stalled_s=s)),
    ],
    ids=["total_s", "exposed_s", "stalled_s"],
)
def test_a_duration_is_a_number_of_seconds(read: Callable[[float], Any], seconds: float) -> None:
    with pytest.raises(InvalidRequest, match="expected a number of seconds"):
        read(seconds)
    read(3600.0)


def test_a_logprob_is_a_number() -> None:
    nan = pb.TokenLogprob(token_id=1, logprob=float("nan"))
    with pytest.raises(InvalidRequest, match="logprob of token 1 is nan"):
        codec.logprobs_from_pb(pb.PositionLogprobs(chosen=nan))
    with pytest.raises(InvalidRequest, match="logprob of token 1 is nan"):
        codec.logprobs_from_pb(pb.PositionLogprobs(top=[nan]))


def test_an_unknown_code_is_an_internal_error_of_bounded_length() -> None:
    failure = codec.failure_from_pb(pb.Failure(code="x" * 3000, message="y" * 3000, blamed_node_id="z" * 3000))
    named = codec.failure_from_pb(pb.Failure(code="InvalidRequest", message="no", param="p" * 3000))
    assert named.param.startswith("ppp")
    assert len(named.param) < 200
    short = replace(named, param="grammar")
    assert codec.failure_from_pb(codec.failure_to_pb(short)) == short
    assert short.error().param == "grammar"
    assert failure.code == "InternalError"
    assert failure.message.startswith("xxx")
    assert len(failure.message) < 1100
    assert len(failure.blamed_node_id) < 300
    assert codec.failure_from_pb(pb.Failure(code="NoBlocks", message="full")).code == "NoBlocks"


@pytest.mark.parametrize("name", ["", "a\nb", "a b", "x" * 300, "\x1b[31m"])
def test_a_node_has_a_name_that_logs_and_labels_can_carry(name: str) -> None:
    model = pb.ModelDescription(name="m")
    with pytest.raises(BadConfig, match="node_id is "):
        codec.node_from_pb(pb.NodeDescription(node_id=name, role=ROLE, home_role=ROLE, model=model))
    node = pb.NodeDescription(node_id="decode-[::1]:7", role=ROLE, home_role=ROLE, model=model)
    node.kv_layout.CopyFrom(pb.KvLayout(num_layers=1, num_blocks=1, num_kv_heads=1, head_dim=8, block_tokens=16))
    node.kv_layout.dtype = "float32"
    assert codec.node_from_pb(node).home_role is Role.DECODE
    node.model.name = f"a{name}\n"
    with pytest.raises(BadConfig, match="model_name is "):
        codec.node_from_pb(node)


def described_node() -> pb.NodeDescription:
    node = pb.NodeDescription(node_id="d0", role=ROLE, home_role=ROLE, model=pb.ModelDescription(name="m"))
    layout = pb.KvLayout(num_layers=1, num_blocks=1, num_kv_heads=1, head_dim=8, block_tokens=16, dtype="float32")
    node.kv_layout.CopyFrom(layout)
    return node


@pytest.mark.parametrize("name", ["address", "host_id", "device", "kernels", "software_version", "metrics_address"])
def test_what_a_node_says_of_itself_is_of_bounded_length(name: str) -> None:
    node = described_node()
    setattr(node, name, "x" * 255)
    codec.node_from_pb(node)
    setattr(node, name, "x" * 256)
    with pytest.raises(InvalidRequest, match=f"{name} has 256 characters, expected at most 255"):
        codec.node_from_pb(node)


def test_lists_and_names_of_a_node_and_a_lease_are_bounded() -> None:
    node = described_node()
    node.transports.extend(["tcp"] * 17)
    with pytest.raises(InvalidRequest, match="17 transports, expected at most 16"):
        codec.node_from_pb(node)
    del node.transports[:]
    node.transports.append("t" * 256)
    with pytest.raises(InvalidRequest, match="transports has 256 characters"):
        codec.node_from_pb(node)
    node = described_node()
    node.model.fingerprint = "f" * 256
    with pytest.raises(InvalidRequest, match=r"model\.fingerprint has 256 characters"):
        codec.node_from_pb(node)
    lease = pb.Lease(sequence_id="s", ttl_s=1.0, node_id="d0", address="a:1")
    lease.block_ids.extend(range(1 << 22))
    assert len(codec.lease_from_pb(lease).block_ids) == 1 << 22
    lease.block_ids.append(0)
    with pytest.raises(InvalidRequest, match="a lease of 4194305 blocks, expected at most 4194304"):
        codec.lease_from_pb(lease)


def test_a_salt_has_the_length_of_a_digest_at_most() -> None:
    sampling = pb.SamplingParams(max_tokens=1, seed=1)
    sequence = pb.Sequence(sequence_id="s", prompt_token_ids=[1], sampling=sampling, cache_salt=bytes(64))
    assert codec.sequence_from_pb(sequence).cache_salt == bytes(64)
    sequence.cache_salt = bytes(65)
    with pytest.raises(InvalidRequest, match="cache_salt is '65 bytes', expected at most 64 bytes") as refused:
        codec.sequence_from_pb(sequence)
    assert refused.value.param == "cache_salt"


def refusals(dispatcher: Dispatcher) -> set[str]:
    return {code for (code,), child in dispatcher._metrics.reservation_refusals.children.items() if child.value}


async def test_what_a_lying_node_says_makes_no_label_and_no_sum_that_is_no_number(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with FakeCluster(prefill=1, decode=1) as cluster, router_beside(cluster) as router:
        dispatcher = router.dispatcher
        await until(lambda: dispatcher.is_ready)
        prefill, decode = (x.address for x in dispatcher.nodes.members)
        nan = float("nan")
        done = node_pb2.SessionResponse.PrefillDone(sequence_id="s", queue_s=nan, compute_s=-1.0)
        defects = Defects(logging.getLogger("test"), MonotonicClock(), dispatcher._metrics.defects.add)
        reader = Reader("prefill-0", prefill, defects)
        dispatcher.nodes.on_messages(prefill, reader.messages(node_pb2.SessionResponse(prefills=[done])), None)
        joined = node_pb2.SessionResponse.Joined(sequence_id="s", wait_s=nan)
        failure = pb.Failure(code="a label\nof mine", message="line\nbreak")
        refused = node_pb2.SequenceFailed(sequence_id="s\n" * 2000, failure=failure)
        said = node_pb2.SessionResponse(joined=[joined], refused=[refused])
        dispatcher.nodes.on_messages(decode, Reader("decode-0", decode, defects).messages(said), None)
        assert refusals(dispatcher) == {"InternalError"}
        (line,) = [x.getMessage() for x in caplog.records if "refused a reservation" in x.message]
        assert "\n" not in line
        assert len(line) < 500
        assert {w: c.value for (w,), c in dispatcher._metrics.defects.children.items() if c.value} == {"message": 2}
