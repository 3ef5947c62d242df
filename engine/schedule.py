"""Machine-level scheduler: which tokens of which sequences the next step computes, and which sequences get KV blocks.

Pure: no threads, clock, torch or I/O. The cycle is schedule -> (the runner computes) -> apply | fail; cancel, hold,
resume, release, reserve and join may come in between, and blocks that a running step reads or writes go back only when
it is over.

A second step may be scheduled while one runs, ahead of the tokens that the first one draws. It preempts no sequence and
computes what the first one leaves certain; a sequence that then turns out to have ended, or to have drawn several
tokens, is dropped from it, and one whose next token the host has to know first is not in it. Steps are applied in the
order they were scheduled.

Order: every decoding sequence that has room for its next token is in every step, then prompts by priority, first come,
first served, in chunks up to the token budget. A prompt that came ``max_prompt_wait_s`` ago goes before all that did
not. With ``tbt_target_s`` a step has only so much of prompts as is predicted to fit into that time, by the steps that
were measured (``engine/step_times.py``): one that decodes, or that a sequence may wait for whose prompt another node is
computing; other steps of a node that is handed sequences may take a few times as long. One that has joined and waited
for the end of a step has the less time left for its first one. A prompt starts when all blocks
of its known tokens are there; decoding grows block by block. When the pool is exhausted the youngest sequence of the
worst priority is preempted: its blocks are dropped and its tokens computed again later. One that was preempted
``max_preemptions`` times starts again only with blocks for its whole life, and is then never a victim; nor is one whose
blocks have a reader outside (``lend``), which is going to another node.

With a prefix cache a sequence begins behind the blocks that are found for it (``engine/prefix_cache.py``); a prompt
whose next block is just being computed for another sequence waits for it, lends it its place, and lets those behind it
pass.
"""

from __future__ import annotations

import math
import sys
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Collection, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from baton.errors import BadLogits, BatonError, InternalError, InvalidRequest, NoBlocks, Overloaded, described
from baton.prefix import PrefixScheme
from baton.types import Failure, SequenceSpec, TokenChunk, blocks_for
from engine import plain_steps, results
from engine.admission import check_spec, joined_ids
from engine.blocks import BlockPool, BlockState
from engine.entry import Entry, Order, Phase, in_order
from engine.events import EngineEvent, Failed, Handoff, Output, PrefillTimes, Started
from engine.list_masks import ListMask
from engine.plain_steps import PlainSteps, Stretch
from engine.prefix_cache import PrefixCache
from engine.scheduler_config import SchedulerConfig
from engine.step import Piece, Sequence, StepPlan, StepResult, StepShape, TokenMask
from engine.step_budget import StepBudget
from engine.step_limit import StepLimit
from engine.step_times import MeasuredSteps

# Plain steps in a row, cuts included, after which they are followed as a stretch.
_STRETCH_AFTER = 3


@dataclass(frozen=True, slots=True)
class Reserved:
    """Blocks for a sequence that another node computes."""

    # Its leading blocks that are here already. Others may share them: their ids stay here.
    num_cached_blocks: int
    # Those behind them, which that node fills.
    block_ids: tuple[int, ...]
    # How many of these it fills at least: all that the known tokens need.
    min_filled_blocks: int


@dataclass(frozen=True, slots=True)
class Load:
    """What the scheduler holds, in the words of NodeStatus."""

    queued_prompt_tokens: int
    num_waiting: int
    num_running: int
    running_tokens: int


class Scheduler:
    def __init__(
        self,
        config: SchedulerConfig,
        pool: BlockPool,
        scheme: PrefixScheme | None = None,
        digest_of: Callable[[int], bytes] | None = None,
        mask_of: Callable[[SequenceSpec], TokenMask] | None = None,
    ) -> None:
        """``scheme``: how blocks are found by their content, None: never. ``digest_of`` as in PrefixCache.
        ``mask_of``: makes the mask of a sequence with a grammar, None: there is no tokenizer for it."""
        self.config = config
        self.pool = pool
        self.prefix_cache = PrefixCache(pool, scheme, config.block_tokens, digest_of)
        self._mask_of = mask_of
        # The engine thread adds the steps that it ran.
        self.measured = MeasuredSteps()
        self._watermark_blocks = int(config.watermark * pool.num_blocks)
        # One slot of every step is left to prompts where there are two: a full decode batch must not lock them out.
        self._max_residents = max(1, min(config.max_num_seqs, config.max_batch_tokens) - 1)
        self._entries: dict[str, Entry] = {}
        # Both sorted by order.
        self._waiting: list[Entry] = []
        self._active: list[Entry] = []
        # Told to stop since the last step was scheduled.
        self._to_hold: list[Entry] = []
        # Blocks are allocated; the bytes behind the computed tokens are to come.
        self._leases: dict[str, Sequence] = {}
        self._num_ordered = 0
        # No prompt becomes overdue before.
        self._next_overdue_s = -math.inf
        self._limit = StepLimit(config, self.measured)
        # Plans under way, oldest first.
        self._plans: deque[StepPlan] = deque()
        # Those of the plan under way that have no piece in it.
        self._in_bulk: tuple[Entry, ...] = ()
        # How often plain steps came in a row, and all that is active if that was often.
        self._num_in_a_row = 0
        self._stretch: Stretch | None = None
        self._gone: list[str] = []
        self._raised: list[tuple[str, Exception]] = []
        self.num_preempted = 0

    # -- arrivals and departures

    def add(self, spec: SequenceSpec, *, hands_off: bool, now: float) -> None:
        """Queue a prompt; ``hands_off``: and ``hold`` it.

        Raises PromptTooLong, InvalidRequest, Overloaded (queue full, or the id is still in use).
        """
        check_spec(spec, self.config, self.pool.num_blocks)
        self._refuse_known(spec.sequence_id)
        if len(self._waiting) >= self.config.max_waiting:
            raise Overloaded(f"{len(self._waiting)} prompts wait on this node, the limit; try another node or later")
        entry = Entry(self._sequence(spec), order=self._next_order(spec), now=now)
        entry.num_cached_tokens = len(self.prefix_cache.find(entry.sequence, draws=True)) * self.config.block_tokens
        self._entries[spec.sequence_id] = entry
        insort(self._waiting, entry, key=in_order)
        if hands_off:
            self.hold(spec.sequence_id)

    def reserve(self, spec: SequenceSpec, now: float, num_headroom_tokens: int = 0) -> Reserved:
        """Blocks for a sequence that is computed elsewhere: its known tokens, the first new one, and
        ``num_headroom_tokens`` that it may generate there meanwhile.

        Raises PromptTooLong, InvalidRequest, NoBlocks, Overloaded.
        """
        check_spec(spec, self.config, self.pool.num_blocks)
        self._refuse_known(spec.sequence_id)
        if not self._has_slot:
            raise Overloaded(f"{self._num_residents()} sequences decode on this node, the limit; try another node")
        sequence = self._sequence(spec)
        # That node scores the prompt and makes its embedding.
        sequence.first_scored = sys.maxsize
        sequence.pool = None
        num_tokens = min(spec.num_known_tokens + 1 + num_headroom_tokens, spec.max_total_tokens)
        count = blocks_for(num_tokens, self.config.block_tokens)
        found = self.prefix_cache.find(sequence, draws=False)
        self._refuse_lease_without_room(spec.sequence_id, count, found)
        found = self.prefix_cache.intact(found)
        self._refuse_lease_without_room(spec.sequence_id, count, found)
        num_new = count - len(found)
        sequence.block_ids = self.pool.allocate(spec.sequence_id, num_new, BlockState.LEASED, now, shared=found)
        sequence.num_computed = len(found) * self.config.block_tokens
        self.prefix_cache.count(spec.num_known_tokens, len(found))
        self._leases[spec.sequence_id] = sequence
        self._limit.handed_to()
        num_known = blocks_for(spec.num_known_tokens, self.config.block_tokens)
        return Reserved(len(found), tuple(sequence.block_ids[len(found) :]), num_known - len(found))

    def expect(self, sequence_id: str) -> None:
        """Its prompt is being computed: it will join soon, and is not to wait for a long step then."""
        if sequence_id in self._leases:
            self._limit.expect(sequence_id)

    def quarantine(self, sequence_id: str, now: float) -> None:
        """The lease is over but a writer may still reach its blocks: hold them until ``return_lease``."""
        if sequence_id in self._leases:
            self._limit.expect_no_more(sequence_id)
            self.pool.move(sequence_id, BlockState.QUARANTINED, now)

    def return_lease(self, sequence_id: str) -> None:
        """No writer can reach the leased blocks any more and none is expected."""
        if self._leases.pop(sequence_id, None) is not None:
            self._limit.expect_no_more(sequence_id)
            self.pool.free(sequence_id)

    def join(self, sequence_id: str, tokens: TokenChunk, now: float) -> None:
        """Decode on: the leased blocks hold the KV of all tokens but the last of ``tokens``.

        ``tokens`` may begin with generated ones that the lease's sequence has already. Raises InvalidRequest if they do
        not continue the sequence, InternalError without a lease.
        """
        seq = self._leases.get(sequence_id)
        if seq is None:
            raise InternalError(f"{sequence_id} arrived without a lease")
        token_ids = joined_ids(seq.spec, tokens, self.config, len(seq.block_ids))
        del self._leases[sequence_id]
        self._limit.joined(sequence_id, now)
        self.pool.move(sequence_id, BlockState.RUNNING, now)
        entry = Entry(seq, order=self._next_order(seq.spec), now=now)
        entry.num_stored = seq.num_computed // self.config.block_tokens
        seq.token_ids += token_ids
        seq.num_computed = len(seq.token_ids) - 1
        entry.phase = Phase.ACTIVE
        entry.is_prefilled = True
        # It was counted when its blocks were reserved: what it finds after a preemption is no hit.
        entry.started_s = now
        self._entries[sequence_id] = entry
        insort(self._active, entry, key=in_order)
        self.prefix_cache.store(entry)
        if self._stretch is not None and seq.token_mask is None:
            self._stretch.add(entry)
        elif self._stretch is not None:
            self._settle()

    def cancel(self, sequence_id: str, now: float) -> None:
        """Compute the sequence no further. Its blocks go back unless it is to be released; unknown ids are ignored."""
        entry = self._entries.get(sequence_id)
        if entry is not None and entry.phase is not Phase.ENDED:
            self._retire(entry, now)

    def lend(self, sequence_id: str, num_blocks: int) -> tuple[int, ...]:
        """A reader outside has the blocks of a sequence that decodes, which goes on; ``release`` or ``resume`` ends
        that.

        Returns the blocks: up to ``num_blocks`` with those that it may fill meanwhile, as far as others do not need
        them at once. Until then it is not preempted, and waits when these are full. Raises Overloaded if it does not
        decode now, is lent already, or has filled ``num_blocks``.
        """
        self._settle()
        entry = self._entries.get(sequence_id)
        if entry is None or not entry.can_lend:
            raise Overloaded(f"{sequence_id} does not decode on this node now; try again later")
        block_tokens = self.config.block_tokens
        if entry.start >= num_blocks * block_tokens:
            raise Overloaded(f"{sequence_id} has {entry.start} tokens by now, more than {num_blocks} blocks hold")
        spare = self.pool.num_available - len(self._active)
        more = min(num_blocks - len(entry.sequence.block_ids), spare)
        if more > 0:
            self.pool.grow(sequence_id, more)
        entry.is_released = False
        entry.max_tokens = min(num_blocks, len(entry.sequence.block_ids)) * block_tokens
        return tuple(entry.sequence.block_ids)

    def hold(self, sequence_id: str) -> None:
        """Stop between two tokens: a prompt when its first token is drawn, one that decodes after the steps under way.

        Handoff follows from ``apply`` or the next ``schedule``, unless the sequence ends before. However it ends, its
        blocks stay until ``release`` from now on. Ids that are unknown or have ended are ignored.
        """
        entry = self._entries.get(sequence_id)
        if entry is not None and entry.phase in (Phase.WAITING, Phase.ACTIVE) and not entry.hands_off:
            if entry.phase is Phase.ACTIVE:
                self._settle()
            entry.hands_off = True
            entry.is_released = False
            self._to_hold.append(entry)

    def resume(self, sequence_id: str, now: float) -> None:
        """After Handoff, or ``lend`` without ``hold``: go on here, with no reader outside any more. Else InternalError.

        Where all slots of decoding sequences are taken it gives its blocks back and is computed again in its turn.
        """
        self._settle()
        entry = self._entries.get(sequence_id)
        if entry is not None:
            entry.max_tokens = None
        if entry is not None and entry.is_lent:
            entry.is_released = True
            return
        if entry is None or entry.phase is not Phase.HELD:
            raise InternalError(f"{sequence_id} is not held on this node, expected a sequence that was handed over")
        entry.hands_off = False
        entry.is_released = True
        entry.phase = Phase.ACTIVE
        insort(self._active, entry, key=in_order)
        self.pool.move(sequence_id, BlockState.RUNNING, now)
        if self._num_residents() > self._max_residents:
            self._preempt(entry, now)

    def release(self, sequence_id: str, now: float) -> None:
        """No reader outside has the blocks any more: stop computing if need be and take them back. Idempotent."""
        entry = self._entries.get(sequence_id)
        if entry is not None:
            entry.is_released = True
            self._retire(entry, now)

    # -- the step

    def schedule(self, now: float, *, in_bulk: bool = False) -> tuple[StepPlan | None, list[EngineEvent]]:
        """The next step, None if nothing can be computed; which sequences start with it and which stopped for ``hold``.

        While a step is under way None also means that the next one has to know what becomes of it. ``in_bulk``, for
        simulators, if none is under way: sequences that decode get no pieces where nothing but blocks is to be decided
        about them; `apply_in_bulk` takes such a step in.
        """
        assert len(self._plans) < 2 - in_bulk, "a step ahead of those that are neither applied nor failed"
        self._settle()
        to_hold, self._to_hold = self._to_hold, []
        # One that is in a step, or has more to compute, is handed over when that step is applied.
        events: list[EngineEvent] = [self._hand_off(entry, now) for entry in to_hold if entry.can_hand_off]
        if self._plans and not self._can_plan_ahead():
            return None, events
        self._move_up_overdue(now)
        if not self._active and not self._waiting:
            self._limit.planned(sits_out=False)
            return None, events
        plain = plain_steps.next_step(self._active, self.pool, self.config.block_tokens) if in_bulk else None
        if plain is None:
            pieces = self._decode_pieces(now)
            decoding = StepShape(0, 0, len(pieces), len(pieces) + sum([p.start for p in pieces]))
            begun = [e for e in self._active if not e.is_decoding]
        else:
            pieces, decoding, begun, self._in_bulk = [], plain.shape, plain.others, plain.decoding
            self._limit.planned(sits_out=False)
        begins_s = self._limit.begins_s(now, is_ahead=bool(self._plans))
        budget = StepBudget(self.config, self.measured, decoding, self._limit.next_s(decoding, begins_s))
        pieces += self._prompt_pieces(begun, budget, events, now)
        if not pieces and not decoding.num_decoding:
            return None, events
        for piece in pieces:
            self._entries[piece.sequence.sequence_id].board(piece)
        self._limit.began(budget.shape, begins_s)
        plan = StepPlan(tuple(pieces), budget.shape, plain_steps.board(self._in_bulk))
        self._plans.append(plan)
        return plan, events

    def apply(self, plan: StepPlan, result: StepResult, now: float) -> list[EngineEvent]:
        """Take in what the runner computed: new tokens, finished sequences, blocks that were waiting for this."""
        events: list[EngineEvent] = []
        for entry, piece in self._land(plan):
            if entry.phase is Phase.ENDED:
                # It left, or ended or failed in the step before, which this one did not wait for.
                self._retire(entry, now)
                continue
            # Else the step before drew more than the token that this piece computed: what it drew is known already.
            if piece.start == entry.sequence.num_computed:
                self._take_in(entry, piece, result, events, now)
            if entry.can_hand_off:
                events.append(self._hand_off(entry, now))
        return events

    def apply_in_bulk(
        self,
        plan: StepPlan,
        result: StepResult,
        now: float,
        token_id: int,
        last: Collection[str] = (),
        last_id: int = 0,
    ) -> list[EngineEvent]:
        """As `apply`, of a step that was scheduled ``in_bulk``: each sequence that has no piece in it draws
        ``token_id``, which ends none, or ``last_id`` if it is one of ``last``.

        Of these returns what became of those that ended or stopped; `Sequence.token_ids` has the tokens of the others.
        """
        entries, self._in_bulk = self._in_bulk, ()
        events: list[EngineEvent] = []
        for entry in plain_steps.land(entries, self.prefix_cache, token_id, last):
            if entry.phase is Phase.ENDED:
                self._retire(entry, now)
                continue
            sequence = entry.sequence
            if sequence.sequence_id in last or len(sequence.token_ids) >= sequence.max_total_tokens:
                events.append(self._drawn_plainly(entry, last, last_id, now))
            if entry.can_hand_off:
                events.append(self._hand_off(entry, now))
        return events + self.apply(plan, result, now)

    def fail(self, plan: StepPlan, error: BatonError, now: float) -> list[EngineEvent]:
        """The step went wrong: every sequence in it fails, the others go on."""
        events: list[EngineEvent] = []
        for entry, _ in self._land(plan):
            if entry.phase is Phase.ENDED:
                self._retire(entry, now)
            else:
                events.append(self._failed(entry, error, now))
        return events

    # -- many steps at once

    def plain_steps(self, most: int, now: float) -> PlainSteps | None:
        """How many of the ``most`` next steps do nothing but decode what decodes now; None if the next one does not.

        None is under way. What comes from outside meanwhile (a prompt, a cancel) cuts them short.
        """
        assert not self._plans, "steps are under way"
        until_s = math.inf
        if not self._active or self._to_hold:
            return None
        if self._waiting:
            # The first one cannot start as long as none ends; the order, and what is found for it, may change.
            until_s = self._next_overdue_s
            is_found = self.prefix_cache.is_on
            if now >= until_s or is_found or self._can_start(self._waiting[0], []):
                return None
        stretch = self._stretch
        if stretch is not None:
            num_steps, num_kv_tokens = stretch.limit(most), stretch.num_kv_tokens
        else:
            num_steps, num_kv_tokens = plain_steps.limit(self._active, self.pool, self.config.block_tokens, most)
        if not num_steps:
            return None
        return PlainSteps(num_steps, StepShape(0, 0, len(self._active), num_kv_tokens), until_s)

    def decode(
        self, began_s: float, ended_s: Seq[float], token_id: int, last: Collection[str] = (), last_id: int = 0
    ) -> list[EngineEvent]:
        """As many of these steps as ``ended_s`` has ends, the first of which began at ``began_s``; each draws
        ``token_id``, which ends no sequence, and the last one draws ``last_id`` for those of the sequences ``last``
        that are in it.

        Returns what became of those that ended; `Sequence.token_ids` has the tokens of the others.
        """
        num_steps, now = len(ended_s), ended_s[-1]
        self._limit.decoded(num_steps)
        # As `schedule` keeps it: nothing that waits becomes overdue in between.
        starts_s = (began_s, *ended_s[:-1])
        while self._next_overdue_s <= starts_s[-1]:
            first_s = starts_s[bisect_left(starts_s, self._next_overdue_s)]
            self._next_overdue_s = first_s + self.config.max_prompt_wait_s
        full = self._advance_plainly(num_steps, token_id)
        events: list[EngineEvent] = []
        named = [entry for name in last if (entry := self._entries.get(name)) and entry.phase is Phase.ACTIVE]
        for entry in sorted({*full, *named}, key=in_order):
            if self._stretch is not None:
                self._stretch.write(entry)
            events.append(self._drawn_plainly(entry, last, last_id, now))
        return events

    def _advance_plainly(self, num_steps: int, token_id: int) -> list[Entry]:
        """Returns those that may draw no more."""
        active, block_tokens = self._active, self.config.block_tokens
        if self._stretch is not None and self._stretch.token_id != token_id:
            self._settle()
        self._num_in_a_row += 1
        if self._stretch is None:
            # A stretch costs as much to begin as some steps.
            is_begun = self._num_in_a_row > _STRETCH_AFTER and plain_steps.can_stretch(active, self.prefix_cache)
            if not is_begun:
                return plain_steps.advance(active, self.pool, self.prefix_cache, block_tokens, num_steps, token_id)
            self._stretch = Stretch(active, self.pool, block_tokens, token_id)
        return self._stretch.advance(num_steps)

    def _settle(self) -> None:
        """Each sequence has what it has drawn, and more than decoding may follow."""
        self._num_in_a_row = 0
        if self._stretch is not None:
            self._stretch.settle()
            self._stretch = None

    def _drawn_plainly(self, entry: Entry, last: Collection[str], last_id: int, now: float) -> Output:
        """The newest token may be its last one."""
        sequence = entry.sequence
        if sequence.sequence_id in last:
            sequence.token_ids[-1] = last_id
        token_id, index = sequence.token_ids[-1], sequence.num_generated - 1
        reason = results.finish_reason(sequence, token_id)
        if reason is not None:
            self._retire(entry, now)
        return Output(
            sequence.sequence_id, TokenChunk(sequence.sequence_id, index, (token_id,), finish_reason=reason)
        )  # fmt: skip

    @property
    def active_ids(self) -> list[str]:
        """Sequences that are computed now, prompts included."""
        return [entry.sequence.spec.sequence_id for entry in self._active]

    def is_active(self, sequence_id: str) -> bool:
        """It has blocks, and is computed to its end or to where it is to stop."""
        entry = self._entries.get(sequence_id)
        return entry is not None and entry.phase is Phase.ACTIVE

    def token_ids(self, sequence_id: str) -> Seq[int]:
        """All that are known of a sequence, of which the caller changes nothing; empty for one that is not here."""
        entry = self._entries.get(sequence_id)
        if entry is None:
            return ()
        if self._stretch is not None:
            self._stretch.write(entry)
        return entry.sequence.token_ids

    # -- questions

    def full_blocks(self, sequence_id: str) -> int:
        """Leading blocks of a sequence that are full and are written no more."""
        entry = self._entries.get(sequence_id)
        # Pieces that will be dropped still write to its blocks.
        if entry is None or entry.is_overtaken:
            return 0
        if self._stretch is not None:
            self._stretch.write(entry)
        return entry.sequence.num_computed // self.config.block_tokens

    @property
    def num_sequences(self) -> int:
        """Sequences and leases that hold or want blocks."""
        return len(self._entries) + len(self._leases)

    @property
    def is_idle(self) -> bool:
        """Nothing is computed, or waits for that."""
        return not self._active and not self._waiting

    @property
    def leased_tokens(self) -> int:
        """Known tokens of the leases whose bytes are to come."""
        return sum(seq.spec.num_known_tokens for seq in self._leases.values())

    def take_gone(self) -> list[str]:
        """Sequences that left since the last call: the runner may forget them."""
        gone, self._gone = self._gone, []
        return gone

    def take_raised(self) -> list[tuple[str, Exception]]:
        """Sequences that failed because drawing or taking in their token raised, since the last call: for the log."""
        raised, self._raised = self._raised, []
        return raised

    def load(self) -> Load:
        prompts, num_running, running_tokens, active = [*self._waiting], 0, 0, self._active
        if self._stretch is not None:
            num_running, active = len(self._stretch), []
            running_tokens = self._stretch.num_kv_tokens - num_running
        for entry in active:
            if entry.is_prefilled:
                num_running += 1
                running_tokens += entry.sequence.num_computed
            else:
                prompts.append(entry)
        return Load(
            queued_prompt_tokens=sum([e.num_expected for e in prompts]),
            num_waiting=len(prompts),
            num_running=num_running,
            running_tokens=running_tokens,
        )

    def check(self) -> None:
        """Assert that scheduler and pool agree."""
        if self._stretch is not None:
            self._stretch.check(self._active)
        self.pool.check()
        holders = {e.sequence_id for e in self._entries.values() if e.sequence.block_ids} | set(self._leases)
        assert holders == self.pool.owners(), "pool and scheduler disagree on owners"
        for entry in self._entries.values():
            seq = entry.sequence
            assert 0 <= seq.num_computed <= len(seq.token_ids)
            assert len(seq.block_ids) * self.config.block_tokens >= entry.start
            num_pieces = sum(seq is p.sequence for plan in self._plans for p in plan.pieces)
            assert entry.num_flights == num_pieces + (entry in self._in_bulk)
            assert (entry.phase is Phase.WAITING) == (entry in self._waiting)
            assert (entry.phase is Phase.ACTIVE) == (entry in self._active)
            assert entry.phase is not Phase.HELD or (not entry.num_flights and not entry.is_released)
            assert entry.num_stored <= seq.num_computed // self.config.block_tokens
            if seq.block_ids:
                assert seq.block_ids is self.pool.block_ids(seq.sequence_id), "two lists of one sequence's blocks"
                to_write = seq.block_ids[seq.num_computed // self.config.block_tokens :]
                assert not any(self.pool.is_shared(block) for block in to_write), "a shared block may be written to"
        for name, seq in self._leases.items():
            to_fill = self.pool.block_ids(name)[seq.num_computed // self.config.block_tokens :]
            assert not any(self.pool.is_shared(block) for block in to_fill), "a writer outside reaches a shared block"
        assert self._num_residents() <= self._max_residents

    # -- inside

    def _sequence(self, spec: SequenceSpec) -> Sequence:
        sequence = Sequence(spec)
        if spec.sampling.grammar:
            if self._mask_of is None:
                message = "grammar needs a tokenizer.json in the model's folder that the node can use; ask for text"
                raise InvalidRequest(message, param="grammar")
            sequence.token_mask = self._mask_of(spec)
        if spec.sampling.allowed_token_ids or spec.sampling.bad_word_ids:
            assert self.config.vocab_size is not None, "a model has a vocabulary"
            sequence.token_mask = ListMask(spec, self.config.vocab_size, sequence.token_mask)
        return sequence

    def _refuse_known(self, sequence_id: str) -> None:
        if sequence_id in self._entries or sequence_id in self._leases:
            raise Overloaded(f"{sequence_id} is still in use on this node, expected a new sequence id")

    def _next_order(self, spec: SequenceSpec) -> Order:
        self._num_ordered += 1
        return 1, spec.priority, self._num_ordered

    def _num_residents(self) -> int:
        return len(self._leases) + sum(not e.hands_off for e in self._active)

    @property
    def _has_slot(self) -> bool:
        """For one more that decodes."""
        # The first question is the cheaper one, and nearly always enough.
        most = self._max_residents
        return len(self._leases) + len(self._active) < most or self._num_residents() < most

    def _blocks_to_start(self, entry: Entry) -> int:
        if entry.num_preemptions >= self.config.max_preemptions:
            # The last token's KV is never computed.
            return blocks_for(entry.sequence.spec.max_total_tokens - 1, self.config.block_tokens)
        return blocks_for(len(entry.sequence.token_ids), self.config.block_tokens)

    def _blocks_taken(self, entry: Entry) -> int:
        """Of the available blocks, those that it would take if it started now."""
        found = self.prefix_cache.find(entry.sequence, draws=True)
        return self.pool.num_taken(self._blocks_to_start(entry), found)

    def _refuse_lease_without_room(self, sequence_id: str, count: int, found: list[int]) -> None:
        need = self.pool.num_taken(count, found)
        # Nothing overtakes a prompt that waits for memory.
        spare = self.pool.num_available - sum(self._blocks_taken(entry) for entry in self._waiting[:1])
        if self.pool.num_held:
            spare -= self._watermark_blocks
        if need > spare:
            raise NoBlocks(
                f"{sequence_id} needs {need} KV blocks, {self.pool.num_available} of {self.pool.num_blocks} are "
                f"free and {max(spare, 0)} of them to be had"
            )

    def _can_start(self, entry: Entry, found: list[int]) -> bool:
        spare = self.pool.num_available
        if not entry.hands_off:
            if not self._has_slot:
                return False
            if self.pool.num_held and entry.num_preemptions < self.config.max_preemptions:
                spare -= self._watermark_blocks
        return self.pool.num_taken(self._blocks_to_start(entry), found) <= spare

    def _can_plan_ahead(self) -> bool:
        """Whether every sequence that decodes next has blocks without preempting one."""
        return (
            sum(self._blocks_to_grow(entry) for entry in self._active if _decodes_next(entry))
            <= self.pool.num_available
        )

    def _decode_pieces(self, now: float) -> list[Piece]:
        pieces = []
        sits_out = False
        for entry in list(self._active):
            # One behind it may have been preempted for another just now.
            if entry.phase is Phase.ACTIVE and _decodes_next(entry):
                if self._grow(entry, now):
                    pieces.append(Piece(entry.sequence, entry.start, 1, samples=True))
            elif entry.is_decoding and _waits_for_host(entry):
                sits_out = True
        self._limit.planned(sits_out=sits_out)
        return pieces

    def _blocks_to_grow(self, entry: Entry) -> int:
        return max(0, blocks_for(entry.start + 1, self.config.block_tokens) - len(entry.sequence.block_ids))

    def _grow(self, entry: Entry, now: float) -> bool:
        """Make sure the next token's KV has room, at the expense of sequences behind it; False if it must wait."""
        seq = entry.sequence
        need = self._blocks_to_grow(entry)
        while need > self.pool.num_available:
            victim = self._last_victim(entry.order)
            if victim is None:
                return False
            self._preempt(victim, now)
        if need > 0:
            self.pool.grow(seq.sequence_id, need)
        return True

    def _last_victim(self, order: Order) -> Entry | None:
        for entry in reversed(self._active):
            if entry.order <= order:
                return None
            if entry.is_released and entry.num_preemptions < self.config.max_preemptions:
                return entry
        return None

    def _preempt(self, entry: Entry, now: float) -> None:
        assert not entry.num_flights, "a running step keeps its blocks"
        assert entry.is_released, "a reader outside keeps its blocks"
        self._active.remove(entry)
        self.pool.free(entry.sequence_id)
        entry.sequence.block_ids = ()
        entry.sequence.num_computed = 0
        entry.num_stored = 0
        entry.phase = Phase.WAITING
        entry.came_s = now
        entry.num_preemptions += 1
        self.num_preempted += 1
        if entry.num_preemptions >= self.config.max_preemptions:
            self._num_ordered += 1
            entry.order = (0, 0, self._num_ordered)
        insort(self._waiting, entry, key=in_order)

    def _move_up_overdue(self, now: float) -> None:
        """Prompts that came too long ago go before all that did not, in the order they came."""
        if now < self._next_overdue_s:
            return
        max_wait_s = self.config.max_prompt_wait_s
        came_s = [now]
        for line in (self._waiting, self._active):
            for entry in [e for e in line if e.order[0] and not e.is_decoding]:
                if now - entry.came_s >= max_wait_s:
                    line.remove(entry)
                    entry.order = (0, 0, entry.order[2])
                    insort(line, entry, key=in_order)
                else:
                    came_s.append(entry.came_s)
        # Not in every step: the bound is kept to a sixteenth.
        self._next_overdue_s = max(min(came_s) + max_wait_s, now + max_wait_s / 16)

    def _prompt_pieces(
        self, begun: list[Entry], budget: StepBudget, events: list[EngineEvent], now: float
    ) -> Iterator[Piece]:
        """``begun``: prompts of which a part is computed."""
        for entry in list(self._waiting):
            if not entry.is_ready:
                continue
            while begun and begun[0].order < entry.order and not budget.is_full:
                yield budget.take(begun.pop(0))
            if budget.is_full:
                return
            found = self._found(entry)
            if found is not None:
                if not self._start(entry, found, events, now):
                    break
                yield budget.take(entry)
            elif entry.leader is not None and entry.leader.entry in begun:
                begun.remove(entry.leader.entry)
                yield budget.take(entry.leader.entry)
        for entry in begun:
            if budget.is_full:
                return
            yield budget.take(entry)

    def _found(self, entry: Entry) -> list[int] | None:
        """The blocks that it begins with; None while its leader is computing the next one."""
        if entry.leader is not None and entry.leader.is_computing:
            return None
        found = self.prefix_cache.find(entry.sequence, draws=True)
        entry.leader = self.prefix_cache.leader(entry, len(found), self._active)
        return found if entry.leader is None else None

    def _start(self, entry: Entry, found: list[int], events: list[EngineEvent], now: float) -> bool:
        """Give it the blocks of its known tokens, if there is room for them."""
        if not self._can_start(entry, found):
            return False
        num_found, found = len(found), self.prefix_cache.intact(found)
        if len(found) < num_found and not self._can_start(entry, found):
            return False
        seq, count = entry.sequence, self._blocks_to_start(entry) - len(found)
        seq.block_ids = self.pool.allocate(entry.sequence_id, count, BlockState.PROMPT, now, shared=found)
        seq.num_computed = len(found) * self.config.block_tokens
        entry.num_stored = len(found)
        if entry.started_s is None:
            entry.started_s = now
            entry.num_cached_tokens = seq.num_computed
            self.prefix_cache.count(len(seq.token_ids), len(found))
        self._waiting.remove(entry)
        entry.phase = Phase.ACTIVE
        insort(self._active, entry, key=in_order)
        if entry.hands_off:
            events.append(Started(entry.sequence_id, tuple(entry.sequence.block_ids), len(found)))
        return True

    def _land(self, plan: StepPlan) -> Iterator[tuple[Entry, Piece]]:
        assert self._plans, "no step is under way"
        assert plan is self._plans.popleft(), "this is not the oldest step that is under way"
        for piece in plan.pieces:
            entry = self._entries[piece.sequence.sequence_id]
            entry.land(piece)
            yield entry, piece

    def _take_in(self, entry: Entry, piece: Piece, result: StepResult, events: list[EngineEvent], now: float) -> None:
        entry.sequence.num_computed += piece.num_tokens
        entry.num_computed_total += piece.num_tokens
        # What the runner computed for one sequence, or failed to compute, changes no other.
        try:
            self._take_results(entry, piece, result, events, now)
        except Exception as error:
            events.append(self._failed(entry, self._known(entry, error), now))
            return
        if not piece.samples:
            self.prefix_cache.store(entry)

    def _take_results(
        self, entry: Entry, piece: Piece, result: StepResult, events: list[EngineEvent], now: float
    ) -> None:
        sequence, name = entry.sequence, entry.sequence_id
        if sequence.pool is not None:
            embedding = results.take_hidden(sequence, sequence.pool, piece, result.hidden.get(name))
            if embedding is not None:
                events.append(embedding)
        elif piece.scored:
            events.append(results.take_scores(sequence, piece, result.scored.get(name, ()), result.failed.get(name)))
        if piece.samples:
            drawn = result.sampled.get(name)
            if drawn is None:
                raise result.failed.get(name) or InternalError("the runner returned no token")
            events.append(self._advance(entry, drawn, now))

    def _known(self, entry: Entry, error: Exception) -> BatonError:
        if isinstance(error, BatonError):
            return error
        self._raised.append((entry.sequence_id, error))
        return InternalError(f"drawing or taking in a token: {described(error)}")

    def _advance(self, entry: Entry, drawn: TokenChunk, now: float) -> Output:
        chunk = results.take_drawn(entry.sequence, drawn, self.config.block_tokens)
        if len(chunk.token_ids) > 1:
            entry.overtake()
        self.prefix_cache.store(entry)
        times = None
        if not entry.is_prefilled:
            assert entry.started_s is not None
            queue_s = entry.started_s - entry.arrived_s
            times = PrefillTimes(
                queue_s, now - entry.started_s, entry.num_computed_total, entry.num_cached_tokens
            )  # fmt: skip
            entry.is_prefilled = True
        if chunk.finish_reason is not None:
            self._retire(entry, now)
        elif not entry.hands_off:
            self.pool.move(entry.sequence_id, BlockState.RUNNING, now)
        return Output(entry.sequence_id, chunk, times)

    def _hand_off(self, entry: Entry, now: float) -> Handoff:
        self._active.remove(entry)
        entry.phase = Phase.HELD
        seq, spec = entry.sequence, entry.sequence.spec
        self.pool.move(seq.sequence_id, BlockState.SENDING, now)
        num_known = len(spec.generated_token_ids)
        tokens = TokenChunk(seq.sequence_id, num_known, tuple(seq.token_ids[spec.num_known_tokens :]))
        num_blocks = blocks_for(seq.num_computed, self.config.block_tokens)
        return Handoff(seq.sequence_id, tokens, tuple(seq.block_ids[:num_blocks]))

    def _failed(self, entry: Entry, error: BatonError, now: float) -> Failed:
        if isinstance(error, BadLogits):
            # No other sequence is to read the KV that led to them.
            self.pool.forget(entry.sequence.block_ids)
        self._retire(entry, now)
        return Failed(entry.sequence_id, Failure.of(error))

    def _retire(self, entry: Entry, now: float) -> None:
        """The sequence is over; its blocks go back once no step and no reader outside has them."""
        if self._stretch is not None:
            self._stretch.remove(entry)
        if entry.phase is Phase.WAITING:
            self._waiting.remove(entry)
        elif entry.phase is Phase.ACTIVE:
            self._active.remove(entry)
        entry.phase = Phase.ENDED
        holds = bool(entry.sequence.block_ids)
        if entry.num_flights:
            return
        if holds and not entry.is_released:
            self.pool.move(entry.sequence_id, BlockState.SENDING, now)
            return
        if holds:
            self.pool.free(entry.sequence_id)
        del self._entries[entry.sequence_id]
        self._gone.append(entry.sequence_id)


def _decodes_next(entry: Entry) -> bool:
    """One whose mask waits for the host, or whose pieces under way will be dropped, sits out the step that is planned
    ahead: the others need not wait with it."""
    return entry.is_decoding and entry.is_ready and not (entry.is_ending or _waits_for_host(entry))


def _waits_for_host(entry: Entry) -> bool:
    return entry.needs_host or entry.is_overtaken


def final_blocks(sequence: Sequence, num_computed: int, block_tokens: int) -> int:
    """Leading blocks that hold their last bytes once ``num_computed`` tokens of the known ones are computed."""
    if num_computed >= sequence.spec.num_known_tokens:
        return blocks_for(sequence.spec.num_known_tokens, block_tokens)
    return num_computed // block_tokens
