"""Masks of grammars: what follows what, wherever a sequence was before."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.errors import BatonError, InvalidRequest, UnsupportedModel
from baton.types import FinishReason, KvLayout, SamplingParams, SequenceSpec
from engine.blocks import BlockPool
from engine.events import Failed, Output
from engine.fake import FakeRunner, expected_tokens
from engine.grammars import GrammarMask, Grammars, load_tokenizer
from engine.schedule import Scheduler
from engine.scheduler_config import SchedulerConfig
from router.text.tokenizer import Tokenizer
from tests.support.root import ROOT
from tests.support.text_tokenizers import KINDS

FILE = ROOT / "demo" / "model" / "tokenizer.json"
VOCAB_SIZE = 2867
STOP = 0
PROMPT = (5, 6, 7)
LIMIT_S = 30.0


class Node:
    """Grammars of a node, with a word on every mask that became ready."""

    def __init__(self, **settings: float) -> None:
        self.ready = threading.Semaphore(0)
        self.grammars = Grammars(
            load_tokenizer(FILE, VOCAB_SIZE), VOCAB_SIZE, num_threads=2, on_ready=self.ready.release, **settings
        )

    def mask(self, spec: SequenceSpec) -> GrammarMask:
        mask = self.grammars.mask(spec)
        end_s = time.monotonic() + LIMIT_S
        while not mask.is_ready:
            # Another one may have become ready first.
            assert self.ready.acquire(timeout=max(0.0, end_s - time.monotonic())), "it does not become ready"
        return mask


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    node = Node()
    yield node
    node.grammars.close()


def lark(text: str) -> str:
    return json.dumps({"grammars": [{"lark_grammar": text}]})


def schema(value: Any) -> str:
    return json.dumps({"grammars": [{"json_schema": value}]})


def spec(grammar: str, generated: tuple[int, ...] = (), **fields: Any) -> SequenceSpec:
    sampling = SamplingParams(**{"seed": 0, "max_tokens": 64, "stop_token_ids": (STOP,), "grammar": grammar, **fields})
    return SequenceSpec("a", PROMPT, sampling, generated)


def ids(bits: bytes) -> list[int]:
    flags = np.unpackbits(np.frombuffer(bits, dtype=np.uint8), bitorder="little")
    return [int(i) for i in np.flatnonzero(flags)]


def text_ids(text: str) -> list[int]:
    return load_tokenizer(FILE, VOCAB_SIZE).tokenize_str(text)


NO_FORM = ("byte-level, then another", "suffix", "wordpiece", "none", "byte tokens without fallback")


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokens_bytes_are_what_it_adds_to_a_text(kind: str, tmp_path: Path) -> None:
    inner = KINDS[kind]()
    inner.save(str(tmp_path / "tokenizer.json"))
    if kind in NO_FORM:
        with pytest.raises(UnsupportedModel, match="expected"):
            load_tokenizer(tmp_path / "tokenizer.json", inner.get_vocab_size())
        return
    read = load_tokenizer(tmp_path / "tokenizer.json", inner.get_vocab_size())
    shown = Tokenizer(inner)
    for token_id in range(inner.get_vocab_size(with_added_tokens=False)):
        # No text has the byte 0xff: the library marks special tokens with it.
        if token_id not in shown.special_ids and shown.token_bytes(token_id) != b"\xff":
            assert read.decode_bytes([token_id]) == shown.token_bytes(token_id), inner.id_to_token(token_id)


def test_why_a_tokenizer_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    for kind, why in (("wordpiece", "WordPiece"), ("none", "is none"), ("byte tokens without fallback", "<0x0A>")):
        KINDS[kind]().save(str(file))
        with pytest.raises(UnsupportedModel, match=why):
            load_tokenizer(file, 300)
    KINDS["llama"]().save(str(file))
    for old, new, why in (
        ('"<0x0A>"', '"<0x0A1>"', "begins like one of a byte"),
        ('"content": " "', '"content": "_"', "stands for a space"),
        ('"stop": 0', '"stop": 1', "strips more"),
        ('"type": "Fuse"', '"type": "CTC"', "CTC"),
    ):
        text = json.dumps(json.loads(file.read_text()), ensure_ascii=False)
        assert old in text
        (tmp_path / "odd.json").write_text(text.replace(old, new))
        with pytest.raises(UnsupportedModel, match=why):
            load_tokenizer(tmp_path / "odd.json", 300)


def test_text_then_stop(node: Node) -> None:
    mask = node.mask(spec(lark("start: /ab?/")))
    (a,), (b,) = text_ids("a"), text_ids("b")
    assert STOP not in ids(mask.bits(PROMPT))
    assert a in ids(mask.bits(PROMPT))
    assert b not in ids(mask.bits(PROMPT))
    # It may end or go on.
    assert ids(mask.bits((*PROMPT, a))) == sorted([STOP, b])
    assert not mask.is_over((*PROMPT, a))
    assert mask.is_over((*PROMPT, a, b))
    assert len(mask.bits((*PROMPT, a))) == -(-VOCAB_SIZE // 32) * 4


def test_a_stop_id_that_is_text_ends_the_answer_where_it_may_end_alone(node: Node) -> None:
    (a,), (b,) = text_ids("a"), text_ids("b")
    mask = node.mask(spec(lark("start: /ab[ab]?/"), stop_token_ids=(b,)))
    assert b not in ids(mask.bits(PROMPT))
    with pytest.raises(InvalidRequest, match="no token may follow"):
        # Only the stop id would do.
        mask.bits((*PROMPT, a))


def test_what_nothing_may_follow_is_over_without_a_stop_id(node: Node) -> None:
    (a,) = text_ids("a")
    assert node.mask(spec(lark('start: "a"'), stop_token_ids=())).is_over((*PROMPT, a))
    ends_or_not = node.mask(spec(lark("start: /a+/"), stop_token_ids=()))
    assert not ends_or_not.is_over((*PROMPT, a))
    assert STOP not in ids(ends_or_not.bits((*PROMPT, a)))


def test_min_tokens_do_not_hold_open_what_is_over(node: Node) -> None:
    (a,) = text_ids("a")
    mask = node.mask(spec(lark('start: "a" ("b" | "")'), min_tokens=50))
    assert mask.is_over((*PROMPT, *text_ids("ab")))
    assert not mask.is_over((*PROMPT, a))


@pytest.mark.parametrize("grammar", ["", "{", lark("start: nothing"), lark("start: <|nope|>"), schema({"type": "x"})])
def test_what_cannot_be_built_fails_its_own_sequence(node: Node, grammar: str) -> None:
    mask = node.mask(spec(grammar or "x"))
    with pytest.raises(InvalidRequest, match="grammar"):
        mask.bits(PROMPT)
    with pytest.raises(InvalidRequest, match="grammar"):
        mask.is_over(PROMPT)


def test_tokens_that_are_not_of_the_grammar_fail_the_sequence(node: Node) -> None:
    mask = node.mask(spec(lark('start: "a"'), generated=tuple(text_ids("b"))))
    with pytest.raises(InvalidRequest, match="grammar"):
        mask.bits((*PROMPT, *text_ids("b")))


def test_one_that_outgrows_the_limits_fails_its_own_sequence(node: Node) -> None:
    rules = "\n".join(f"a{i}: a{i + 1} a{i + 1}" for i in range(40))
    mask, good = node.mask(spec(lark(f'start: a0\n{rules}\na40: "x"'))), node.mask(spec(lark("start: /x+/")))
    x = tuple(text_ids("x"))
    failed_at = None
    for count in range(20):
        token_ids = (*PROMPT, *x * count)
        if mask.needs_bits(token_ids):
            node.grammars.fill([(mask, token_ids), (good, token_ids)])
        try:
            mask.bits(token_ids)
        except InvalidRequest as error:
            failed_at = error.message
    assert failed_at is not None
    assert "cannot be followed" in failed_at
    assert good.bits((*PROMPT, *x))


SCHEMAS: list[Any] = [
    {
        "type": "object",
        "properties": {"name": {"type": "string"}, "tags": {"type": "array", "items": {"enum": ["x", "yy", "z z"]}}},
        "required": ["name", "tags"],
        "additionalProperties": False,
    },
    {"type": "array", "items": {"anyOf": [{"type": "number"}, {"type": "null"}, {"const": "Grüße"}]}, "minItems": 2},
    {"type": "string", "pattern": "^[a-c]{2,9}(-[0-9]+)*$"},
]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_the_state_is_replayed_from_the_ids(node: Node, data: st.DataObject) -> None:
    """Masks of a sequence that stayed are those of one that came with any part of its tokens."""
    grammar = schema(data.draw(st.sampled_from(SCHEMAS)))
    stayed, token_ids = node.mask(spec(grammar)), list(PROMPT)
    for _ in range(data.draw(st.integers(1, 24))):
        allowed = ids(stayed.bits(token_ids))
        token_id = allowed[data.draw(st.integers(0, 2**31)) % len(allowed)]
        if token_id == STOP:
            break
        token_ids.append(token_id)
        if stayed.is_over(token_ids):
            break
        at = data.draw(st.integers(len(PROMPT), len(token_ids)))
        came = node.mask(spec(grammar, tuple(token_ids[len(PROMPT) : at])))
        assert came.is_over(token_ids) == stayed.is_over(token_ids)
        assert came.bits(token_ids) == stayed.bits(token_ids)


def run(node: Node, specs: list[SequenceSpec]) -> tuple[dict[str, list[int]], dict[str, FinishReason | str]]:
    """Tokens, and how each ended, of an engine with a fake model."""
    layout = KvLayout(1, 64, 1, 1, 16, "float32")
    runner = FakeRunner(layout, vocab_size=VOCAB_SIZE)
    config = SchedulerConfig(block_tokens=16, max_model_tokens=512, vocab_size=VOCAB_SIZE, max_num_seqs=8)
    scheduler = Scheduler(config, BlockPool(64), mask_of=node.grammars.mask)
    tokens: dict[str, list[int]] = {s.sequence_id: [] for s in specs}
    ends: dict[str, FinishReason | str] = {}
    for s in specs:
        scheduler.add(s, hands_off=False, now=0.0)
    end_s = time.monotonic() + LIMIT_S
    while len(ends) < len(specs):
        plan, _ = scheduler.schedule(0.0)
        if plan is None:
            assert node.ready.acquire(timeout=max(0.0, end_s - time.monotonic())), "nothing became ready"
            continue
        node.grammars.prepare(plan)
        for event in scheduler.apply(plan, runner.execute(plan), 0.0):
            if isinstance(event, Output):
                tokens[event.sequence_id] += event.chunk.token_ids
                if event.chunk.finish_reason is not None:
                    ends[event.sequence_id] = event.chunk.finish_reason
            elif isinstance(event, Failed):
                ends[event.sequence_id] = event.failure.code
        scheduler.check()
    assert scheduler.num_sequences == 0
    return tokens, ends


def test_an_engine_draws_sentences_of_the_grammar(node: Node) -> None:
    plain = SequenceSpec("plain", PROMPT, SamplingParams(seed=0, max_tokens=4))
    number = SequenceSpec("number", PROMPT, spec(lark("start: /[0-9]{3}x/"), seed=1).sampling)
    choice = SequenceSpec("choice", PROMPT, spec(lark('start: "yes" | "no"'), stop_token_ids=()).sampling)
    broken = SequenceSpec("broken", PROMPT, spec(lark("start: nothing")).sampling)
    tokens, ends = run(node, [plain, number, choice, broken])
    tokenizer = load_tokenizer(FILE, VOCAB_SIZE)
    number_text = tokenizer.decode_str(tokens["number"])
    assert len(number_text) == 4
    assert number_text[:3].isdigit()
    assert number_text[3] == "x"
    assert tokenizer.decode_str(tokens["choice"]) in ("yes", "no")
    assert ends == {"plain": FinishReason.LENGTH, "number": FinishReason.STOP, "choice": FinishReason.STOP,
                    "broken": "InvalidRequest"}  # fmt: skip
    layout = KvLayout(1, 64, 1, 1, 16, "float32")
    for s in (number, choice):
        assert tokens[s.sequence_id] == expected_tokens(s, layout, VOCAB_SIZE, node.mask(s))
    assert tokens["plain"] == expected_tokens(plain, layout, VOCAB_SIZE)


# The library takes 0.7 s for its first mask, in one call; routers refuse it.
SLOW = lark("start: /((a{9999}){9999}){9999}/")


def test_a_mask_that_takes_too_long_fails_its_own_sequences() -> None:
    node = Node(mask_limit_s=0.02)
    try:
        first = node.mask(spec(SLOW))
        with pytest.raises(InvalidRequest, match=r"more than 0\.02 s") as refused:
            first.bits(PROMPT)
        assert refused.value.param == "grammar"
        assert not first.needs_bits(PROMPT)
        # The next one is refused at once, and others are followed.
        with pytest.raises(InvalidRequest, match=r"more than 0\.02 s"):
            node.mask(spec(SLOW)).is_over(PROMPT)
        slow = [SequenceSpec(f"slow{i}", PROMPT, spec(SLOW).sampling) for i in range(3)]
        number = SequenceSpec("number", PROMPT, spec(lark("start: /[0-9]{3}x/"), seed=1).sampling)
        plain = SequenceSpec("plain", PROMPT, SamplingParams(seed=0, max_tokens=4))
        _, ends = run(node, [*slow, number, plain])
        assert ends == {
            "slow0": "InvalidRequest", "slow1": "InvalidRequest", "slow2": "InvalidRequest",
            "number": FinishReason.STOP, "plain": FinishReason.LENGTH,
        }  # fmt: skip
    finally:
        node.grammars.close()


def test_masks_are_made_after_the_end_as_well() -> None:
    node = Node()
    mask = node.mask(spec(lark("start: /a+/")))
    (a,) = text_ids("a")
    node.grammars.close()
    assert a in ids(mask.bits((*PROMPT, a)))


def test_one_that_is_not_ready_holds_up_no_other(node: Node) -> None:
    class Waiting:
        is_ready = False
        follows_tokens = True

        def is_over(self, token_ids: object) -> bool:
            raise AssertionError("not ready")

        def bits(self, token_ids: object) -> bytes:
            raise AssertionError("not ready")

    mask = Waiting()
    config = SchedulerConfig(block_tokens=16, max_model_tokens=512, vocab_size=VOCAB_SIZE, max_num_seqs=8)
    scheduler = Scheduler(config, BlockPool(64), mask_of=lambda _: mask)
    scheduler.add(spec("x"), hands_off=False, now=0.0)
    scheduler.add(SequenceSpec("b", PROMPT, SamplingParams(seed=0, max_tokens=4)), hands_off=False, now=0.0)
    plan, _ = scheduler.schedule(0.0)
    assert plan is not None
    assert [piece.sequence.sequence_id for piece in plan.pieces] == ["b"]
    mask.is_ready = True
    scheduler.fail(plan, BatonError("x"), 0.0)
    plan, _ = scheduler.schedule(0.0)
    assert plan is not None
    assert [piece.sequence.sequence_id for piece in plan.pieces] == ["a"]


def test_without_a_tokenizer_a_grammar_is_refused() -> None:
    scheduler = Scheduler(SchedulerConfig(), BlockPool(64))
    for ask in (lambda: scheduler.add(spec("x"), hands_off=False, now=0.0), lambda: scheduler.reserve(spec("x"), 0.0)):
        with pytest.raises(InvalidRequest, match=r"tokenizer\.json") as refused:
            ask()
        assert refused.value.param == "grammar"
    assert scheduler.num_sequences == 0
