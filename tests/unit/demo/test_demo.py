"""The demo model's prompts are reproducible and held out, its tokenizer loses nothing, and its answers are right."""

from __future__ import annotations

import subprocess
import sys

import pytest
from tokenizers import Tokenizer

from demo import MODEL_DIR, tasks
from demo.evaluate import evaluate, transformers_generator
from demo.tasks import Split, Task
from demo.words import NAMES, THINGS
from tests.support.root import ROOT

MAX_MODEL_BYTES = 8 * 2**20


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))


def pairs(task: Task) -> set[tuple[str, str]]:
    words = task.prompt.replace(".", "").split()
    return {(words[i - 1], words[i + 1]) for i, word in enumerate(words) if word == "likes"}


def test_prompts_depend_on_their_seed_and_place_alone() -> None:
    for make in (tasks.recall_prompts, tasks.copy_prompts, tasks.sequence_prompts):
        assert make(3, 8) == make(3, 8)
        assert make(3, 8)[:5] == make(3, 5)
        assert make(3, 8) != make(4, 8)
    assert tasks.demo_prompts() == tasks.demo_prompts()
    assert tasks.mixed_prompts(1, 10)[:4] == tasks.mixed_prompts(1, 4)


def test_held_out_facts_are_never_trained_on() -> None:
    for name in NAMES:
        held_out, trained = (set(tasks.things_for(name, split)) for split in (Split.HELD_OUT, Split.TRAIN))
        assert held_out.isdisjoint(trained)
        assert held_out | trained == set(THINGS)
        assert len(held_out) >= 20
    for task in tasks.recall_prompts(5, 20) + tasks.recall_prompts(5, 5, kind="chat"):
        assert all(tasks.is_held_out(name, thing) for name, thing in pairs(task))


def test_recall_answers_follow_from_the_facts() -> None:
    for task in tasks.recall_prompts(6, 20, num_pairs=(1, 240), num_questions=(1, 30)):
        facts = dict(pairs(task))
        asked = [
            word.strip(",") for word in task.prompt.split(" do ")[-1].split(" does ")[-1].split(" like?")[0].split()
        ]
        assert task.expected == " ".join(f"{name} likes {facts[name]}." for name in asked)


def test_lengths_are_what_was_asked_for(tokenizer: Tokenizer) -> None:
    for task in tasks.demo_prompts() + tasks.mixed_prompts(2, 12):
        assert len(tokenizer.encode(task.prompt).ids) == task.num_prompt_tokens
        assert len(tokenizer.encode(f" {task.expected}").ids) + 1 == task.num_output_tokens
    lengths = sorted(task.num_prompt_tokens for task in tasks.demo_prompts())
    assert lengths[0] <= 25
    assert 950 <= lengths[-1] <= 1050


@pytest.mark.parametrize(
    "text",
    [
        "Facts: Anna likes copper. Question: what does Anna like? Answer:",
        "  two  spaces, no spaces;a\ttab\r\nand a line",
        "naïve 世界 🎉 \u0000 \u200d Ωmega 12345 unheard-of",
        "",
    ],
)
def test_any_text_round_trips(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_the_chat_template_ends_where_the_answer_begins() -> None:
    from transformers import AutoTokenizer

    auto = AutoTokenizer.from_pretrained(MODEL_DIR)
    turns = [
        {"role": "system", "content": " You are a helpful assistant. "},
        {"role": "user", "content": "Facts: Anna likes copper."},
        {"role": "assistant", "content": "Anna likes copper."},
        {"role": "user", "content": "Question: what does Anna like?"},
    ]
    assert auto.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == (
        "<|system|>You are a helpful assistant.<|user|>Facts: Anna likes copper.<|assistant|> Anna likes copper.<|eos|>"
        "<|user|>Question: what does Anna like?<|assistant|>"
    )
    assert auto.eos_token_id == 0
    # An empty reply keeps no space.
    silent = [*turns[:2], {"role": "assistant", "content": ""}]
    assert auto.apply_chat_template(silent, tokenize=False).endswith("copper.<|assistant|><|eos|>")


def test_the_chat_template_writes_tools_and_calls_as_hermes_models_do() -> None:
    from transformers import AutoTokenizer

    auto = AutoTokenizer.from_pretrained(MODEL_DIR)
    tool = {"type": "function", "function": {"name": "facts"}}
    call = {"id": "1", "type": "function", "function": {"name": "facts", "arguments": {"of": "Anna"}}}
    turns = [
        {"role": "user", "content": "What does Anna like?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "Facts: Anna likes copper. Question: what does Anna like?", "tool_call_id": "1"},
    ]
    assert auto.apply_chat_template(turns, tools=[tool], tokenize=False, add_generation_prompt=True) == (
        '<|system|>Tools:\n{"type": "function", "function": {"name": "facts"}}\nA call:\n<tool_call>\n'
        '{"name": <name>, "arguments": <object>}\n</tool_call><|user|>What does Anna like?'
        '<|assistant|><tool_call>\n{"name": "facts", "arguments": {"of": "Anna"}}\n</tool_call><|eos|>'
        "<|user|>Facts: Anna likes copper. Question: what does Anna like?<|assistant|>"
    )


def test_the_committed_tokenizer_is_what_the_words_give(tokenizer: Tokenizer) -> None:
    from demo import tokenizer as built

    assert tokenizer.get_vocab() == built.build().get_vocab()


def test_the_model_is_small() -> None:
    assert sum(path.stat().st_size for path in MODEL_DIR.iterdir()) < MAX_MODEL_BYTES


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_held_out_prompts_are_answered(dtype: str) -> None:
    prompts = [
        *tasks.recall_prompts(101, 12, num_pairs=(100, 240), num_questions=(1, 6)),
        *tasks.recall_prompts(102, 6, kind="chat"),
        *tasks.copy_prompts(103, 6, num_words=(20, 80)),
        *[task for task in tasks.sequence_prompts(105, 12) if task.num_output_tokens <= 60][:6],
    ]
    generate = transformers_generator(MODEL_DIR, dtype)
    right = evaluate(generate, [Task(task.prompt, task.expected, task.kind) for task in prompts])
    share = sum(right[task.kind] for task in prompts) / len(prompts)
    assert len(prompts) >= 30
    assert share >= 0.95, right


def test_the_generator_loads_no_torch() -> None:
    code = (
        "import sys, demo, demo.tasks, demo.evaluate; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
