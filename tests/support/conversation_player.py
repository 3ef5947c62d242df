"""Plays conversations on nodes in this process; keeps tokens, log-probabilities and logits of every choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random

from baton.types import SamplingParams, SequenceSpec
from tests.support.conversation_engine import Drawn, Service
from tests.support.conversations import Conversation, Key
from tests.support.engine_driver import Run

# Steps in a row in which nothing was computed, by any node.
_MAX_IDLE_STEPS = 200


@dataclass
class _Live:
    key: Key | None
    spec: SequenceSpec
    run: Run


@dataclass
class Player:
    """Asks the turns of all conversations, each as soon as the one that it continues has been answered.

    ``restarts``: the chance, at every step, that one sequence begins anew with what it has, as after a failure.
    ``strays``: the chance that somebody else asks the same as a turn does, and leaves before the answer is complete.
    """

    service: Service
    conversations: Sequence[Conversation]
    random: Random
    most_at_once: int = 8
    restarts: float = 0.0
    strays: float = 0.0
    num_restarted: int = 0
    answers: dict[Key, Run] = field(default_factory=dict)
    _live: dict[str, _Live] = field(default_factory=dict)
    _num_submitted: int = 0

    def play(self) -> dict[Key, Run]:
        """Tokens and logits of every choice."""
        waiting = [(c, turn) for c in self.conversations for turn in range(len(c.turns))]
        pending: list[_Live] = []
        num_idle = 0
        while waiting or pending or self._live:
            self.random.shuffle(waiting)
            for asked in [w for w in waiting if self._is_ready(*w)]:
                if len(self._live) + len(pending) < self.most_at_once:
                    pending += self._choices(*asked)
                    waiting.remove(asked)
            pending = [live for live in pending if not self._submit(live)]
            before = sum(node.num_steps for node in self.service.nodes)
            self._take(self.service.step())
            self._disturb()
            num_idle = num_idle + 1 if before == sum(node.num_steps for node in self.service.nodes) else 0
            assert num_idle < _MAX_IDLE_STEPS, f"nothing goes on: {sorted(self._live)}, {len(pending)} without room"
        for node in self.service.nodes:
            node.check_empty()
        return self.answers

    def _is_ready(self, conversation: Conversation, turn: int) -> bool:
        parent = conversation.turns[turn].parent
        return parent is None or all(self._is_answered(key) for key in conversation.keys(parent))

    def _is_answered(self, key: Key) -> bool:
        return key in self.answers

    def _choices(self, conversation: Conversation, turn: int) -> list[_Live]:
        asked = conversation.turns[turn]
        prompt = conversation.prompt(turn, {key: run.token_ids for key, run in self.answers.items()})
        lives = []
        for key in conversation.keys(turn):
            sampling = _sampling(asked.sampling, key[2], asked.max_tokens)
            lives.append(_Live(key, self._spec(prompt, sampling, conversation.salt), Run()))
        if self.random.random() < self.strays:
            sampling = _sampling(asked.sampling, len(lives), asked.max_tokens)
            lives.append(_Live(None, self._spec(prompt, sampling, conversation.salt), Run()))
            self.random.shuffle(lives)
        return lives

    def _spec(
        self, prompt: tuple[int, ...], sampling: SamplingParams, salt: bytes, generated: Sequence[int] = ()
    ) -> SequenceSpec:
        self._num_submitted += 1
        return SequenceSpec(f"r{self._num_submitted}/0/0", prompt, sampling, tuple(generated), salt)

    def _submit(self, live: _Live) -> bool:
        if not self.service.submit(live.spec):
            return False
        self._live[live.spec.sequence_id] = live
        return True

    def _take(self, drawn: Sequence[Drawn]) -> None:
        for one in drawn:
            live = self._live[one.chunk.sequence_id]
            run = live.run
            assert one.chunk.index == len(run.token_ids), "tokens come in order, each once"
            run.token_ids += one.chunk.token_ids
            run.logits.append(one.logits)
            run.sampled.append((one.chunk.token_ids, one.chunk.logprobs))
            if one.chunk.finish_reason is not None:
                del self._live[one.chunk.sequence_id]
                if live.key is not None:
                    self.answers[live.key] = run

    def _disturb(self) -> None:
        for sequence_id, live in list(self._live.items()):
            if live.key is None and self.random.random() < 0.3:
                self.service.drop(sequence_id)
                del self._live[sequence_id]
        if self._live and self.random.random() < self.restarts:
            sequence_id, live = self.random.choice(list(self._live.items()))
            self.service.drop(sequence_id)
            del self._live[sequence_id]
            spec = live.spec
            live.spec = self._spec(spec.prompt_token_ids, spec.sampling, spec.cache_salt, live.run.token_ids)
            self.num_restarted += 1
            if not self._submit(live):
                self._retry(live)

    def _retry(self, live: _Live) -> None:
        """A sequence that was cut off goes on before anything new is asked."""
        for _ in range(_MAX_IDLE_STEPS):
            self._take(self.service.step())
            if self._submit(live):
                return
        raise AssertionError(f"{live.spec.sequence_id} finds no room")


def _sampling(options: Mapping[str, object], choice: int, max_tokens: int) -> SamplingParams:
    seed = options["seed"]
    assert isinstance(seed, int)
    return SamplingParams(**{**options, "seed": seed + choice, "max_tokens": max_tokens})  # type: ignore[arg-type]
