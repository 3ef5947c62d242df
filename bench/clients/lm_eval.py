"""lm-eval through Baton beside lm-eval through transformers: the same model and tasks, every document's figures.

    python -m bench.clients.lm_eval --python ENVIRONMENT/bin/python

``--python`` has `lm-eval[api,hf]`. The cluster, 1 prefill and 1 decode node, is of this environment. `python -m bench
clients --only lm-eval` runs the same as cells of the table of clients.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from baton.errors import BatonError
from bench.clients import lm_eval_tasks
from bench.cluster import cluster
from demo import MODEL_DIR

MODEL = MODEL_DIR
# Of a document's log-likelihood.
TOLERANCE = 1e-3
_TIMEOUT_S = 900.0

# By document and then by request: what the model gave.
Samples = Mapping[str, list[Any]]


async def run(python: str, num_documents: int, folder: Path) -> dict[str, Any]:
    names = await asyncio.to_thread(lm_eval_tasks.write, folder, num_documents)
    reference = await _evaluated(
        python, "hf", {"pretrained": str(MODEL), "dtype": "float32"}, names, folder, ("--device", "cpu")
    )
    found: dict[str, Any] = {"documents": num_documents, "reference": reference[0]}
    options = ("--prefill", "1", "--decode", "1", "--dtype", "float32")
    run_dir = folder / "run"
    run_dir.mkdir()
    async with cluster("lm-eval", options, MODEL, run_dir) as served:
        for is_tokenized in (False, True):
            settings = {
                "model": MODEL.name, "tokenizer": str(MODEL), "base_url": f"{served.http}/v1/completions",
                "num_concurrent": 4, "max_length": 2048, "tokenized_requests": is_tokenized,
            }  # fmt: skip
            scores, samples = await _evaluated(python, "local-completions", settings, names, folder, ())
            name = "token ids" if is_tokenized else "text"
            found[name] = scores | {"largest difference": _largest_difference(reference[1], samples)}
    return found


async def _evaluated(
    python: str, model: str, settings: Mapping[str, object], names: list[str], folder: Path, more: tuple[str, ...]
) -> tuple[dict[str, Any], Samples]:
    out = Path(tempfile.mkdtemp(dir=folder))
    arguments = ",".join(f"{name}={value}" for name, value in settings.items())
    command = [
        *("-m", "lm_eval", "--model", model, "--model_args", arguments, "--tasks", ",".join(names)),
        *("--include_path", str(folder), "--output_path", str(out), "--log_samples", "--batch_size", "1", *more),
    ]
    environment = os.environ | {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": "none"}
    environment.pop("PYTHONPATH", None)
    process = await asyncio.create_subprocess_exec(python, *command, env=environment, cwd=folder)
    async with asyncio.timeout(_TIMEOUT_S):
        if await process.wait():
            raise RuntimeError(f"lm-eval of {model} ended with {process.returncode}")
    return _results(out)


def _results(out: Path) -> tuple[dict[str, Any], Samples]:
    (results,) = out.rglob("results_*.json")
    scores = json.loads(results.read_text())["results"]
    samples: dict[str, list[Any]] = {}
    for path in out.rglob("samples_*.jsonl"):
        task = path.name.removeprefix("samples_").rsplit("_", 1)[0]
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        samples[task] = [line["filtered_resps"] for line in sorted(lines, key=lambda line: line["doc_id"])]
    return {
        name: {k: v for k, v in metrics.items() if isinstance(v, float)} for name, metrics in scores.items()
    }, samples


def _largest_difference(wanted: Samples, found: Samples) -> dict[str, float]:
    """Of log-likelihoods; of texts, and of what is the likeliest, 0 or infinity."""
    assert wanted.keys() == found.keys()
    return {task: _difference(wanted[task], found[task]) for task in wanted}


def _difference(one: Any, other: Any) -> float:
    if isinstance(one, list):
        return max((_difference(*pair) for pair in zip(one, other, strict=True)), default=0.0)
    try:
        # A log-likelihood, which samples have as text.
        return abs(float(one) - float(other))
    except ValueError:
        return 0.0 if one == other else float("inf")


def cells(python: str, num_documents: int, folder: Path) -> list[dict[str, Any]]:
    """For the table of clients: both ways of sending prompts, log-likelihoods and generated answers apart."""
    names = {"recall_choice": "logprobs", "recall_likelihood": "logprobs", "recall_answer": "plain"}
    run_dir = Path(tempfile.mkdtemp(dir=folder))
    try:
        found = asyncio.run(run(python, num_documents, run_dir))
    except (RuntimeError, TimeoutError, BatonError) as error:
        said = f"{type(error).__name__}: {error}"
        return [{"feature": "logprobs", "case": "all tasks", "state": "failed", "said": said}]
    rows = []
    for way in ("text", "token ids"):
        for task, feature in names.items():
            difference = found[way]["largest difference"][task]
            ours, theirs = found[way][task], found["reference"][task]
            is_right = difference <= TOLERANCE and _accuracies(ours) == _accuracies(theirs)
            said = f"largest difference {difference:.2g}, {ours}, transformers {theirs}"
            rows.append(
                {"feature": feature, "case": f"{task}, prompts as {way}", "state": "ok" if is_right else "failed",
                 "said": said}
            )  # fmt: skip
    return rows


def _accuracies(scores: Mapping[str, float]) -> dict[str, float]:
    """Those that count documents; a perplexity is as near as the log-likelihoods are."""
    return {name: value for name, value in scores.items() if name.startswith(("acc", "exact_match"))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True)
    parser.add_argument("--documents", type=int, default=100)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(run(options.python, options.documents, Path(folder)))
    print(json.dumps(found, indent=1))
    worst = max(max(found[name]["largest difference"].values()) for name in ("text", "token ids"))
    raise SystemExit(0 if worst <= TOLERANCE else f"figures differ by {worst:g}, expected at most {TOLERANCE:g}")


if __name__ == "__main__":
    main()
