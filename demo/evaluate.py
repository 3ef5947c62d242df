"""Measures the share of right answers of a text generator, by kind of task. Loads torch only on demand."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from demo import tasks
from demo.tasks import Task

Generate = Callable[[Task], str]


def held_out(count: int) -> list[Task]:
    """``count`` prompts of each kind; recall also at the end of the trained length."""
    return [
        *tasks.recall_prompts(11, count),
        *[Task(t.prompt, t.expected, "recall, 1,160 tokens") for t in tasks.recall_prompts(12, count, 285, (1, 20))],
        *tasks.recall_prompts(13, count, kind="chat"),
        *tasks.copy_prompts(14, count),
        *tasks.sequence_prompts(16, count),
    ]


def evaluate(generate: Generate, prompts: Iterable[Task]) -> dict[str, float]:
    """Right answers / prompts, by kind."""
    right: dict[str, list[bool]] = defaultdict(list)
    for task in prompts:
        right[task.kind].append(task.accepts(generate(task)))
    return {kind: sum(marks) / len(marks) for kind, marks in right.items()}


def transformers_generator(folder: Path, dtype: str) -> Generate:
    """Greedy generation with the transformers library, one prompt at a time."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    model.eval()

    def generate(task: Task) -> str:
        text = task.prompt
        if task.kind == "chat":
            messages = [{"role": "user", "content": task.prompt}]
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        inputs = tokenizer(text, return_tensors="pt")
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=task.num_output_tokens + 4, do_sample=False)
        answer: str = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return answer

    return generate
