"""Three small tasks for lm-eval, out of the demo's own questions: multiple choice, log-likelihood, generation.

No data set is downloaded: the documents are written beside the tasks.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from demo.words import NAMES, THINGS

_TASKS = {
    "recall_choice": """
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
target_delimiter: " "
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "recall_likelihood": """
output_type: loglikelihood
doc_to_text: "{{text}}"
doc_to_target: " {{answer}}"
target_delimiter: ""
metric_list: [{metric: perplexity}, {metric: acc}]
""",
    "recall_answer": """
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: " {{answer}}"
generation_kwargs: {until: ["."], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match, ignore_punctuation: true}]
""",
}


def write(folder: Path, num_documents: int, seed: int = 1) -> list[str]:
    """The names of the tasks, which lie in ``folder`` then."""
    generator = random.Random(seed)
    documents = [_document(generator) for _ in range(num_documents)]
    data = folder / "recall.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    for name, settings in _TASKS.items():
        source = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{source}{settings}")
    return [*_TASKS]


def _document(generator: random.Random) -> dict[str, object]:
    names, things = generator.sample(NAMES, 4), generator.sample(THINGS, 4)
    asked = generator.randrange(4)
    facts = " ".join(f"{name} likes {thing}." for name, thing in zip(names, things, strict=True))
    return {
        "text": f"Facts: {facts} Question: what does {names[asked]} like? Answer:",
        "choices": [f"{names[asked]} likes {thing}." for thing in things],
        "gold": asked,
        "answer": f"{names[asked]} likes {things[asked]}.",
    }
