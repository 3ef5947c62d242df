"""Trains the demo model: ``python -m demo.train --out demo/model``. Minutes on two cores; same seed, same weights.

The curriculum matters more than the size. Training on recall from the start stalls: the loss stays at that of a random
thing until the model finds lookup by content, and no intermediate step is rewarded. So the model first repeats lists
from a word *inside them* on, which counting positions cannot solve, with a training aid for the first of the two heads
that this needs. Then recall and copying join, then the lists grow to 1,200 tokens. A stage ends when the model answers
well, not after a fixed time.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from demo import MODEL_DIR, tasks, tokenizer
from demo.evaluate import evaluate, held_out, transformers_generator
from demo.tasks import Split, Task
from demo.words import NAMES, THINGS

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_MODEL_TOKENS = 2048
IGNORED = -100  # label of a token that carries no loss
SYSTEM_PROMPTS = ("", "", "You are a helpful assistant.", "You answer from the facts.", "Answer briefly.")


@dataclass(frozen=True, slots=True)
class Stage:
    """Lists of up to ``max_words`` words or pairs, until ``accuracy`` of the answer tokens are right.

    ``kinds`` are drawn by weight. A stage ends after ``max_steps`` in any case.
    """

    name: str
    kinds: dict[str, float]
    max_words: int
    accuracy: float
    max_steps: int
    learning_rate: float
    batch_tokens: int = 4096


MIXTURE = {"resume": 1.0, "recall": 3.0, "copy": 1.0, "sequence": 2.0}
SHORT_WORDS = 24
CURRICULUM = (
    Stage("lookup", {"resume": 2.0, "sequence": 1.0}, SHORT_WORDS, 0.9, 4000, 3e-3, batch_tokens=2048),
    Stage("recall", MIXTURE, SHORT_WORDS, 0.95, 600, 2e-3),
    Stage("longer", MIXTURE, 100, 0.97, 500, 2e-3),
    Stage("long", MIXTURE, 295, 1.1, 1000, 2e-3, batch_tokens=6144),
)


def resume(rng: Random, num_words: int) -> Task:
    """Continue a list after one of its words, whose place only its content tells. For training only."""
    words = rng.sample(NAMES + THINGS, num_words)
    start, *rest = words[rng.randrange(num_words // 2) :]
    return Task(f"Repeat: {' '.join(words)}. Go on: {start}", f"{' '.join(rest)}.", "resume")


def draw(rng: Random, kind: str, num_words: int) -> Task:
    """A training task of about ``num_words`` words or pairs."""
    if kind == "recall":
        few = rng.random() < 0.3
        num_questions = rng.randint(1, 3) if few else rng.randint(1, min(num_words, 40))
        return tasks.recall(rng, num_words, num_questions, Split.TRAIN, rng.choice(("recall", "recall", "chat")))
    if kind == "sequence":
        # Mostly short: the end is the only hard token of a run, and long runs would outweigh it.
        return tasks.sequence(rng, max_items=rng.randint(2, 10) if rng.random() < 0.7 else 200)
    return tasks.copy(rng, num_words) if kind == "copy" else resume(rng, num_words)


def render(rng: Random, task: Task) -> tuple[str, str]:
    """Prompt and answer as the model gets them: some as plain text, some as a chat, with or without a system turn."""
    answer = f" {task.expected}{tokenizer.EOS}"
    if task.kind != "chat" and (task.kind == "recall" or rng.random() < 0.7):
        return task.prompt, answer
    system = rng.choice(SYSTEM_PROMPTS)
    start = f"<|system|>{system}" if system else ""
    return f"{start}<|user|>{task.prompt}<|assistant|>", answer


def batches(vocabulary: Tokenizer, stage: Stage, seed: int) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
    """Endless (token ids, labels, kinds); rows of a batch are of similar length, padded to the right."""
    rng = Random(f"{Split.TRAIN.value}/{stage.name}/{seed}")
    while True:
        # A quarter of the batches is short in every stage: they are cheap and contain many runs.
        longest = SHORT_WORDS if rng.random() < 0.25 else stage.max_words
        num_words = rng.randint(4, longest)
        kinds = {kind: weight for kind, weight in stage.kinds.items() if kind != "sequence" or longest <= SHORT_WORDS}
        rows: list[tuple[list[int], int, str]] = []
        width = 0
        while (len(rows) + 1) * width <= stage.batch_tokens:
            kind = rng.choices(list(kinds), list(kinds.values()))[0]
            task = draw(rng, kind, max(3, num_words - rng.randrange(3)))
            prompt, answer = render(rng, task)
            prompt_ids = vocabulary.encode(prompt).ids
            rows.append((prompt_ids + vocabulary.encode(answer).ids, len(prompt_ids), kind))
            width = max(width, len(rows[-1][0]))
        token_ids = torch.zeros(len(rows), width, dtype=torch.long)
        labels = torch.full((len(rows), width), IGNORED, dtype=torch.long)
        for i, (ids, num_prompt, _) in enumerate(rows):
            token_ids[i, : len(ids)] = torch.tensor(ids)
            labels[i, num_prompt - 1 : len(ids) - 1] = token_ids[i, num_prompt : len(ids)]
        yield token_ids, labels, [kind for _, _, kind in rows]


def new_model(vocab_size: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_MODEL_TOKENS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-5,
        initializer_range=0.06,  # 1 / sqrt(hidden) is 0.09; the usual 0.02 suits wide models and trains slowly here
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        # A component shared by all embeddings lets heads attend by position alone ("the token before") from the first
        # step; without biases they would have to learn such a component first. It shifts all tied output logits alike,
        # which has no effect.
        model.model.embed_tokens.weight += config.initializer_range * torch.randn(config.hidden_size)
    return model


class Offsets(torch.nn.Module):
    """Training aid: the first layer must encode which tokens are one, two and three positions before.

    Lookup needs two heads in sequence, and the first one ("which token was before me") is of no use until the second
    one uses it. Rewarding it separately shortens a long plateau to a hundred steps. Discarded after training.
    """

    NUM_SAMPLED = 384  # positions a step

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.readers = torch.nn.ModuleList(torch.nn.Linear(hidden_size, hidden_size, bias=False) for _ in range(3))

    def forward(self, first_layer: Tensor, token_ids: Tensor, embeddings: Tensor) -> Tensor:
        width = token_ids.shape[1]
        places = torch.randint(3, width, (self.NUM_SAMPLED,))
        rows = torch.randint(token_ids.shape[0], (self.NUM_SAMPLED,))
        # Unit variance, as the final norm would make it; first_layer is [rows, width, hidden].
        states = torch.nn.functional.rms_norm(first_layer[rows, places], first_layer.shape[-1:])
        losses = [
            torch.nn.functional.cross_entropy(reader(states) @ embeddings.T, token_ids[rows, places - back])
            for back, reader in enumerate(self.readers, start=1)
        ]
        return torch.stack(losses).mean()


def step_loss(model: Any, offsets: Offsets, token_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean loss over the answer tokens, the training aid's loss, and which answer tokens were right (row-major)."""
    output = model.model(input_ids=token_ids, use_cache=False, output_hidden_states=True)
    chosen = labels != IGNORED
    logits = model.lm_head(output.last_hidden_state[chosen])
    wanted = labels[chosen]
    aid = offsets(output.hidden_states[1], token_ids, model.lm_head.weight.detach())
    return torch.nn.functional.cross_entropy(logits, wanted), aid, logits.argmax(-1) == wanted


class Meter:
    """Share of right answer tokens per kind, as a moving average over batches."""

    def __init__(self) -> None:
        self.by_kind: dict[str, float] = defaultdict(float)

    def add(self, labels: Tensor, kinds: list[str], is_right: Tensor) -> None:
        counts = (labels != IGNORED).sum(1).tolist()
        rows: dict[str, list[float]] = defaultdict(list)
        for kind, right in zip(kinds, torch.split(is_right, counts), strict=True):
            rows[kind].append(right.float().mean().item())
        for kind, values in rows.items():
            self.by_kind[kind] += 0.1 * (sum(values) / len(values) - self.by_kind[kind])

    @property
    def worst(self) -> float:
        return min(self.by_kind.values())

    def __str__(self) -> str:
        return " ".join(f"{kind} {share:.3f}" for kind, share in sorted(self.by_kind.items()))


def train(model: Any, vocabulary: Tokenizer, seed: int) -> None:
    offsets = Offsets(model.config.hidden_size)
    decay = [p for p in [*model.parameters(), *offsets.parameters()] if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}], lr=0.0, betas=(0.9, 0.98)
    )
    started, total = time.monotonic(), 0
    for stage in CURRICULUM:
        meter = Meter()
        for step, (token_ids, labels, kinds) in enumerate(batches(vocabulary, stage, seed)):
            is_last = stage is CURRICULUM[-1]
            falling = 0.5 + 0.5 * math.cos(math.pi * step / stage.max_steps) if is_last else 1.0
            for group in optimizer.param_groups:
                group["lr"] = stage.learning_rate * falling * min(1.0, (total + 1) / 100)
            loss, aid, is_right = step_loss(model, offsets, token_ids, labels)
            optimizer.zero_grad(set_to_none=True)
            (loss if is_last else loss + 0.3 * aid).backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            meter.add(labels, kinds, is_right)
            total += 1
            if step % 50 == 49 or step + 1 == stage.max_steps:
                took = time.monotonic() - started
                losses = f"loss {loss.item():.3f} (aid {aid.item():.3f})"
                print(f"{took:6.0f} s  {stage.name:6} step {step + 1:5}  {losses}  {meter}", flush=True)
            if step + 1 == stage.max_steps or (step >= 50 and meter.worst >= stage.accuracy):
                break


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("--out", type=Path, default=MODEL_DIR)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    torch.use_deterministic_algorithms(True)
    vocabulary = tokenizer.build()
    model = new_model(vocabulary.get_vocab_size())
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {vocabulary.get_vocab_size()} tokens")
    train(model, vocabulary, args.seed)
    model.eval()
    model.generation_config.eos_token_id = 0
    model.generation_config.pad_token_id = 0
    model.save_pretrained(args.out)
    tokenizer.save(vocabulary, args.out, MAX_MODEL_TOKENS)
    report = evaluate(transformers_generator(args.out, "float32"), held_out(count=100))
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
