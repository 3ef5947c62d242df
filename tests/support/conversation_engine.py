"""Runs sequences on schedulers and runners in this thread, and keeps the logits that every token was drawn from.

Beside each arena lies a note of what was written where, so that a sequence that starts with shared blocks is known to
have found its own tokens, under its own salt. Free blocks hold NaN. The transfer of a split pair is a plain copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Protocol

import torch
from torch import Tensor

from baton.errors import NoBlocks, Overloaded
from baton.prefix import PrefixScheme
from baton.types import SequenceSpec, TokenChunk
from engine.blocks import BlockPool
from engine.events import EngineEvent, Failed, Handoff, Output
from engine.runner import Runner
from engine.schedule import Reserved, Scheduler
from engine.scheduler_config import SchedulerConfig
from engine.step import StepPlan


def scheme_of(runner: Runner, *, phases_agree: bool | None = None) -> PrefixScheme:
    caching = runner.prefix_caching
    if phases_agree is not None:
        caching = replace(caching, phases_agree=phases_agree)
    return PrefixScheme(runner.description.fingerprint, runner.kernels, runner.layout, caching)


@dataclass(frozen=True, slots=True)
class Drawn:
    """A token, and the logits it was drawn from."""

    chunk: TokenChunk
    logits: Tensor


class Node:
    """A runner and its scheduler; ``pool`` may be smaller than the runner's arena."""

    def __init__(
        self,
        runner: Runner,
        scheme: PrefixScheme | None,
        pool: BlockPool,
        *,
        max_batch_tokens: int = 200,
        is_noted: bool = True,
    ) -> None:
        """``is_noted``: compare what is found with what was written; else only tokens and logits can be wrong."""
        config = SchedulerConfig(max_batch_tokens=max_batch_tokens, max_num_seqs=32).of_model(
            block_tokens=runner.layout.block_tokens,
            max_model_tokens=runner.description.max_model_tokens,
            vocab_size=runner.description.vocab_size,
        )
        self.runner = runner
        self.pool = pool
        self.scheduler = Scheduler(config, pool, scheme)
        self.arena = [runner._cache.layer(i) for i in range(runner.layout.num_layers)]
        self._is_noted = is_noted
        self.num_steps = 0
        # Known tokens of sequences that started, and those of them that lay there.
        self.num_asked = 0
        self.num_found = 0
        # By block and position in it: the tokens up to there and their salt, as a number.
        self.written: list[list[int | None]] = [
            [None] * runner.layout.block_tokens for _ in range(runner.layout.num_blocks)
        ]
        # By sequence: the numbers of its tokens, and up to where it computed without a break.
        self._chains: dict[str, list[int]] = {}
        self._ends: dict[str, int] = {}
        # Free blocks that hold NaN.
        self.poisoned: set[int] = set()

    def step(self) -> tuple[list[EngineEvent], list[Drawn]]:
        """One step, if there is something to compute."""
        plan, events = self.scheduler.schedule(0.0)
        if plan is None:
            self._forget()
            return events, []
        self.num_steps += 1
        self._poison()
        self._note(plan)
        launched = self.runner.launch(plan)
        rows = dict(zip([s.sequence_id for s in launched.sequences], launched.logits.clone(), strict=True))
        after = self.scheduler.apply(plan, launched.result(), 0.0)
        self._forget()
        drawn = [Drawn(e.chunk, rows[e.sequence_id]) for e in after if isinstance(e, Output)]
        return events + after, drawn

    def check_empty(self) -> None:
        """Nothing is held any more, and what is cached is all there."""
        self.scheduler.check()
        assert self.scheduler.num_sequences == 0
        assert self.pool.num_held == 0

    def _poison(self) -> None:
        free = set(self.pool.free_ids)
        fresh = sorted(free - self.poisoned)
        with torch.inference_mode():
            for layer in self.arena:
                layer[fresh] = float("nan")
        for block in fresh:
            self.written[block] = [None] * self.runner.layout.block_tokens
        self.poisoned = free

    def _note(self, plan: StepPlan) -> None:
        """What the step reads of earlier work is the sequence's own content, and what it writes is the sequence's."""
        size = self.runner.layout.block_tokens
        for piece in plan.pieces:
            seq = piece.sequence
            chain = self._chain(seq.spec, seq.token_ids)
            if self._ends.get(seq.sequence_id) != piece.start:
                found = [self.written[seq.block_ids[i // size]][i % size] for i in range(piece.start)]
                is_own = found == chain[: piece.start]
                assert is_own or not self._is_noted, f"{seq.sequence_id} starts on blocks that hold something else"
                self.num_asked += len(seq.token_ids)
                self.num_found += piece.start
            self._ends[seq.sequence_id] = piece.end
            for i in range(piece.start, piece.end):
                self.written[seq.block_ids[i // size]][i % size] = chain[i]
            for block in seq.block_ids[piece.start // size : -(-piece.end // size)]:
                holders = sum(list(self.pool.block_ids(owner)).count(block) for owner in self.pool.owners())
                assert holders == 1 or not self._is_noted, (
                    f"{seq.sequence_id} writes to block {block}, which {holders} sequences hold"
                )

    def _chain(self, spec: SequenceSpec, token_ids: Sequence[int]) -> list[int]:
        chain = self._chains.setdefault(spec.sequence_id, [])
        last = chain[-1] if chain else hash(spec.cache_salt)
        for token_id in token_ids[len(chain) :]:
            last = hash((last, token_id))
            chain.append(last)
        return chain

    def _forget(self) -> None:
        for sequence_id in self.scheduler.take_gone():
            self.runner.forget(sequence_id)
            self._chains.pop(sequence_id, None)
            self._ends.pop(sequence_id, None)


class Service(Protocol):
    """Where sequences run."""

    @property
    def nodes(self) -> Sequence[Node]: ...

    def submit(self, spec: SequenceSpec) -> bool:
        """False: there is no room now."""
        ...

    def drop(self, sequence_id: str) -> None:
        """As if its client, or one of its nodes, had gone."""
        ...

    def step(self) -> list[Drawn]: ...


class Colocated:
    """Prompt and answer on one node."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.nodes = (node,)

    def submit(self, spec: SequenceSpec) -> bool:
        self.node.scheduler.add(spec, hands_off=False, now=0.0)
        return True

    def drop(self, sequence_id: str) -> None:
        self.node.scheduler.cancel(sequence_id, 0.0)

    def step(self) -> list[Drawn]:
        events, drawn = self.node.step()
        _refuse_failures(events)
        return drawn


@dataclass(frozen=True, slots=True)
class _Sent:
    handoff: Handoff
    reserved: Reserved


class Split:
    """Prompts on one node, answers on the other one; transfers take a random number of steps."""

    def __init__(self, prefill: Node, decode: Node, random: Random) -> None:
        self.prefill, self.decode = prefill, decode
        self.nodes = (prefill, decode)
        self.num_moved_blocks = 0
        # Of blocks that a transfer would have moved without a cache.
        self.num_needed_blocks = 0
        self._random = random
        self._reserved: dict[str, Reserved] = {}
        self._underway: list[_Sent] = []

    def submit(self, spec: SequenceSpec) -> bool:
        try:
            reserved = self.decode.scheduler.reserve(spec, 0.0)
        except (NoBlocks, Overloaded):
            return False
        self._reserved[spec.sequence_id] = reserved
        self.prefill.scheduler.add(spec, hands_off=True, now=0.0)
        return True

    def drop(self, sequence_id: str) -> None:
        self._underway = [s for s in self._underway if s.handoff.sequence_id != sequence_id]
        self.prefill.scheduler.cancel(sequence_id, 0.0)
        self.prefill.scheduler.release(sequence_id, 0.0)
        if self._reserved.pop(sequence_id, None) is None:
            self.decode.scheduler.cancel(sequence_id, 0.0)
        else:
            self.decode.scheduler.quarantine(sequence_id, 0.0)
            self.decode.scheduler.return_lease(sequence_id)

    def step(self) -> list[Drawn]:
        events, drawn = self.prefill.step()
        _refuse_failures(events)
        for event in events:
            if isinstance(event, Handoff):
                self._underway.append(_Sent(event, self._reserved[event.sequence_id]))
            elif isinstance(event, Output) and event.chunk.finish_reason is not None:
                # Over with its first token: there is nothing to hand over.
                self.prefill.scheduler.release(event.sequence_id, 0.0)
                self.decode.scheduler.return_lease(event.sequence_id)
                del self._reserved[event.sequence_id]
        late = [sent for sent in self._underway if self._random.random() < 0.4]
        for sent in self._underway:
            if sent not in late:
                self._arrive(sent)
        self._underway = late
        events, later = self.decode.step()
        _refuse_failures(events)
        return drawn + later

    def _arrive(self, sent: _Sent) -> None:
        handoff, reserved = sent.handoff, sent.reserved
        size = self.prefill.runner.layout.block_tokens
        spec = self.decode.scheduler._leases[handoff.sequence_id].spec
        num_blocks = -(-spec.num_known_tokens // size)
        source = list(handoff.block_ids[reserved.num_cached_blocks : num_blocks])
        target = list(reserved.block_ids[: len(source)])
        self.num_needed_blocks += num_blocks
        self.num_moved_blocks += len(source)
        with torch.inference_mode():
            for theirs, ours in zip(self.prefill.arena, self.decode.arena, strict=True):
                ours[target] = theirs[source]
        for theirs_id, ours_id in zip(source, target, strict=True):
            self.decode.written[ours_id] = list(self.prefill.written[theirs_id])
        self.decode.poisoned -= set(target)
        del self._reserved[handoff.sequence_id]
        self.decode.scheduler.join(handoff.sequence_id, handoff.tokens, 0.0)
        self.prefill.scheduler.release(handoff.sequence_id, 0.0)


def _refuse_failures(events: Sequence[EngineEvent]) -> None:
    failed = [event for event in events if isinstance(event, Failed)]
    assert not failed, failed
