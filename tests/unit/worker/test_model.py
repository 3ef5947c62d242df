"""Workers with a real (tiny, random) model: split over two workers equals one worker alone, token for token."""

import asyncio
import json
from contextlib import AsyncExitStack
from pathlib import Path

import numpy as np
import pytest

from baton.types import Role, SamplingParams, SequenceSpec
from engine.config import EngineConfig
from engine.scheduler_config import SchedulerConfig
from tests.support.node import session
from tests.support.relay import Load, Pair, worker
from worker.loading import load_model

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCAB = 64, 3, 4, 2, 16, 96, 200


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with random weights, large enough that its tokens vary."""
    from safetensors.numpy import save_file

    folder = tmp_path_factory.mktemp("model")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "intermediate_size": FFN,
        "vocab_size": VOCAB,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    random = np.random.default_rng(0)

    def matrix(*shape: int) -> np.ndarray:
        return (random.standard_normal(shape) * 0.3).astype(np.float32)

    weights = {
        "model.embed_tokens.weight": matrix(VOCAB, HIDDEN),
        "lm_head.weight": matrix(VOCAB, HIDDEN),
        "model.norm.weight": np.ones(HIDDEN, np.float32),
    }
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        weights |= {
            at + "input_layernorm.weight": np.ones(HIDDEN, np.float32),
            at + "post_attention_layernorm.weight": np.ones(HIDDEN, np.float32),
            at + "self_attn.q_proj.weight": matrix(HEADS * HEAD_DIM, HIDDEN),
            at + "self_attn.k_proj.weight": matrix(KV_HEADS * HEAD_DIM, HIDDEN),
            at + "self_attn.v_proj.weight": matrix(KV_HEADS * HEAD_DIM, HIDDEN),
            at + "self_attn.o_proj.weight": matrix(HIDDEN, HEADS * HEAD_DIM),
            at + "mlp.gate_proj.weight": matrix(FFN, HIDDEN),
            at + "mlp.up_proj.weight": matrix(FFN, HIDDEN),
            at + "mlp.down_proj.weight": matrix(HIDDEN, FFN),
        }
    save_file(weights, folder / "model.safetensors")
    return folder


def sequence(name: str, num_prompt: int, max_tokens: int, temperature: float) -> SequenceSpec:
    source = np.random.default_rng(num_prompt)
    prompt = tuple(int(t) for t in source.integers(0, VOCAB, num_prompt))
    return SequenceSpec(name, prompt, SamplingParams(temperature=temperature, seed=num_prompt, max_tokens=max_tokens))


@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_split_equals_colocated(tmp_path: Path, model: Path, transport: str) -> None:
    settings = {
        "model": model,
        "load": load_model,
        "engine": EngineConfig(
            block_tokens=16, num_blocks=120, num_threads=1, scheduler=SchedulerConfig(max_batch_tokens=48)
        ),
        "transports": (transport,),
    }
    lengths = [1, 15, 16, 17, 47, 64, 100, 250]
    specs = [sequence(f"s{n}", n, 24, temperature) for n in lengths for temperature in (0.0,)]
    specs += [sequence(f"t{n}", n, 24, 1.0) for n in lengths]
    async with AsyncExitStack() as stack:
        p = await stack.enter_async_context(worker(tmp_path, "p0", Role.PREFILL, **settings))
        d = await stack.enter_async_context(worker(tmp_path, "d0", Role.DECODE, **settings))
        to_prefill = await stack.enter_async_context(session(p.address))
        to_decode = await stack.enter_async_context(session(d.address))
        await to_prefill.hello()
        await to_decode.hello()
        split = await Load(Pair(p, d, to_prefill, to_decode), specs, at_once=6).run()
        await p.until_ledger({})
        await d.until_ledger({})
        alone: dict[str, list[int]] = {}
        for spec in specs:
            again = SequenceSpec(f"{spec.sequence_id}/alone", spec.prompt_token_ids, spec.sampling)
            await to_prefill.run(again)
            async with asyncio.timeout(20):
                alone[spec.sequence_id] = await to_prefill.tokens()
        assert len({tuple(tokens) for tokens in split.values()}) == len(specs), "the model says different things"
        assert split == alone
        await p.until_ledger({})
