"""Seeded prompts with known answers: recall, copying, sequences. Pure; loads no torch and no tokenizer.

Every word and every punctuation mark is one token of the demo tokenizer, so lengths are known without it. Facts are
drawn from (name, thing) pairs, split in two by a checksum. Training uses one part, the prompts of this module's public
functions the other, so a right answer was read from the context and not memorized in training.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache
from random import Random
from typing import TypeAlias

from demo.words import DAYS, LETTERS, MONTHS, NAMES, NUMBERS, THINGS

HELD_OUT_SHARE = 8  # one pair in eight is held out
_TOKEN = re.compile(r"\w+|[^\w\s]")

Span: TypeAlias = int | tuple[int, int]


class Split(Enum):
    """The (name, thing) pairs and random streams that a task uses."""

    TRAIN = "train"
    HELD_OUT = "held_out"


@dataclass(frozen=True, slots=True)
class Task:
    """A prompt and its only right answer. For kind "chat" the prompt is the user's message, not rendered text."""

    prompt: str
    expected: str
    kind: str

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the plain prompt; a chat template adds two."""
        return len(_TOKEN.findall(self.prompt))

    @property
    def num_output_tokens(self) -> int:
        """Tokens of the answer and the end-of-text token."""
        return len(_TOKEN.findall(self.expected)) + 1

    def accepts(self, text: str) -> bool:
        """Whether generated text is the right answer, white space around it aside."""
        return text.strip() == self.expected


def is_held_out(name: str, thing: str) -> bool:
    return zlib.crc32(f"{name} {thing}".encode()) % HELD_OUT_SHARE == 0


@cache
def things_for(name: str, split: Split) -> tuple[str, ...]:
    """The possible things for this name in this split."""
    wanted = split is Split.HELD_OUT
    return tuple(thing for thing in THINGS if is_held_out(name, thing) is wanted)


def recall(rng: Random, num_pairs: int, num_questions: int, split: Split, kind: str = "recall") -> Task:
    """``num_pairs`` facts, then questions about ``num_questions`` of them; 4 tokens a fact, 2 + 4 a question."""
    num_questions = min(num_questions, num_pairs)
    names = rng.sample(NAMES, num_pairs)
    likes = {name: rng.choice(things_for(name, split)) for name in names}
    asked = rng.sample(names, num_questions)
    facts = " ".join(f"{name} likes {thing}." for name, thing in likes.items())
    verb = "does" if num_questions == 1 else "do"
    question = f"Question: what {verb} {', '.join(asked)} like?"
    answer = " ".join(f"{name} likes {likes[name]}." for name in asked)
    return Task(f"Facts: {facts} {question}{'' if kind == 'chat' else ' Answer:'}", answer, kind)


def copy(rng: Random, num_words: int) -> Task:
    """Repeat ``num_words`` different words."""
    words = " ".join(rng.sample(NAMES + THINGS, num_words))
    return Task(f"Repeat: {words}. Again:", f"{words}.", "copy")


def sequence(rng: Random, max_items: int = 200) -> Task:
    """Count, or name days, months or letters, from one to another; days, months and letters wrap round."""
    title, items, wraps = rng.choice(
        (
            ("Count", NUMBERS, False),
            ("Count", NUMBERS, False),
            ("Days", DAYS, True),
            ("Months", MONTHS, True),
            ("Alphabet", LETTERS, False),
        )
    )
    first, last = rng.randrange(len(items)), rng.randrange(len(items))
    if first > last and not wraps:
        first, last = last, first
    count = min((last - first) % len(items) + 1, max_items)
    run = [items[(first + i) % len(items)] for i in range(count)]
    return Task(f"{title} from {run[0]} to {run[-1]}:", f"{' '.join(run)}.", "sequence")


def _pick(rng: Random, span: Span) -> int:
    return span if isinstance(span, int) else rng.randint(*span)


def _stream(name: str, seed: int, index: int) -> Random:
    """One generator per prompt, so that prompt i is the same whatever the count."""
    return Random(f"{Split.HELD_OUT.value}/{name}/{seed}/{index}")


def recall_prompts(
    seed: int, count: int, num_pairs: Span = (20, 240), num_questions: Span = (1, 12), kind: str = "recall"
) -> list[Task]:
    """Held-out recall; a span is a number or an inclusive range. Kind "chat" omits the word Answer."""
    rngs = [_stream(kind, seed, i) for i in range(count)]
    return [recall(rng, _pick(rng, num_pairs), _pick(rng, num_questions), Split.HELD_OUT, kind) for rng in rngs]


def copy_prompts(seed: int, count: int, num_words: Span = (10, 300)) -> list[Task]:
    """Held-out copying, with an answer as long as the prompt."""
    rngs = [_stream("copy", seed, i) for i in range(count)]
    return [copy(rng, _pick(rng, num_words)) for rng in rngs]


def sequence_prompts(seed: int, count: int) -> list[Task]:
    """Counting, days, months, letters. Short prompts, answers of up to 201 tokens."""
    return [sequence(_stream("sequence", seed, i)) for i in range(count)]


def mixed_prompts(seed: int, count: int) -> list[Task]:
    """Held-out prompts of every kind and length, interleaved; used by load and fault tests."""
    quarter = -(-count // 4)
    kinds: Sequence[list[Task]] = (
        recall_prompts(seed, quarter),
        copy_prompts(seed, quarter, (10, 150)),
        recall_prompts(seed, quarter, kind="chat"),
        sequence_prompts(seed, quarter),
    )
    return [task for group in zip(*kinds, strict=True) for task in group][:count]


def demo_prompts() -> list[Task]:
    """The prompts of the demo: about 20, 100, 400 and 1,000 prompt tokens, a count, a copy and a chat."""
    return [
        recall_prompts(1, 1, num_pairs=3, num_questions=1)[0],
        recall_prompts(2, 1, num_pairs=20, num_questions=3)[0],
        sequence_prompts(1, 1)[0],
        recall_prompts(3, 1, num_pairs=92, num_questions=5)[0],
        copy_prompts(4, 1, num_words=60)[0],
        recall_prompts(5, 1, num_pairs=240, num_questions=12)[0],
        recall_prompts(6, 1, num_pairs=30, num_questions=2, kind="chat")[0],
    ]
