"""Converts the router's types to the messages for gRPC clients."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict

from baton import codec
from baton.observe import Relay
from baton.v1 import router_pb2
from router.cluster.membership import Member
from router.dispatch.records import Ended
from router.frontend.generation import Ending
from router.frontend.resume import Resume
from router.openai.embeddings import embedding_of
from router.text.deltas import CallArguments, CallBegin, ReasoningText
from router.text.detokenizer import Part


def relay_to_pb(relay: Relay) -> router_pb2.Relay:
    return router_pb2.Relay(
        prefill_node_id=relay.prefill_node_id,
        decode_node_id=relay.decode_node_id,
        router_queue_s=relay.router_queue_s,
        prefill_queue_s=relay.prefill_queue_s,
        prefill_s=relay.prefill_s,
        transfer=None if relay.transfer is None else codec.report_to_pb(relay.transfer),
        ttft_s=relay.ttft_s,
        e2e_s=relay.e2e_s,
        tbt_mean_s=relay.tbt_mean_s,
        tbt_max_s=relay.tbt_max_s,
        attempts=relay.attempts,
        tokenize_s=relay.tokenize_s,
        rerun_s=relay.rerun_s,
        placement_s=relay.placement_s,
        reserve_s=relay.reserve_s,
        network_s=relay.network_s,
        second_token_s=relay.second_token_s,
        lease_wait_s=relay.lease_wait_s,
        recovery_s=relay.recovery_s,
        stamps=[router_pb2.Relay.Stamp(name=name, at_s=at_s) for name, at_s in relay.stamps],
        slo_ttft_s=relay.slo.ttft_s or 0.0,
        slo_tbt_s=relay.slo.tbt_s or 0.0,
        failures=[router_pb2.Relay.FailedAttempt(**asdict(failure)) for failure in relay.failures],
        moves=[router_pb2.Relay.Moved(**asdict(move)) for move in relay.moves],
        placement_reason=relay.placement_reason,
    )


def delta_to_pb(part: Part) -> router_pb2.GenerateResponse:
    delta = router_pb2.GenerateResponse.Delta(
        text=part.text,
        token_ids=part.token_ids,
        logprobs=map(codec.logprobs_to_pb, part.logprobs),
        prompt_logprobs=map(codec.logprobs_to_pb, part.scored),
        has_whole_text=part.is_last,
    )
    for said in part.deltas:
        match said:
            case ReasoningText(text):
                delta.reasoning += text
            case CallBegin(index, call_id, name):
                delta.calls.add(index=index, call_id=call_id, name=name)
            case CallArguments(index, text):
                if not delta.calls or delta.calls[-1].index != index:
                    delta.calls.add(index=index)
                delta.calls[-1].arguments += text
    return router_pb2.GenerateResponse(delta=delta)


def resume_from_pb(message: router_pb2.Resume) -> Resume:
    ids = tuple(message.token_ids)
    return Resume(message.seed, len(ids), ids, has_whole_text=message.has_whole_text)


def finished_to_pb(ending: Ending, num_prompt_tokens: int) -> router_pb2.GenerateResponse:
    return router_pb2.GenerateResponse(
        finished=router_pb2.GenerateResponse.Finished(
            finish_reason=codec.finish_to_pb(ending.finish_reason),
            usage=router_pb2.Usage(
                prompt_tokens=num_prompt_tokens,
                completion_tokens=ending.num_tokens,
                cached_tokens=ending.num_cached_tokens,
                reasoning_tokens=ending.num_reasoning_tokens,
            ),
            relay=relay_to_pb(ending.relay),
            stop_reason="" if ending.stop_reason is None else str(ending.stop_reason),
            has_tool_calls=ending.has_tool_calls,
            embedding=embedding_of(ending.embedding) if ending.embedding else (),
        )
    )


def member_to_pb(member: Member) -> router_pb2.StatusResponse.NodeState:
    state = member.state.value if not member.reason else f"{member.state.value}: {member.reason}"
    found = router_pb2.StatusResponse.NodeState(state=state)
    if member.node is not None:
        found.node.CopyFrom(codec.node_to_pb(member.node))
    else:
        found.node.address = member.address
    if member.status is not None:
        found.status.CopyFrom(codec.status_to_pb(member.status))
    return found


def trace_to_pb(router_id: str, now: float, ended: Iterable[Ended]) -> router_pb2.ClusterTraceResponse:
    """Sequences that ended, as the router's part of a trace."""
    part = router_pb2.ClusterTraceResponse.RouterTrace(router_id=router_id, now_s=now)
    for one in ended:
        part.requests.add(
            request_id=one.request_id,
            choice=one.choice,
            outcome=one.outcome.kind.value,
            arrived_s=one.arrived_s,
            relay=relay_to_pb(one.relay),
        )
    return router_pb2.ClusterTraceResponse(router=part)
