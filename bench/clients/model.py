"""The model of the clients' bench: the demo's, taught when to call a tool, what to make of the result, to answer in
JSON and to reason. Taught in minutes on two cores, once, into a cache folder; never committed.

A model that small has no judgement of its own, so its world is small: four people, four things and three questions.
But it decides by itself: nothing forces a call, an end or a form where a client forces none.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from baton.chat import CallMode, ChatMessage, Tool, ToolCall, ToolChoice
from bench.model import cache_folder
from demo import MODEL_DIR
from demo import tokenizer as demo_tokenizer
from router.text.chat import ChatTemplate, Conversation

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Any change below needs a new name: an existing folder is used without a check.
NAME = "demo-agent-1"
PEOPLE = ("Ada", "Carl", "Dora", "Emil")
LIKED = ("plums", "jam", "honey", "books")
TOOL = "facts"
THINKS, THOUGHT = "<think>\n", "\n</think>\n\n"
MAX_NEW_TOKENS = 200

_GENERATION_PROMPT = "{{ '<|assistant|>' }}{%- endif -%}"
# As in Qwen3's template, but reasoning is off unless a request turns it on.
_WITH_THOUGHT = (
    "{{ '<|assistant|><think>\\n' }}{%- if not enable_thinking -%}{{ '\\n</think>\\n\\n' }}{%- endif -%}{%- endif -%}"
)
CHAT_TEMPLATE = demo_tokenizer.CHAT_TEMPLATE.removesuffix(_GENERATION_PROMPT) + _WITH_THOUGHT

# What clients write around a question: schemas, descriptions and instructions, in words that mean nothing here.
_NOISE = (
    *("object", "string", "type", "properties", "required", "title", "description", "null", "true", "false", "$defs"),
    *("You are a helpful assistant", "Return the", "the parsed objects in json", "json_schema", "an instance of"),
    *("enum", "Always respond with a JSON object", "function", "anyOf", "Answer briefly.", "```json", "codeblock"),
    *('{"', '": "', '", "', '"}', "}, {", "[", "]", "\n", "\n\n", ":", ", ", ".", "(", ")", "_", "#", "-"),
)
_NUM_STEPS, _BATCH_TOKENS, _LEARNING_RATE, _WARM_UP = 700, 1536, 2e-3, 15
_GOOD_SHARE, _NUM_CHECKED = 0.75, 240


@dataclass(frozen=True, slots=True)
class Example:
    """``given`` is what a grammar writes before the model may choose; only ``answer`` is learned."""

    kind: str
    prompt: str
    answer: str
    given: str = ""


class Examples:
    """Endless, by a seed."""

    def __init__(self, seed: int) -> None:
        self._rng = Random(seed)
        self._template = ChatTemplate(CHAT_TEMPLATE, {"eos_token": demo_tokenizer.EOS})

    def draw(self) -> Example:
        # Spelling takes longest to learn: in JSON words are made of letters.
        spelled = (self._as_json, self._extracted)
        makers = (self._call, self._told, self._answer, *spelled, *spelled, self._recalled)
        return self._rng.choice(makers)()

    def _prompt(
        self, turns: Sequence[ChatMessage], tools: Sequence[Tool] = (), *, mode: CallMode = CallMode.AUTO,
        thinks: bool = False,
    ) -> str:  # fmt: skip
        system = self._noise((0, 0, 0, 4, 10, 35))
        first = [ChatMessage("system", system)] if system else []
        conversation = Conversation(
            (*first, *turns), tools=tuple(tools), tool_choice=ToolChoice(mode),
            variables={"enable_thinking": True} if thinks else {},
        )  # fmt: skip
        return self._template.render(conversation)

    def _noise(self, sizes: Sequence[int]) -> str:
        return " ".join(self._rng.choice(_NOISE) for _ in range(self._rng.choice(sizes)))

    def _tool(self, name: str, properties: Sequence[str]) -> Tool:
        rng = self._rng
        parameters: dict[str, Any] = {
            "type": "object",
            "properties": {
                key: {"type": "string", **({"title": key.title()} if rng.random() < 0.5 else {})} for key in properties
            },
            "required": [*properties],
        }
        extra = {"additionalProperties": False, "title": name, "$schema": "http://json-schema.org/draft-07/schema#"}
        parameters |= {key: value for key, value in extra.items() if rng.random() < 0.4}
        return Tool(name, self._noise((0, 2, 6, 12)), dict(rng.sample([*parameters.items()], len(parameters))))

    def _facts(self, most: int = 1) -> tuple[str, str, str]:
        """A question with facts to answer it, who was asked about, and what that one likes."""
        people = self._rng.sample(PEOPLE, self._rng.randint(1, most))
        things = self._rng.sample(LIKED, len(people))
        asked = self._rng.randrange(len(people))
        told = " ".join(f"{name} likes {thing}." for name, thing in zip(people, things, strict=True))
        return f"Facts: {told} Question: what does {people[asked]} like", people[asked], things[asked]

    def _behind(self) -> str:
        """What a client adds to a question."""
        return f"\n\n{self._noise((6, 12, 20))}" if self._rng.random() < 0.2 else ""

    def _call(self) -> Example:
        name = self._rng.choice(PEOPLE)
        turns = [*self._earlier(), ChatMessage("user", f"What does {name} like?")]
        prompt = self._prompt(turns, [self._tool(TOOL, ["person"])])
        return Example("call", prompt, f"{call(TOOL, {'person': name})}{demo_tokenizer.EOS}")

    def _earlier(self) -> list[ChatMessage]:
        """Sometimes a question that was asked and answered before."""
        return self._told_turns(*self._pair())[:-1] if self._rng.random() < 0.15 else []

    def _pair(self) -> tuple[str, str]:
        return self._rng.choice(PEOPLE), self._rng.choice(LIKED)

    def _told_turns(self, name: str, thing: str) -> list[ChatMessage]:
        """A question, the call, what came of it, and the answer."""
        result = f"{name} likes {thing}."
        return [
            ChatMessage("user", f"What does {name} like?"),
            ChatMessage("assistant", None, tool_calls=(ToolCall("", TOOL, json.dumps({"person": name})),)),
            ChatMessage("tool", self._rng.choice((result, json.dumps(result))), tool_call_id=""),
            ChatMessage("assistant", result),
        ]

    def _told(self) -> Example:
        name, thing = self._pair()
        prompt = self._prompt(self._told_turns(name, thing)[:-1], [self._tool(TOOL, ["person"])])
        return Example("told", prompt, f" {name} likes {thing}.{demo_tokenizer.EOS}")

    def _answer(self) -> Example:
        question, name, thing = self._facts(most=3)
        tools = [self._tool(TOOL, ["person"])] if self._rng.random() < 0.2 else []
        return self._after(question + "?", f" {name} likes {thing}.", name, thing, tools)

    def _as_json(self) -> Example:
        question, name, thing = self._facts()
        return self._after(question + ", as JSON?", in_json(name, thing), name, thing)

    def _after(self, question: str, answer: str, name: str, thing: str, tools: Sequence[Tool] = ()) -> Example:
        thinks = self._rng.random() < 0.3
        prompt = self._prompt([ChatMessage("user", question + self._behind())], tools, thinks=thinks)
        thought = f" {name} likes {thing}.{THOUGHT}" if thinks else ""
        return Example("json" if answer.startswith("{") else "answer", prompt, f"{thought}{answer}{demo_tokenizer.EOS}")

    def _extracted(self) -> Example:
        """A call that is required, of a function that takes an answer."""
        question, name, thing = self._facts()
        function = self._rng.choice(("Fact", "final_result", "fact", "extract", "output"))
        ending = self._rng.choice(("?", ", as JSON?"))
        prompt = self._prompt(
            [ChatMessage("user", question + ending)], [self._tool(function, ["name", "thing"])], mode=CallMode.REQUIRED
        )
        written = call(function, {"name": name, "thing": thing})
        given, begin, rest = written.partition('"arguments": ')
        return Example("extracted", prompt, f"{rest}{demo_tokenizer.EOS}", given + begin)

    def _recalled(self) -> Example:
        """What the demo's model knows, so that it forgets nothing."""
        from demo.train import MIXTURE, draw, render

        kind = self._rng.choices([*MIXTURE], [*MIXTURE.values()])[0]
        return Example("recalled", *render(self._rng, draw(self._rng, kind, self._rng.randint(4, 30))))


def call(name: str, arguments: dict[str, str]) -> str:
    return f'<tool_call>\n{{"name": {json.dumps(name)}, "arguments": {json.dumps(arguments)}}}\n</tool_call>'


def in_json(name: str, thing: str) -> str:
    return json.dumps({"name": name, "thing": thing})


def agent_model() -> Path:
    """The folder of the model, taught on first use."""
    folder = cache_folder() / NAME
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Written under another name and renamed, so that a folder of that name is always complete.
    made = Path(tempfile.mkdtemp(prefix=f".{NAME}-", dir=folder.parent))
    try:
        _write(made)
        os.replace(made, folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return folder


def _write(folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    vocabulary = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
    _teach(model, vocabulary, Examples(seed=1))
    shares = _checked(model, vocabulary, Examples(seed=2))
    print(f"right answers: {', '.join(f'{kind} {share:.0%}' for kind, share in sorted(shares.items()))}", flush=True)
    if min(shares.values()) < _GOOD_SHARE:
        raise RuntimeError(f"the model has not learned enough: {shares}, expected {_GOOD_SHARE} of each kind")
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(MODEL_DIR / name, folder / name)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    # Some clients name neither temperature nor a limit.
    sampling = {"eos_token_id": 0, "pad_token_id": 0, "temperature": 0.0, "max_new_tokens": MAX_NEW_TOKENS}
    (folder / "generation_config.json").write_text(json.dumps(sampling, indent=1) + "\n")


def _teach(model: Any, vocabulary: Tokenizer, examples: Examples) -> None:
    import torch

    from demo.train import IGNORED

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.0)
    for step, rows in zip(range(_NUM_STEPS), _batches(vocabulary, examples), strict=False):
        falling = 0.5 + 0.5 * math.cos(math.pi * step / _NUM_STEPS)
        for group in optimizer.param_groups:
            group["lr"] = _LEARNING_RATE * falling * min(1.0, (step + 1) / _WARM_UP)
        token_ids, labels = _tensors(rows, IGNORED)
        chosen = labels != IGNORED
        hidden = model.model(input_ids=token_ids, use_cache=False).last_hidden_state[chosen]
        logits = model.lm_head(hidden)
        loss = torch.nn.functional.cross_entropy(logits, labels[chosen])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 19:
            right = (logits.argmax(-1) == labels[chosen]).float().mean().item()
            print(f"step {step + 1:4}  loss {loss.item():.4f}  right tokens {right:.4f}", flush=True)
    model.eval()


# Of one example: its ids, and how many of them are not learned.
_Row = tuple[list[int], int]


def _row(vocabulary: Tokenizer, example: Example) -> _Row:
    before = vocabulary.encode(example.prompt).ids + vocabulary.encode(example.given).ids
    return before + vocabulary.encode(example.answer).ids, len(before)


def _batches(vocabulary: Tokenizer, examples: Examples) -> Iterator[list[_Row]]:
    """Rows of a batch are of similar length."""
    rng = Random(3)
    while True:
        rows = sorted((_row(vocabulary, examples.draw()) for _ in range(64)), key=lambda row: len(row[0]))
        batches: list[list[_Row]] = [[]]
        for row in rows:
            if (len(batches[-1]) + 1) * len(row[0]) > _BATCH_TOKENS and batches[-1]:
                batches.append([])
            batches[-1].append(row)
        rng.shuffle(batches)
        yield from batches


def _tensors(rows: Sequence[_Row], ignored: int) -> tuple[Any, Any]:
    import torch

    width = max(len(ids) for ids, _ in rows)
    token_ids = torch.zeros(len(rows), width, dtype=torch.long)
    labels = torch.full((len(rows), width), ignored, dtype=torch.long)
    for i, (ids, num_before) in enumerate(rows):
        token_ids[i, : len(ids)] = torch.tensor(ids)
        labels[i, num_before - 1 : len(ids) - 1] = token_ids[i, num_before : len(ids)]
    return token_ids, labels


def _checked(model: Any, vocabulary: Tokenizer, examples: Examples) -> dict[str, float]:
    """The share of whole answers that greedy decoding gives, by kind."""
    import torch

    marks: dict[str, list[bool]] = {}
    with torch.inference_mode():
        for _ in range(_NUM_CHECKED):
            example = examples.draw()
            if example.kind == "recalled":
                continue
            ids, num_before = _row(vocabulary, example)
            logits = model(torch.tensor([ids])).logits[0, num_before - 1 : -1]
            is_right = logits.argmax(-1).tolist() == ids[num_before:]
            marks.setdefault(example.kind, []).append(is_right)
    return {kind: sum(found) / len(found) for kind, found in marks.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.clients.model", description=__doc__)
    parser.parse_args()
    print(agent_model())


if __name__ == "__main__":
    main()
