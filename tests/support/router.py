"""What the router's tests share: a small tokenizer and model folder, and a router beside fake nodes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from router.cluster.membership import State
from router.config import RouterConfig
from router.serve import Router, running
from tests.support.fake_nodes import FakeCluster

CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "baton hands the cache over from prefill to decode",
    "Grüße aus Köln, 東京 and मुंबई 🎽🏃",
]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
VOCAB_SIZE = 320


def write_model_folder(folder: Path, *, chat_template: str | None = CHAT_TEMPLATE) -> Path:
    """A folder as Hugging Face models have it, with a byte-level BPE tokenizer and no weights."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
    if chat_template is not None:
        config["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 4096, "eos_token_id": 1}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1]}))
    return folder


def patient(config: RouterConfig) -> RouterConfig:
    """Short pauses. What counts as silence is the router's default: a busy machine is not taken for a dead node."""
    return replace(
        config,
        limits=replace(config.limits, drain_s=0.2),
        flow=replace(config.flow, backoff_base_s=0.01),
        membership=replace(config.membership, redial_max_s=0.2, refused_redial_s=0.3),
    )


def quick(config: RouterConfig) -> RouterConfig:
    """For tests that wait for a node to be found silent."""
    config = patient(config)
    return replace(
        config,
        flow=replace(config.flow, reserve_timeout_s=0.5, gap_timeout_s=0.3, no_node_timeout_s=5.0),
        membership=replace(config.membership, suspect_s=0.3, lost_s=0.6),
    )


@asynccontextmanager
async def router_beside(
    cluster: FakeCluster,
    /,
    *,
    all_up: bool = True,
    timing: Callable[[RouterConfig], RouterConfig] = patient,
    **settings: Any,
) -> AsyncIterator[Router]:
    """A router that sees every node of the cluster; afterwards its books balance."""
    config = timing(RouterConfig(nodes=cluster.addresses, **settings))
    async with running(config) as router:
        if all_up:
            await until(lambda: all(m.state is State.READY for m in router.dispatcher.nodes.members))
        yield router
        await until(lambda: router.dispatcher.scheduler.num_in_flight == 0)
        router.dispatcher.scheduler.check()


async def until(condition: Any, timeout_s: float = 5.0) -> None:
    """Wait for something that other processes or tasks bring about."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 (other processes set no event here)
            await asyncio.sleep(0.005)


async def baseline(cluster: FakeCluster, timeout_s: float = 3.0) -> None:
    """Every live node has all of its blocks back."""
    await until(lambda: all(n.is_down or n.used_blocks == 0 for n in cluster.nodes.values()), timeout_s)
