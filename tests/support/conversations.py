"""Random conversations for tests of the prefix cache: what is asked, in which order, and what may share what.

Pure, and independent of answers: a turn's prompt is put together from the answers that the test got itself, so that a
wrong token shows in all later turns as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

Tokens = tuple[int, ...]
# Of a choice: conversation, turn, choice.
Key = tuple[int, int, int]

SALTS = (b"", b"", b"one tenant", b"another tenant")
_PLAIN: dict[str, Any] = {"temperature": 0.0}
# With seeds; the choices of one turn get seeds that follow each other.
_SAMPLINGS: tuple[dict[str, Any], ...] = (
    _PLAIN,
    _PLAIN,
    {"temperature": 0.0, "logprobs": 3},
    {"temperature": 0.0, "repetition_penalty": 1.3, "frequency_penalty": 0.4},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 0.8, "top_k": 40, "min_p": 0.002, "presence_penalty": 0.5, "logprobs": 5},
    {"temperature": 0.9, "repetition_penalty": 1.1, "logit_bias": {3: 2.0, 7: -100.0}, "logprobs": 0},
)


@dataclass(frozen=True, slots=True)
class Turn:
    """``said`` is added behind choice ``choice`` of turn ``parent``, or behind the system prompt if there is none."""

    parent: int | None
    choice: int
    said: Tokens
    num_choices: int
    max_tokens: int
    sampling: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns come after those that they continue; several may continue the same one."""

    number: int
    system: Tokens
    salt: bytes
    turns: tuple[Turn, ...]

    def prompt(self, turn: int, answers: Mapping[Key, Sequence[int]]) -> Tokens:
        """What turn ``turn`` asks; ``answers`` has those of the turns before."""
        asked = self.turns[turn]
        if asked.parent is None:
            return self.system + asked.said
        answer = tuple(answers[self.number, asked.parent, asked.choice])
        return self.prompt(asked.parent, answers) + answer + asked.said

    def keys(self, turn: int) -> list[Key]:
        return [(self.number, turn, choice) for choice in range(self.turns[turn].num_choices)]


@dataclass(frozen=True, slots=True)
class Shape:
    """What conversations are drawn from. Lengths in tokens, both ends included."""

    vocab_size: int
    # One of these is the beginning of each conversation, of the same tokens each time.
    system_lengths: Sequence[int] = (0, 40, 150, 230)
    said: tuple[int, int] = (1, 60)
    answer: tuple[int, int] = (1, 40)
    # Prompt and answer of a turn; one that would be longer continues an earlier turn.
    longest: int = 640
    turns: tuple[int, int] = (2, 8)
    salts: Sequence[bytes] = SALTS
    samplings: Sequence[Mapping[str, Any]] = _SAMPLINGS
    num_choices: Sequence[int] = (1, 1, 1, 2, 3)


@dataclass
class Book:
    """Draws conversations. Those of one book share their system prompts, and things that were said."""

    shape: Shape
    random: Random
    _systems: list[Tokens] = field(init=False)
    # Said before, to be said again behind another beginning: equal blocks at other places.
    _said: list[Tokens] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._systems = [self._tokens(length) for length in self.shape.system_lengths]

    def conversations(self, count: int) -> list[Conversation]:
        return [self._conversation(number) for number in range(count)]

    def _tokens(self, length: int) -> Tokens:
        return tuple(self.random.randrange(self.shape.vocab_size) for _ in range(length))

    def _conversation(self, number: int) -> Conversation:
        shape, rng = self.shape, self.random
        system = rng.choice(self._systems)
        turns: list[Turn] = []
        # The most tokens that prompt and answer of each turn have.
        lengths: list[int] = []
        for index in range(rng.randint(*shape.turns)):
            said, max_tokens = self._say(), rng.randint(*shape.answer)
            parent = self._parent(index)
            before = len(system) if parent is None else lengths[parent]
            while parent is not None and before + len(said) + max_tokens > shape.longest:
                parent = turns[parent].parent
                before = len(system) if parent is None else lengths[parent]
            choice = 0 if parent is None else rng.randrange(turns[parent].num_choices)
            sampling = {**rng.choice(shape.samplings), "seed": rng.randrange(1 << 40)}
            turns.append(Turn(parent, choice, said, rng.choice(shape.num_choices), max_tokens, sampling))
            lengths.append(before + len(said) + max_tokens)
        return Conversation(number, system, rng.choice(shape.salts), tuple(turns))

    def _parent(self, index: int) -> int | None:
        """Mostly the turn before; else another one, which then has several turns behind it."""
        if index == 0 or self.random.random() < 0.05:
            return None
        return index - 1 if self.random.random() < 0.7 else self.random.randrange(index)

    def _say(self) -> Tokens:
        if self._said and self.random.random() < 0.25:
            return self.random.choice(self._said)
        self._said.append(self._tokens(self.random.randint(*self.shape.said)))
        return self._said[-1]
