"""Messages to types and back. Everything that came over a wire passes through here and is validated here."""

from __future__ import annotations

from dataclasses import asdict
from math import isnan

from baton import errors
from baton.names import check_model_name, check_node_id
from baton.timeline import Recorded
from baton.types import (
    Failure,
    FinishReason,
    KvLayout,
    Lease,
    ModelDescription,
    NodeDescription,
    NodeStatus,
    PositionLogprobs,
    PrefixCaching,
    Role,
    RopeRegimes,
    SamplingParams,
    SequenceSpec,
    StepTimes,
    TokenChunk,
    TokenLogprob,
    TransferReport,
)
from baton.v1 import common_pb2 as pb
from baton.v1 import node_pb2

_MAX_BLAMED_CHARS = 255
# Of what a node says of itself: addresses, versions, names of devices.
_MAX_TEXT_CHARS = 255
_MAX_TRANSPORTS = 16
# Of a lease: more than any cache has.
_MAX_LEASED_BLOCKS = 1 << 22
# Of what a peer says that something took: longer than any request or stall lasts.
_MAX_DURATION_S = 1e7

_ROLE_TO_PB = {
    Role.PREFILL: pb.Role.ROLE_PREFILL,
    Role.DECODE: pb.Role.ROLE_DECODE,
    Role.MIXED: pb.Role.ROLE_MIXED,
}
_ROLE_FROM_PB = {v: k for k, v in _ROLE_TO_PB.items()}
_FINISH_TO_PB = {
    None: pb.FinishReason.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: pb.FinishReason.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FinishReason.FINISH_REASON_LENGTH,
}
_FINISH_FROM_PB = {v: k for k, v in _FINISH_TO_PB.items()}
_POOLING_TO_PB = {
    "": pb.Pooling.POOLING_UNSPECIFIED,
    "last": pb.Pooling.POOLING_LAST,
    "mean": pb.Pooling.POOLING_MEAN,
}
_POOLING_FROM_PB = {v: k for k, v in _POOLING_TO_PB.items()}


def role_to_pb(role: Role) -> pb.Role.ValueType:
    return _ROLE_TO_PB[role]


def role_from_pb(role: pb.Role.ValueType) -> Role:
    if role not in _ROLE_FROM_PB:
        raise errors.InvalidRequest(f"role is {role}, expected prefill, decode or mixed", param="role")
    return _ROLE_FROM_PB[role]


def finish_to_pb(reason: FinishReason | None) -> pb.FinishReason.ValueType:
    return _FINISH_TO_PB[reason]


def finish_from_pb(reason: pb.FinishReason.ValueType) -> FinishReason | None:
    if reason not in _FINISH_FROM_PB:
        raise errors.InvalidRequest(f"finish_reason {reason} is unknown", param="finish_reason")
    return _FINISH_FROM_PB[reason]


def pooling_from_pb(pooling: pb.Pooling.ValueType) -> str:
    if pooling not in _POOLING_FROM_PB:
        raise errors.InvalidRequest(f"pooling is {pooling}, expected last or mean", param="pooling")
    return _POOLING_FROM_PB[pooling]


def sampling_from_pb(msg: pb.SamplingParams) -> SamplingParams:
    return SamplingParams(
        temperature=msg.temperature if msg.HasField("temperature") else 1.0,
        top_p=msg.top_p if msg.HasField("top_p") else 1.0,
        top_k=msg.top_k,
        min_p=msg.min_p,
        repetition_penalty=msg.repetition_penalty if msg.HasField("repetition_penalty") else 1.0,
        presence_penalty=msg.presence_penalty,
        frequency_penalty=msg.frequency_penalty,
        seed=msg.seed if msg.HasField("seed") else None,
        max_tokens=msg.max_tokens if msg.HasField("max_tokens") else None,
        min_tokens=msg.min_tokens,
        ignore_eos=msg.ignore_eos,
        stop_token_ids=tuple(msg.stop_token_ids),
        logprobs=msg.logprobs if msg.HasField("logprobs") else None,
        logit_bias=dict(msg.logit_bias),
        grammar=msg.grammar,
        allowed_token_ids=tuple(msg.allowed_token_ids),
        bad_word_ids=tuple(tuple(word.token_ids) for word in msg.bad_word_ids),
        prompt_logprobs=msg.prompt_logprobs if msg.HasField("prompt_logprobs") else None,
        pooling=pooling_from_pb(msg.pooling),
    )


def sampling_to_pb(params: SamplingParams) -> pb.SamplingParams:
    return pb.SamplingParams(
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        seed=params.seed,
        max_tokens=params.max_tokens,
        min_tokens=params.min_tokens,
        ignore_eos=params.ignore_eos,
        stop_token_ids=params.stop_token_ids,
        logprobs=params.logprobs,
        logit_bias=params.logit_bias,
        grammar=params.grammar,
        allowed_token_ids=params.allowed_token_ids,
        bad_word_ids=[pb.TokenRun(token_ids=word) for word in params.bad_word_ids],
        prompt_logprobs=params.prompt_logprobs,
        pooling=_POOLING_TO_PB[params.pooling],
    )


def sequence_from_pb(msg: pb.Sequence) -> SequenceSpec:
    return SequenceSpec(
        sequence_id=msg.sequence_id,
        prompt_token_ids=tuple(msg.prompt_token_ids),
        generated_token_ids=tuple(msg.generated_token_ids),
        sampling=sampling_from_pb(msg.sampling),
        cache_salt=msg.cache_salt,
        priority=msg.priority,
    )


def sequence_to_pb(spec: SequenceSpec) -> pb.Sequence:
    return pb.Sequence(
        sequence_id=spec.sequence_id,
        prompt_token_ids=spec.prompt_token_ids,
        generated_token_ids=spec.generated_token_ids,
        sampling=sampling_to_pb(spec.sampling),
        cache_salt=spec.cache_salt,
        priority=spec.priority,
    )


def logprobs_from_pb(msg: pb.PositionLogprobs) -> PositionLogprobs:
    return PositionLogprobs(
        chosen=_logprob_from_pb(msg.chosen),
        rank=msg.rank,
        top=tuple([_logprob_from_pb(t) for t in msg.top]),
    )


def _logprob_from_pb(msg: pb.TokenLogprob) -> TokenLogprob:
    if isnan(msg.logprob):
        raise errors.InvalidRequest(f"logprob of token {msg.token_id} is nan, expected a number", param="logprobs")
    return TokenLogprob(msg.token_id, msg.logprob)


def logprobs_to_pb(position: PositionLogprobs) -> pb.PositionLogprobs:
    return pb.PositionLogprobs(
        chosen=pb.TokenLogprob(token_id=position.chosen.token_id, logprob=position.chosen.logprob),
        rank=position.rank,
        top=[pb.TokenLogprob(token_id=t.token_id, logprob=t.logprob) for t in position.top],
    )


def tokens_from_pb(msg: pb.Tokens) -> TokenChunk:
    token_ids = tuple(msg.token_ids)
    logprobs = tuple([logprobs_from_pb(p) for p in msg.logprobs])
    if logprobs and len(logprobs) != len(token_ids):
        raise errors.InvalidRequest(
            f"{msg.sequence_id}: {len(logprobs)} logprobs for {len(token_ids)} tokens", param="logprobs"
        )
    return TokenChunk(msg.sequence_id, msg.index, token_ids, logprobs, finish_from_pb(msg.finish_reason))


def tokens_to_pb(chunk: TokenChunk) -> pb.Tokens:
    return pb.Tokens(
        sequence_id=chunk.sequence_id,
        index=chunk.index,
        token_ids=chunk.token_ids,
        logprobs=[logprobs_to_pb(p) for p in chunk.logprobs],
        finish_reason=finish_to_pb(chunk.finish_reason),
    )


def layout_from_pb(msg: pb.KvLayout) -> KvLayout:
    return KvLayout(
        num_layers=msg.num_layers,
        num_blocks=msg.num_blocks,
        num_kv_heads=msg.num_kv_heads,
        head_dim=msg.head_dim,
        block_tokens=msg.block_tokens,
        dtype=msg.dtype,
    )


def layout_to_pb(layout: KvLayout) -> pb.KvLayout:
    return pb.KvLayout(
        num_layers=layout.num_layers,
        num_blocks=layout.num_blocks,
        num_kv_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
        block_tokens=layout.block_tokens,
        dtype=layout.dtype,
    )


_NODE_TEXTS = ("address", "host_id", "device", "kernels", "software_version", "metrics_address")
_MODEL_TEXTS = ("fingerprint", "dtype")


def _check_text(name: str, text: str) -> None:
    if len(text) > _MAX_TEXT_CHARS:
        expected = f"at most {_MAX_TEXT_CHARS}"
        raise errors.InvalidRequest(f"{name} has {len(text)} characters, expected {expected}", param=name)


def node_from_pb(msg: pb.NodeDescription) -> NodeDescription:
    """Raises BadConfig for names that logs and labels of metrics cannot carry, InvalidRequest for what is too long."""
    m = msg.model
    check_node_id(msg.node_id)
    if m.name:
        check_model_name(m.name)
    for name in _NODE_TEXTS:
        _check_text(name, getattr(msg, name))
    for name in _MODEL_TEXTS:
        _check_text(f"model.{name}", getattr(m, name))
    if len(msg.transports) > _MAX_TRANSPORTS:
        expected = f"at most {_MAX_TRANSPORTS}"
        raise errors.InvalidRequest(f"{len(msg.transports)} transports, expected {expected}", param="transports")
    for transport in msg.transports:
        _check_text("transports", transport)
    return NodeDescription(
        node_id=msg.node_id,
        incarnation=msg.incarnation,
        home_role=role_from_pb(msg.home_role),
        address=msg.address,
        model=ModelDescription(m.name, m.fingerprint, m.dtype, m.max_model_tokens, m.vocab_size),
        kv_layout=layout_from_pb(msg.kv_layout),
        protocol_version=msg.protocol_version,
        pid=msg.pid,
        host_id=msg.host_id,
        transports=tuple(msg.transports),
        device=msg.device,
        kernels=msg.kernels,
        software_version=msg.software_version,
        metrics_address=msg.metrics_address,
        prefix_cache=_caching_from_pb(msg.prefix_cache) if msg.HasField("prefix_cache") else None,
        tbt_target_s=duration_from_pb("tbt_target_s", msg.tbt_target_s) or None,
    )


def node_to_pb(node: NodeDescription) -> pb.NodeDescription:
    m = node.model
    return pb.NodeDescription(
        node_id=node.node_id,
        incarnation=node.incarnation,
        role=role_to_pb(node.home_role),
        home_role=role_to_pb(node.home_role),
        address=node.address,
        model=pb.ModelDescription(
            name=m.name,
            fingerprint=m.fingerprint,
            dtype=m.dtype,
            max_model_tokens=m.max_model_tokens,
            vocab_size=m.vocab_size,
        ),
        kv_layout=layout_to_pb(node.kv_layout),
        protocol_version=node.protocol_version,
        pid=node.pid,
        host_id=node.host_id,
        transports=node.transports,
        device=node.device,
        kernels=node.kernels,
        software_version=node.software_version,
        metrics_address=node.metrics_address,
        prefix_cache=None if node.prefix_cache is None else _caching_to_pb(node.prefix_cache),
        tbt_target_s=node.tbt_target_s or 0.0,
    )


def _caching_from_pb(msg: pb.PrefixCaching) -> PrefixCaching:
    rope = RopeRegimes(msg.rope.limit, msg.rope.is_each_its_own) if msg.HasField("rope") else None
    return PrefixCaching(msg.phases_agree, rope)


def _caching_to_pb(caching: PrefixCaching) -> pb.PrefixCaching:
    rope = caching.rope
    regimes = None if rope is None else pb.RopeRegimes(limit=rope.limit, is_each_its_own=rope.is_each_its_own)
    return pb.PrefixCaching(phases_agree=caching.phases_agree, rope=regimes)


def status_from_pb(msg: pb.NodeStatus) -> NodeStatus:
    return NodeStatus(
        role=role_from_pb(msg.role),
        draining=msg.draining,
        total_blocks=msg.total_blocks,
        free_blocks=msg.free_blocks,
        queued_prompt_tokens=msg.queued_prompt_tokens,
        num_waiting=msg.num_waiting,
        num_running=msg.num_running,
        running_tokens=msg.running_tokens,
        stalled_s=duration_from_pb("stalled_s", msg.stalled_s),
        prompt_blocks=msg.prompt_blocks,
        sending_blocks=msg.sending_blocks,
        leased_blocks=msg.leased_blocks,
        running_blocks=msg.running_blocks,
        quarantined_blocks=msg.quarantined_blocks,
        cached_blocks=msg.cached_blocks,
        home=role_from_pb(msg.home_role) if msg.home_role else None,
        is_pinned=msg.is_pinned,
        step_times=_step_times_from_pb(msg.step_times) if msg.HasField("step_times") else None,
    )


def _step_times_from_pb(msg: pb.StepTimes) -> StepTimes:
    return StepTimes(
        base_s=duration_from_pb("base_s", msg.base_s),
        prompt_token_s=duration_from_pb("prompt_token_s", msg.prompt_token_s),
        sequence_s=duration_from_pb("sequence_s", msg.sequence_s),
        kv_token_s=duration_from_pb("kv_token_s", msg.kv_token_s),
    )


def status_to_pb(status: NodeStatus) -> pb.NodeStatus:
    return pb.NodeStatus(
        role=role_to_pb(status.role),
        draining=status.draining,
        total_blocks=status.total_blocks,
        free_blocks=status.free_blocks,
        queued_prompt_tokens=status.queued_prompt_tokens,
        num_waiting=status.num_waiting,
        num_running=status.num_running,
        running_tokens=status.running_tokens,
        stalled_s=status.stalled_s,
        prompt_blocks=status.prompt_blocks,
        sending_blocks=status.sending_blocks,
        leased_blocks=status.leased_blocks,
        running_blocks=status.running_blocks,
        quarantined_blocks=status.quarantined_blocks,
        cached_blocks=status.cached_blocks,
        home_role=pb.Role.ROLE_UNSPECIFIED if status.home is None else role_to_pb(status.home),
        is_pinned=status.is_pinned,
        step_times=None if status.step_times is None else pb.StepTimes(**asdict(status.step_times)),
    )


def lease_from_pb(msg: pb.Lease) -> Lease:
    for name in ("node_id", "address"):
        _check_text(name, getattr(msg, name))
    if len(msg.block_ids) > _MAX_LEASED_BLOCKS:
        expected = f"at most {_MAX_LEASED_BLOCKS}"
        raise errors.InvalidRequest(f"a lease of {len(msg.block_ids)} blocks, expected {expected}", param="block_ids")
    return Lease(
        sequence_id=msg.sequence_id,
        epoch=msg.epoch,
        node_id=msg.node_id,
        incarnation=msg.incarnation,
        address=msg.address,
        block_ids=tuple(msg.block_ids),
        ttl_s=msg.ttl_s,
        num_cached_blocks=msg.num_cached_blocks,
    )


def lease_to_pb(lease: Lease) -> pb.Lease:
    return pb.Lease(
        sequence_id=lease.sequence_id,
        epoch=lease.epoch,
        node_id=lease.node_id,
        incarnation=lease.incarnation,
        address=lease.address,
        block_ids=lease.block_ids,
        ttl_s=lease.ttl_s,
        num_cached_blocks=lease.num_cached_blocks,
    )


def failure_from_pb(msg: pb.Failure) -> Failure:
    """A code outside the error tree is an InternalError: codes are labels of metrics, which no peer may make."""
    error = errors.from_code(msg.code, msg.message, msg.param)
    blamed = errors.shortened(msg.blamed_node_id, _MAX_BLAMED_CHARS)
    return Failure(error.code, error.message, msg.retryable, blamed, error.param or "")


def failure_to_pb(failure: Failure) -> pb.Failure:
    return pb.Failure(
        code=failure.code,
        message=failure.message,
        retryable=failure.retryable,
        blamed_node_id=failure.blamed_node_id,
        param=failure.param,
    )


def duration_from_pb(name: str, value_s: float) -> float:
    """Raises InvalidRequest: a NaN would stay in the sum of a histogram for as long as the process lives."""
    if not 0 <= value_s <= _MAX_DURATION_S:
        expected = f"a number of seconds from 0 to {_MAX_DURATION_S:g}"
        raise errors.InvalidRequest(f"{name} is {value_s:g}, expected {expected}", param=name)
    return value_s


def report_from_pb(msg: pb.TransferReport) -> TransferReport:
    return TransferReport(
        transport=msg.transport,
        layerwise=msg.layerwise,
        num_bytes=msg.num_bytes,
        num_blocks=msg.num_blocks,
        total_s=duration_from_pb("total_s", msg.total_s),
        exposed_s=duration_from_pb("exposed_s", msg.exposed_s),
        retransmits=msg.retransmits,
    )


def report_to_pb(report: TransferReport) -> pb.TransferReport:
    return pb.TransferReport(
        transport=report.transport,
        layerwise=report.layerwise,
        num_bytes=report.num_bytes,
        num_blocks=report.num_blocks,
        total_s=report.total_s,
        exposed_s=report.exposed_s,
        retransmits=report.retransmits,
    )


def last_s_from_pb(last_s: float) -> float:
    """How far back a trace is to go; 0 stands for all."""
    if not 0 <= last_s < float("inf"):
        raise errors.InvalidRequest(f"last_s is {last_s}, expected 0 (all) or a number of seconds", param="last_s")
    return last_s or float("inf")


def recorded_to_pb(node: NodeDescription, role: Role, recorded: Recorded) -> node_pb2.TraceResponse:
    message = node_pb2.TraceResponse(node_id=node.node_id, incarnation=node.incarnation, role=role_to_pb(role))
    for step in recorded.steps:
        message.steps.add(
            started_s=step.started_s,
            ended_s=step.ended_s,
            num_prompt_tokens=step.num_prompt_tokens,
            num_decoding=step.num_decoding,
            prompts=step.prompts,
            num_prompt_pairs=step.num_prompt_pairs,
            num_kv_tokens=step.num_kv_tokens,
            turn_s=step.turn_s,
        )
    for transfer in recorded.transfers:
        message.transfers.add(
            sequence_id=transfer.sequence_id,
            target=transfer.target,
            transport=transfer.transport,
            layerwise=transfer.is_layerwise,
            num_bytes=transfer.num_bytes,
            started_s=transfer.started_s,
            computed_s=transfer.computed_s,
            ended_s=transfer.ended_s,
        )
    for write in recorded.writes:
        message.writes.add(
            sequence_id=write.sequence_id,
            lane=write.lane,
            layer=write.layer,
            num_layers=write.num_layers,
            num_bytes=write.num_bytes,
            started_s=write.started_s,
            ended_s=write.ended_s,
        )
    for join in recorded.joins:
        message.joins.add(sequence_id=join.sequence_id, at_s=join.at_s)
    return message
