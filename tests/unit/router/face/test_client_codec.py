"""The record of a request reaches a gRPC client as the router made it."""

from dataclasses import fields

from baton.client import relay_from_pb
from baton.observe import FailedAttempt, Moved, Relay, Stamp
from baton.types import Slo, TransferReport
from baton.v1 import router_pb2
from router.face.client_codec import relay_to_pb

FULL = Relay(
    prefill_node_id="p", decode_node_id="d", router_queue_s=0.25, prefill_queue_s=0.5, prefill_s=0.75, ttft_s=1.0,
    e2e_s=2.0, tbt_mean_s=0.125, tbt_max_s=0.375, attempts=2, num_tokens=7, num_cached_tokens=3,
    transfer=TransferReport("shm", True, 4096, 2, 0.5, 0.25, 1), tokenize_s=0.0625, rerun_s=0.03125, placement_s=1.5,
    reserve_s=2.5, network_s=3.5, second_token_s=4.5, lease_wait_s=5.5, recovery_s=6.5,
    stamps=(Stamp("arrived", 0.0), Stamp("ended", 2.0)),
    failures=(FailedAttempt("p", "d", "d", "NodeLost", "node d was lost", 0.5, 0.25),),
    slo=Slo(4.0, 0.5), moves=(Moved("d", "e", "defragment", 1.25, 0.0625, 8192),), placement_reason="pools",
)  # fmt: skip


def test_no_field_of_the_relay_is_lost_on_its_way_to_a_grpc_client():
    empty = Relay("", "", 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0)
    left_out = [field.name for field in fields(Relay) if getattr(FULL, field.name) == getattr(empty, field.name)]
    assert not left_out, "this test sets every field"
    usage = router_pb2.Usage(completion_tokens=FULL.num_tokens, cached_tokens=FULL.num_cached_tokens)
    assert relay_from_pb(relay_to_pb(FULL), usage) == FULL
