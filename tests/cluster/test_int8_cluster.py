"""A split cluster on int8 weights: the tokens are those of one engine that does both, and the answers are right."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer

from demo.tasks import recall_prompts
from engine.config import EngineConfig
from engine.runner import Runner
from tests.support.cluster import StartCluster
from tests.support.engine_driver import Driver, spec
from tests.support.load import Job, run_all

NUM_PROMPTS = 16
MIN_ACCURACY = 0.9


async def test_split_tokens_equal_those_of_one_engine(start_cluster: StartCluster, demo_model: Path) -> None:
    tasks = recall_prompts(seed=99, count=NUM_PROMPTS)
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    prompts = [tokenizer(task.prompt)["input_ids"] for task in tasks]
    cluster = start_cluster(demo_model, prefill=1, decode=1, dtype="bfloat16", arguments=("--quantization", "int8"))
    jobs = [Job(p, t.num_output_tokens, {"ignore_eos": True}) for p, t in zip(prompts, tasks, strict=True)]
    answers = await run_all(cluster.http, jobs, concurrency=8)
    cluster.wait_baseline()
    assert [a.error for a in answers] == [None] * NUM_PROMPTS
    assert all(a.relay["prefill_node_id"] != a.relay["decode_node_id"] for a in answers)
    driver = Driver(Runner.load(demo_model, EngineConfig(dtype="bfloat16", quantization="int8", num_blocks=64)))
    assert {node.node.kernels for node in cluster.status().nodes} == {driver.runner.kernels}
    for prompt, task, answer in zip(prompts, tasks, answers, strict=True):
        alone = driver.generate(spec("alone", prompt, max_tokens=task.num_output_tokens))
        assert answer.token_ids == alone.token_ids
    texts = [tokenizer.decode(a.token_ids, skip_special_tokens=True) for a in answers]
    assert sum(t.accepts(text) for t, text in zip(tasks, texts, strict=True)) >= MIN_ACCURACY * NUM_PROMPTS
