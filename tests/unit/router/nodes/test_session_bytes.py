"""What nodes are told is put together from bytes: it reads as if protobuf had made the whole message."""

from __future__ import annotations

import logging
import time
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from baton import codec
from baton.clock import MonotonicClock
from baton.defects import Defects
from baton.node_messages import Cancel, HandedOff, Joined, NotMigrated, Reserve, Run, SequenceFailed
from baton.types import (
    Embedding,
    Lease,
    PositionLogprobs,
    PromptLogprobs,
    SamplingParams,
    SequenceSpec,
    TokenChunk,
    TokenLogprob,
)
from baton.v1 import node_pb2
from router.flow.messages import Prompt
from router.nodes import session_bytes
from worker.session_codec import Composer

ids = st.lists(st.integers(0, 2**32 - 1), max_size=300).map(tuple)
samplings = st.builds(
    SamplingParams,
    temperature=st.floats(0, 2, width=32),
    max_tokens=st.integers(1, 2**31 - 1),
    seed=st.integers(0, 2**64 - 1),
    stop_token_ids=st.lists(st.integers(0, 2**31 - 1), max_size=5).map(tuple),
    logit_bias=st.dictionaries(st.integers(0, 2**31 - 1), st.floats(-100, 100, width=32), max_size=3),
)
specs = st.builds(SequenceSpec, st.text(min_size=1), ids.filter(bool), samplings, ids)
leases = st.builds(
    Lease, sequence_id=st.just("r/0/0"), epoch=st.integers(1, 2**63), node_id=st.text(min_size=1),
    incarnation=st.integers(0, 2**63), address=st.text(), block_ids=ids, ttl_s=st.floats(0.1, 1000),
)  # fmt: skip


@given(specs, st.floats(0.1, 100), st.text())
def test_a_reservation_reads_as_it_was_meant(spec: SequenceSpec, ttl_s: float, prefill_id: str) -> None:
    data = session_bytes.encode(Reserve(spec, ttl_s, prefill_id), Prompt(spec.prompt_token_ids))
    reserve = node_pb2.SessionRequest.Reserve(
        sequence=codec.sequence_to_pb(spec), ttl_s=ttl_s, prefill_node_id=prefill_id
    )
    assert node_pb2.SessionRequest.FromString(data) == node_pb2.SessionRequest(reserve=reserve)


@given(specs, st.none() | leases)
def test_a_run_reads_as_it_was_meant(spec: SequenceSpec, lease: Lease | None) -> None:
    data = session_bytes.encode(Run(spec, lease), Prompt(spec.prompt_token_ids))
    run = node_pb2.SessionRequest.Run(
        sequence=codec.sequence_to_pb(spec), lease=None if lease is None else codec.lease_to_pb(lease)
    )
    assert node_pb2.SessionRequest.FromString(data) == node_pb2.SessionRequest(run=run)


def test_a_cancellation_reads_as_it_was_meant() -> None:
    data = session_bytes.encode(Cancel("r/0/0", "the client left"), Prompt((1,)))
    cancel = node_pb2.Cancel(sequence_id="r/0/0", reason="the client left")
    assert node_pb2.SessionRequest.FromString(data) == node_pb2.SessionRequest(cancel=cancel)


def test_many_choices_of_a_long_prompt_cost_less_than_a_few_prompts() -> None:
    spec = SequenceSpec("r/0/0", tuple(range(100, 100_100)), SamplingParams(max_tokens=1, seed=1))
    prompt = Prompt(spec.prompt_token_ids)
    first_s, others_s = time.thread_time(), 0.0
    session_bytes.encode(Run(spec, None), prompt)
    first_s = time.thread_time() - first_s
    for number in range(1, 129):
        started_s = time.thread_time()
        other = replace(spec, sequence_id=f"r/{number}/0")
        session_bytes.encode(Run(other, None), prompt)
        others_s += time.thread_time() - started_s
    # It was 300 times as much.
    assert others_s < 40 * first_s


def test_tokens_count_before_the_word_that_their_node_has_let_go_of_the_sequence() -> None:
    """From then on the tokens of a sequence that moved come from elsewhere, and later ones of this node are void."""
    response = node_pb2.SessionResponse()
    response.failed.add(sequence_id="r/0/0")
    response.not_migrated.add(sequence_id="r/0/0")
    response.handed_off.add(sequence_id="r/0/0")
    response.tokens.add(sequence_id="r/0/0", index=3, token_ids=[7])
    response.prompt_logprobs.add(sequence_id="r/0/0", index=1)
    response.joined.add(sequence_id="r/0/0")
    reader = session_bytes.Reader("d0", "a:1", Defects(logging.getLogger("test"), MonotonicClock()))
    kinds = [type(message) for message in reader.messages(response)]
    assert kinds == [PromptLogprobs, Joined, TokenChunk, HandedOff, NotMigrated, SequenceFailed]


@given(st.integers(1, 2**31 - 1), st.lists(st.floats(-100, 0, width=32), max_size=3))
def test_what_was_scored_of_a_prompt_arrives_as_it_was_sent(index: int, values: list[float]) -> None:
    tops = tuple(TokenLogprob(7 + i, value) for i, value in enumerate(values))
    sent = PromptLogprobs("r/0/0", index, tuple(PositionLogprobs(TokenLogprob(3, v), 5, tops) for v in values))
    composer = Composer()
    composer.add(sent)
    response = node_pb2.SessionResponse.FromString(composer.response().SerializeToString())
    reader = session_bytes.Reader("d0", "a:1", Defects(logging.getLogger("test"), MonotonicClock()))
    assert reader.messages(response) == [sent]


def test_an_embedding_arrives_as_it_was_sent_or_fails_its_sequence() -> None:
    sent = Embedding("r/0/0", bytes(range(8)))
    composer = Composer()
    composer.add(sent)
    composer.add(Embedding("r/1/0", b"123"))
    reader = session_bytes.Reader("d0", "a:1", Defects(logging.getLogger("test"), MonotonicClock()))
    found, failed = reader.messages(composer.response())
    assert found == sent
    assert isinstance(failed, SequenceFailed)
    assert failed.sequence_id == "r/1/0"
